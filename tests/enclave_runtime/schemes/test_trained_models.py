"""Training under each scheme through a real enclave equals plain training, for two models."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen

import tempo_jax as tempo
from tempo_jax.schemes import Orthogonal, Tempo
from tests.support.steps import assert_close, uniform
from tests.support.two_layers import DECOYS, TOLERANCE


class Convolutional(linen.Module):
    """Two convolutions wide enough to go out, batch normalization, and a classifier."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for strides in (1, 2):
            x = linen.Conv(64, (3, 3), (strides, strides), param_dtype=jnp.float64)(x)
            x = linen.LayerNorm(param_dtype=jnp.float64)(jax.nn.relu(x))
        return linen.Dense(10, param_dtype=jnp.float64)(x.mean((1, 2)))


class Block(linen.Module):
    """A transformer block with its head."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind = {"param_dtype": jnp.float64}
        h = linen.LayerNorm(**kind)(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=2, **kind)(h, h)
        h = linen.gelu(linen.Dense(256, **kind)(linen.LayerNorm(**kind)(x)))
        return linen.Dense(64, **kind)(x + linen.Dense(128, **kind)(h))


def training_step(model: Any, tx: Any) -> Any:
    def loss_fn(parameters, x, y):
        logits = model.apply(parameters, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state[0], *batch)
        updates, moments = tx.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), moments), tempo.reveal(loss)

    return step


def started(model: Any, tx: Any, batch: Any) -> Any:
    parameters = model.init(jax.random.key(0), batch[0])
    return parameters, tx.init(parameters)


MODELS = {
    "cnn": (Convolutional(), (uniform(1, 2, 12, 12, 64), jnp.arange(2))),
    "transformer": (Block(), (uniform(2, 1, 128, 128), jnp.arange(128)[None] % 64)),
}


# Of the schemes that other files try on every model, one model is enough where time counts.
STEPS = {
    "mixing": (None, optax.adamw(1e-3), TOLERANCE),
    "decoys": (DECOYS, optax.adamw(1e-3), TOLERANCE),
    "tempo": (Tempo(), tempo.cheap_update(optax.sgd(0.1, momentum=0.9)), 1e-10),
    "integers": (Tempo("integers"), tempo.cheap_update(optax.sgd(0.1)), 1e-10),
    "orthogonal": (
        Orthogonal(2),
        tempo.cheap_update(optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, 0.9))),
        1e-10,
    ),
}


@pytest.mark.parametrize(
    ("model", "scheme", "tx", "tolerance"),
    [
        pytest.param(
            model,
            *step,
            id=f"{name}-{model}",
            marks=() if name == "mixing" or model == "cnn" else pytest.mark.slow,
        )
        for name, step in STEPS.items()
        for model in MODELS
    ],
)
def test_new_state_equals_the_plain_steps(model, scheme, tx, tolerance, enclave):
    network, batch = MODELS[model]
    step = training_step(network, tx)
    state = started(network, tx, batch)
    shielded: Any = tempo.shield(step, enclave=enclave, scheme=scheme, offload="all")
    sealed = enclave.seal(state)
    for _ in range(3):
        state, loss = jax.jit(step)(state, batch)
        sealed, revealed = shielded(sealed, batch)
        assert_close(revealed, loss, tolerance)
    assert_close(enclave.open(sealed), state, tolerance)
