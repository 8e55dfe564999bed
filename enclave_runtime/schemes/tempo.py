"""The paper's own scheme: permutations and positive scales, kept keys, two polarities.

MM-obfuscation of Tempo (arXiv 2401.11531, section 4): a product's key is
(c_m, π_m, c_n, π_n, c_p, π_p), and ``X̂[i, j] = c_m[i] / c_n[j] · X[π_m(i), π_n(j)]``.
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

COEFFICIENTS = ("powers_of_two", "integers")
_EXPONENTS = 7  # powers of two from 2**-3 to 2**3
_INTEGERS = 64  # integers from 1 to 64 …
_MIDDLE = 8  # … over their geometric middle, so that their products stay in float16's range


@register
@dataclasses.dataclass(frozen=True)
class Tempo(PermutationScheme):
    """Obfuscation without confidentiality, as published: rows and columns permuted and scaled.

    ``X̂[i, j] = c_m[i] / c_n[j] · X[π_m(i), π_n(j)]`` and ``Ŵ[j, k] = c_n[j] / c_p[k] ·
    W[π_n(j), π_p(k)]``, so that ``Ŷ[i, k] = c_m[i] / c_p[k] · Y[π_m(i), π_p(k)]``. For the
    gradient of W to come out in W's own layout its operands are blinded once more with the
    opposite polarity; linear optimizers (SGD, momentum, weight decay) then update Ŵ where
    it lies. **It does not protect against a host that tries**: what breaks signed permutations
    breaks it, after the scales are taken off by normalising rows and columns. The copies share
    their columns' permutation with what they copy, so that the host sees each column both over c
    and times c. The ratio of its energies gives two thirds of the powers of two away, up to one
    factor for all: what is hidden are the names of rows and columns, and hardly their scales.

    Attributes:
      coefficients: "powers_of_two" (from 1/8 to 8), which are exact in every float format, or
        "integers" (from 1 to 64, over 8), as in the paper, which round.

    References:
      Tempo, arXiv 2401.11531.
    """

    coefficients: str = "powers_of_two"
    name: ClassVar[str] = "tempo"
    factor_dtype: ClassVar[type[np.generic]] = np.float64
    group: ClassVar[Group] = Group.SCALED_PERMUTATION
    reference: ClassVar[SchemeCost] = SchemeCost(overhead=4e-5, blinding=0.8, drawing=60.0)
    host_learns: ClassVar[str] = (
        "every blinded matrix up to the order and positive scales of its rows and columns, which "
        "is enough to rebuild the model and most inputs: obfuscation, not confidentiality"
    )

    def __post_init__(self) -> None:
        """Checks the parameters."""
        if self.coefficients not in COEFFICIENTS:
            raise ValueError(
                f"Tempo: coefficients is {self.coefficients!r}, expected one of "
                f"{', '.join(COEFFICIENTS)}"
            )

    def draw_factors(self, size: int, stream: KeyStream) -> np.ndarray:
        """Uniform coefficients."""
        uniform = stream.uniform(size)
        if self.coefficients == "powers_of_two":
            return np.exp2(np.floor(uniform * _EXPONENTS) - _EXPONENTS // 2)
        return (np.floor(uniform * _INTEGERS) + 1) / _MIDDLE

    def oriented(self, factors: np.ndarray, parity: int, inverse: bool) -> np.ndarray | None:
        """Parity 1 is the key itself, parity 0 its inverse transpose."""
        return factors if parity != inverse else 1 / factors

    @staticmethod
    def apply(x: jax.Array, factors: jax.Array) -> jax.Array:
        """Multiplies in float32 at least, so that 16-bit formats are rounded once."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return x.astype(wide) * factors.astype(wide)
