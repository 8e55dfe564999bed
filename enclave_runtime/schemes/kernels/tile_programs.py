"""Tile programs: all that is done to a tile from load to store, while it is in the cache.

A tile holds one axis of a matrix, of whose other axis it has as many *lines* as 64 bytes have
elements. A pass of `enclave_runtime.schemes.kernels.passes` maps one axis, and memory is read and
written for each; a program loads from several arrays, maps, adds and subtracts, and stores once.
There are two tiles, 0 and 1, and two sets of *factors*, of a product whose inner axis is short.

Programs and the scratch are private memory. Their data are never an index or a branch.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from enclave_runtime.compiled.kernel import Kernel
from enclave_runtime.compiled.layout import FACTORS, STAGED, TILE_BYTES, WORDS, TileStep
from enclave_runtime.schemes.kernels.axis_map import BLOCK, AxisMap
from enclave_runtime.schemes.kernels.passes import aligned_empty, blocks_of
from enclave_runtime.schemes.kernels.threads import in_parallel

run_program = Kernel("enclave_runtime.compiled.definitions.tile_programs", "run_program")

_STAGED_AT = 11  # the word of a step that says where in the scratch its strips are staged


class TiledMatrix(NamedTuple):
    """A matrix, or a batch, as the tiles of its columns: what one program leaves to the next.

    Attributes:
      tiles: (copies, tiles, rows, lanes).
      columns: of the matrix; what the last tile has beyond them is nobody's.
    """

    tiles: np.ndarray
    columns: int

    def __repr__(self) -> str:
        return "TiledMatrix(<secret>)"

    @property
    def rows(self) -> int:
        """Of the matrix."""
        return self.tiles.shape[2]


def empty_tiles(copies: int, rows: int, columns: int, dtype: np.dtype) -> TiledMatrix:
    """Room for a matrix."""
    lanes = TILE_BYTES // dtype.itemsize
    return TiledMatrix(aligned_empty((copies, -(-columns // lanes), rows, lanes), dtype), columns)


def padded(factors: np.ndarray) -> np.ndarray:
    """Factors (…, m, k) with zeros up to multiples of 8, as `outer` and `inner` read them."""
    *batch, m, k = factors.shape
    whole = np.zeros((*batch, -(-m // 8) * 8, -(-k // 8) * 8), factors.dtype)
    whole[..., :m, :k] = factors
    return whole


class TileProgram:
    """Steps, and the arrays that they read and write.

    Every array is of `dtype`, and has a leading axis of `copies` or none, which all copies share.
    """

    def __init__(self, dtype: np.dtype, copies: int, lines: int):
        """An empty program for the tiles of matrices with so many lines."""
        self._dtype, self._copies, self._lines = dtype, copies, lines
        self._lanes = TILE_BYTES // dtype.itemsize
        self._steps: list[list[int]] = []
        # Steps that move strips of far rows, and how many rows.
        self._far: list[tuple[int, int]] = []
        self._held: list[np.ndarray] = []
        self._span = 0

    def __repr__(self) -> str:
        return "TileProgram(<secret>)"

    def _address(self, array: np.ndarray) -> int:
        self._held.append(array)  # Until the program has run.
        return array.ctypes.data

    def _add(self, step: TileStep, *words: int) -> None:
        assert len(words) < WORDS
        self._steps.append([int(step), *words, *[0] * (WORDS - 1 - len(words))])

    def _move(
        self, step: TileStep, tile: int, array: np.ndarray | TiledMatrix, axis: int, at: int = 0
    ) -> None:
        lanes = self._lanes
        if isinstance(array, TiledMatrix):
            held = array.tiles
            outer, block = held[0].size, array.rows * lanes
            if axis == -2:
                count, place = array.rows, (block, lanes, 0, 0, 1)
            else:
                count, place = array.columns, (lanes * lanes, lanes, block, 1, 0)
        else:
            held, count = array, array.shape[axis]
            along, across = (array.strides[a] // array.itemsize for a in (axis, -3 - axis))
            outer = array.strides[0] // array.itemsize if array.ndim == 3 else 0
            if across == 1 or array.shape[-3 - axis] == 1:
                place = (lanes, along, 0, 0, 0)
            else:
                assert along == 1 or count == 1, "one of two axes is contiguous"
                place = (lanes * across, across, lanes, 1, 0)
        step_on, stride, block, runs, whole = place
        address = self._address(held)
        self._span = max(self._span, at + count)
        if not runs and not whole and self._lines > lanes:
            self._far.append((len(self._steps), count))
        self._add(step, tile, address, outer, step_on, stride, block, runs, count, whole, at)

    def load(self, tile: int, array: np.ndarray | TiledMatrix, axis: int, at: int = 0) -> None:
        """Takes lines of an array, whose axis -2 or -1 becomes the tile's, from `at` on."""
        self._move(TileStep.LOAD, tile, array, axis, at)

    def add(self, tile: int, array: np.ndarray, axis: int) -> None:
        """Adds lines of an array."""
        self._move(TileStep.ADD, tile, array, axis)

    def store(self, tile: int, array: np.ndarray | TiledMatrix, axis: int) -> None:
        """Writes lines of an array; what the tile has beyond its axis is cut."""
        self._move(TileStep.STORE, tile, array, axis)

    def unit(self, tile: int, size: int) -> None:
        """Takes lines of the identity."""
        self._span = max(self._span, size)
        self._add(TileStep.UNIT, tile, size)

    def resize(self, tile: int, size: int, to: int) -> None:
        """Cuts the tile's axis, or fills it up with zeros."""
        if to > size:
            self._span = max(self._span, to)
            self._add(TileStep.ZERO, tile, size, to)

    def map(self, tile: int, axis_map: AxisMap) -> None:
        """Maps the tile's axis, of an odd number of transforms."""
        rounds = axis_map.order.shape[1] - 1
        assert rounds % 2 and axis_map.copies in (1, self._copies)
        size, blocks = axis_map.size, blocks_of(axis_map)
        scale = axis_map.scale.copy()
        scale[:, :-1] *= blocks.level(size)
        step = axis_map.order[0].size if axis_map.copies > 1 else 0
        order = self._address(np.ascontiguousarray(axis_map.order, np.int32))
        scales = self._address(scale.astype(self._dtype))
        level = self._address(np.full(blocks.size, blocks.size**-0.5, self._dtype))
        same = self._address(np.arange(blocks.size, dtype=np.int32))
        self._span = max(self._span, size)
        self._add(TileStep.MAP, tile, order, scales, step, rounds, size, *blocks, level, same)

    def subtract(self, tile: int, other: int, count: int) -> None:
        """Takes the first positions of another tile off."""
        self._add(TileStep.SUBTRACT, tile, other, count)

    def _factors(
        self, step: TileStep, tile: int, factors: np.ndarray, rows: int, held: int
    ) -> None:
        width = factors.shape[-1]
        assert width % 8 == 0 and width <= FACTORS and factors.flags.c_contiguous
        outer = factors[0].size if factors.ndim == 3 else 0
        self._add(step, tile, self._address(factors), outer, rows, width, held)

    def outer(self, tile: int, factors: np.ndarray, held: int) -> None:
        """``tile[i] += Σ factors[i, k] held[k]``."""
        self._span = max(self._span, factors.shape[-2])
        self._factors(TileStep.OUTER, tile, factors, factors.shape[-2], held)

    def inner(self, tile: int, factors: np.ndarray, rows: int, held: int) -> None:
        """``held[k] = Σ factors[i, k] tile[i]``, over the first `rows` positions."""
        self._factors(TileStep.INNER, tile, factors, rows, held)

    def read(self, held: int, array: np.ndarray) -> None:
        """Takes factors from an array (…, lines or more, k)."""
        self._factors(TileStep.READ, held, array, 0, 0)

    def write(self, held: int, array: np.ndarray) -> None:
        """Writes factors to an array (…, lines, k)."""
        self._factors(TileStep.WRITE, held, array, 0, 0)

    def run(self) -> None:
        """Runs the program, with the work of a large one spread over threads."""
        span = -(-self._span // 8) * 8
        groups = -(-self._lines // self._lanes)
        header = (groups, span, self._lines, *[0] * (WORDS - 3))
        size = (3 * span + BLOCK + 2 * FACTORS) * self._lanes
        for number, count in self._far:
            self._steps[number][_STAGED_AT] = size
            size += STAGED * count * self._lanes
        program = np.array([header, *self._steps], np.int64)

        def run(start: int, stop: int) -> None:
            run_program(program, _scratch(size, self._dtype), start, stop)

        elements = self._copies * self._lines * self._span * len(self._steps) // 4
        if self._copies and self._lines:
            in_parallel(run, self._copies * groups, elements)


_kept = threading.local()


def _scratch(size: int, dtype: np.dtype) -> np.ndarray:
    """This thread's private memory, kept from program to program: fresh pages cost more."""
    memory = getattr(_kept, "memory", None)
    if memory is None or memory.size < size * dtype.itemsize:
        memory = _kept.memory = aligned_empty((size * dtype.itemsize,), np.dtype(np.uint8))
    return memory[: size * dtype.itemsize].view(dtype)
