"""The paper's own scheme: permutations and positive scales, kept keys, two polarities.

MM-obfuscation of Tempo (arXiv 2401.11531, section 4): a product's key is
(c_m, π_m, c_n, π_n, c_p, π_p), and ``X̂[i, j] = c_m[i] / c_n[j] · X[π_m(i), π_n(j)]``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.crypto.encryption import refuse_pickling
from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes.contract import Group, Scheme, SchemeCost, keyed_axes, register
from enclave_runtime.schemes.signed_permutation import inverse_permutation

COEFFICIENTS = ("powers_of_two", "integers")
_EXPONENTS = 7  # powers of two from 2**-3 to 2**3
_INTEGERS = 64  # integers from 1 to 64 …
_MIDDLE = 8  # … over their geometric middle, so that their products stay in float16's range


class TempoKey(NamedTuple):
    """One group element: int32[n] permutation, its inverse, and float64[n] scales (None: 1).

    The scales are indexed by the blinded position.
    """

    permutation: np.ndarray
    inverse: np.ndarray
    scales: np.ndarray | None

    def __repr__(self) -> str:
        return "TempoKey(<secret>)"

    __reduce__ = refuse_pickling


@register
@dataclasses.dataclass(frozen=True)
class Tempo(Scheme):
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

    def draw(self, key_class: KeyClass, stream: KeyStream) -> TempoKey:
        """Draws a permutation and scales; batch classes get no scales."""
        permutation = stream.permutation(key_class.size)
        scales = None
        if not key_class.batch:
            uniform = stream.uniform(key_class.size)
            if self.coefficients == "powers_of_two":
                scales = np.exp2(np.floor(uniform * _EXPONENTS) - _EXPONENTS // 2)
            else:
                scales = (np.floor(uniform * _INTEGERS) + 1) / _MIDDLE
        return TempoKey(permutation, inverse_permutation(permutation), scales)

    def blind(
        self,
        plain: jax.Array | np.ndarray,
        layout: Layout,
        keys: Mapping[int, TempoKey],
        out: np.ndarray,
        stream: Callable[[], KeyStream],
    ) -> None:
        """Blinds a float array of any shape; see the class's formula."""
        np.copyto(out, np.asarray(_apply(plain, layout, keys, inverse=False)))

    def unblind(
        self,
        blinded: np.ndarray,
        layout: Layout,
        keys: Mapping[int, TempoKey],
        operands: tuple[Any, Any] | None,
    ) -> jax.Array:
        """Inverse of `blind`, exact for powers of two unless a value leaves the format's range."""
        return _apply(blinded, layout, keys, inverse=True)

    def warm_up(self, array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]) -> None:
        """Compiles the kernel for such values; blinding and unblinding share it."""
        keys = {}
        for _, number, _ in keyed_axes(layout):
            order = np.arange(classes[number].size, dtype=np.int32)
            keys[number] = TempoKey(order, order, None if classes[number].batch else order + 1.0)
        zeros = np.zeros(array.shape, np.dtype(array.dtype))
        _apply(zeros, layout, keys, inverse=False).block_until_ready()


@functools.partial(jax.jit, static_argnames="axes")
def _permute(x, axes, permutations, factors):
    """Gathers along each axis of `axes`, then multiplies, all indexed by the result."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = x
    for axis, permutation in zip(axes, permutations, strict=True):
        y = jnp.take(y, permutation, axis=axis, mode="clip", unique_indices=True)
    y = y.astype(wide)
    for axis, factor in zip(axes, factors, strict=True):
        if factor is not None:
            shape = [-1 if a == axis else 1 for a in range(x.ndim)]
            y = y * factor.astype(wide).reshape(shape)
    return y.astype(x.dtype)


def _apply(
    x: jax.Array | np.ndarray, layout: Layout, keys: Mapping[int, TempoKey], inverse: bool
) -> jax.Array:
    axes, permutations, factors = [], [], []
    for axis, number, parity in keyed_axes(layout):
        key = keys[number]
        axes.append(axis)
        permutations.append(key.inverse if inverse else key.permutation)
        if key.scales is None:
            factors.append(None)
            continue
        scales = key.scales[key.inverse] if inverse else key.scales
        # Parity 1 is the key itself, parity 0 its inverse transpose.
        factors.append(scales if parity != inverse else 1 / scales)
    return _permute(x, tuple(axes), tuple(permutations), tuple(factors))
