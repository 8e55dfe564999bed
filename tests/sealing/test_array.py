"""Sealed values outside shielded functions: nothing computes on them without a word."""

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax import lax

import tempo_jax as tempo
from tempo_jax.errors import CheckpointError, SealedValueError, TempoError
from tests.support.steps import assert_close, shield_all, uniform

WEIGHTS = uniform(1, 6, 4)
TX = tempo.cheap_update(optax.sgd(0.1))
ADVICE = "tempo.shield, or decrypt it with enclave.open"


def step(state, x):
    gradients = jax.grad(lambda w: jnp.square(jnp.tanh(x @ w["w"]) + w["b"]).sum())(state)
    return optax.apply_updates(state, TX.update(gradients, TX.init(state), state)[0])


@pytest.fixture(scope="module")
def train(enclave) -> Any:
    return shield_all(step, enclave=enclave)


@pytest.fixture
def state(enclave, train) -> Any:
    """A blinded leaf and a resident one."""
    state = train({"w": WEIGHTS, "b": jnp.zeros(4)}, uniform(2, 8, 6))
    assert (state["w"].form, state["b"].form) == ("blinded", "resident")
    return state


@pytest.mark.parametrize(
    "compute",
    [
        lambda s: jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, s, s),
        lambda s: optax.apply_updates(s, s),
        optax.tree.norm,
        lambda s: optax.incremental_update(s, s, 0.1),
        lambda s: jax.tree.map(jnp.sum, s),
        lambda s: jax.tree.map(lambda x: x.astype(jnp.float32), s),
        lambda s: jax.tree.map(np.asarray, s),
        lambda s: jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t))(s),
    ],
    ids=["ema", "updates", "norm", "incremental", "sum", "astype", "numpy", "jit"],
)
def test_arithmetic_on_the_insides_raises_in_jax(enclave, state, compute):
    for tree in (state, enclave.seal({"w": WEIGHTS})):
        with pytest.raises((TypeError, ValueError, NotImplementedError)):
            compute(tree)


def test_the_message_of_jax_says_what_to_do(state):
    with pytest.raises(TypeError, match=ADVICE):
        jax.tree.map(lambda a: 0.9 * a, state["b"])


@pytest.mark.parametrize(
    "look",
    [
        lambda x: f"{x:.3f}",
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: x[0],
        list,
        lambda x: x + 1,
        lambda x: 1.0 - x,
        lambda x: np.ones(4) * x,
        lambda x: jnp.ones(4) * x,
        lambda x: x @ x,
        lambda x: x == x,
        lambda x: x < 1,
        lambda x: x.astype(jnp.float32),
        lambda x: x.mean(),
        lambda x: x.T,
        float,
        int,
        bool,
        np.asarray,
        np.sum,
        jnp.asarray,
        jnp.sum,
        abs,
    ],
)
def test_every_way_of_looking_is_one_error(state, look):
    with pytest.raises(SealedValueError, match=r"`tempo\.reveal`.*`enclave\.open`"):
        look(state["b"])


def test_sizes_are_those_of_the_secret(enclave, state):
    for tree in (state, enclave.seal({"w": WEIGHTS, "b": jnp.zeros(4)})):
        leaves = jax.tree.leaves(tree, is_leaf=tempo.is_sealed)
        assert sorted((x.shape, x.size, x.ndim, len(x)) for x in leaves) == [
            ((4,), 4, 1, 4),
            ((6, 4), 24, 2, 6),
        ]
        assert sum(x.size for x in jax.tree.leaves(tempo.shapes(tree))) == 28
        assert sum(x.nbytes for x in leaves) == 28 * 8
        assert "SealedArray(float64[4]" in f"{tree['b']}"
    assert not hasattr(state["b"], "astype") and not hasattr(state["b"], "anything")


