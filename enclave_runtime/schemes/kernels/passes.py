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
from typing import Any, NamedTuple

import numpy as np

from enclave_runtime.crypto.keys import compiled
from enclave_runtime.schemes.kernels.axis_map import AxisMap, block_size
from enclave_runtime.schemes.kernels.vectors import (
    TILE_BYTES,
    VECTOR,
    address_of,
    butterflies,
    gather,
    lane_count,
    load,
    shifted,
    store,
    transposed,
)

STRIPS = 4  # side by side, copied together: far rows cost less in runs of 256 bytes


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


class _Table(NamedTuple):
    """The address of a gather's order, and of its scale."""

    order: Any
    scale: Any


class _Rounds(NamedTuple):
    """What all rounds of a task have in common: n, `Blocks`, the overlapping block's gather."""

    size: Any
    blocks: Any
    level: _Table
    buffer: Any


class _Strips(NamedTuple):
    """Strips of a tile's width: rows are `row` elements apart, and a row's strips `strip`."""

    address: Any
    row: Any
    strip: Any


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
    level = np.full(axis_map.size, blocks.size**-0.5)
    level[blocks.bare : blocks.bare + axis_map.size % blocks.size] = 1
    scale = axis_map.scale.copy()
    scale[:, :-1] *= level
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


# Kernels


@compiled
def _transform_block(source, table, size, buffer, target):
    """One gather and transform of `size` rows; `target` is where the first is written."""
    lanes = lane_count(target)
    order, scale = table.order, table.scale
    if size == 64:
        for i in range(0, 64, 8):
            for v in range(0, lanes, VECTOR):
                rows = butterflies(gather(source, v, order, scale, i, 8))
                store(buffer, i * lanes + v, lanes, rows)
        for i in range(8):
            for v in range(0, lanes, VECTOR):
                rows = butterflies(load(buffer, i * lanes + v, 8 * lanes, 8))
                store(target, i * lanes + v, 8 * lanes, rows)
        return
    for i in range(size):
        for v in range(0, lanes, VECTOR):
            store(buffer, i * lanes + v, lanes, gather(source, v, order, scale, i, 1))
    distance = 1
    while distance < size:
        for i in range(size):
            if not i & distance:
                for v in range(0, lanes, VECTOR):
                    place, apart = i * lanes + v, distance * lanes
                    store(buffer, place, apart, butterflies(load(buffer, place, apart, 2)))
        distance *= 2
    for at in range(0, size * lanes, VECTOR):
        store(target, at, lanes, load(buffer, at, lanes, 1))


@compiled
def _moved(table, by):
    """The table `by` positions on."""
    return _Table(shifted(table.order, by), shifted(table.scale, by))


@compiled
def _round(rounds, source, table, target):
    """One gather and one H, from tile to tile; see `Blocks`."""
    lanes = lane_count(target)
    size, blocks, buffer = rounds.size, rounds.blocks, rounds.buffer
    tail, count = size % blocks.size, size // blocks.size
    for number in range(count):
        at = number * blocks.size if number < count - 1 else blocks.last
        place = shifted(target, at * lanes)
        _transform_block(source, _moved(table, at), blocks.size, buffer, place)
    if tail:
        for i in range(blocks.bare, blocks.bare + tail):
            for v in range(0, lanes, VECTOR):
                rows = gather(source, v, table.order, table.scale, i, 1)
                store(target, i * lanes + v, lanes, rows)
        # In place: a block is gathered into the buffer before any of it is written.
        place = shifted(target, blocks.overlapping * lanes)
        _transform_block(place, rounds.level, blocks.size, buffer, place)


@compiled
def _all_rounds(rounds, count, tile, table, first, second):
    """Does `count` rounds, by way of two more tiles; the second may be the one it starts from.

    Returns the tile that holds the result, and the last gather's table.
    """
    current, mixed, spare = tile, first, second
    for _ in range(count):
        _round(rounds, current, table, mixed)
        current, mixed, spare = mixed, spare, mixed
        table = _moved(table, rounds.size)
    return current, table


