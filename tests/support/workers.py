"""What tests of several workers share: meshes, models, and what plain training makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

import tempo_jax as tempo
from tests.support.steps import uniform

STEPS = 3
ADAMW = tempo.cheap_update(optax.adamw(1e-2))


def mesh_of(workers: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:workers]), ("workers",))


# Models


class MLP(nn.Module):
    """One hidden layer."""

    hidden: int = 8
    outputs: int = 5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (n, features) to (n, outputs)."""
        x = nn.gelu(nn.Dense(self.hidden, param_dtype=float)(x))
        return nn.Dense(self.outputs, param_dtype=float)(x)


class ConvNet(nn.Module):
    """Two convolutions, the first with batch norm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (n, 4, 4, 2) to (n, 5)."""
        x = nn.Conv(6, (3, 3), use_bias=False, param_dtype=float)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, param_dtype=float)(x))
        return nn.Conv(5, (4, 4), padding="VALID", param_dtype=float)(x)[:, 0, 0]


class Attention(nn.Module):
    """A transformer's attention block with layer norm and two heads.

    Without biases: the gradient of the keys' bias is zero, and Adam would divide its rounding
    error by itself.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (n, s, 6) to (n, s, 6)."""
        y = nn.LayerNorm(param_dtype=float)(x)
        return x + nn.MultiHeadDotProductAttention(2, use_bias=False, param_dtype=float)(y, y)


@dataclasses.dataclass(frozen=True)
class Task:
    """A training step in plain JAX, its arguments, and the result of `STEPS` steps."""

    step: Callable[..., Any]
    state: Any
    batch: tuple[jax.Array, jax.Array]
    result: Any


def make_task(model: nn.Module, shape: tuple[int, ...], optimizer: Any) -> Task:
    """A regression by `model` on random inputs of this shape."""
    x = uniform(1, *shape)
    types = jax.eval_shape(model.init, jax.random.key(0), x)
    leaves, structure = jax.tree.flatten(types)
    variables = jax.tree.unflatten(structure, [uniform(i, *t.shape) for i, t in enumerate(leaves)])
    y = uniform(2, *jax.eval_shape(lambda v: model.apply(v, x, mutable=True)[0], types).shape)

    def step(state, x, y):
        variables, optimizer_state = state

        def loss_of(params):
            out, new = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.mean((out - y) ** 2), new

        (loss, new), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, **new}, optimizer_state), tempo.reveal(loss)

    state = (variables, optimizer.init(variables["params"]))
    return Task(step, state, (x, y), train(jax.jit(step), state, (x, y)))


def train(step: Callable[..., Any], state: Any, batch: tuple[Any, Any]) -> Any:
    """The state after `STEPS` steps and their losses."""
    losses = []
    for _ in range(STEPS):
        state, loss = step(state, *batch)
        losses.append(loss)
    return state, losses
