"""The kernel that gives rows and columns their scales and measures them, in one pass; for Numba.

Nothing is checked: arrays that do not fit each other are read and written beyond their ends.
"""

from __future__ import annotations

from enclave_runtime.compiled.definitions.vectors import (
    VECTOR,
    address_of,
    load,
    minus,
    plus,
    plus_multiples,
    shifted,
    store,
    times,
)
from enclave_runtime.compiled.kernel import compiled

_TOGETHER = 256  # rows whose squares are added up before they are added to the other rows'


@compiled
def scale_lines(x, by_row, by_column, out, rows, columns, sums, start, stop):
    """Rows times a factor each, columns times another, and the sums of their squares.

    Args:
      x: dtype[copies, m, n].
      by_row: dtype[copies or 1, m].
      by_column: dtype[copies or 1, n].
      out: dtype[copies, m, n] takes the result, or is empty.
      rows: float64[copies, m] takes the sums over the result's rows `start` to `stop`.
      columns: float64[copies, n], to which those over its columns are added.
      sums: dtype[n + 8], for what is not yet added to `columns`.
      start: of the rows of all copies, counted through.
      stop: likewise.
    """
    copies, m, n = x.shape
    whole = n - n % VECTOR
    block, last = address_of(sums), shifted(address_of(sums), n)
    sums[:] = 0
    since = 0
    for row in range(start, stop):
        index, i = row // m, row % m
        source = shifted(address_of(x), row * n)
        target = shifted(address_of(out), row * n if out.size else 0)
        factor = shifted(address_of(by_row), i + (index * m if by_row.shape[0] > 1 else 0))
        factors = shifted(address_of(by_column), index * n if by_column.shape[0] > 1 else 0)
        total = 0.0
        if whole:
            zero = part = minus(load(factors, 0, 0, 1), load(factors, 0, 0, 1))
            for j in range(0, whole, VECTOR):
                both = plus_multiples(zero, factor, 0, 0, load(factors, j, 0, 1))
                scaled = times(load(source, j, 0, 1), both)
                if out.size:
                    store(target, j, 0, scaled)
                squares = times(scaled, scaled)
                part = plus(part, squares)
                store(block, j, 0, plus(load(block, j, 0, 1), squares))
            store(last, 0, 0, part)
            for v in range(VECTOR):
                total += last[v]
        for j in range(whole, n):
            scaled = source[j] * (factor[0] * factors[j])
            if out.size:
                target[j] = scaled
            total += scaled * scaled
            block[j] += scaled * scaled
        rows[index, i] = total
        since += 1
        if since == _TOGETHER or row == stop - 1 or i == m - 1:
            for j in range(n):
                columns[index, j] += block[j]
                block[j] = 0
            since = 0
