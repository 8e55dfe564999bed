"""Forms: how an array of any rank is read as a matrix, or as a batch of matrices.

Axes are grouped, or windows of a convolution's input unfolded into patches. Untrusted and pure;
`families.finder` says which form each operand has.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


class Form(abc.ABC):
    """How an array is read as a matrix.

    Attributes:
      copies: how many matrices it holds, or 0 if it is a single matrix without a batch axis.
      rows: rows of each.
      columns: columns of each.
    """

    copies: int
    rows: int
    columns: int

    @abc.abstractmethod
    def matrix(self, array: jax.Array) -> jax.Array:
        """The array as ([copies,] rows, columns)."""

    @abc.abstractmethod
    def array(self, matrix: jax.Array) -> jax.Array:
        """The linear transpose of `matrix`; its inverse where that only rearranges."""

    @property
    def size(self) -> int:
        """Number of elements of all matrices."""
        return max(self.copies, 1) * self.rows * self.columns


@dataclasses.dataclass(frozen=True)
class GroupedAxes(Form):
    """Groups of axes become the batch, the rows and the columns.

    Attributes:
      shape: the array's.
      batch: its batch axes, in order.
      first: axes that become rows, in order.
      second: axes that become columns, in order.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]

    def _length(self, axes: Sequence[int]) -> int:
        return math.prod(self.shape[i] for i in axes)

    @property
    def copies(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Form`."""
        return self._length(self.batch) if self.batch else 0

    @property
    def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Form`."""
        return self._length(self.first)

    @property
    def columns(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Form`."""
        return self._length(self.second)

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.batch, *self.first, *self.second)

    def matrix(self, array: jax.Array) -> jax.Array:
        """See `Form`."""
        batch = (self.copies,) if self.batch else ()
        return lax.reshape(lax.transpose(array, self._order), (*batch, self.rows, self.columns))

    def array(self, matrix: jax.Array) -> jax.Array:
        """See `Form`."""
        ordered = lax.reshape(matrix, tuple(self.shape[i] for i in self._order))
        back = sorted(range(len(self.shape)), key=lambda i: self._order[i])
        return lax.transpose(ordered, back)


@dataclasses.dataclass(frozen=True)
class Patches(Form):
    """The windows of a convolution's input: (batch × places, window × channels).

    A result's gradient is read so as well where a product yields, for each place of the input, what
    it adds to each place of the result: `array` then adds those parts up.

    Attributes:
      shape: the input's.
      lhs_spec: its batch axis, channel axis and spatial axes.
      places: sizes of the convolution's output space.
      window: sizes of its window.
      strides: between windows.
      padding: pairs, for each spatial axis.
      lhs_dilation: of the input.
      rhs_dilation: of the window.
      backwards: whether a window is read from its end, as a result's is by the input.
    """

    shape: tuple[int, ...]
    lhs_spec: tuple[int, ...]
    places: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    backwards: bool = False
    copies = 0

    @property
    def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Form`."""
        return self.shape[self.lhs_spec[0]] * math.prod(self.places)

    @property
    def columns(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Form`."""
        return self.shape[self.lhs_spec[1]] * math.prod(self.window)

    def matrix(self, array: jax.Array) -> jax.Array:
        """See `Form`."""
        batch, feature, *space = self.lhs_spec
        x = lax.transpose(array, (batch, *space, feature))
        config = [(0, 0, 0)]
        for (low, high), dilation in zip(self.padding, self.lhs_dilation, strict=True):
            config.append((low, high, dilation - 1))
        x = lax.pad(x, jnp.zeros((), x.dtype), [*config, (0, 0, 0)])
        taps = []
        step = -1 if self.backwards else 1
        for offsets in itertools.product(*(range(n)[::step] for n in self.window)):
            starts = [k * d for k, d in zip(offsets, self.rhs_dilation, strict=True)]
            ends = [
                s + (n - 1) * stride + 1
                for s, n, stride in zip(starts, self.places, self.strides, strict=True)
            ]
            taps.append(
                lax.slice(
                    x, (0, *starts, 0), (x.shape[0], *ends, x.shape[-1]), (1, *self.strides, 1)
                )
            )
        patches = lax.concatenate(taps, x.ndim - 1)
        return lax.reshape(patches, (self.rows, self.columns))

    def array(self, matrix: jax.Array) -> jax.Array:
        """See `Form`."""
        aval = jax.ShapeDtypeStruct(self.shape, matrix.dtype)
        (back,) = jax.linear_transpose(self.matrix, aval)(matrix)
        return back
