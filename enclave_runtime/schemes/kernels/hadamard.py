"""Mixing: dense, well-conditioned maps of an axis that cost a few passes over memory.

An axis of size n is multiplied by ``A = G3 H G2 H G1``, or by one round ``G H`` more on the
left. Each G is a gather with scale,
``(G x)[i] = scale[i] * x[order[i]]``, and H is the normalised Hadamard transform of blocks
of ``b = min(64, largest power of two <= n)`` positions. Where b does not divide n, one more
block, the *tail*, covers the last b positions, so that every position lies in a full block.

H is orthogonal, so A's condition number is that of the scales. Unlike a permutation, A puts
a part of every entry into hundreds of others. It is a linear map all the same: whoever learns
about n independent inputs of it solves for A. What a key drawn here protects is the business
of the scheme that uses it.

Speed comes from tiles of n rows and 64 bytes of lanes. Along the last axis, a tile is that
many rows of the array, transposed; along any other axis it is a strip of columns. A gather
is fused into the load of a block, whose butterflies run on vectors of lanes.

The input is data alone: no element of it is ever an index or a branch. Intermediate results
stay in private memory; `out` may be shared with the host, which sees only finished elements.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import scipy.linalg

from enclave_runtime.crypto.keys import KeyStream, compiled
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

BLOCK = 64  # positions in a Hadamard block; two passes of radix 8
STRIPS = 4  # side by side, copied together: far rows cost less in runs of 256 bytes
DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
# Below this many elements, handing work to another thread (0.1 to 0.3 ms, mostly until it
# wakes and gets the GIL) costs more than it saves.
PARALLEL_ELEMENTS = 1 << 19
THREADS = os.cpu_count() or 1

_pool = concurrent.futures.ThreadPoolExecutor(THREADS, "hadamard")


# Group elements


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
                matrix = _dense_transform(self.size, self.tail_first) @ matrix
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


@compiled
def _reversed(order, scale):
    """The transposed gathers, last first."""
    undo, taken = np.empty_like(order), np.empty_like(scale)
    for copy in range(order.shape[0]):
        for stage in range(order.shape[1]):
            last = order.shape[1] - 1 - stage
            for i in range(order.shape[2]):
                place = order[copy, stage, i]
                undo[copy, last, place] = i
                taken[copy, last, place] = scale[copy, stage, i]
    return undo, taken


def _block_size(size: int) -> int:
    return min(BLOCK, 1 << (size.bit_length() - 1))


def _dense_transform(size: int, tail_first: bool) -> np.ndarray:
    """H as a matrix."""
    block = _block_size(size)
    butterfly = scipy.linalg.hadamard(block) / math.sqrt(block)
    blocks, tail = np.eye(size), np.eye(size)
    for start in range(0, size - block + 1, block):
        blocks[start : start + block, start : start + block] = butterfly
    if size % block:
        tail[-block:, -block:] = butterfly
    return blocks @ tail if tail_first else tail @ blocks


# Kernels


@compiled
def _transform_block(source, order, scale, block, buffer, target):
    """One gather and transform of `block` rows; `target` is where the first is written."""
    lanes = lane_count(target)
    if block == 64:
        for i in range(0, 64, 8):
            for v in range(0, lanes, VECTOR):
                rows = butterflies(gather(source, v, order, scale, i, 8))
                store(buffer, i * lanes + v, lanes, rows)
        for i in range(8):
            for v in range(0, lanes, VECTOR):
                rows = butterflies(load(buffer, i * lanes + v, 8 * lanes, 8))
                store(target, i * lanes + v, 8 * lanes, rows)
        return
    for i in range(block):
        for v in range(0, lanes, VECTOR):
            store(buffer, i * lanes + v, lanes, gather(source, v, order, scale, i, 1))
    distance = 1
    while distance < block:
        for i in range(block):
            if not i & distance:
                for v in range(0, lanes, VECTOR):
                    place, apart = i * lanes + v, distance * lanes
                    store(buffer, place, apart, butterflies(load(buffer, place, apart, 2)))
        distance *= 2
    for at in range(0, block * lanes, VECTOR):
        store(target, at, lanes, load(buffer, at, lanes, 1))


@compiled
def _round(source, size, order, scale, plan, level, same, buffer, target):
    """One gather and one H, from tile to tile; see `_Prepared`."""
    lanes = lane_count(target)
    block, last, bare, overlapping = plan
    tail = size % block
    blocks = size // block
    for number in range(blocks):
        at = number * block if number < blocks - 1 else last
        orders, scales, place = shifted(order, at), shifted(scale, at), shifted(target, at * lanes)
        _transform_block(source, orders, scales, block, buffer, place)
    if tail:
        for i in range(bare, bare + tail):
            for v in range(0, lanes, VECTOR):
                store(target, i * lanes + v, lanes, gather(source, v, order, scale, i, 1))
        # In place: a block is gathered into the buffer before any of it is written.
        place = shifted(target, overlapping * lanes)
        _transform_block(place, same, level, block, buffer, place)


@compiled
def _copy_rows(source, row, strip, target, target_row, target_strip, count, width):
    """Copies `count` rows of `width` elements, in strips of a tile's width.

    Rows are `row` elements apart in the source, and a row's strips are `strip` apart.
    """
    lanes = lane_count(source)
    whole = width // lanes
    for i in range(count):
        for u in range(whole):
            for v in range(0, lanes, VECTOR):
                vectors = load(source, i * row + u * strip + v, lanes, 1)
                store(target, i * target_row + u * target_strip + v, lanes, vectors)
        for v in range(width - whole * lanes):
            element = source[i * row + whole * strip + v]
            target[i * target_row + whole * target_strip + v] = element


@compiled
def _mix_strips(source, extra, target, rows, kept, inner, prepared, scratch, start, stop):
    """Maps the middle axis of (outer, rows, inner), in groups of strips of columns.

    `extra` holds more rows, (outer, n - rows, inner), below each of the source's; `kept`
    rows of the result are written. Tasks `start` to `stop` are outer index times group.
    """
    order, scale, plan, level, same = prepared
    copies, gathers, size = order.shape
    orders, scales, level, same = (
        address_of(order),
        address_of(scale),
        address_of(level),
        address_of(same),
    )
    outer, more = target.size // (kept * inner), size - rows
    source, extra, target = address_of(source), address_of(extra), address_of(target)
    first, second = address_of(scratch[0]), address_of(scratch[1])
    buffer, tiles = address_of(scratch[2]), address_of(scratch[3])
    lanes = lane_count(target)
    group, apart = STRIPS * lanes, size * lanes
    groups = (inner + group - 1) // group
    for task in range(start, stop):
        index, column = task // groups, task % groups * group
        table = index * copies // outer * gathers * size
        width = min(group, inner - column)
        place = shifted(source, index * rows * inner + column)
        _copy_rows(place, inner, lanes, tiles, lanes, apart, rows, width)
        place, below = shifted(extra, index * more * inner + column), shifted(tiles, rows * lanes)
        _copy_rows(place, inner, lanes, below, lanes, apart, more, width)
        for strip in range(0, width, lanes):
            tile = shifted(tiles, strip * size)
            order, scale = shifted(orders, table), shifted(scales, table)
            mixed, spare, current = first, second, tile
            for _ in range(gathers - 1):
                _round(current, size, order, scale, plan, level, same, buffer, mixed)
                current, mixed, spare = mixed, spare, mixed
                order, scale = shifted(order, size), shifted(scale, size)
            for i in range(kept):
                for v in range(0, lanes, VECTOR):
                    store(tile, i * lanes + v, lanes, gather(current, v, order, scale, i, 1))
        place = shifted(target, index * kept * inner + column)
        _copy_rows(tiles, lanes, apart, place, inner, lanes, kept, width)


@compiled
def _mix_rows(source, target, rows, prepared, scratch, start, stop):
    """Maps the last axis of (copies, rows, n), in groups of as many rows as there are lanes.

    Tasks `start` to `stop` are copy times group.
    """
    order, scale, plan, level, same = prepared
    _, gathers, size = order.shape
    orders, scales, level, same = (
        address_of(order),
        address_of(scale),
        address_of(level),
        address_of(same),
    )
    source, target = address_of(source), address_of(target)
    first, second, buffer = address_of(scratch[0]), address_of(scratch[1]), address_of(scratch[2])
    lanes = lane_count(target)
    groups = (rows + lanes - 1) // lanes
    for task in range(start, stop):
        copy, row = task // groups, task % groups * lanes
        base = (copy * rows + row) * size
        height = min(lanes, rows - row)
        whole = size - size % lanes if height == lanes else 0
        table = copy * gathers * size
        order, scale = shifted(orders, table), shifted(scales, table)
        for j in range(0, whole, lanes):
            for v in range(0, lanes, VECTOR):
                for u in range(j, j + lanes, VECTOR):
                    square = transposed(load(source, base + v * size + u, size, VECTOR))
                    store(second, u * lanes + v, lanes, square)
        for v in range(height):
            for j in range(whole, size):
                second[j * lanes + v] = source[base + v * size + j]
        mixed, spare, current = first, second, second
        for _ in range(gathers - 1):
            _round(current, size, order, scale, plan, level, same, buffer, mixed)
            current, mixed, spare = mixed, spare, mixed
            order, scale = shifted(order, size), shifted(scale, size)
        for j in range(0, whole, lanes):
            for v in range(0, lanes, VECTOR):
                for u in range(j, j + lanes, VECTOR):
                    square = gather(current, v, order, scale, u, VECTOR)
                    store(target, base + v * size + u, size, transposed(square))
        for j in range(whole, size):
            for v in range(height):
                target[base + v * size + j] = current[order[j] * lanes + v] * scale[j]


# Application


class _Prepared(NamedTuple):
    """What the kernels read of a map.

    Attributes:
      order: int32[copies, gathers, n].
      scale: dtype[copies, gathers, n], with ``b**-0.5`` multiplied in where a block is gathered.
      plan: b; where the last gathered block starts; where the ``n % b`` rows start that
        are gathered bare; where the block starts that overlaps them, done last and in place.
      level: dtype[b], all ``b**-0.5``: the scale of the last.
      same: int32[b], the order of the last: 0, 1, 2, ...
    """

    order: np.ndarray
    scale: np.ndarray
    plan: tuple[int, int, int, int]
    level: np.ndarray
    same: np.ndarray

    def __repr__(self) -> str:
        return "_Prepared(<secret>)"


def _prepare(axis_map: AxisMap, dtype: np.dtype) -> _Prepared:
    size, block = axis_map.size, _block_size(axis_map.size)
    whole = size - size % block
    if axis_map.tail_first:
        plan = block, size - block, whole - block, whole - block
    else:
        plan = block, whole - block, whole, size - block
    level = np.full(size, block**-0.5)
    level[plan[2] : plan[2] + size % block] = 1
    scale = axis_map.scale.copy()
    scale[:, :-1] *= level
    order = np.ascontiguousarray(axis_map.order, np.int32)
    same = np.arange(block, dtype=np.int32)
    return _Prepared(order, scale.astype(dtype), plan, np.full(block, block**-0.5, dtype), same)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that starts on a cache line, which NumPy's do not: a strip is then one line."""
    count = math.prod(shape)
    memory = np.empty(count * dtype.itemsize + TILE_BYTES, np.uint8)
    offset = -memory.ctypes.data % TILE_BYTES
    return memory[offset : offset + count * dtype.itemsize].view(dtype).reshape(shape)


