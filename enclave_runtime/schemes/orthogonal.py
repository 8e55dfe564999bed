"""Random orthogonal mixing in fast form, its keys kept for a budget of steps.

On each axis ``P S H P S H P S``: permutations, signs and normalised Hadamard transforms of
blocks of 64 (`enclave_runtime.schemes.kernels.hadamard`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes.contract import Group, Scheme, SchemeCost, keyed_axes, register
from enclave_runtime.schemes.kernels import hadamard
from enclave_runtime.schemes.kernels.hadamard import AxisMap
from enclave_runtime.schemes.permutation import PermutationKey, draw_permutation

# What a batch axis of a product carries is a permutation alone.
OrthogonalKey = AxisMap | PermutationKey


@register
@dataclasses.dataclass(frozen=True)
class Orthogonal(Scheme):
    """Mixes every axis by a random orthogonal map; weights stay on the devices for `budget` steps.

    ``X̂ = A X B``, ``Ŵ = Bᵀ W C``. Keys of activations are drawn anew at every step; those of
    device-resident weights are kept for `budget` steps, then the enclave takes the weights in
    and blinds them anew. SGD, momentum, weight decay, Muon and clipping by global norm run on
    the devices. **A host that watches long enough wins**: Gram matrices of successive steps
    share the kept keys and can be aligned, singular values and inner products show at once,
    and under a public checkpoint the keys fall in a single step. Never use it to fine-tune
    a published model. **No budget is safe**: the study saw kept keys fall after about
    ``5 (1 + κ)²`` steps, for decoys of κ times the signal's energy, and allows a sixteenth of
    them, ``K ≤ 5 (1 + κ)² / 16``. There are no decoys here, so κ = 0 and ``K ≤ 0.31``: not even
    ``budget=1`` is within that bound. A smaller budget gives the host fewer steps to align and
    promises nothing.

    Attributes:
      budget: steps for which a weight's key is kept, at least 1; see above on how little it means.
    """

    budget: int = 1
    name: ClassVar[str] = "orthogonal"
    group: ClassVar[Group] = Group.ORTHOGONAL
    reference: ClassVar[SchemeCost] = SchemeCost(overhead=1e-4, blinding=2.5, drawing=60.0)
    host_learns: ClassVar[str] = (
        "singular values and inner products of every blinded matrix at once, and from several "
        "steps under one key the directions too, enough to rebuild the model: partial hiding for "
        "a limited number of steps, none for a model whose earlier version is public"
    )

    def __post_init__(self) -> None:
        """Checks the parameters."""
        if type(self.budget) is not int or self.budget < 1:
            raise ValueError("Orthogonal: budget is the number of steps, an int of at least 1")

    @property
    def rounding(self) -> str:
        """What mixing without scales does to rows and columns of different sizes."""
        return (
            "each row and column is off by about 1e-6 of the largest in float32, whatever its own "
            "size, and one that is not finite spoils the others: even out scales, or use Mixing"
        )

    @property
    def key_budget(self) -> int | None:
        """The budget."""
        return self.budget

    def draw(self, key_class: KeyClass, stream: KeyStream) -> OrthogonalKey:
        """Draws an element in fast form; batch classes get a permutation alone."""
        if key_class.batch:
            return draw_permutation(key_class.size, stream)
        return hadamard.draw(stream, key_class.size, condition=1.0)

    def blind(
        self,
        plain: jax.Array | np.ndarray,
        layout: Layout,
        keys: Mapping[int, OrthogonalKey],
        out: np.ndarray,
        stream: Callable[[], KeyStream],
    ) -> None:
        """Blinds a float array of any shape; 16-bit formats are mixed in float32."""
        x = to_mixable(plain)
        maps = {}
        for axis, number, _ in keyed_axes(layout):
            key = keys[number]
            if isinstance(key, AxisMap):
                maps[axis] = key
            else:
                x = np.take(x, key.permutation, axis=axis)
        mix_into(out, x, maps)

    def unblind(
        self,
        blinded: np.ndarray,
        layout: Layout,
        keys: Mapping[int, OrthogonalKey],
        operands: tuple[Any, Any] | None,
    ) -> jax.Array:
        """Inverse of `blind`, up to rounding."""
        x = to_mixable(blinded)
        maps = {}
        for axis, number, _ in keyed_axes(layout):
            key = keys[number]
            if isinstance(key, AxisMap):
                maps[axis] = key.inverse()
            else:
                x = np.take(x, key.inverse, axis=axis)
        return jnp.asarray(rounded(hadamard.mix(x, maps), blinded.dtype))

    @classmethod
    def load(cls) -> None:
        """Compiles or loads all kernels."""
        hadamard.warm_up()

    def warm_up(self, array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]) -> None:
        """Compiles the kernels; they do not depend on shapes."""
        self.load()


def to_mixable(x: jax.Array | np.ndarray) -> np.ndarray:
    """A private or borrowed C-contiguous float32 or float64 array of the same values."""
    if x.dtype in (np.float32, np.float64):
        return np.ascontiguousarray(x)
    # By XLA: NumPy converts 16-bit formats one element at a time.
    return np.asarray(jnp.asarray(np.asarray(x)).astype(np.float32))


def mix_into(
    out: np.ndarray,
    x: np.ndarray,
    maps: Mapping[int, AxisMap],
    extra: np.ndarray | None = None,
) -> None:
    """Mixes into shared memory, in its float format; see `hadamard.mix`."""
    if out.dtype == x.dtype and out.flags.carray:
        hadamard.mix(x, maps, extra=extra, out=out)
    else:
        round_into(out, hadamard.mix(x, maps, extra=extra))


def round_into(out: np.ndarray, x: np.ndarray) -> None:
    """Writes the values to shared memory, in its float format."""
    # ml_dtypes rounds to bfloat16 as it writes; NumPy's own float16 is slower than XLA's.
    np.copyto(out, x if out.dtype == jnp.bfloat16 else rounded(x, out.dtype))


def rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    """The values in another float format."""
    return x if x.dtype == dtype else np.asarray(jnp.asarray(x).astype(dtype))
