"""A step of Adam with a random key, for tests that keep its state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import tempo_jax as tempo
from tempo_jax import CheckpointKey
from tests.support.steps import uniform

OPTIMIZER = tempo.cheap_update(optax.adam(1e-2))
X, Y = uniform(1, 8, 6), uniform(2, 8, 3)
KEY = CheckpointKey.generate()
SECRET = bytes(range(32))
ALTERED = "failed its authentication"


def train_step(state, x, y):
    """One step of an MLP with Adam and a random key that is split."""
    params, optimizer, key = state
    key, noise = jax.random.split(key)
    x = x + 0.1 * jax.random.normal(noise, x.shape)

    def loss_of(params):
        hidden = jnp.tanh(x @ params["first"] + params["bias"])
        return jnp.mean((hidden @ params["second"] - y) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, optimizer = OPTIMIZER.update(gradients, optimizer, params)
    return (optax.apply_updates(params, updates), optimizer, key), tempo.reveal(loss)


def initial_state():
    params = {"first": uniform(3, 6, 4), "bias": uniform(4, 4), "second": uniform(5, 4, 3)}
    return params, OPTIMIZER.init(params), jax.random.key(0)


def plain_state(steps: int) -> Any:
    state, step = initial_state(), jax.jit(train_step)
    for _ in range(steps):
        state, _ = step(state, X, Y)
    return state


def is_sealed(x: Any) -> bool:
    return isinstance(x, tempo.SealedArray)


def forms(tree: Any) -> set[str]:
    return {leaf.form for leaf in jax.tree.leaves(tree, is_leaf=is_sealed)}