def in_parallel(run: Callable[[int, int], None], tasks: int, elements: int) -> None:
    """Calls ``run(start, stop)`` on ranges that add up to the tasks."""
    parts = min(tasks, THREADS) if elements >= PARALLEL_ELEMENTS else 1
    bounds = [tasks * part // parts for part in range(parts + 1)]
    others = [_pool.submit(run, *bounds[part : part + 2]) for part in range(1, parts)]
    run(*bounds[:2])
    for other in others:
        other.result()


def _apply(
    source: np.ndarray,
    axis: int,
    axis_map: AxisMap,
    extra: np.ndarray | None,
    target: np.ndarray,
) -> None:
    """Maps one axis; `target` may be `source` where their shapes agree."""
    if not target.size:
        return
    prepared = _prepare(axis_map, source.dtype)
    size, rows, kept = axis_map.size, source.shape[axis], target.shape[axis]
    outer, inner = math.prod(source.shape[:axis]), math.prod(source.shape[axis + 1 :])
    lanes = TILE_BYTES // source.dtype.itemsize
    flat_source, flat_target = source.reshape(-1), target.reshape(-1)
    # One signature of each kernel serves writable and read-only sources.
    flat_source.flags.writeable = False

    strips = min(STRIPS, -(-inner // lanes))

    def scratch() -> tuple[np.ndarray, ...]:
        lengths = (size, size, prepared.plan[0], strips * size)
        return tuple(_empty((length * lanes,), source.dtype) for length in lengths)

    if inner == 1 and rows == kept == size:
        group_rows = outer // axis_map.copies

        def run(start: int, stop: int) -> None:
            _mix_rows(flat_source, flat_target, group_rows, prepared, scratch(), start, stop)

        tasks = axis_map.copies * -(-group_rows // lanes)
    else:
        flat_extra = (source[:0] if extra is None else extra).reshape(-1)
        flat_extra.flags.writeable = False

        def run(start: int, stop: int) -> None:
            _mix_strips(
                *(flat_source, flat_extra, flat_target, rows, kept, inner),
                *(prepared, scratch(), start, stop),
            )

        tasks = outer * -(-inner // (STRIPS * lanes))
    in_parallel(run, tasks, outer * size * inner)


def _transform(
    name: str,
    x: np.ndarray,
    maps: Mapping[int, AxisMap],
    extra: np.ndarray | None,
    keep: int | None,
    out: np.ndarray | None,
) -> np.ndarray:
    x = np.require(x, requirements=["C", "A"])
    rows_axis = x.ndim - 2
    if x.dtype not in DTYPES or x.ndim < 1:
        raise ValueError(f"{name}: expected float32 or float64 of rank 1 or more, got {x.dtype}")
    if (extra is not None or keep is not None) and rows_axis not in maps:
        raise ValueError(f"{name}: extra rows need a map of axis {rows_axis}")
    sizes = list(x.shape)
    if extra is not None:
        extra = np.require(extra, requirements=["C", "A"])
        cut = (*x.shape[:rows_axis], *x.shape[rows_axis + 1 :])
        got = (*extra.shape[:rows_axis], *extra.shape[rows_axis + 1 :])
        if extra.dtype != x.dtype or extra.ndim != x.ndim or cut != got:
            raise ValueError(
                f"{name}: extra rows {extra.dtype}{extra.shape} do not fit {x.dtype}{x.shape}"
            )
        sizes[rows_axis] += extra.shape[rows_axis]
    for axis, axis_map in maps.items():
        if not 0 <= axis < x.ndim or axis_map.size != sizes[axis]:
            raise ValueError(f"{name}: a map of size {axis_map.size} on axis {axis} of {sizes}")
        if axis_map.copies not in (1, sizes[0] if axis else 1):
            raise ValueError(f"{name}: {axis_map.copies} copies on axis {axis} of {sizes}")
    if 0 in maps and any(axis_map.copies != 1 for axis_map in maps.values()):
        # The two would not commute, and a map across the batch would undo its keys' independence.
        raise ValueError(f"{name}: a map of axis 0 beside copies, one for each index of axis 0")
    if keep is not None:
        if not 0 <= keep <= sizes[rows_axis]:
            raise ValueError(f"{name}: cannot keep {keep} of {sizes[rows_axis]} rows")
        sizes[rows_axis] = keep
    shape = tuple(sizes)
    if out is None:
        result = private = _empty(shape, x.dtype)
    elif out.shape == shape and out.dtype == x.dtype and out.flags.carray:
        # The host may see `out`, and must not see an array that lacks some axis's map.
        result, private = out, _empty(shape, x.dtype) if len(maps) > 1 else out
    else:
        raise ValueError(f"{name}: out is not a C-contiguous {x.dtype}{shape}")
    # The axis that grows or shrinks comes first, so that the others can work in place.
    axes = sorted(maps, key=lambda axis: axis != rows_axis)
    for axis in axes:
        target = result if axis == axes[-1] else private
        _apply(x, axis, maps[axis], extra, target)
        x, extra = target, None
    if not axes:
        result[...] = x
    return result


def mix(
    x: np.ndarray,
    maps: Mapping[int, AxisMap],
    *,
    extra: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Applies ``maps[axis]`` along each axis that has one.

    Args:
      x: float32 or float64 of any rank >= 1. With `copies` > 1, axis 0 is the batch, and
        copy i maps ``x[i]``.
      maps: by axis, counted from 0; axes without a map stay as they are.
      extra: rows that are appended along axis ``rank - 2`` first, of x's shape otherwise;
        the axis's map then has the size of both.
      out: C-contiguous, not overlapping x; takes the result. Only finished elements are
        written to it.

    Returns:
      `out`, or a new array: of x's shape, with the extra rows.

    Raises:
      ValueError: shapes, sizes or dtypes do not fit each other.

    >>> a = draw(KeyStream(bytes(32)), 3, condition=4)
    >>> x = np.ones((2, 3))
    >>> bool(np.allclose(mix(x, {1: a}), x @ a.dense().T))
    True
    """
    return _transform("mix", x, maps, extra, None, out)


def unmix(
    y: np.ndarray,
    maps: Mapping[int, AxisMap],
    *,
    keep: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Applies maps as `mix` does, and keeps the first `keep` positions along axis ``rank - 2``.

    Called with the maps' inverses, ``unmix(mix(x, A, extra=r), inverse, keep=len(x)) == x``
    up to rounding.

    >>> a = draw(KeyStream(bytes(32)), 5, condition=4)
    >>> x, decoys = np.ones((3, 2)), np.zeros((2, 2))
    >>> bool(np.allclose(unmix(mix(x, {0: a}, extra=decoys), {0: a.inverse()}, keep=3), x))
    True
    """
    return _transform("unmix", y, maps, None, keep, out)


@functools.cache
def warm_up() -> None:
    """Compiles every kernel, or loads it from Numba's cache: seconds, or a fraction of one."""
    axis_map = draw(KeyStream(bytes(32)), 1, condition=1).inverse()
    for dtype in DTYPES:
        mix(np.zeros((1, 2), dtype), {0: axis_map})
        mix(np.zeros((2, 1), dtype), {1: axis_map})
    KeyStream(bytes(32)).normal(1)
