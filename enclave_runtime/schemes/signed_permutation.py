"""Signed permutations: ``X̂[i, j] = s_a(i) s_b(j) X[π_a(i), π_b(j)]``.

Exact in every float format, and the cheapest scheme. It is obfuscation and gives no
confidentiality against a host that correlates what it sees: rows, columns and adjacent
layers can be linked from one batch, and a public checkpoint or one known input gives the
key away. It hides the names of rows and columns, no more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.keys import KeyStream
from enclave_runtime.program import ArrayType, KeyClass, Layout


class SignedPermutationKey(NamedTuple):
    """One group element: int32[n] permutation, its inverse, and int8[n] signs (None: all 1)."""

    permutation: np.ndarray
    inverse: np.ndarray
    signs: np.ndarray | None

    def __repr__(self) -> str:
        return "SignedPermutationKey(<secret>)"


def draw(key_class: KeyClass, stream: KeyStream) -> SignedPermutationKey:
    """Draws a uniform element of the class's group."""
    permutation = stream.permutation(key_class.size)
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(key_class.size, dtype=np.int32)
    signs = stream.signs(key_class.size) if key_class.signed else None
    return SignedPermutationKey(permutation, inverse, signs)


def _keyed_axes(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """Each keyed axis, its class, and its weight."""
    for axis, (number, weight) in enumerate(zip(layout.classes, layout.weights, strict=True)):
        if number is not None:
            yield axis, number, weight


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
    keys: dict[int, SignedPermutationKey],
    inverse: bool,
) -> jax.Array:
    axes, permutations, signs = [], [], []
    for axis, number, weight in _keyed_axes(layout):
        key = keys[number]
        permutations.append(key.inverse if inverse else key.permutation)
        if key.signs is None or not weight:
            signs.append(None)
        else:
            # The key's signs are indexed by the blinded position.
            signs.append(key.signs[key.inverse] if inverse else key.signs)
        axes.append((axis, signs[-1] is not None))
    if not axes:
        return jnp.array(x)
    return _permute(x, tuple(axes), tuple(permutations), tuple(signs))


def blind(
    plain: jax.Array | np.ndarray, layout: Layout, keys: dict[int, SignedPermutationKey]
) -> jax.Array:
    """Blinds a float array of any shape; see the module's formula."""
    return _apply(plain, layout, keys, inverse=False)


def unblind(
    blinded: np.ndarray, layout: Layout, keys: dict[int, SignedPermutationKey]
) -> jax.Array:
    """Inverse of `blind`: ``unblind(blind(x)) == x`` bit for bit."""
    return _apply(blinded, layout, keys, inverse=True)


def warm_up(array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]) -> None:
    """Compiles the kernel for such values; blinding and unblinding share it."""
    keys = {}
    for number in layout.classes:
        if number is not None:
            order = np.arange(classes[number].size, dtype=np.int32)
            signs = np.ones(order.size, np.int8) if classes[number].signed else None
            keys[number] = SignedPermutationKey(order, order, signs)
    blind(np.zeros(array.shape, np.dtype(array.dtype)), layout, keys).block_until_ready()
