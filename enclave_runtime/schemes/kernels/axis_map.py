"""Maps of an axis in fast form: what a pass over memory applies, and how one is drawn.

An axis of size n is multiplied by ``A = G3 H G2 H G1``, or by one round ``G H`` more on the
left. Each G is a gather with scale,
``(G x)[i] = scale[i] * x[order[i]]``, and H is the normalised Hadamard transform of blocks
of ``b = min(64, largest power of two <= n)`` positions. Where b does not divide n, one more
block, the *tail*, covers the last b positions, so that every position lies in a full block.

H is orthogonal, so A's condition number is that of the scales. Unlike a permutation, A puts
a part of every entry into hundreds of others. It is a linear map all the same: whoever learns
about n independent inputs of it solves for A. What a key drawn here protects is the business
of the scheme that uses it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from enclave_runtime.compiled.kernel import Kernel
from enclave_runtime.crypto.keys import KeyStream

BLOCK = 64  # positions in a Hadamard block; two passes of radix 8

_reversed_gathers = Kernel("enclave_runtime.compiled.definitions.sampling", "reversed_gathers")


class AxisMap(NamedTuple):
    """A map ``G … H G2 H G1`` of an axis, or `copies` of them, one for each batch index.

    Attributes:
      order: int32[copies, gathers, n], permutations; the first is applied first.
      scale: float64[copies, gathers, n], none of them 0, indexed as the gather's result is.
      tail_first: whether H transforms the tail before the blocks, and not after them.
    """

    order: np.ndarray
    scale: np.ndarray
    tail_first: bool = False

    def __repr__(self) -> str:
        return "AxisMap(<secret>)"

    @property
    def copies(self) -> int:
        """How many independent elements there are."""
        return self.order.shape[0]

    @property
    def size(self) -> int:
        """The length n of the axis."""
        return self.order.shape[2]

    def inverse(self) -> AxisMap:
        """The map ``A^-1``: ``A.inverse().dense() @ A.dense() == I``."""
        order, scale = _reversed(self.order, 1 / self.scale)
        return AxisMap(order, scale, not self.tail_first)

    def transpose(self) -> AxisMap:
        """The map ``A^T``."""
        order, scale = _reversed(self.order, self.scale)
        return AxisMap(order, scale, not self.tail_first)

    def inverse_transpose(self) -> AxisMap:
        """The map ``A^-T``, which an axis takes when its partner in a product takes A."""
        return AxisMap(self.order, 1 / self.scale, self.tail_first)

    def scaled(self, factor: float | np.ndarray) -> AxisMap:
        """The map ``factor * A``; an array holds one factor for each copy."""
        scale = self.scale.copy()
        scale[:, -1] *= np.reshape(factor, (-1, 1))
        return self._replace(scale=scale)

    def dense(self, copy: int = 0) -> np.ndarray:
        """The matrix of one copy, float64[n, n], made without the kernels: for audits."""
        matrix = np.eye(self.size)
        for stage in range(self.order.shape[1]):
            if stage:
                matrix = dense_transform(self.size, self.tail_first) @ matrix
            matrix = self.scale[copy, stage, :, None] * matrix[self.order[copy, stage]]
        return matrix


def draw(
    stream: KeyStream, size: int, *, condition: float, copies: int = 1, rounds: int = 2
) -> AxisMap:
    """Draws maps with uniform permutations and signs.

    Args:
      stream: the only source of randomness.
      size: the axis's length, at least 1.
      condition: at least 1; bounds the condition number of each map. The second gather's
        scales are log-uniform in ``[condition**-0.5, condition**0.5]``; 1 gives
        orthogonal maps.
      copies: how many independent maps to draw.
      rounds: transforms H, at least 1, of which one comes before the second gather.

    >>> a = draw(KeyStream(bytes(32)), 5, condition=1)
    >>> bool(np.allclose(a.inverse().dense() @ a.dense(), np.eye(5)))
    True
    """
    if size < 1 or not 1 <= condition < math.inf:
        raise ValueError(f"draw: size {size} or condition {condition} is below 1")
    shape = copies, rounds + 1, size
    order = stream.permutations(shape[0] * shape[1], size).reshape(shape)
    scale = stream.signs(math.prod(shape)).astype(np.float64).reshape(shape)
    if condition != 1:
        exponents = stream.uniform(copies * size).reshape(copies, size) - 0.5
        scale[:, 1] *= np.exp(exponents * math.log(condition))
    return AxisMap(order, scale)


def _reversed(order: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The transposed gathers, last first."""
    undo, taken = np.empty_like(order), np.empty_like(scale)
    _reversed_gathers(order, scale, undo, taken)
    return undo, taken


def block_size(size: int) -> int:
    """Positions in a Hadamard block of an axis of this size: b."""
    return min(BLOCK, 1 << (size.bit_length() - 1))


def dense_transform(size: int, tail_first: bool) -> np.ndarray:
    """H as a matrix."""
    block = block_size(size)
    butterfly = np.ones((1, 1))
    while len(butterfly) < block:
        butterfly = np.kron([[1, 1], [1, -1]], butterfly)
    butterfly /= math.sqrt(block)
    blocks, tail = np.eye(size), np.eye(size)
    for start in range(0, size - block + 1, block):
        blocks[start : start + block, start : start + block] = butterfly
    if size % block:
        tail[-block:, -block:] = butterfly
    return blocks @ tail if tail_first else tail @ blocks
