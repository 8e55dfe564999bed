"""Whatever `jax.jit` takes, `shield` takes: odd values, transformations, and how it is called."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import tempo_jax as tempo
from tests.support.cases import KEY, LEGACY_KEY, Cases, S, V, W, X, qr
from tests.support.steps import assert_close, shield_all, uniform

CASES = Cases()
case = CASES.add


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
    CASES.check(enclave, name)


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


def test_debugging_callbacks_are_left_out_with_a_note(enclave, capfd):
    function, arguments = CASES["printing_in_loops"]
    shielded = shield_all(function, enclave=enclave, donate=False)
    shielded(*arguments)
    jax.effects_barrier()
    assert "secret" not in capfd.readouterr().out
    assert str(shielded.explain(*arguments)).count("is left out") == 3
