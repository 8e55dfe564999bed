"""Whatever `jax.jit` takes, `shield` takes: control flow, linear algebra, randomness, odd values.

Each case is a small function with a product or two around what it is about, so that values
cross before and after it. It is compared with itself under `jit`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.extend import core as jex_core
from jax.interpreters import mlir

import tempo_jax as tempo
from tests.support.steps import assert_close, offloaded_products, shield_all, uniform

X = uniform(1, 8, 12)
W = uniform(2, 12, 8)
V = uniform(3, 8, 12)
S = X @ X.T + 8 * jnp.eye(8)
KEY = jax.random.key(7)
LEGACY_KEY = jax.random.PRNGKey(7)
qr: Any = jax.scipy.linalg.qr  # declared with every number of results

Case = tuple[Callable[..., Any], tuple[Any, ...]]
CASES: dict[str, Case] = {}


def case(*arguments: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds a function on these arguments to `CASES`."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        CASES[function.__name__] = (function, arguments)
        return function

    return add


# Control flow


@case(X, W)
def while_loop(x, w):
    y = jnp.tanh(x @ w)
    return lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, c[1] * 0.5 + y), (0, y))[1] @ w.T


@case(X, W)
def while_loop_around_a_product(x, w):
    return lax.while_loop(lambda c: jnp.sum(c**2) < 1e4, lambda c: c @ (w @ w.T) + c, x)


@case(X, W)
def while_loop_that_depends_on_a_product(x, w):
    y = x @ w
    return lax.while_loop(lambda c: jnp.abs(c).max() > 1, lambda c: c / 2, 9 * y) @ w.T


@case(X, W, True)
def cond_of_an_argument(x, w, flag):
    return lax.cond(flag, lambda y: jnp.sin(y @ w), lambda y: y[:, :8] * 2, x)


@case(X, W)
def cond_of_a_product(x, w):
    y = x @ w
    return lax.cond(y.sum() > 0, jnp.exp, jnp.negative, y) @ w.T


@case(X, W, 2)
def switch(x, w, index):
    return lax.switch(index, [jnp.sin, jnp.cos, jnp.tanh], x @ w)


@case(X, W)
def fori_loop(x, w):
    return lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w @ w.T) + i, x)


@case(X, W)
def fori_loop_longer_than_is_unrolled(x, w):
    return lax.fori_loop(0, 70, lambda i, c: jnp.tanh(c @ w @ w.T), x)


@case(X, W)
def nested_scan(x, w):
    def outer(c, row):
        inner = lax.scan(lambda d, i: (jnp.tanh(d @ w @ w.T) + i, d.sum()), c, jnp.arange(2.0))
        return inner[0] + row, inner[1]

    return lax.scan(outer, x, x[:3])


@case(X, W)
def reverse_scan_without_inputs(x, w):
    return lax.scan(lambda c, _: (jnp.tanh(c @ w @ w.T), c[0]), x, None, length=3, reverse=True)


@case(X, W)
def scan_of_length_zero(x, w):
    return lax.scan(lambda c, r: (c + (r @ w).sum(), r @ w), jnp.float64(0), x[:0])


@case(X, W)
def associative_scan(x, w):
    return lax.associative_scan(jnp.multiply, x @ w, axis=0)


@case(X, W)
def map_over_rows(x, w):
    return lax.map(lambda row: jnp.tanh(row @ w), x)


@case(X, W)
def custom_root(x, w):
    def solve(f, guess):
        return lax.fori_loop(0, 20, lambda _, g: g - f(g) / 3, guess)

    def root(t):
        return lax.custom_root(
            lambda y: y**3 + y - t, 0 * t, solve, lambda g, y: y / g(jnp.ones_like(y))
        )

    return jax.grad(lambda x: root(jnp.tanh(x @ w)).sum())(x)


# Data movement


@case(X, W)
def sort_and_argsort(x, w):
    y = x @ w
    return jnp.sort(y, axis=1), jnp.argsort(y, axis=0), lax.top_k(y, 3), jnp.argmax(y)


@case(X, W, jnp.array([5, 1, 1, 7]))
def gather_and_scatter(x, w, rows):
    y = (x @ w)[rows]
    return jnp.zeros((8, 8)).at[rows].add(y).at[0].set(1.0) @ w.T, jnp.take_along_axis(
        y, rows[:, None], 1
    )


@case(X, W, 3)
def dynamic_slices(x, w, start):
    y = lax.dynamic_slice(x @ w, (start, 0), (4, 8))
    return lax.dynamic_update_slice(x, y, (start, 2)) @ w


@case(X, W)
def cumulative(x, w):
    y = x @ w
    return jnp.cumsum(y, 1), jnp.cumprod(y, 0), lax.cummax(y), lax.cumlogsumexp(y) @ w.T


@case(X, W)
def layout_operations_around_products(x, w):
    y = (x @ w).reshape(2, 4, 8).transpose(2, 0, 1)[::-1]
    padded = jnp.pad(y, ((0, 0), (1, 1), (0, 0)))
    return jnp.concatenate([padded, padded], 2).reshape(8, -1) @ jnp.ones((32, 9))


@case(X, W)
def operations_on_zeros(x, w):
    zeros = jnp.zeros((8, 3))
    joined = jnp.concatenate([zeros, jnp.zeros((8, 9))], axis=1)
    padded = jnp.pad(jnp.zeros((6, 12)), ((1, 1), (0, 0)))
    return (x @ w) @ (joined + padded)[:, ::-1].T[:8], zeros


@case(X, W)
def cuts_and_windows(x, w):
    y = (x @ w)[None, None]
    pooled = lax.reduce_window(y, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    sums = functools.partial(
        lax.reduce_window,
        init_value=0.0,
        computation=lax.add,
        window_dimensions=(1, 1, 3, 3),
        window_strides=(1, 1, 1, 1),
        padding="SAME",
    )
    return pooled, jax.grad(lambda y: sums(y).sum())(y)


# Linear algebra


@case(S, X)
def factorizations(s, x):
    return (
        jnp.linalg.cholesky(s),
        jnp.linalg.qr(x)[1],
        jnp.linalg.svd(s @ x, compute_uv=False),
        jnp.linalg.eigh(s)[0],
        jnp.linalg.slogdet(s),
    )


@case(S, X)
def iterative_solver(s, x):
    def solution(s):
        return jax.scipy.sparse.linalg.cg(s, x[:, 0], maxiter=20)[0]

    return solution(s), jax.grad(lambda s: solution(s).sum())(s)


@case(S, X)
def solves(s, x):
    return (
        jnp.linalg.solve(s, x),
        jnp.linalg.inv(s) @ x,
        jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(s), x),
        jax.scipy.linalg.solve_triangular(s, x, lower=True),
    )


@case(S)
def unsymmetric_eigenvalues(s):
    values = jnp.linalg.eigvals(s + jnp.triu(s))
    return jnp.sort(values.real), jax.scipy.linalg.expm(s / 20)


@case(S)
def gradient_of_a_factorization(s):
    return jax.grad(lambda s: jnp.linalg.cholesky(s @ s).sum())(s)


@case(X)
def fourier_transform(x):
    return jnp.fft.rfft(x), jnp.fft.ifft(jnp.fft.fft(x, axis=0)).real


@case(X, W)
def other_products(x, w):
    ragged = lax.ragged_dot(x, jnp.stack([w, 2 * w]), jnp.array([3, 5]))
    heads = x.reshape(2, 4, 3, 4)
    attended = jax.nn.dot_product_attention(heads, heads, heads, is_causal=True)
    return ragged, attended, lax.batch_matmul(heads, heads.swapaxes(2, 3))


@case(X, W)
def complex_products(x, w):
    return (x + 1j * x) @ w.astype(complex)


# Random numbers


@case(KEY, X, W)
def typed_key(key, x, w):
    first, second = jax.random.split(key)
    y = jnp.where(jax.random.bernoulli(first, 0.5, (8, 8)), x @ w, 0.0)
    return second, y @ jax.random.normal(first, (8, 3)), jax.random.key_data(key)


@case(LEGACY_KEY, X, W)
def legacy_key(key, x, w):
    key, use = jax.random.split(key)
    return key, (x @ w) * jax.random.uniform(use, (8, 8))


@case(KEY, X, W)
def typed_key_in_later_segments(key, x, w):
    keys = jax.random.split(key, 3)
    y = jnp.tanh(x @ w)
    folded = jax.random.fold_in(keys[1], (10 * jnp.abs(y).sum()).astype(int))
    z = lax.cond(
        y.sum() > 0,
        lambda k: jax.random.normal(k, (8, 8)),
        lambda k: jax.random.uniform(k, (8, 8)),
        keys[2],
    )
    return folded, z @ w.T


@case(jax.random.split(KEY, 4), X, W)
def mapped_keys(keys, x, w):
    draw = jax.vmap(lambda k: jax.random.permutation(k, 8))(keys)
    return draw, keys[1:], (x @ w)[draw[0]]


@case(jax.random.key(1, impl="rbg"), X, W)
def keys_of_another_kind(key, x, w):
    return jax.random.clone(key), (x @ w) + jax.random.normal(key, (8, 8))


@case(X, W)
def key_made_inside(x, w):
    key = jax.random.key(3)
    return key, jax.random.categorical(key, x @ w)


@case(KEY, X)
def carried_key(key, x):
    def body(k, row):
        k, use = jax.random.split(k)
        return k, row @ x.T + jax.random.normal(use, (8,))

    return lax.scan(body, key, x)


# Kinds of values


@case(jnp.arange(64).reshape(8, 8), jnp.arange(8) % 2 == 0)
def integers_and_booleans(n, flags):
    return n @ n, (n // 3) ^ 5, flags & ~flags, jnp.where(flags, n, -n), lax.population_count(n)


@case(X[:0], W, X[:, :0], W[:0])
def empty_arrays(none, w, narrow, flat):
    return none @ w, narrow @ flat, jnp.concatenate([none @ w, jnp.ones((1, 8))]), none.sum()


@case(X[:1], W[:, :1], X[0], W[:, 0])
def arrays_of_size_one(row, column, x, w):
    return row @ column, x @ w, jnp.outer(x, w), (row * column.T).reshape(3, 4)


@case(jnp.float64(2.0), 3.0, 4, True, 1 + 2j)
def scalars(a, b, c, d, e):
    return a * b + c, jnp.where(d, a, b), e * a, c // 3, d


@case(np.float32(2), np.ones((8, 12), np.float32), np.arange(3, dtype=np.int8))
def numpy_values(a, x, n):
    return a * x @ x.T, n * 2


@case({"a": [X, None], "b": ()}, None)
def missing_leaves(tree, nothing):
    assert nothing is None
    return {"a": [tree["a"][0] @ tree["a"][0].T, None], "b": (), "c": None}


@case(X, W)
def literal_and_repeated_outputs(x, w):
    y = x @ w
    return x, x, y, y, 1, 2.5, True, jnp.zeros(3), jnp.float32(1), np.arange(3)


@case(X, W)
def nothing_is_used(x, w):
    return ()


@case()
def no_arguments():
    return jnp.arange(3), jax.random.normal(jax.random.key(0), (4,))


@case(X, W)
def constant_operands(x, w):
    return x @ jnp.eye(12), jnp.ones((8, 8)) @ x, jnp.zeros((8, 8)) @ (x @ w), x @ np.ones((12, 2))


@case(X, W)
def closed_over_values(x, w):
    return (x @ w) @ V + S[0, 0], jax.random.normal(KEY, (2,)), LEGACY_KEY, KEY


# Transformations


@case(X, W)
def revealed_values(x, w):
    y = tempo.reveal(x @ w)
    return y, y + 1, tempo.reveal({"again": y, "number": 3}), tempo.reveal(KEY), tempo.reveal(x)


@case(X, W)
def nested_jit(x, w):
    inner = jax.jit(functools.partial(jnp.matmul, x))
    return jax.jit(lambda y: jax.jit(jnp.tanh)(y) @ w.T)(inner(w))


@case(uniform(4, 3, 8, 12), W)
def vmap_of_grad(xs, w):
    return jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(x @ w) ** 2)))(xs)


@case(X[0], W)
def second_derivatives(x, w):
    return jax.hessian(lambda x: jnp.sum(jnp.tanh(x @ w) ** 3))(x)


@case(X, W)
def forward_and_reverse(x, w):
    _, tangent = jax.jvp(lambda w: jnp.exp(x @ w / 9), (w,), (w,))
    return tangent, jax.linearize(lambda w: jnp.tanh(x @ w), w)[1](w), jax.jacfwd(jnp.sin)(x[0])


@case(X, W)
def mapped_axis_names(x, w):
    def row(r):
        return r @ w - lax.pmean(r @ w, "rows") + lax.axis_index("rows")

    return jax.vmap(row, axis_name="rows")(x)


@case(X, W)
def custom_rules(x, w):
    @jax.custom_jvp
    def twice(y):
        return 2 * y

    twice.defjvp(lambda primals, tangents: (twice(*primals), tangents[0] * 3))

    @jax.custom_gradient
    def halved(y):
        return y / 2, lambda ct: ct * 5

    linear = jax.custom_derivatives.linear_call(
        lambda w, x: x @ w, lambda w, ct: ct @ w.T, w, jnp.tanh(x)
    )
    return jax.grad(lambda x: jnp.sum(twice(halved(x @ w)) ** 2))(x), linear


@case(X, W)
def barrier(x, w):
    y, z = lax.optimization_barrier((x @ w, x))
    return jnp.tanh(y) @ w.T + z


@case(X, W)
def sharding_hints(x, w):
    return jax.device_put(x @ w) @ lax.stop_gradient(w).T


@case(X, W)
def printing(x, w):
    y = x @ w
    jax.debug.print("secret {}", y.sum())
    return jnp.tanh(y) @ w.T


@case(X, W)
def printing_in_loops(x, w):
    def body(c):
        jax.debug.print("secret {}", c.sum())
        return lax.cond(c.sum() > 0, printed, printed, c / 2)

    def printed(c):
        jax.debug.print("also secret {}", c.sum())
        return c

    return lax.while_loop(lambda c: jnp.abs(c).max() > 1, body, 9 * (x @ w))


@case(X, W)
def mutable_references(x, w):
    ref, total = jax.new_ref(x @ w), jax.new_ref(jnp.zeros((8, 8)))
    ref[0, 0] = 1.0
    ref[...] += 2.0

    def add(i, carry):
        total[...] += jnp.tanh(ref[...]) * i
        return carry

    lax.fori_loop(0, 3, add, 0.0)
    return ref[...] @ w.T, total[...]


@case(X, W)
def precision_and_formats(x, w):
    low = lax.dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=float)
    with jax.default_matmul_precision("float32"):
        return low, x @ w, lax.reduce_precision(x, 5, 2), x.astype(jnp.float8_e4m3fn).astype(float)


@case(X, S)
def lapack_without_a_guarantee(x, s):
    q, r, order = qr(s @ x, pivoting=True)
    product, triangle = jax.scipy.linalg.qr_multiply(s, x.T @ s, "right")
    algorithm = lax.linalg.SvdAlgorithm.QR
    values = lax.linalg.svd(s @ x, compute_uv=False, algorithm=algorithm)
    return q @ r, order, product, triangle, values


@case(S)
def complex_lapack_without_a_guarantee(s):
    z = s + 1j * jnp.triu(s)
    q, r, _ = qr(z, pivoting=True)
    algorithm = lax.linalg.SvdAlgorithm.QR
    product, _ = jax.scipy.linalg.qr_multiply(z, z, "right")
    return q @ r, product, lax.linalg.svd(z, compute_uv=False, algorithm=algorithm)


@pytest.mark.parametrize("name", CASES)
def test_shielded_equals_jitted(enclave, name):
    function, arguments = CASES[name]
    expected = jax.jit(function)(*arguments)
    shielded = shield_all(function, enclave=enclave, donate=False)
    assert_close(enclave.open(shielded(*arguments)), expected)


def test_keyword_arguments(enclave):
    def function(x, w, *, scale=2.0, bias=None):
        return (x @ w) * scale if bias is None else x @ w + bias

    shielded = shield_all(function, enclave=enclave, donate=False)
    assert_close(enclave.open(shielded(X, w=W, scale=3)), function(X, W, scale=3))
    assert_close(enclave.open(shielded(X, W, bias=X[:, :8])), function(X, W, bias=X[:, :8]))


def test_methods_and_partial_functions(enclave):
    class Layer:
        weights = W

        def apply(self, x):
            return x @ self.weights

    bound = shield_all(Layer().apply, enclave=enclave, donate=False)
    partial = shield_all(functools.partial(jnp.matmul, X), enclave=enclave)
    assert_close(enclave.open(bound(X)), X @ W)
    assert_close(enclave.open(partial(W)), X @ W)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_products_of_small_integers_are_exact_in_every_format(enclave, dtype):
    # Sums of a few products of -1, 0 and 1 have no rounding, so their order does not matter.
    x = jnp.round(uniform(5, 8, 12)).astype(dtype)
    w = jnp.round(uniform(6, 12, 8)).astype(dtype)

    def function(x, w):
        return jnp.matmul(x, w), lax.dot(x, w, preferred_element_type=jnp.float32)

    shielded = shield_all(function, enclave=enclave, donate=False)
    assert offloaded_products(shielded, x, w) == 2
    assert_close(enclave.open(shielded(x, w)), jax.jit(function)(x, w), tolerance=0)


def test_debugging_callbacks_are_left_out_with_a_note(enclave, capfd):
    function, arguments = CASES["printing_in_loops"]
    shielded = shield_all(function, enclave=enclave, donate=False)
    shielded(*arguments)
    jax.effects_barrier()
    assert "secret" not in capfd.readouterr().out
    assert str(shielded.explain(*arguments)).count("is left out") == 3


@pytest.mark.parametrize("ordered", [False, True])
def test_io_callbacks_without_results_are_left_out_like_debugging(enclave, ordered):
    seen = []

    def show(c):
        io_callback(lambda value: seen.append(value), None, c.sum(), ordered=ordered)

    def function(x, w):
        def body(c, _):
            show(c)
            return jnp.tanh(c), c.sum()

        show(x)
        return lax.scan(body, x @ w, length=3)

    shielded = shield_all(function, enclave=enclave, donate=False)
    result = enclave.open(shielded(X, W))
    jax.effects_barrier()
    assert not seen
    assert str(shielded.explain(X, W)).count("`io_callback` at") == 2
    assert_close(result, jax.jit(function)(X, W))


def _like_equinox(x: Any, failed: jax.Array) -> Any:
    """What `equinox.error_if` traces to."""

    def raises(_: Any) -> Any:
        raise RuntimeError

    raises.__module__ = "equinox._errors"
    return lax.cond(failed, lambda: jax.pure_callback(raises, x, failed), lambda: x)


def _equinox(x: Any, failed: jax.Array) -> Any:
    equinox = pytest.importorskip("equinox", reason="equinox is not installed")
    return equinox.error_if(x, failed, "too large")


@pytest.mark.parametrize("check", [_like_equinox, _equinox])
def test_failed_checks_give_nan_and_others_nothing(enclave, check):
    def function(x, w):
        def body(c, _):
            return check((jnp.tanh(c[0]), c[1] + 1), jnp.abs(c[0]).max() > 50), None

        start = check(x @ w, jnp.abs(x).max() > 100)
        return start, lax.scan(body, (start, 0), length=100)[0]

    shielded = shield_all(function, enclave=enclave, donate=False)
    assert_close(enclave.open(shielded(X, W)), jax.jit(function)(X, W))
    assert "become NaN" in str(shielded.explain(X, W))
    first, (last, _) = enclave.open(shielded(1e3 * X, W))
    assert np.isnan(first).all() and np.isnan(last).all()
    # A failure within the loop alone.
    first, (last, _) = enclave.open(shielded(90 * X / jnp.abs(X).max(), W))
    assert np.isfinite(first).all() and np.isnan(last).all()


def _solved(x: Any, s: Any) -> Any:
    return linear_solve_p.bind(x, s)[0]


def _solve(x: Any, s: Any) -> list[Any]:
    return [jnp.linalg.solve(s, _like_equinox(x, jnp.abs(x).max() > 100))]


_solve.__module__ = "lineax._solve"
linear_solve_p = jex_core.Primitive("linear_solve")
linear_solve_p.multiple_results = True
linear_solve_p.def_impl(_solve)
linear_solve_p.def_abstract_eval(lambda x, s: [x])
mlir.register_lowering(linear_solve_p, mlir.lower_fun(_solve, multiple_results=True))


def _lineax(x: Any, s: Any) -> Any:
    lineax = pytest.importorskip("lineax", reason="lineax is not installed")

    def loss(s: Any) -> Any:
        return lineax.linear_solve(lineax.MatrixLinearOperator(s), x[:, 0]).value.sum()

    return jax.grad(loss)(s)


@pytest.mark.parametrize("solve", [_solved, _lineax])
def test_checks_that_a_lowering_makes_are_computed_inside(enclave, solve):
    shielded = shield_all(solve, enclave=enclave, donate=False)
    assert_close(enclave.open(shielded(X, S)), jax.jit(solve)(X, S))


def test_check_that_could_not_show_its_failure_is_refused(enclave):
    shielded = tempo.shield(lambda x: _like_equinox(jnp.int32(3), x[0, 0] > 1), enclave=enclave)
    with pytest.raises(tempo.errors.UnsupportedError, match="A check that raises may give NaN"):
        shielded(X)


def test_values_without_a_key_stay_inside(enclave):
    # A scalar product of vectors would show its result, whatever the blinding of its operands.
    shielded = shield_all(lambda x, y: x @ y, enclave=enclave, donate=False)
    assert offloaded_products(shielded, X[0], X[1]) == 0
    report = str(shielded.explain(X[0], X[1]))
    assert "no axis of an operand or of the result can carry a key" in report
