"""Static arguments: what `jax.jit` and `equinox.filter_jit` take, `shield` takes alike."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tempo_jax as tempo
from tempo_jax.errors import StaticArgumentError, UnsupportedError
from tests.support.fresh import run_fresh

ROWS, WIDTH = 512, 128


def data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, WIDTH**-0.5, shape), jnp.float32)


def step(state, x, depth, *, activation="gelu", scale=1.0):
    """Gradient descent through `depth` layers that share a weight."""

    def loss_of(w):
        h = x
        for _ in range(depth):
            h = getattr(jax.nn, activation)(h @ w)
        return scale * jnp.mean(h**2)

    loss, gradient = jax.value_and_grad(loss_of)(state["w"])
    return {"w": state["w"] - 0.1 * gradient}, tempo.reveal(loss)


def check(found, expected):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def given_to_shield() -> None:
    state, x = {"w": data(WIDTH, WIDTH)}, data(ROWS, WIDTH, seed=1)
    calls: list[Any] = [
        ((2,), {}),
        ((3,), {"activation": "tanh"}),
        ((2,), {}),
        ((), {"depth": 2, "activation": "gelu"}),
    ]
    with tempo.Enclave.launch() as enclave:
        both: list[Any] = [
            {"static_argnums": 2, "static_argnames": ("depth", "activation")},
            {"static_argnames": ["depth", "activation"]},
        ]
        for options in both:
            shielded = tempo.shield(step, enclave=enclave, offload="all", **options)
            for args, kwargs in calls:
                new, loss = shielded(enclave.seal(state), x, *args, **kwargs)
                plain = jax.jit(step, **options)(state, x, *args, **kwargs)
                check((enclave.open(new), loss), plain)
        assert "offloaded" not in str(shielded.explain(state, x, 2))
        shielded = tempo.shield(step, enclave=enclave, offload="all", static_argnums=2)
        shallow, deep = (shielded.explain(state, x, n).offloaded_work[1] for n in (1, 3))
        assert deep > 2 * shallow


def of_a_wrapped_jit() -> None:
    state, x = {"w": data(WIDTH, WIDTH)}, data(ROWS, WIDTH, seed=1)

    class Trainer:
        def __init__(self, depth):
            self.depth = depth

        @functools.partial(jax.jit, static_argnums=(0, 3))
        def step(self, state, x, activation):
            return step(state, x, self.depth, activation=activation)

    jitted = jax.jit(step, static_argnames=("depth", "activation"))
    trainer = Trainer(2)
    functions: list[Any] = [
        (jitted, (2,)),
        (functools.partial(jitted, depth=2), ()),
        (trainer.step, ("gelu",)),
    ]
    with tempo.Enclave.launch() as enclave:
        for function, more in functions:
            shielded: Any = tempo.shield(function, enclave=enclave, offload="all")
            carried = enclave.seal(state)
            for _ in range(2):
                carried, loss = shielded(carried, x, *more)
            once, _ = function(state, x, *more)
            check((enclave.open(carried), loss), function(once, x, *more))


def of_equinox() -> None:
    eqx: Any = importlib.import_module("equinox")

    optimizer = optax.adam(1e-2)
    key = jax.random.key(0)
    model = eqx.nn.MLP(WIDTH, 1, WIDTH, 2, activation=jax.nn.tanh, key=key)

    def plain_update(model, moments, x, y, mode, rate=0.5):
        assert isinstance(mode, str) and isinstance(rate, float)

        @eqx.filter_value_and_grad
        def loss_of(model):
            return jnp.mean((jax.vmap(model)(x) - y) ** 2) * rate

        loss, gradients = loss_of(model)
        updates, moments = optimizer.update(gradients, moments, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), moments, (tempo.reveal(loss), mode)

    update: Any = eqx.filter_jit(plain_update)
    x, y = data(ROWS, WIDTH, seed=1), data(ROWS, 1, seed=2)
    plain: Any = model, optimizer.init(eqx.filter(model, eqx.is_array))
    with tempo.Enclave.launch() as enclave:
        shielded: Any = tempo.shield(update, enclave=enclave, offload="all")
        state: Any = plain
        for mode in ("first", "second", "second"):
            *plain, (loss, _) = update(*plain, x, y, mode)
            *state, (found, same) = shielded(*state, x, y, mode)
            assert same == mode
            np.testing.assert_allclose(found, loss, rtol=1e-4)
        opened, _ = enclave.open(state)
        assert opened.activation == model.activation
        check(eqx.filter(opened, eqx.is_array), eqx.filter(plain[0], eqx.is_array))
        # Model and moments are carried, although what is no array lies among them.
        with pytest.raises(tempo.errors.SealedValueError, match="donated"):
            shielded(*state, x, y, "second")
            shielded(*state, x, y, "second")


def test_as_jit_takes_them():
    run_fresh(given_to_shield, of_a_wrapped_jit, optimized=False)


def test_equinox_filter_jit():
    pytest.importorskip("equinox", reason="Equinox is not installed")
    run_fresh(of_equinox, optimized=False)


@pytest.mark.parametrize(
    "options",
    [
        {"static_argnums": 5},
        {"static_argnums": -4},
        {"static_argnames": "missing"},
        {"static_argnums": "n"},
        {"static_argnames": 3},
    ],
)
def test_refuses_what_jit_refuses(enclave, options):
    def function(x, n, *, mode="a"):
        return x * n

    with pytest.raises((TypeError, ValueError)) as theirs:
        jax.jit(function, **options)
    with pytest.raises(StaticArgumentError) as ours:
        tempo.shield(function, enclave=enclave, **options)
    assert str(theirs.value) in str(ours.value)


def test_refuses_values_that_cannot_belong_to_a_program(enclave):
    shielded = tempo.shield(lambda x, n: x, enclave=enclave, static_argnames="n")
    for unhashable in ([3], {}, jnp.ones(2)):
        for args, kwargs in (((1.0, unhashable), {}), ((1.0,), {"n": unhashable})):
            with pytest.raises(ValueError, match="non-hashable static arguments") as refusal:
                shielded(*args, **kwargs)
            assert isinstance(refusal.value, UnsupportedError) and "3" not in str(refusal.value)
    with pytest.raises(StaticArgumentError, match="static and sealed"):
        shielded(1.0, enclave.seal(2.0))


def test_an_object_that_is_no_array_is_told_to_be_static(enclave):
    with pytest.raises(UnsupportedError, match="static_argnames"):
        tempo.shield(lambda x, mode: x, enclave=enclave)(1.0, "mean")


def test_a_value_belongs_to_the_key(enclave):
    traced = []

    def function(x, n):
        traced.append(n)
        return tempo.reveal(x * n)

    shielded = tempo.shield(function, enclave=enclave, static_argnums=-1)
    plain = jax.jit(function, static_argnums=-1)
    for n in (1, 1.0, True, 1, 1.0, True):
        expected = plain(2, n)
        found = shielded(2, n)
        assert (found, found.dtype) == (expected, expected.dtype)
    assert [type(n) for n in traced] == [int, int, float, float, bool, bool]
