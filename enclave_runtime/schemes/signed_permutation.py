"""Signed permutations: ``X̂[i, j] = s_a(i) s_b(j) X[π_a(i), π_b(j)]``.

Exact in every float format, and the cheapest scheme; what it does not protect against
stands in the class's docstring.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.schemes.contract import Group, SchemeCost, register
from enclave_runtime.schemes.permutation import PermutationScheme


@register
@dataclasses.dataclass(frozen=True)
class SignedPermutation(PermutationScheme):
    """Obfuscation without confidentiality: rows and columns permuted, their signs flipped.

    ``X̂[i, j] = s_a(i) s_b(j) X[π_a(i), π_b(j)]``. Exact in every float format, cheap (about
    half a nanosecond an element), and equivariant under every odd elementwise optimizer, so
    weights stay on the devices. **It does not protect against a host that tries**: one batch links
    adjacent layers, a public checkpoint or one known input reveals the key, and inputs and
    labels can be recovered. It hides the names of rows and columns.
    """

    name: ClassVar[str] = "signed_permutation"
    factor_dtype: ClassVar[type[np.generic]] = np.int8
    group: ClassVar[Group] = Group.SIGNED_PERMUTATION
    reference: ClassVar[SchemeCost] = SchemeCost(overhead=3e-5, blinding=0.6, drawing=60.0)
    host_learns: ClassVar[str] = (
        "every blinded matrix up to the order and signs of its rows and columns, which is "
        "enough to rebuild the model and most inputs: obfuscation, not confidentiality"
    )

    def draw_factors(self, size: int, stream: KeyStream) -> np.ndarray:
        """Uniform signs."""
        return stream.signs(size)

    def oriented(self, factors: np.ndarray, parity: int, inverse: bool) -> np.ndarray | None:
        """Signs are their own inverses, and an even power of them is 1."""
        return factors if parity else None

    @staticmethod
    def apply(x: jax.Array, factors: jax.Array) -> jax.Array:
        """Flips signs; not by a product, which flushes subnormal numbers to zero on the CPU."""
        return jnp.where(factors < 0, -x, x)
