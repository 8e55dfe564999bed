"""A step of a small classifier with AdamW, and what plain JAX makes of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tempo_jax as tempo
from tests.support.steps import (
    uniform,
)

OPTIMIZER = tempo.cheap_update(optax.adamw(1e-2))
X, Y = uniform(1, 8, 6), jax.nn.one_hot(jnp.arange(8) % 4, 4)
BATCHES = [(uniform(10 + i, 8, 6), jnp.roll(Y, i, axis=0)) for i in range(3)]


def logits(params, x):
    return jax.nn.relu(x @ params["first"] + params["bias"]) @ params["second"]


def train_step(state, x, y):
    """One step of an MLP with AdamW; the loss is revealed."""
    params, optimizer = state

    def loss_of(params):
        return optax.softmax_cross_entropy(logits(params, x), y).mean()

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, optimizer = OPTIMIZER.update(gradients, optimizer, params)
    return (optax.apply_updates(params, updates), optimizer), tempo.reveal(loss)


def initial_state():
    params = {"first": uniform(2, 6, 8), "bias": uniform(3, 8), "second": uniform(4, 8, 4)}
    return params, OPTIMIZER.init(params)


@functools.cache
def plain_steps(count: int) -> tuple[Any, tuple[float, ...]]:
    """The state after some steps of plain JAX on `BATCHES`, and the losses."""
    if not count:
        return initial_state(), ()
    state, losses = plain_steps(count - 1)
    state, loss = jax.jit(train_step)(state, *BATCHES[(count - 1) % len(BATCHES)])
    return state, (*losses, float(loss))


def is_sealed(x: Any) -> bool:
    return isinstance(x, tempo.SealedArray)


def forms(tree: Any) -> list[str]:
    """The forms of a tree's leaves, all of which are sealed."""
    return [leaf.form for leaf in jax.tree.leaves(tree, is_leaf=is_sealed)]
