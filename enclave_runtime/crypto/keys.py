"""Where blinding keys come from.

Every key descends from a root secret that the enclave draws from the operating system
(RDRAND under SGX) when the session starts and never sends: HKDF-SHA256 with the key's
purpose, expanded by ChaCha20 (RFC 8439). Nothing here uses `jax.random` or NumPy's
generators, whose output can be predicted from a part of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from enclave_runtime.crypto.encryption import SECRET_BYTES, derive_key, refuse_pickling

# The bits of the float64 number sqrt(1/2), and those of any that are not sign or exponent.
_ROOT_HALF = np.int64(0x3FE6A09E667F3BCD)
_FRACTION = np.int64((1 << 52) - 1)

_NORMAL_BLOCK = 8192


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles with Numba, for calls that release the GIL.

    The machine code is cached next to the source, or in the user's cache directory, and
    compiled again in each process where neither can be written. A cache is code: where
    the host can write to it, it must lie outside of what the enclave reads.
    """
    # Division as in NumPy: a check for zero would keep loops from being vectorized.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(**options, cache=True)(function)
    except RuntimeError:  # Numba found no directory that it can write to.
        return numba.njit(**options)(function)


@compiled
def _shuffled(words):
    """Fisher and Yates, for each row: place i takes from place ``⌊word * (i + 1) / 2**64⌋``."""
    order = np.empty(words.shape, np.int32)
    for row in range(words.shape[0]):
        for i in range(words.shape[1]):
            order[row, i] = i
        for i in range(words.shape[1] - 1, 0, -1):
            # The product has 96 bits; those of its halves give its upper 32.
            word, places = words[row, i], np.uint64(i + 1)
            low, high = word & np.uint64(0xFFFFFFFF), word >> np.uint64(32)
            j = np.int64((high * places + ((low * places) >> np.uint64(32))) >> np.uint64(32))
            order[row, i], order[row, j] = order[row, j], order[row, i]
    return order


@compiled
def _box_muller(words):
    """Two normal values from each word of 64 bits, float64[2, count].

    The word's lower half gives the radius ``sqrt(-2 log u)``, the next 30 bits the angle in
    a quadrant, and the last two bits the quadrant, as two signs. Polynomials, exact to about
    1e-12, stand for the functions so that LLVM vectorizes the loop.
    """
    values = np.empty((2, words.size), np.float64)
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
    return values


class KeyStream:
    """A stream of uniform random numbers from one derived key; each byte is used once."""

    def __init__(self, key: bytes):
        # The key serves this one stream, so a constant counter and nonce repeat nothing.
        self._encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def __repr__(self) -> str:
        return "KeyStream(<secret>)"

    def words(self, count: int) -> np.ndarray:
        """Uniform uint64[count]."""
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), np.uint64)

    def permutation(self, size: int) -> np.ndarray:
        """A uniform permutation of `size` elements, int32[size].

        Shuffles with one 64-bit word for each place. A word chooses among k places with
        probabilities that differ from 1 / k by less than 2**-64, so the order's
        distribution is within size² / 2**65 of uniform in total variation.
        """
        return self.permutations(1, size)[0]

    def permutations(self, count: int, size: int) -> np.ndarray:
        """Independent permutations, int32[count, size]; each as `permutation` draws it."""
        return _shuffled(self.words(count * size).reshape(count, size))

    def signs(self, size: int) -> np.ndarray:
        """Uniform signs, int8[size] of -1 and 1."""
        bits = np.unpackbits(self.words(-(-size // 64)).view(np.uint8))[:size]
        return (1 - 2 * bits.astype(np.int8)).astype(np.int8)

    def uniform(self, count: int) -> np.ndarray:
        """Uniform float64[count] strictly between 0 and 1, of 53 bits: odd multiples of 2**-53."""
        # The shift leaves 52 random bits; the half step keeps 0 and 1 out.
        return ((self.words(count) >> np.uint64(12)) + 0.5) * 2.0**-52

    def normal(self, count: int, dtype: Any = np.float32) -> np.ndarray:
        """Standard normal values, dtype[count], at most 6.8 from 0 (Box and Muller).

        Half a word makes each value: float64 values lie on a grid of 2**32 radii and as
        many angles.
        """
        values = np.empty(count, dtype)
        for start in range(0, count, _NORMAL_BLOCK):  # what is between stays in the cache
            part = values[start : start + _NORMAL_BLOCK]
            part[...] = _box_muller(self.words(-(-part.size // 2))).reshape(-1)[: part.size]
        return values


class KeySchedule:
    """Derives streams from the session's root secret, one for each use."""

    def __init__(self) -> None:
        self._root = os.urandom(SECRET_BYTES)

    def __repr__(self) -> str:
        return "KeySchedule(<secret>)"

    __reduce__ = refuse_pickling

    def stream(self, purpose: str, *use: int) -> KeyStream:
        """The stream for one use; callers never name the same use twice."""
        return KeyStream(derive_key(self._root, "/".join([purpose, *map(str, use)])))
