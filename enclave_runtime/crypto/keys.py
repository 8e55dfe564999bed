"""Where blinding keys come from.

Every key descends from a root secret that the enclave draws from the operating system
(RDRAND under SGX) when the session starts and never sends: HKDF-SHA256 with the key's
purpose, expanded by ChaCha20 (RFC 8439). Nothing here uses `jax.random` or NumPy's
generators, whose output can be predicted from a part of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from enclave_runtime.compiled.kernel import Kernel
from enclave_runtime.crypto.encryption import SECRET_BYTES, derive_key, refuse_pickling

_NORMAL_BLOCK = 8192


_shuffled = Kernel("enclave_runtime.compiled.definitions.sampling", "shuffled")
_box_muller = Kernel("enclave_runtime.compiled.definitions.sampling", "box_muller")
_residues = Kernel("enclave_runtime.compiled.definitions.sampling", "residues")


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
        order = np.empty((count, size), np.int32)
        _shuffled(self.words(count * size).reshape(count, size), order)
        return order

    def signs(self, size: int) -> np.ndarray:
        """Uniform signs, int8[size] of -1 and 1."""
        bits = np.unpackbits(self.words(-(-size // 64)).view(np.uint8))[:size]
        return (1 - 2 * bits.astype(np.int8)).astype(np.int8)

    def residues(self, primes: Sequence[int], copies: int, count: int) -> np.ndarray:
        """Uniform residues between -(p-1)/2 and (p-1)/2, int8[copies, primes, count].

        A word of 16 bits beyond the last multiple of its prime is drawn again, so that none is
        likelier than another.

        Args:
          primes: odd, between 3 and 255.
          copies: how many for each prime and place.
          count: places.
        """
        drawn = self._halfwords(copies * len(primes) * count).reshape(-1, count)
        out, done = np.empty(drawn.shape, np.int8), np.zeros(1, np.int64)
        while done[0] < drawn.size:
            spare = self._halfwords(64 + drawn.size // 256)
            _residues(drawn, np.array(primes, np.int64), spare, done, out)
        return out.reshape(copies, len(primes), count)

    def _halfwords(self, count: int) -> np.ndarray:
        """uint16[count] that may be written to."""
        return self.words(-(-count // 4)).view(np.uint16)[:count].copy()

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
        pairs = np.empty((2, _NORMAL_BLOCK // 2))
        for start in range(0, count, _NORMAL_BLOCK):  # what is between stays in the cache
            part = values[start : start + _NORMAL_BLOCK]
            words = self.words(-(-part.size // 2))
            block = pairs.reshape(-1)[: 2 * words.size].reshape(2, -1)
            _box_muller(words, block)
            part[...] = block.reshape(-1)[: part.size]
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
