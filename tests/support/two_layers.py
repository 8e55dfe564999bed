"""A small loss that `Mixing` sends out, and how near to the plain values it comes."""

from typing import Any

import jax
import jax.numpy as jnp

from tempo_jax.schemes import Mixing
from tests.support.steps import uniform

TOLERANCE = 1e-9  # of Mixing; of the others, 1e-10
DECOYS = Mixing(decoy_rows=32, mask_energy=0.0)


def two_layers(p, x):
    """A loss over three products, with something between each two."""
    h = jnp.tanh(x @ p["a"])
    return jnp.square(jnp.tanh(h @ p["b"]) @ p["c"]).mean()


def small() -> tuple[Any, jax.Array]:
    """Arguments of `two_layers`, as large as `Mixing` asks."""
    p = {n: uniform(i, 64, 64) for i, n in enumerate("abc")}
    return p, uniform(7, 128, 64)
