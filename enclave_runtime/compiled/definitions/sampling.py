"""Kernels that make permutations, normal values and residues from random words; for Numba.

Nothing is checked: arrays that do not fit each other are read and written beyond their ends.
"""

from __future__ import annotations

import math

import numpy as np

from enclave_runtime.compiled.kernel import compiled

# The bits of the float64 number sqrt(1/2), and those of any that are not sign or exponent.
_ROOT_HALF = np.int64(0x3FE6A09E667F3BCD)
_TOGETHER = 64  # words that are compared at once
_FRACTION = np.int64((1 << 52) - 1)


@compiled
def shuffled(words, order):
    """Fisher and Yates, for each row: place i takes from place ``⌊word * (i + 1) / 2**64⌋``.

    Args:
      words: uint64[rows, n].
      order: int32[rows, n], takes a permutation in each row.
    """
    for row in range(words.shape[0]):
        for i in range(words.shape[1]):
            order[row, i] = i
        for i in range(words.shape[1] - 1, 0, -1):
            # The product has 96 bits; those of its halves give its upper 32.
            word, places = words[row, i], np.uint64(i + 1)
            low, high = word & np.uint64(0xFFFFFFFF), word >> np.uint64(32)
            j = np.int64((high * places + ((low * places) >> np.uint64(32))) >> np.uint64(32))
            order[row, i], order[row, j] = order[row, j], order[row, i]


@compiled
def box_muller(words, values):
    """Two normal values from each word of 64 bits.

    The word's lower half gives the radius ``sqrt(-2 log u)``, the next 30 bits the angle in
    a quadrant, and the last two bits the quadrant, as two signs. Polynomials, exact to about
    1e-12, stand for the functions so that LLVM vectorizes the loop.

    Args:
      words: uint64[count].
      values: float64[2, count], takes them.
    """
    first, second = values[0], values[1]
    for i in range(words.size):
        word = words[i]
        # u = m 2**e with sqrt(1/2) <= m < sqrt(2), and log m = 2 artanh((m - 1) / (m + 1)).
        u = np.float64(np.int64(word & np.uint64(0xFFFFFFFF))) + 0.5
        bits = np.float64(u).view(np.int64) - _ROOT_HALF
        exponent = np.int32(bits >> 52)
        m = np.int64((bits & _FRACTION) + _ROOT_HALF).view(np.float64)
        t = (m - 1) / (m + 1)
        q = t * t
        series = 1 / 11 + q * (1 / 13 + q * (1 / 15 + q * (1 / 17)))
        series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * series))))
        logarithm = 2 * t * series + (exponent - 32) * 0.6931471805599453
        radius = math.sqrt(-logarithm)  # without the factor sqrt(2), which the angle has too
        # The angle is x + pi/4 with |x| < pi/4, whose sine and cosine are (c ± s) / sqrt(2).
        quarter = np.float64(np.int64((word >> np.uint64(32)) & np.uint64(0x3FFFFFFF))) + 0.5
        x = (quarter * 2.0**-30 - 0.5) * (math.pi / 2)
        q = x * x
        sine = 1 / 362880 + q * (-1 / 39916800 + q * (1 / 6227020800))
        sine = x * (1 + q * (-1 / 6 + q * (1 / 120 + q * (-1 / 5040 + q * sine))))
        cosine = 1 / 40320 + q * (-1 / 3628800 + q * (1 / 479001600 - q * (1 / 87178291200)))
        cosine = 1 + q * (-1 / 2 + q * (1 / 24 + q * (-1 / 720 + q * cosine)))
        sign_x = 1.0 - 2.0 * np.float64(np.int64((word >> np.uint64(62)) & np.uint64(1)))
        sign_y = 1.0 - 2.0 * np.float64(np.int64(word >> np.uint64(63)))
        first[i] = sign_x * radius * (cosine - sine)
        second[i] = sign_y * radius * (cosine + sine)


@compiled
def residues(drawn, primes, spare, done, out):
    """Uniform residues between -(p-1)/2 and (p-1)/2 from random words of 16 bits.

    A word beyond the last multiple of its prime is drawn again, so that no residue is likelier than
    another. How long that takes depends on such words alone, of which none is used.

    Args:
      drawn: uint16[rows, n], replaced where words are drawn again.
      primes: int64[k]; row i has the prime of i modulo k.
      spare: uint16[m], taken in order for what is drawn again.
      done: int64[1], how many of `drawn` were looked at; all, unless the spare words ran out, and
        then the call is to be repeated with others.
      out: int8[rows, n], takes the residues when all is done.
    """
    used, count = 0, drawn.shape[1]
    for row in range(done[0] // count, drawn.shape[0]):
        words, prime = drawn[row], primes[row % primes.size]
        last = np.uint16(65535 - 65536 % prime)
        start = done[0] - row * count
        while start < count:
            stop = min(start + _TOGETHER, count)
            beyond = np.uint16(0)
            for i in range(start, stop):
                beyond |= np.uint16(words[i] > last)
            if beyond:
                for i in range(start, stop):
                    while words[i] > last:
                        if used == spare.size:
                            done[0] = row * count + i
                            return
                        words[i] = spare[used]
                        used += 1
            start = stop
        done[0] = (row + 1) * count
    for row in range(drawn.shape[0]):
        words, taken = drawn[row], out[row]
        prime = np.int32(primes[row % primes.size])
        inverse, half = np.float32(1) / np.float32(prime), np.int32(prime // 2)
        for i in range(count):
            word = np.int32(words[i])
            # At least 1/502 away from the next integer, and float32 errs by 1e-4 at most.
            quotient = np.int32((np.float32(word) + np.float32(0.5)) * inverse)
            taken[i] = np.int8(np.int32(word - quotient * prime) - half)


@compiled
def reversed_gathers(order, scale, undo, taken):
    """The transposed gathers, last first.

    Args:
      order: int32[copies, gathers, n], permutations.
      scale: float64[copies, gathers, n].
      undo: of order's shape and type, takes the inverse permutations.
      taken: of scale's, takes the scales where they are needed then.
    """
    for copy in range(order.shape[0]):
        for stage in range(order.shape[1]):
            last = order.shape[1] - 1 - stage
            for i in range(order.shape[2]):
                place = order[copy, stage, i]
                undo[copy, last, place] = i
                taken[copy, last, place] = scale[copy, stage, i]
