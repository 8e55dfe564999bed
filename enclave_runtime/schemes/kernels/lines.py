"""Rows and columns of matrices: their lengths, and factors for each, in one pass over memory.

The values are data alone: none of them is ever an index or a branch.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from enclave_runtime.compiled.kernel import Kernel
from enclave_runtime.compiled.layout import TILE_BYTES
from enclave_runtime.schemes.kernels.passes import aligned_empty
from enclave_runtime.schemes.kernels.threads import in_parallel

_scale_lines = Kernel("enclave_runtime.compiled.definitions.lines", "scale_lines")

# Sums of squares in float32 beyond these may have lost digits, or overflowed.
_SURE = (1e-25, np.inf)


class Factors(NamedTuple):
    """What a tensor's rows and columns are multiplied by: powers of two from 2^-60 to 2^60.

    Attributes:
      rows: float64[copies, m]; one copy serves all leading indices.
      columns: float64[copies, n].
    """

    rows: np.ndarray
    columns: np.ndarray

    def __repr__(self) -> str:
        return "Factors(<secret>)"

    @property
    def none(self) -> bool:
        """Whether all are 1."""
        return bool((self.rows == 1).all() and (self.columns == 1).all())


class Lengths(NamedTuple):
    """The lengths of a tensor's lines, float64; not finite where elements are not.

    Attributes:
      rows: (…, m).
      columns: (…, n).
    """

    rows: np.ndarray
    columns: np.ndarray

    def __repr__(self) -> str:
        return "Lengths(<secret>)"


def lengths(x: np.ndarray, factors: Factors | None = None) -> Lengths:
    """Of a tensor's rows and columns, as they would be with factors.

    Args:
      x: C-contiguous, float32 or float64, (…, m, n).
      factors: of its lines; none are 1 each.
    """
    return _gone_through(x, factors, None)


def scaled(x: np.ndarray, factors: Factors) -> tuple[np.ndarray, Lengths]:
    """A tensor with factors in an array of its own, and the lengths of its lines.

    Factors are exact where the result is in the dtype's range, whatever each alone would give.
    """
    out = aligned_empty(x.shape, x.dtype)
    return out, _gone_through(x, factors, out)


def _gone_through(x: np.ndarray, factors: Factors | None, out: np.ndarray | None) -> Lengths:
    *batch, m, n = x.shape
    copies = math.prod(batch)
    if not x.size:
        return Lengths(np.zeros((*batch, m)), np.zeros((*batch, n)))
    if factors is None:
        factors = Factors(np.ones((1, m)), np.ones((1, n)))
    by_row, by_column = (np.ascontiguousarray(f, x.dtype) for f in factors)
    cube = x.reshape(copies, m, n).view()
    cube.flags.writeable = False  # one signature serves read-only arrays as well
    target = np.empty((0, m, n), x.dtype) if out is None else out.reshape(copies, m, n)
    rows, parts = np.empty((copies, m)), []

    def run(start: int, stop: int) -> None:
        columns = np.zeros((copies, n))
        sums = np.empty(n + TILE_BYTES // x.itemsize, x.dtype)
        _scale_lines(cube, by_row, by_column, target, rows, columns, sums, start, stop)
        parts.append(columns)

    in_parallel(run, copies * m, x.size)
    across = np.sum(parts, axis=0)
    return Lengths(
        _roots(rows, cube, by_row, by_column).reshape(*batch, m),
        _roots(across, cube.swapaxes(1, 2), by_column, by_row).reshape(*batch, n),
    )


def _roots(
    sums: np.ndarray, x: np.ndarray, by_row: np.ndarray, by_column: np.ndarray
) -> np.ndarray:
    """The lengths of x's rows from their sums of squares, where these are unsure from x itself."""
    low, high = _SURE
    unsure = ~((sums > low) & (sums < high))
    if unsure.any():
        copy, row = np.nonzero(unsure)
        wide = x[copy, row].astype(np.float64)
        wide *= by_row[copy % len(by_row), row, None].astype(np.float64)
        wide *= by_column[copy % len(by_column)]
        sums[unsure] = np.einsum("ij,ij->i", wide, wide)
    return np.sqrt(sums)


@functools.cache
def warm_up() -> None:
    """Compiles the kernel, or loads it from Numba's cache."""
    for dtype in (np.float32, np.float64):
        lengths(np.ones((1, 1), dtype))
