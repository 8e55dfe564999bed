"""Schemes whose keys permute an axis and apply a factor to each position: what they share."""

from __future__ import annotations

import abc
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
from enclave_runtime.schemes.contract import Scheme, keyed_axes


class PermutationKey(NamedTuple):
    """One group element of an axis of n positions.

    Attributes:
      permutation: int32[n]; place i of the blinded axis holds what was at ``permutation[i]``.
      inverse: int32[n], its inverse.
      factors: one for each blinded position, [n], of the scheme's dtype; None: all of them 1.
    """

    permutation: np.ndarray
    inverse: np.ndarray
    factors: np.ndarray | None = None

    def __repr__(self) -> str:
        return "PermutationKey(<secret>)"

    __reduce__ = refuse_pickling


def draw_permutation(size: int, stream: KeyStream) -> PermutationKey:
    """A uniform permutation, without factors."""
    permutation = stream.permutation(size)
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(size, dtype=permutation.dtype)
    return PermutationKey(permutation, inverse)


@dataclasses.dataclass(frozen=True)
class PermutationScheme(Scheme):
    """Permutes each axis and applies a factor to each of its positions; batch axes have none.

    Attributes:
      factor_dtype: of a key's factors.
    """

    factor_dtype: ClassVar[type[np.generic]]

    @abc.abstractmethod
    def draw_factors(self, size: int, stream: KeyStream) -> np.ndarray:
        """Draws the factors of an axis, factor_dtype[size]."""

    @abc.abstractmethod
    def oriented(self, factors: np.ndarray, parity: int, inverse: bool) -> np.ndarray | None:
        """What an axis of a parity is multiplied by, to blind it or, for `inverse`, to unblind it.

        None stands for ones.
        """

    @staticmethod
    @abc.abstractmethod
    def apply(x: jax.Array, factors: jax.Array) -> jax.Array:
        """Applies factors that broadcast to x; under `jax.jit`, and may widen the dtype."""

    def draw(self, key_class: KeyClass, stream: KeyStream) -> PermutationKey:
        """Draws a uniform permutation and factors; batch classes get no factors."""
        key = draw_permutation(key_class.size, stream)
        if key_class.batch:
            return key
        return key._replace(factors=self.draw_factors(key_class.size, stream))

    def blind(
        self,
        plain: jax.Array | np.ndarray,
        layout: Layout,
        keys: Mapping[int, PermutationKey],
        out: np.ndarray,
        stream: Callable[[], KeyStream],
    ) -> None:
        """Blinds a float array of any shape; see the class's formula."""
        np.copyto(out, np.asarray(self._applied(plain, layout, keys, inverse=False)))

    def unblind(
        self,
        blinded: np.ndarray,
        layout: Layout,
        keys: Mapping[int, PermutationKey],
        operands: tuple[Any, Any] | None,
    ) -> jax.Array:
        """Inverse of `blind`, bit for bit as far as the factors and theirs are exact."""
        return self._applied(blinded, layout, keys, inverse=True)

    @classmethod
    def load(cls) -> None:
        """Compiles or loads the kernel that draws permutations."""
        KeyStream(bytes(32)).permutation(2)

    def warm_up(self, array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]) -> None:
        """Compiles the kernel for such values; blinding and unblinding share it."""
        keys = {}
        for _, number, _ in keyed_axes(layout):
            order = np.arange(classes[number].size, dtype=np.int32)
            ones = None if classes[number].batch else np.ones(order.size, self.factor_dtype)
            keys[number] = PermutationKey(order, order, ones)
        zeros = np.zeros(array.shape, np.dtype(array.dtype))
        self._applied(zeros, layout, keys, inverse=False).block_until_ready()

    def _applied(
        self,
        x: jax.Array | np.ndarray,
        layout: Layout,
        keys: Mapping[int, PermutationKey],
        inverse: bool,
    ) -> jax.Array:
        axes, permutations, factors = [], [], []
        for axis, number, parity in keyed_axes(layout):
            key = keys[number]
            axes.append(axis)
            permutations.append(key.inverse if inverse else key.permutation)
            own = key.factors
            if own is not None:
                own = self.oriented(own[key.inverse] if inverse else own, parity, inverse)
            factors.append(own)
        return _permuted(x, tuple(axes), tuple(permutations), tuple(factors), self.apply)


@functools.partial(jax.jit, static_argnames=("axes", "apply"))
def _permuted(x, axes, permutations, factors, apply):
    """Gathers along each axis of `axes`, then applies its factors, indexed by the result."""
    y = x
    for axis, permutation, own in zip(axes, permutations, factors, strict=True):
        y = jnp.take(y, permutation, axis=axis, mode="clip", unique_indices=True)
        if own is not None:
            y = apply(y, own.reshape([-1 if a == axis else 1 for a in range(x.ndim)]))
    return y.astype(x.dtype)
