"""Shielded steps inside `scan`, `fori_loop`, `while_loop` and `cond`, on state of every form."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh

import tempo_jax as tempo
from tempo_jax.errors import SealedValueError
from tempo_jax.schemes import Mixing, Orthogonal, Scheme, SignedPermutation, Tempo
from tests.support.fresh import run_fresh

ROWS, WIDTH = 256, 64
OPTIMIZER = tempo.cheap_update(optax.sgd(0.05, momentum=0.9))
KEY = tempo.CheckpointKey.generate()
KEPT = SignedPermutation()  # keeps weights on the devices

Step = Callable[..., Any]


def loss_of(params: Any, x: jax.Array) -> jax.Array:
    return jnp.square(jnp.tanh(x @ params["kernel"]) + params["bias"]).mean()


def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    """Momentum on one layer; its loss is revealed."""
    loss, gradients = jax.value_and_grad(loss_of)(state[0], x)
    updates, moments = OPTIMIZER.update(gradients, state[1], state[0])
    return (optax.apply_updates(state[0], updates), moments), tempo.reveal(loss)


def initial() -> Any:
    kernel = np.random.default_rng(0).normal(0, WIDTH**-0.5, (WIDTH, WIDTH))
    params = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.full(WIDTH, 0.1)}
    return params, OPTIMIZER.init(params)


def batch() -> jax.Array:
    x = np.random.default_rng(1).standard_normal((ROWS, WIDTH))
    return jnp.asarray(x, jnp.float32)


def check(found: Any, steps: int) -> None:
    """The opened state is the one that plain JAX reaches in as many steps."""
    plain = initial()
    for _ in range(steps):
        plain, _ = jax.jit(step)(plain, batch())
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def every_loop(train: Step, state: Any, x: Any) -> Any:
    """Seven steps in the four ways that JAX has."""
    state, _ = lax.scan(lambda s, _: train(s, x), state, None, length=3)
    state = lax.fori_loop(0, 1, lambda _, s: train(s, x)[0], state)
    _, state = lax.while_loop(
        lambda carry: carry[0] < 2,
        lambda carry: (carry[0] + 1, train(carry[1], x)[0]),
        (0, state),
    )

    def once(i: Any, state: Any) -> Any:
        return lax.cond(i < 1, lambda s: train(s, x)[0], lambda s: s, state)

    return lax.fori_loop(0, 2, once, state)


def forms(state: Any) -> set[str]:
    return {leaf.form for leaf in jax.tree.leaves(state, is_leaf=tempo.is_sealed)}


def loops(
    schemes: Sequence[Scheme], donate: Sequence[bool] = (True, False), verify: bool = False
) -> None:
    with tempo.Enclave.launch(checkpoint_key=KEY) as enclave:
        x = enclave.seal(batch())
        for scheme in schemes:
            for donated in donate:
                train = tempo.shield(
                    step,
                    enclave=enclave,
                    scheme=scheme,
                    offload="all",
                    verify=verify,
                    donate=donated,
                )
                for start in ("sealed", "returned", "restored"):
                    state, before = enclave.seal(initial()), 0
                    if start != "sealed":
                        (state, _), before = train(state, x), 1
                    if start == "restored":
                        state = enclave.restore(enclave.checkpoint(state), like=initial())
                    went = every_loop(train, state, x)
                    check(enclave.open(went), before + 7)
                    again = jax.jit(every_loop, static_argnums=0)(train, went, x)
                    if not donated:
                        check(enclave.open((state, went)[0]), before)
                    found = forms(again)
                    after, _ = train(again, x)
                    assert found == forms(after)
                    restored = enclave.restore(enclave.checkpoint(after), like=initial())
                    check(enclave.open(restored), before + 15)


def over_a_mesh() -> None:
    mesh = Mesh(np.array(jax.devices()), ("workers",))
    with tempo.Enclave.launch() as enclave:
        x = enclave.seal(batch())
        train = tempo.shield(step, enclave=enclave, scheme=KEPT, offload="all", mesh=mesh)
        check(enclave.open(every_loop(train, enclave.seal(initial()), x)), 7)


def weights_on_the_devices() -> None:
    loops((KEPT,), donate=(True,))


def every_scheme() -> None:
    loops((Mixing(), Orthogonal(budget=4), Tempo(), KEPT))


def verified() -> None:
    loops((Mixing(), KEPT), donate=(True,), verify=True)


def looked_at(train: Step, evaluate: Step, x: Any, keep: bool) -> Step:
    """Three steps with an evaluation before each, which may keep every state as well."""

    def body(state: Any, _: Any) -> Any:
        loss = evaluate(state, x)
        after, same = train(state, x)
        return after, (loss, same, state if keep else ())

    return lambda state: lax.scan(body, state, None, length=3)


def state_that_is_used_twice() -> None:
    """An intermediate state lives on until it is donated, also when several functions use it."""
    with tempo.Enclave.launch() as enclave:
        x = enclave.seal(batch())
        for scheme in (Mixing(), KEPT):
            options: Any = {"enclave": enclave, "scheme": scheme, "offload": "all"}
            evaluate = tempo.shield(lambda s, x: tempo.reveal(loss_of(s[0], x)), **options)
            for donate in (True, False):
                train = tempo.shield(step, donate=donate, **options)

                state, (losses, same, states) = looked_at(train, evaluate, x, not donate)(
                    enclave.seal(initial())
                )
                np.testing.assert_allclose(losses, same, rtol=1e-5)
                check(enclave.open(state), 3)
                if donate:
                    assert enclave.statistics()["handles"] == len(jax.tree.leaves(initial()))
                else:  # what scan has stacked are states as well
                    for i in range(3):
                        check(enclave.open(jax.tree.map(lambda s, i=i: s[i], states)), i)


def old_ciphertext_is_not_taken_for_the_state() -> None:
    """A freshly sealed state that went through a loop still carries what it was sealed with."""
    with tempo.Enclave.launch() as enclave:
        x = enclave.seal(batch())
        train = tempo.shield(step, enclave=enclave, scheme=KEPT, offload="all")
        state, _ = lax.scan(lambda s, _: train(s, x), enclave.seal(initial()), None, length=2)
        copied = jax.tree.map(lambda s: s, state)
        train(state, x)
        for use in (enclave.open, lambda s: train(s, x), lambda s: jax.jit(train)(s, x)):
            with pytest.raises(Exception, match="donated|deleted"):
                jax.block_until_ready(use(copied))
        with pytest.raises(SealedValueError, match="donated"):
            enclave.open(state)


def weak_types() -> None:
    """What enters weakly typed and comes back strongly does so in a loop."""
    with tempo.Enclave.launch() as enclave:
        halve = tempo.shield(lambda s: {"x": s["x"] * jnp.float32(0.5)}, enclave=enclave)
        state = lax.fori_loop(0, 3, lambda _, s: halve(s), enclave.seal({"x": 1.0}))
        assert not state["x"].weak_type
        opened = enclave.open(state)["x"]
        assert float(opened) == 0.125 and not opened.weak_type


def as_long_as_what_is_revealed_says() -> None:
    """The body of a loop and the branches of a `cond` on a predicate that the host may know."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(0, 0.05, (128, 128)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(256, 128)), jnp.float32)

    def shrink(x: Any, w: Any) -> Any:
        y = x @ w
        return y, tempo.reveal(jnp.abs(y).max() > 0.1)

    def loop(f: Callable[..., Any], x: Any, w: Any) -> Any:
        def body(c: Any) -> Any:
            return (c[0] + 1, *f(c[1], w))

        return lax.while_loop(lambda c: c[2], body, (0, x, True))

    count, y, _ = loop(shrink, x, w)
    with tempo.Enclave.launch() as enclave:
        for scheme in (Mixing(), KEPT):
            options: Any = {"enclave": enclave, "scheme": scheme, "offload": "all"}
            shielded = tempo.shield(shrink, donate=False, **options)
            sealed = enclave.seal((x, w))
            found, last, _ = jax.jit(lambda x, w, f=shielded: loop(f, x, w))(*sealed)
            assert found == count and count > 3
            np.testing.assert_allclose(enclave.open(last), y, rtol=1e-3, atol=1e-4)
            # The host computes as many iterations as are needed, and no more.
            assert shielded.traffic(*sealed).runs == count

            twice = tempo.shield(lambda x: 2 * x, donate=False, **options)
            halve = tempo.shield(lambda x: x / 2, donate=False, **options)
            for which, factor in ((True, 2), (False, 0.5)):
                taken = jax.jit(lambda p, x, t=twice, h=halve: lax.cond(p, t, h, x))
                result = enclave.open(taken(which, sealed[0]))
                np.testing.assert_allclose(result, factor * x, rtol=1e-6)


@pytest.mark.parametrize(
    ("programs", "devices"),
    [
        (
            (
                weights_on_the_devices,
                state_that_is_used_twice,
                old_ciphertext_is_not_taken_for_the_state,
                weak_types,
                as_long_as_what_is_revealed_says,
            ),
            1,
        ),
        pytest.param((over_a_mesh,), 2, marks=pytest.mark.slow),
        pytest.param((every_scheme, verified), 1, marks=pytest.mark.slow),
    ],
    ids=["loops", "mesh", "every scheme"],
)
def test_loops(programs, devices):
    run_fresh(*programs, devices=devices)
