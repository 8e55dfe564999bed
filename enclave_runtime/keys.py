"""Where blinding keys come from.

Every key descends from a root secret that the enclave draws from the operating system
(RDRAND under SGX) when the session starts and never sends: HKDF-SHA256 with the key's
purpose, expanded by ChaCha20 (RFC 8439). Nothing here uses `jax.random` or NumPy's
generators, whose output can be predicted from a part of it.
"""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from enclave_runtime.encryption import SECRET_BYTES, derive_key


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

        Sorts random 64-bit words; they collide, which would bias the order, with
        probability below size² / 2**65.
        """
        return np.argsort(self.words(size), kind="stable").astype(np.int32)

    def signs(self, size: int) -> np.ndarray:
        """Uniform signs, int8[size] of -1 and 1."""
        bits = np.unpackbits(self.words(-(-size // 64)).view(np.uint8))[:size]
        return (1 - 2 * bits.astype(np.int8)).astype(np.int8)


class KeySchedule:
    """Derives streams from the session's root secret, one for each use."""

    def __init__(self) -> None:
        self._root = os.urandom(SECRET_BYTES)

    def __repr__(self) -> str:
        return "KeySchedule(<secret>)"

    def stream(self, purpose: str, *use: int) -> KeyStream:
        """The stream for one use; callers never name the same use twice."""
        return KeyStream(derive_key(self._root, "/".join([purpose, *map(str, use)])))
