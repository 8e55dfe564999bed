"""Batches, and models written as functions of a dict of arrays, that a step is shielded for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tests.support.steps import (
    Training,
    training,
    uniform,
    uniform_like,
)

BATCH, FEATURES, CLASSES = 8, 12, 9
F64 = jnp.float64


def vectors(*inner: int) -> list[dict[str, jax.Array]]:
    """Two batches of vectors, or of sequences of them, with labels."""
    labels = jnp.arange(BATCH) % CLASSES
    return [{"x": uniform(s, BATCH, *inner, FEATURES), "y": labels} for s in (101, 102)]


def images(channels: int) -> list[dict[str, jax.Array]]:
    """Two batches of 6 by 6 images with labels."""
    labels = jnp.arange(BATCH) % CLASSES
    return [{"x": uniform(s, BATCH, 6, 6, channels), "y": labels} for s in (103, 104)]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def plain_model(
    apply: Callable[[Any, jax.Array], jax.Array],
    shapes: dict[str, tuple[int, ...]],
    batches: list[Any],
    tx: Any,
) -> Training:
    """A model written as a function of a dict of arrays."""

    def loss(parameters: Any, rest: Any, batch: Any) -> Any:
        logits = apply(parameters, batch["x"])
        return cross_entropy(logits, batch["y"]), (rest, logits)

    parameters = uniform_like({name: jnp.zeros(shape) for name, shape in shapes.items()})
    return training(loss, parameters, batches, tx)
