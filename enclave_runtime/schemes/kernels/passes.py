"""Passes: one axis of an array multiplied by its map, tile by tile.

Speed comes from tiles of n rows and 64 bytes of lanes. Along the last axis, a tile is that
many rows of the array, transposed; along any other axis it is a strip of columns. A gather
is fused into the load of a block, whose butterflies run on vectors of lanes.

The input is data alone: no element of it is ever an index or a branch. Intermediate results
stay in the scratch, which is private memory; the target may be shared with the host, which
sees only finished elements. Nothing is checked here: a `Pass` that does not fit its arrays
reads and writes beyond them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from enclave_runtime.compiled.kernel import Kernel
from enclave_runtime.compiled.layout import STRIPS, TILE_BYTES
from enclave_runtime.schemes.kernels.axis_map import AxisMap, block_size

mix_rows = Kernel("enclave_runtime.compiled.definitions.tiles", "mix_rows")
mix_strips = Kernel("enclave_runtime.compiled.definitions.tiles", "mix_strips")


class Blocks(NamedTuple):
    """Where the transform H works along an axis of n positions.

    Attributes:
      size: b, the positions of a block.
      last: where the last block starts that is gathered.
      bare: where the ``n % b`` positions start that are gathered bare.
      overlapping: where the block starts that overlaps them, done last and in place.
    """

    size: int
    last: int
    bare: int
    overlapping: int

    def level(self, axis_size: int) -> np.ndarray:
        """What normalises H, by the place that a gather fills: 1 where none follows at once."""
        level = np.full(axis_size, self.size**-0.5)
        level[self.bare : self.bare + axis_size % self.size] = 1
        return level


class Pass(NamedTuple):
    """All that the kernels read of one pass, and where they write.

    Arrays are C-contiguous, of one float dtype where nothing else is said, and do not overlap,
    except that the target may be the source where ``rows == kept == n``.

    Attributes:
      source: dtype[outer * rows * inner], the array whose middle axis is mapped.
      extra: dtype[outer * (n - rows) * inner], more rows, below each of the source's.
      target: dtype[outer * kept * inner], takes the first `kept` rows of each result.
      outer: how many independent matrices there are.
      rows: of each in the source.
      kept: of each in the target.
      inner: columns of each.
      order: int32[copies, gathers, n], as in `AxisMap`; `copies` divides `outer`.
      scale: dtype[copies, gathers, n], with ``b**-0.5`` multiplied in where a block is gathered.
      level: dtype[b], all ``b**-0.5``: the scale of the overlapping block.
      same: int32[b], its order: 0, 1, 2, ...
      blocks: where H works.
    """

    source: np.ndarray
    extra: np.ndarray
    target: np.ndarray
    outer: int
    rows: int
    kept: int
    inner: int
    order: np.ndarray
    scale: np.ndarray
    level: np.ndarray
    same: np.ndarray
    blocks: Blocks

    def __repr__(self) -> str:
        return "Pass(<secret>)"

    @property
    def elements(self) -> int:
        """How many elements go through a tile."""
        return self.outer * self.inner * self.order.shape[2]

    @property
    def along_rows(self) -> bool:
        """Whether the axis is the array's last and keeps its length: `mix_rows` is for those."""
        return self.inner == 1 and self.rows == self.kept == self.order.shape[2]

    @property
    def tasks(self) -> int:
        """How many tasks its kernel divides the work into."""
        lanes = _lanes(self.source)
        if self.along_rows:
            copies = self.order.shape[0]
            return copies * -(-(self.outer // copies) // lanes)
        return self.outer * -(-self.inner // (STRIPS * lanes))


class Scratch(NamedTuple):
    """Private memory of one thread, each array dtype[… * lanes] and on a cache line.

    Attributes:
      first: a tile of n rows.
      second: another.
      block: b rows, between the two halves of a block's butterflies.
      tiles: as many tiles as strips are copied together.
    """

    first: np.ndarray
    second: np.ndarray
    block: np.ndarray
    tiles: np.ndarray


def planned(
    source: np.ndarray,
    axis: int,
    axis_map: AxisMap,
    extra: np.ndarray | None,
    target: np.ndarray,
) -> Pass:
    """The pass that maps one axis of a C-contiguous array.

    Args:
      source: float32 or float64 of any rank.
      axis: counted from 0.
      axis_map: of the size of source and extra together along the axis; `copies` is 1 or
        divides what lies before the axis.
      extra: of the source's shape but along the axis.
      target: of the source's shape but along the axis; may be `source` where they agree.
    """
    blocks = blocks_of(axis_map)
    scale = axis_map.scale.copy()
    scale[:, :-1] *= blocks.level(axis_map.size)
    flat = source.reshape(-1), (source[:0] if extra is None else extra).reshape(-1)
    for array in flat:
        # One signature of each kernel serves writable and read-only sources.
        array.flags.writeable = False
    return Pass(
        *flat,
        target.reshape(-1),
        outer=math.prod(source.shape[:axis]),
        rows=source.shape[axis],
        kept=target.shape[axis],
        inner=math.prod(source.shape[axis + 1 :]),
        order=np.ascontiguousarray(axis_map.order, np.int32),
        scale=scale.astype(source.dtype),
        level=np.full(blocks.size, blocks.size**-0.5, source.dtype),
        same=np.arange(blocks.size, dtype=np.int32),
        blocks=blocks,
    )


def blocks_of(axis_map: AxisMap) -> Blocks:
    """Where H works for a map."""
    size, block = axis_map.size, block_size(axis_map.size)
    whole = size - size % block
    if axis_map.tail_first:
        return Blocks(block, size - block, whole - block, whole - block)
    return Blocks(block, whole - block, whole, size - block)


def scratch_for(plan: Pass) -> Scratch:
    """Memory for one thread's share of a pass."""
    size, lanes = plan.order.shape[2], _lanes(plan.source)
    strips = min(STRIPS, -(-plan.inner // lanes))
    lengths = (size, size, plan.blocks.size, strips * size)
    return Scratch(*(aligned_empty((length * lanes,), plan.source.dtype) for length in lengths))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that starts on a cache line, which NumPy's do not: a strip is then one line."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + TILE_BYTES, np.uint8)
    offset = -memory.ctypes.data % TILE_BYTES
    return memory[offset : offset + size].view(dtype).reshape(shape)


def run(plan: Pass, start: int, stop: int) -> None:
    """Does tasks `start` to `stop` of a pass, in memory of its own."""
    kernel = mix_rows if plan.along_rows else mix_strips
    kernel(plan, scratch_for(plan), start, stop)


def _lanes(array: np.ndarray) -> int:
    return TILE_BYTES // array.itemsize