@compiled
def _copy_rows(source, target, count, width):
    """Copies `count` rows of `width` elements between two `_Strips`."""
    lanes = lane_count(source.address)
    whole = width // lanes
    for i in range(count):
        for u in range(whole):
            for v in range(0, lanes, VECTOR):
                vectors = load(source.address, i * source.row + u * source.strip + v, lanes, 1)
                store(target.address, i * target.row + u * target.strip + v, lanes, vectors)
        for v in range(width - whole * lanes):
            element = source.address[i * source.row + whole * source.strip + v]
            target.address[i * target.row + whole * target.strip + v] = element


@compiled
def mix_strips(plan, scratch, start, stop):
    """Maps the middle axis in groups of strips of columns; tasks are outer index times group."""
    copies, gathers, size = plan.order.shape
    rows, kept, inner = plan.rows, plan.kept, plan.inner
    tables = _Table(address_of(plan.order), address_of(plan.scale))
    level = _Table(address_of(plan.same), address_of(plan.level))
    rounds = _Rounds(size, plan.blocks, level, address_of(scratch.block))
    source, extra, target = (
        address_of(plan.source),
        address_of(plan.extra),
        address_of(plan.target),
    )
    first, second = address_of(scratch.first), address_of(scratch.second)
    tiles = address_of(scratch.tiles)
    lanes = lane_count(target)
    group, apart, more = STRIPS * lanes, size * lanes, size - rows
    groups = (inner + group - 1) // group
    for task in range(start, stop):
        index, column = task // groups, task % groups * group
        width = min(group, inner - column)
        place = shifted(source, index * rows * inner + column)
        _copy_rows(_Strips(place, inner, lanes), _Strips(tiles, lanes, apart), rows, width)
        place, below = shifted(extra, index * more * inner + column), shifted(tiles, rows * lanes)
        _copy_rows(_Strips(place, inner, lanes), _Strips(below, lanes, apart), more, width)
        own = _moved(tables, index * copies // plan.outer * gathers * size)
        for strip in range(0, width, lanes):
            tile = shifted(tiles, strip * size)
            mixed, table = _all_rounds(rounds, gathers - 1, tile, own, first, second)
            for i in range(kept):
                for v in range(0, lanes, VECTOR):
                    vectors = gather(mixed, v, table.order, table.scale, i, 1)
                    store(tile, i * lanes + v, lanes, vectors)
        place = shifted(target, index * kept * inner + column)
        _copy_rows(_Strips(tiles, lanes, apart), _Strips(place, inner, lanes), kept, width)


@compiled
def mix_rows(plan, scratch, start, stop):
    """Maps the last axis of (copies, rows, n), in groups of as many rows as there are lanes.

    Tasks are copy times group.
    """
    copies, gathers, size = plan.order.shape
    rows = plan.outer // copies
    tables = _Table(address_of(plan.order), address_of(plan.scale))
    level = _Table(address_of(plan.same), address_of(plan.level))
    rounds = _Rounds(size, plan.blocks, level, address_of(scratch.block))
    source, target = address_of(plan.source), address_of(plan.target)
    first, second = address_of(scratch.first), address_of(scratch.second)
    lanes = lane_count(target)
    groups = (rows + lanes - 1) // lanes
    for task in range(start, stop):
        copy, row = task // groups, task % groups * lanes
        base = (copy * rows + row) * size
        height = min(lanes, rows - row)
        whole = size - size % lanes if height == lanes else 0
        for j in range(0, whole, lanes):
            for v in range(0, lanes, VECTOR):
                for u in range(j, j + lanes, VECTOR):
                    square = transposed(load(source, base + v * size + u, size, VECTOR))
                    store(second, u * lanes + v, lanes, square)
        for v in range(height):
            for j in range(whole, size):
                second[j * lanes + v] = source[base + v * size + j]
        own = _moved(tables, copy * gathers * size)
        mixed, table = _all_rounds(rounds, gathers - 1, second, own, first, second)
        for j in range(0, whole, lanes):
            for v in range(0, lanes, VECTOR):
                for u in range(j, j + lanes, VECTOR):
                    square = gather(mixed, v, table.order, table.scale, u, VECTOR)
                    store(target, base + v * size + u, size, transposed(square))
        for j in range(whole, size):
            for v in range(height):
                element = mixed[table.order[j] * lanes + v]
                target[base + v * size + j] = element * table.scale[j]