@pytest.mark.parametrize("make", [jnp.zeros_like, jnp.ones_like], ids=["zeros", "ones"])
def test_what_gets_through_is_recognised(enclave, train, state, make):
    changed = jax.tree.map(make, state)
    for use in (
        enclave.open,
        lambda s: train(s, uniform(2, 8, 6)),
        enclave.seal,
        lambda s: jax.jit(train)(s, enclave.seal(uniform(2, 8, 6))),
    ):
        with pytest.raises(Exception, match="computed outside a shielded function"):
            jax.block_until_ready(use(changed))


def test_blinded_content_of_another_type_is_recognised(enclave, state):
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )
    with pytest.raises(SealedValueError, match="content was changed outside"):
        enclave.open(half)


def test_insides_are_refused(enclave, train, state):
    for use in (enclave.seal, lambda x: train(x, uniform(2, 8, 6))):
        with pytest.raises(SealedValueError, match="opaque name inside a sealed value"):
            use(jax.tree.leaves(state["b"])[0])


def test_what_moves_values_goes_on(enclave, train, state):
    before = enclave.open(state)
    moved = [
        jax.jit(lambda t: t)(state),
        jax.tree.map(jnp.copy, state),
        jax.device_put(state, jax.devices()[0]),
        jax.tree.map(lambda a: jnp.where(True, a, a), state),
        lax.cond(True, lambda t: t, lambda t: t, state),
        lax.scan(lambda t, _: (t, None), state, None, length=2)[0],
        jax.jit(lambda t: t, donate_argnums=0)(jax.tree.map(jnp.copy, state)),
        jax.device_get(state),
    ]
    for tree in moved:
        assert_close(enclave.open(tree), before)


def test_copy_outlives_its_original(enclave, train, state):
    expected = enclave.open(state)
    kept = enclave.copy(state)
    assert kept["w"].weak_type == state["w"].weak_type
    train(state, uniform(2, 8, 6))
    with pytest.raises(SealedValueError, match="donated"):
        enclave.open(state)
    assert_close(enclave.open(kept), expected)


def test_averages_norms_and_counts_are_taken_inside(enclave, state):
    expected = enclave.open(state)
    average = tempo.shield(
        lambda a, b: optax.incremental_update(a, b, 0.1), enclave=enclave, donate=False
    )
    norm = tempo.shield(lambda s: tempo.reveal(optax.tree.norm(s)), enclave=enclave)
    assert_close(enclave.open(average(state, enclave.copy(state))), expected)
    assert_close(norm(state), optax.tree.norm(expected))


def test_saving_is_refused(enclave, state, tmp_path):
    for save in (pickle.dumps, copy.deepcopy, lambda x: np.save(tmp_path / "x", x)):
        with pytest.raises(TempoError):
            save(state["b"])
    for tree in (state, {"w": enclave.seal(WEIGHTS)}):
        with pytest.raises(TypeError, match="SealedArray"):
            serialization.to_bytes(tree)


@pytest.mark.parametrize("form", ["encrypted", "resident"])
def test_weak_types_survive(enclave, form):
    enclave.use_checkpoint_key(key := tempo.CheckpointKey.generate())
    tree = {"scale": jnp.asarray(2.0), "weak": 2.0, "strong": jnp.float32(1)}
    sealed = enclave.seal(tree)
    if form == "resident":
        sealed = tempo.shield(lambda t: t, enclave=enclave, donate=False)(sealed)
    data = enclave.checkpoint(sealed)
    for opened in (
        enclave.open(sealed),
        enclave.open(enclave.restore(data, like=tree)),
        tempo.checkpoints.open_checkpoint(data, key, tempo.shapes(tree)),
        enclave.open(enclave.copy(sealed)),
    ):
        assert {k: v.weak_type for k, v in opened.items()} == {
            k: jax.typeof(v).weak_type for k, v in tree.items()
        }
        assert (jnp.ones(2, jnp.bfloat16) * opened["weak"]).dtype == jnp.bfloat16
    with pytest.raises(CheckpointError):
        enclave.restore(data, like={"weak": 2.0})
