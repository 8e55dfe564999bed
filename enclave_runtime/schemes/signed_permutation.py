"""Signed permutations: ``X̂[i, j] = s_a(i) s_b(j) X[π_a(i), π_b(j)]``.

Exact in every float format, and the cheapest scheme; what it does not protect against
stands in the class's docstring.
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


class SignedPermutationKey(NamedTuple):
    """One group element: int32[n] permutation, its inverse, and int8[n] signs (None: all 1)."""

    permutation: np.ndarray
    inverse: np.ndarray
    signs: np.ndarray | None

    def __repr__(self) -> str:
        return "SignedPermutationKey(<secret>)"

    __reduce__ = refuse_pickling


@register
@dataclasses.dataclass(frozen=True)
class SignedPermutation(Scheme):
    """Obfuscation without confidentiality: rows and columns permuted, their signs flipped.

    ``X̂[i, j] = s_a(i) s_b(j) X[π_a(i), π_b(j)]``. Exact in every float format, cheap (about
    half a nanosecond an element), and equivariant under every odd elementwise optimizer, so
    weights stay on the devices. **It does not protect against a host that tries**: one batch links
    adjacent layers, a public checkpoint or one known input reveals the key, and inputs and
    labels can be recovered. It hides the names of rows and columns.
    """

    name: ClassVar[str] = "signed_permutation"
    group: ClassVar[Group] = Group.SIGNED_PERMUTATION
    reference: ClassVar[SchemeCost] = SchemeCost(overhead=3e-5, blinding=0.6, drawing=60.0)
    host_learns: ClassVar[str] = (
        "every blinded matrix up to the order and signs of its rows and columns, which is "
        "enough to rebuild the model and most inputs: obfuscation, not confidentiality"
    )

    def draw(self, key_class: KeyClass, stream: KeyStream) -> SignedPermutationKey:
        """Draws a uniform element; batch classes get no signs."""
        permutation = stream.permutation(key_class.size)
        signs = None if key_class.batch else stream.signs(key_class.size)
        return SignedPermutationKey(permutation, inverse_permutation(permutation), signs)

    def blind(
        self,
        plain: jax.Array | np.ndarray,
        layout: Layout,
        keys: Mapping[int, SignedPermutationKey],
        out: np.ndarray,
        stream: Callable[[], KeyStream],
    ) -> None:
        """Blinds a float array of any shape; see the class's formula."""
        np.copyto(out, np.asarray(_apply(plain, layout, keys, inverse=False)))

    def unblind(
        self,
        blinded: np.ndarray,
        layout: Layout,
        keys: Mapping[int, SignedPermutationKey],
        operands: tuple[Any, Any] | None,
    ) -> jax.Array:
        """Inverse of `blind`: ``unblind(blind(x)) == x`` bit for bit."""
        return _apply(blinded, layout, keys, inverse=True)

    def warm_up(self, array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]) -> None:
        """Compiles the kernel for such values; blinding and unblinding share it."""
        keys = {}
        for _, number, _ in keyed_axes(layout):
            order = np.arange(classes[number].size, dtype=np.int32)
            signs = None if classes[number].batch else np.ones(order.size, np.int8)
            keys[number] = SignedPermutationKey(order, order, signs)
        zeros = np.zeros(array.shape, np.dtype(array.dtype))
        _apply(zeros, layout, keys, inverse=False).block_until_ready()


def inverse_permutation(permutation: np.ndarray) -> np.ndarray:
    """The permutation that undoes an int32[n] permutation."""
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(permutation.size, dtype=permutation.dtype)
    return inverse


@functools.partial(jax.jit, static_argnames="axes")
def _permute(x, axes, permutations, signs):
    """Gathers along each axis of `axes`, then applies the signs, all indexed by the result."""
    for (axis, signed), permutation, sign in zip(axes, permutations, signs, strict=True):
        x = jnp.take(x, permutation, axis=axis, mode="clip", unique_indices=True)
        if signed:
            negative = (sign < 0).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
            # Not a product, which flushes subnormal numbers to zero on the CPU.
            x = jnp.where(negative, -x, x)
    return x


def _apply(
    x: jax.Array | np.ndarray,
    layout: Layout,
    keys: Mapping[int, SignedPermutationKey],
    inverse: bool,
) -> jax.Array:
    axes, permutations, signs = [], [], []
    for axis, number, parity in keyed_axes(layout):
        key = keys[number]
        permutations.append(key.inverse if inverse else key.permutation)
        if key.signs is None or not parity:
            signs.append(None)
        else:
            # The key's signs are indexed by the blinded position.
            signs.append(key.signs[key.inverse] if inverse else key.signs)
        axes.append((axis, signs[-1] is not None))
    return _permute(x, tuple(axes), tuple(permutations), tuple(signs))
