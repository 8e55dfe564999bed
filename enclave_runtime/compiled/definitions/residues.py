"""Kernels that split integers into shares modulo small primes; for Numba.

Nothing is checked: arrays that do not fit each other are read and written beyond their ends.
"""

from __future__ import annotations

import numpy as np

from enclave_runtime.compiled.kernel import compiled

_ROUND = 1.5 * 2.0**52  # added and taken off again, it leaves an integer


@compiled
def split(integers, primes, shares, out):
    """The residues of integers in three shares, of which each pool gets two.

    Args:
      integers: float64[n], below 2**52.
      primes: float64[k].
      shares: int8[2, k, n], uniform residues.
      out: int8[3, 2, k, n], takes shares i and i + 1 for each pool i.
    """
    for row in range(primes.size):
        prime = primes[row]
        inverse, half = 1 / prime, (prime - 1) / 2
        for i in range(integers.size):
            x = integers[i]
            multiple = (x * inverse + _ROUND) - _ROUND
            first, second = shares[0, row, i], shares[1, row, i]
            third = (x - multiple * prime) - first - second
            if third > half:
                third -= prime
            if third < -half:
                third += prime
            last = np.int8(np.int32(third))
            out[0, 0, row, i] = first
            out[2, 1, row, i] = first
            out[1, 0, row, i] = second
            out[0, 1, row, i] = second
            out[2, 0, row, i] = last
            out[1, 1, row, i] = last
