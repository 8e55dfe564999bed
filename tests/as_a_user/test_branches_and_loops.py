"""Products inside `cond`, `switch` and `while_loop` as a user's program has them: sent out, exact.

Whichever branch is taken and however often a loop runs, results are the plain step's, and the host
sees as many products of as many bytes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import tempo_jax as tempo
from tempo_jax.schemes import Mixing, Orthogonal, SignedPermutation, Tempo
from tempo_jax.testing import host_view
from tests.support.fresh import run_fresh

ROWS, WIDTH = 256, 64
SCHEMES = (Mixing(), SignedPermutation(), Orthogonal(budget=4), Tempo())


def _weights() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(rng.normal(0, WIDTH**-0.5, (WIDTH, WIDTH))) for n in "abcd"}


def _x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, WIDTH)))


def _sgd(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """A step of gradient descent; its loss is revealed."""

    def step(p: Any, *batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(p, *batch)
        return jax.tree.map(lambda w, g: w - 0.1 * g, p, grads), tempo.reveal(value)

    return step


def _shielded(step: Any, enclave: Any, scheme: Any, **options: Any) -> Any:
    return tempo.shield(
        step, enclave=enclave, scheme=scheme, offload="all", donate=False, **options
    )


def _compare(shielded: Any, step: Any, *arguments: Any) -> list[tuple[Any, ...]]:
    """Checks a call against the plain step; returns what kinds of products the host saw."""
    with host_view() as view:
        found = shielded(*arguments)
    plain = jax.jit(step)(*arguments)
    ours = jax.tree.map(
        lambda y: shielded._enclave.open(y) if tempo.is_sealed(y) else y,
        found,
        is_leaf=tempo.is_sealed,
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    for product in view.products:
        for operand in product.operands:
            # Zeros would stand for what a branch that is not taken leaves out.
            assert np.all(np.isfinite(operand)) <= np.any(operand)
    return [(p.primitive, *(o.shape for o in p.operands)) for p in view.products]


def _in_double() -> None:
    jax.config.update("jax_enable_x64", True)


def switched(p: Any, x: jax.Array, i: jax.Array) -> jax.Array:
    branches = [
        lambda h: jnp.tanh(h @ p["b"]) @ p["c"],
        lambda h: jnp.sin(h @ p["d"]),
        lambda h: 2 * h,
    ]
    h = lax.switch(i, branches, jnp.tanh(x @ p["a"]))
    return jnp.square(h @ p["a"]).mean()


def every_branch_of_a_switch() -> None:
    _in_double()
    step = _sgd(switched)
    with tempo.Enclave.launch() as enclave:
        for scheme in SCHEMES:
            shielded = _shielded(step, enclave, scheme)
            seen = [_compare(shielded, step, _weights(), _x(), i) for i in (0, 1, 2, -5, 9)]
            assert all(products == seen[0] for products in seen) and len(seen[0]) > 8
            report = shielded.explain(_weights(), _x(), 0)
            assert "cond" not in "".join(report.plan.notes)


def recurrent(p: Any, x: jax.Array, skip: jax.Array) -> jax.Array:
    """Layers that are skipped at random, as in stochastic depth."""

    def layer(h: jax.Array, skipped: jax.Array) -> tuple[jax.Array, jax.Array]:
        apply = jax.checkpoint(lambda h: h + jnp.tanh(h @ p["a"]) @ p["b"])
        h = lax.cond(skipped, lambda h: h, apply, h)
        return h, jnp.square(h).mean()

    h, sizes = lax.scan(layer, x, skip)
    return jnp.square(h @ p["c"]).mean() + sizes.mean()


def conditions_in_a_scan() -> None:
    _in_double()
    step = _sgd(recurrent)
    flags = [jnp.array(f) for f in ([True] * 4, [False] * 4, [True, False, False, True])]
    with tempo.Enclave.launch() as enclave:
        for scheme in SCHEMES:
            shielded = _shielded(step, enclave, scheme)
            seen = [_compare(shielded, step, _weights(), _x(), f) for f in flags]
            assert all(products == seen[0] for products in seen) and len(seen[0]) > 16


def guarded(p: Any, x: jax.Array, ok: jax.Array) -> jax.Array:
    """A branch that would give NaN and infinities, in its value and its gradient."""

    def good(h: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.abs(h @ p["b"]) + 1) @ p["b"]

    def bad(h: jax.Array) -> jax.Array:
        wild = jnp.log(-jnp.abs(h @ p["c"])) + 1 / (0 * h)
        return jnp.sqrt(wild @ p["c"]) @ p["d"]

    h = x @ p["a"]
    return jnp.square(jnp.tanh(lax.cond(ok, good, bad, h)) @ p["a"]).mean()


def nan_in_the_branch_not_taken() -> None:
    _in_double()
    step = _sgd(guarded)
    with tempo.Enclave.launch() as enclave:
        for scheme in SCHEMES:
            _compare(_shielded(step, enclave, scheme), step, _weights(), _x(), True)


def endless(p: Any, x: jax.Array, ok: jax.Array) -> jax.Array:
    def fine(h: jax.Array) -> jax.Array:
        return h @ p["b"]

    def never_ends(h: jax.Array) -> jax.Array:
        jax.debug.callback(lambda _: print("EFFECT"), h[0, 0])
        h = h @ p["c"]
        key = jax.random.key(0)
        h, key = lax.while_loop(
            lambda _: True, lambda c: (c[0] + 1, jax.random.split(c[1])[0]), (h, key)
        )
        return h @ p["d"] + jax.random.normal(key, h.shape)

    return tempo.reveal(lax.cond(ok, fine, never_ends, x @ p["a"]))


def what_never_ends_is_not_run() -> None:
    _in_double()
    with tempo.Enclave.launch() as enclave:
        for unroll_while in (0, 2):
            shielded = _shielded(endless, enclave, SCHEMES[1], unroll_while=unroll_while)
            assert len(_compare(shielded, endless, _weights(), _x(), True)) >= 4


def solved(p: Any, x: jax.Array, most: jax.Array) -> jax.Array:
    """Conjugate gradients on several right-hand sides; past convergence they divide 0 by 0."""
    matrix = p["a"] @ p["a"].T + jnp.eye(WIDTH)

    def body(c: Any) -> Any:
        n, y, r, d, rr = c
        ad = d @ matrix
        alpha = rr / (d * ad).sum(-1, keepdims=True)
        y, r = y + alpha * d, r - alpha * ad
        new = (r * r).sum(-1, keepdims=True)
        return n + 1, y, r, r + new / rr * d, new

    start = (0, jnp.zeros_like(x), x, x, (x * x).sum(-1, keepdims=True))
    n, y, *_ = lax.while_loop(lambda c: (c[0] < most) & (c[4].max() > 1e-24), body, start)
    return tempo.reveal(y + n)


def loops_of_any_length() -> None:
    _in_double()
    with tempo.Enclave.launch() as enclave:
        for scheme in SCHEMES:
            shielded = _shielded(solved, enclave, scheme, unroll_while=4)
            seen = [_compare(shielded, solved, _weights(), _x(), n) for n in (0, 1, 4, 6)]
            assert all(products == seen[0] for products in seen) and len(seen[0]) >= 2
            # Solved at once: everything after the first iteration is 0/0.
            shielded(_weights() | {"a": jnp.zeros((WIDTH, WIDTH))}, _x(), 9)


def each_its_own(p: Any, x: jax.Array, limits: jax.Array) -> jax.Array:
    """A loop for each of a batch, which `vmap` makes one of with a predicate for each."""

    def one(x: jax.Array, limit: jax.Array) -> jax.Array:
        def body(c: Any) -> Any:
            return c[0] + 1, jnp.tanh(c[1] @ p["a"])

        return lax.while_loop(lambda c: c[0] < limit, body, (0, x))[1]

    return tempo.reveal(jax.vmap(one)(x.reshape(4, -1, WIDTH), limits))


def loops_of_several_lengths() -> None:
    _in_double()
    with tempo.Enclave.launch() as enclave:
        shielded = _shielded(each_its_own, enclave, SCHEMES[1], unroll_while=3)
        for limits in ([0, 1, 2, 3], [5, 0, 3, 3]):
            _compare(shielded, each_its_own, _weights(), _x(), jnp.array(limits))


def nothing_repeats_after_the_end() -> None:
    """The host cannot tell by repeated operands that a loop had ended."""
    _in_double()

    def decode(p: Any, x: jax.Array, limit: jax.Array) -> jax.Array:
        def body(c: Any) -> Any:
            return c[0] + 1, jnp.tanh(c[1] @ p["a"] + x)

        return tempo.reveal(lax.while_loop(lambda c: c[0] < limit, body, (0, x))[1])

    with tempo.Enclave.launch() as enclave:
        shielded = _shielded(decode, enclave, SCHEMES[1], unroll_while=5)
        with host_view() as view:
            shielded(_weights(), _x(), 1)
        sizes = [np.sort(np.linalg.norm(p.operands[0], axis=1)) for p in view.products]
        assert len(sizes) == 5
        for a, b in zip(sizes, sizes[1:], strict=False):
            assert np.abs(a - b).max() > 1e-3


def test_switch():
    run_fresh(every_branch_of_a_switch)


@pytest.mark.slow
def test_conditions_in_a_scan():
    run_fresh(conditions_in_a_scan)


def test_what_is_not_taken_does_not_happen():
    said = run_fresh(nan_in_the_branch_not_taken, what_never_ends_is_not_run)
    assert "EFFECT" not in said


@pytest.mark.slow
def test_while_loops():
    run_fresh(loops_of_any_length, loops_of_several_lengths, nothing_repeats_after_the_end)
