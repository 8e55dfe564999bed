"""Whatever `jax.jit` takes, `shield` takes: control flow, linear algebra, randomness."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.support.cases import KEY, LEGACY_KEY, Cases, S, W, X
from tests.support.steps import assert_close, offloaded_products, shield_all, uniform

CASES = Cases()
case = CASES.add


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


@pytest.mark.parametrize("name", CASES)
def test_shielded_equals_jitted(enclave, name):
    CASES.check(enclave, name)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_products_of_small_integers_are_exact_in_every_format(enclave, dtype):
    # Sums of a few products of -1, 0 and 1 have no rounding, so their order does not matter.
    x = jnp.round(uniform(5, 8, 12)).astype(dtype)
    w = jnp.round(uniform(6, 12, 8)).astype(dtype)

    def function(x, w):
        return jnp.matmul(x, w), lax.dot(x, w, preferred_element_type=jnp.float32)

    shielded = shield_all(function, enclave=enclave, donate=False)
    # A blinding would leave nothing of the digits of 8 bits.
    assert offloaded_products(shielded, x, w) == (0 if dtype == "float8_e4m3fn" else 2)
    assert_close(enclave.open(shielded(x, w)), jax.jit(function)(x, w), tolerance=0)


def test_values_without_a_key_stay_inside(enclave):
    # A scalar product of vectors would show its result, whatever the blinding of its operands.
    shielded = shield_all(lambda x, y: x @ y, enclave=enclave, donate=False)
    assert offloaded_products(shielded, X[0], X[1]) == 0
    report = str(shielded.explain(X[0], X[1]))
    assert "no axis of an operand or of the result can carry a key" in report
