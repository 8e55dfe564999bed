"""Kernels that multiply an axis by its map, tile by tile; for Numba.

They read a `Pass` and use a `Scratch` of `enclave_runtime.schemes.kernels.passes`, where their work
is described. Nothing is checked: what does not fit is read and written beyond its end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from enclave_runtime.compiled.definitions.vectors import (
    VECTOR,
    address_of,
    butterflies,
    gather,
    lane_count,
    load,
    prefetch,
    shifted,
    store,
    transposed,
)
from enclave_runtime.compiled.kernel import compiled
from enclave_runtime.compiled.layout import STRIPS

_AHEAD = 8  # rows that are fetched before they are read


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
def all_rounds(rounds, count, tile, table, first, second):
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
def copy_rows(source, target, count, width):
    """Copies `count` rows of `width` elements between two `_Strips`."""
    lanes = lane_count(source.address)
    whole = width // lanes
    for i in range(count):
        if source.row != lanes:  # rows in a row come by themselves
            for u in range(whole):
                prefetch(source.address, (i + _AHEAD) * source.row + u * source.strip)
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
        copy_rows(_Strips(place, inner, lanes), _Strips(tiles, lanes, apart), rows, width)
        place, below = shifted(extra, index * more * inner + column), shifted(tiles, rows * lanes)
        copy_rows(_Strips(place, inner, lanes), _Strips(below, lanes, apart), more, width)
        own = _moved(tables, index * copies // plan.outer * gathers * size)
        for strip in range(0, width, lanes):
            tile = shifted(tiles, strip * size)
            mixed, table = all_rounds(rounds, gathers - 1, tile, own, first, second)
            for i in range(kept):
                for v in range(0, lanes, VECTOR):
                    vectors = gather(mixed, v, table.order, table.scale, i, 1)
                    store(tile, i * lanes + v, lanes, vectors)
        place = shifted(target, index * kept * inner + column)
        copy_rows(_Strips(tiles, lanes, apart), _Strips(place, inner, lanes), kept, width)


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
        mixed, table = all_rounds(rounds, gathers - 1, second, own, first, second)
        for j in range(0, whole, lanes):
            for v in range(0, lanes, VECTOR):
                for u in range(j, j + lanes, VECTOR):
                    square = gather(mixed, v, table.order, table.scale, u, VECTOR)
                    store(target, base + v * size + u, size, transposed(square))
        for j in range(whole, size):
            for v in range(height):
                element = mixed[table.order[j] * lanes + v]
                target[base + v * size + j] = element * table.scale[j]
