"""A chain of two products, for tests of what happens between them."""

import jax.numpy as jnp

import tempo_jax as tempo
from tests.support.steps import MOMENTUM_BATCH, uniform


def chain(x, w, v):
    """Two products with something between them, in three visits."""
    return tempo.reveal(jnp.tanh(x @ w) @ v)


X, W, V = MOMENTUM_BATCH[0], uniform(6, 5, 4), uniform(7, 4, 3)
CHAIN = jnp.tanh(X @ W) @ V
