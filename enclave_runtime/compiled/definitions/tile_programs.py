"""The kernel that runs tile programs: several steps on a tile while it is in the cache; for Numba.

A program is int64[1 + steps, `WORDS`]: a header and the steps that
`enclave_runtime.schemes.kernels.tile_programs` describes. Nothing is checked: a program that does
not fit its arrays reads and writes beyond them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from enclave_runtime.compiled.definitions.tiles import (
    _Rounds,
    _Strips,
    _Table,
    all_rounds,
    copy_rows,
)
from enclave_runtime.compiled.definitions.vectors import (
    VECTOR,
    address_of,
    gather,
    int32_pointer,
    lane_count,
    load,
    minus,
    plus,
    plus_multiples,
    pointer_like,
    shifted,
    store,
    transposed,
)
from enclave_runtime.compiled.kernel import compiled
from enclave_runtime.compiled.layout import FACTORS, STAGED, TileStep


class _Places(NamedTuple):
    """As `enclave_runtime.schemes.kernels.passes.Blocks`."""

    size: Any
    last: Any
    bare: Any
    overlapping: Any


_LOAD, _ADD, _STORE = int(TileStep.LOAD), int(TileStep.ADD), int(TileStep.STORE)
_UNIT, _ZERO, _MAP = int(TileStep.UNIT), int(TileStep.ZERO), int(TileStep.MAP)
_SUBTRACT, _OUTER, _INNER = int(TileStep.SUBTRACT), int(TileStep.OUTER), int(TileStep.INNER)
_READ, _WRITE = int(TileStep.READ), int(TileStep.WRITE)


@compiled
def _load_across(source, stride, tile, count, width, add):
    """Rows of a tile from rows of the source, `stride` elements apart."""
    lanes = lane_count(tile)
    if width == lanes:
        for i in range(count):
            for v in range(0, lanes, VECTOR):
                vectors = load(source, i * stride + v, lanes, 1)
                if add:
                    vectors = plus(vectors, load(tile, i * lanes + v, lanes, 1))
                store(tile, i * lanes + v, lanes, vectors)
        return
    for i in range(count):
        for v in range(width):
            element = source[i * stride + v]
            if add:
                element += tile[i * lanes + v]
            tile[i * lanes + v] = element


@compiled
def _load_along(source, stride, block, tile, count, width, add):
    """Lanes from runs of the source: lanes are `stride`, groups of positions `block` apart."""
    lanes = lane_count(tile)
    whole = count - count % lanes if width == lanes else 0
    for j in range(0, whole, lanes):
        for v in range(0, lanes, VECTOR):
            for u in range(0, lanes, VECTOR):
                at = j // lanes * block + v * stride + u
                square = transposed(load(source, at, stride, VECTOR))
                place = (j + u) * lanes + v
                if add:
                    square = plus(square, load(tile, place, lanes, VECTOR))
                store(tile, place, lanes, square)
    for v in range(width):
        for j in range(whole, count):
            element = source[j // lanes * block + v * stride + j % lanes]
            if add:
                element += tile[j * lanes + v]
            tile[j * lanes + v] = element


@compiled
def _store_across(tile, target, stride, count, width):
    lanes = lane_count(tile)
    if width == lanes:
        for i in range(count):
            for v in range(0, lanes, VECTOR):
                store(target, i * stride + v, lanes, load(tile, i * lanes + v, lanes, 1))
        return
    for i in range(count):
        for v in range(width):
            target[i * stride + v] = tile[i * lanes + v]


@compiled
def _store_along(tile, target, stride, block, count, width):
    lanes = lane_count(tile)
    whole = count - count % lanes if width == lanes else 0
    for j in range(0, whole, lanes):
        for v in range(0, lanes, VECTOR):
            for u in range(0, lanes, VECTOR):
                square = transposed(load(tile, (j + u) * lanes + v, lanes, VECTOR))
                store(target, j // lanes * block + v * stride + u, stride, square)
    for v in range(width):
        for j in range(whole, count):
            target[j // lanes * block + v * stride + j % lanes] = tile[j * lanes + v]


@compiled
def _clear(tile, start, stop):
    lanes = lane_count(tile)
    for at in range(start * lanes, stop * lanes):
        tile[at] = 0


@compiled
def _map(step, index, tile, spare, block):
    """An odd number of rounds, and the last gather, back into the tile."""
    lanes = lane_count(tile)
    places = _Places(step[7], step[8], step[9], step[10])
    level = _Table(int32_pointer(step[12]), pointer_like(tile, step[11]))
    rounds = _Rounds(step[6], places, level, block)
    order = shifted(int32_pointer(step[2]), index * step[4])
    scale = shifted(pointer_like(tile, step[3]), index * step[4])
    mixed, table = all_rounds(rounds, step[5], tile, _Table(order, scale), spare, tile)
    size = step[6]
    whole = size - size % 8
    for i in range(0, whole, 8):
        for v in range(0, lanes, VECTOR):
            rows = gather(mixed, v, table.order, table.scale, i, 8)
            store(tile, i * lanes + v, lanes, rows)
    for i in range(whole, size):
        for v in range(0, lanes, VECTOR):
            rows = gather(mixed, v, table.order, table.scale, i, 1)
            store(tile, i * lanes + v, lanes, rows)


@compiled
def _subtract(tile, other, count):
    lanes = lane_count(tile)
    for at in range(0, count * lanes, VECTOR):
        store(tile, at, lanes, minus(load(tile, at, lanes, 1), load(other, at, lanes, 1)))


@compiled
def _outer(tile, factors, count, width, vectors):
    """``tile[i] += Σ factors[i, k] vectors[k]``; factors have rows up to a multiple of 8."""
    lanes = lane_count(tile)
    for i in range(0, count, 8):
        for v in range(0, lanes, VECTOR):
            rows = load(tile, i * lanes + v, lanes, 8)
            for k in range(width):
                one = load(vectors, k * lanes + v, lanes, 1)
                rows = plus_multiples(rows, factors, i * width + k, width, one)
            store(tile, i * lanes + v, lanes, rows)


@compiled
def _inner(tile, factors, count, width, vectors):
    """``vectors[k] = Σ factors[i, k] tile[i]``, for a multiple of 8 values of k."""
    lanes = lane_count(tile)
    _clear(vectors, 0, width)
    for start in range(0, count, 256):  # sums of sums round less
        stop = min(start + 256, count)
        for k in range(0, width, 8):
            for v in range(0, lanes, VECTOR):
                sums = load(vectors, k * lanes + v, lanes, 8)
                part = minus(sums, sums)
                for i in range(start, stop):
                    one = load(tile, i * lanes + v, lanes, 1)
                    part = plus_multiples(part, factors, i * width + k, 1, one)
                store(vectors, k * lanes + v, lanes, plus(sums, part))


@compiled
def _read(vectors, source, width, count):
    lanes = lane_count(vectors)
    _clear(vectors, 0, width)
    for v in range(count):
        for k in range(width):
            vectors[k * lanes + v] = source[v * width + k]


@compiled
def _write(vectors, target, width, count):
    lanes = lane_count(vectors)
    for v in range(count):
        for k in range(width):
            target[v * width + k] = vectors[k * lanes + v]


@compiled
def run_program(program, scratch, start, stop):
    """Runs a program for tasks `start` to `stop`."""
    memory = address_of(scratch)
    lanes = lane_count(memory)
    groups, span, lines = program[0, 0], program[0, 1], program[0, 2]
    length = span * lanes
    block = shifted(memory, 3 * length)
    spare = shifted(memory, 2 * length)
    factors = shifted(block, 64 * lanes)
    for task in range(start, stop):
        index, group = task // groups, task % groups
        width = min(lanes, lines - group * lanes)
        # The strips that lie staged with this one's are this range's and this copy's.
        nearest = max(start, task - group % STAGED)
        last = min(stop, task - group % STAGED + STAGED, (index + 1) * groups) - 1
        together = min((last + 1 - nearest) * lanes, lines - nearest % groups * lanes)
        for number in range(1, len(program)):
            step = program[number]
            kind = step[0]
            tile = shifted(memory, step[1] * length)
            vectors = shifted(factors, step[1] * FACTORS * lanes)
            if kind == _LOAD or kind == _ADD or kind == _STORE:
                place = shifted(pointer_like(memory, step[2]), index * step[3] + group * step[4])
                # Blocks are whole: what lies beyond an array in them is nobody's.
                wide = lanes if step[9] else width
                part = shifted(tile, step[10] * lanes)
                staged = shifted(memory, step[11])
                own = shifted(staged, (task - nearest) * step[8] * lanes)
                if kind == _STORE:
                    if step[7]:
                        _store_along(part, place, step[5], step[6], step[8], wide)
                    elif step[11]:
                        _store_across(part, own, lanes, step[8], lanes)
                        if task == last:
                            first = shifted(place, (nearest - task) * lanes)
                            side_by_side = _Strips(first, step[5], lanes)
                            apart = _Strips(staged, lanes, step[8] * lanes)
                            copy_rows(apart, side_by_side, step[8], together)
                    else:
                        _store_across(part, place, step[5], step[8], wide)
                else:
                    if kind == _LOAD and wide < lanes:
                        _clear(part, 0, step[8])
                    if step[7]:
                        _load_along(place, step[5], step[6], part, step[8], wide, kind == _ADD)
                    elif step[11]:
                        if task == nearest:
                            side_by_side = _Strips(place, step[5], lanes)
                            apart = _Strips(staged, lanes, step[8] * lanes)
                            copy_rows(side_by_side, apart, step[8], together)
                        _load_across(own, lanes, part, step[8], wide, kind == _ADD)
                    else:
                        _load_across(place, step[5], part, step[8], wide, kind == _ADD)
            elif kind == _MAP:
                _map(step, index, tile, spare, block)
            elif kind == _ZERO:
                _clear(tile, step[2], step[3])
            elif kind == _UNIT:
                _clear(tile, 0, step[2])
                for v in range(min(lanes, step[2] - group * lanes)):
                    tile[(group * lanes + v) * lanes + v] = 1
            elif kind == _SUBTRACT:
                _subtract(tile, shifted(memory, step[2] * length), step[3])
            else:
                place = shifted(pointer_like(memory, step[2]), index * step[3])
                values = shifted(factors, step[6] * FACTORS * lanes)
                if kind == _OUTER:
                    _outer(tile, place, step[4], step[5], values)
                elif kind == _INNER:
                    _inner(tile, place, step[4], step[5], values)
                else:
                    place = shifted(place, group * lanes * step[5])
                    if kind == _READ:
                        _read(vectors, place, step[5], width)
                    else:
                        _write(vectors, place, step[5], width)
