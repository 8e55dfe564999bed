"""Authenticated encryption between the client and the enclave, shared by both.

The host carries these ciphertexts and cannot read or alter them. AES-256-GCM from
`cryptography`, with random 96-bit nonces (NIST SP 800-38D, 8.2.2: safe for 2**32
messages under one key, and every session has keys of its own). The associated data
binds a ciphertext to its session, direction, shape and dtype.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple, NoReturn

import ml_dtypes  # noqa: F401  (registers bfloat16 and the other narrow floats with NumPy)
import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SECRET_BYTES = 32
NONCE_BYTES = 12
OVERHEAD_BYTES = NONCE_BYTES + 16  # nonce in front, tag behind
PART_BYTES = 1 << 30  # AES-GCM takes 2**31 - 1 bytes a call
NOT_AUTHENTIC = "a ciphertext failed its authentication"


class DecryptionError(Exception):
    """A ciphertext that was altered, or made for another session, shape or dtype."""


def refuse_pickling(self: Any) -> NoReturn:
    """What a class with secrets takes for its `__reduce__`: they are neither pickled nor copied.

    Raises:
      TypeError: always.
    """
    raise TypeError(f"{type(self).__name__} holds secrets and cannot be pickled or copied")


class SessionKeys(NamedTuple):
    """The keys both ends derive from the session secret; never sent."""

    connection: bytes
    to_enclave: bytes
    to_client: bytes

    def __repr__(self) -> str:
        return "SessionKeys(<secret>)"

    __reduce__ = refuse_pickling


def derive_key(secret: bytes, purpose: str, length: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869) of `secret` for one purpose, `length` bytes."""
    return HKDF(hashes.SHA256(), length, salt=None, info=b"tempo_jax/" + purpose.encode()).derive(
        secret
    )


def session_keys(secret: bytes) -> SessionKeys:
    """Derives a session's keys from its 32-byte secret."""
    return SessionKeys(
        derive_key(secret, "connection"),
        derive_key(secret, "to enclave"),
        derive_key(secret, "to client"),
    )


def encrypt_bytes(key: bytes, plain: bytes | memoryview, context: bytes | memoryview) -> bytes:
    """Nonce ‖ AES-256-GCM ciphertext ‖ tag, bound to `context`."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, context)


def decrypt_bytes(key: bytes, encrypted: bytes | memoryview, context: bytes | memoryview) -> bytes:
    """Inverse of `encrypt_bytes`.

    Raises:
      DecryptionError: the tag does not match.
    """
    try:
        return AESGCM(key).decrypt(encrypted[:NONCE_BYTES], encrypted[NONCE_BYTES:], context)
    except (InvalidTag, ValueError) as error:
        raise DecryptionError(NOT_AUTHENTIC) from error


def array_context(
    session: str, shape: tuple[int, ...], dtype: np.dtype, bound_to: bytes = b""
) -> bytes:
    """What an array's ciphertext is bound to: session, shape and dtype, and further bytes."""
    return f"array|{session}|{tuple(shape)}|{np.dtype(dtype).name}|".encode() + bound_to


def encrypted_bytes(nbytes: int, part_bytes: int = PART_BYTES) -> int:
    """How long the ciphertext of an array of `nbytes` bytes is."""
    return nbytes + OVERHEAD_BYTES * max(1, -(-nbytes // part_bytes))


def encrypt_array(
    key: bytes,
    plain: np.ndarray,
    session: str,
    *,
    bound_to: bytes = b"",
    part_bytes: int = PART_BYTES,
) -> np.ndarray:
    """Encrypts an array of any shape, dtype and size.

    One of more than `part_bytes` comes as so many ciphertexts one after the other, each bound to
    its number, the count, and the first one's nonce, so that none can be left out, moved, or
    taken from another array.

    Args:
      key: of one direction of the session.
      plain: the array.
      session: its public name.
      bound_to: what else the ciphertext is bound to.
      part_bytes: at most so many bytes of the array go in one ciphertext.

    Returns:
      uint8[encrypted_bytes(nbytes, part_bytes)].
    """
    # The context names the dtype without its byte order, so there is only the native one.
    plain = plain.astype(plain.dtype.newbyteorder("="), copy=False)
    context = array_context(session, plain.shape, plain.dtype, bound_to)
    parts = _parts(plain, part_bytes)
    if len(parts) == 1:
        return np.frombuffer(encrypt_bytes(key, parts[0], context), np.uint8)
    encrypted = np.empty(encrypted_bytes(plain.nbytes, part_bytes), np.uint8)
    places = _parts(encrypted, part_bytes + OVERHEAD_BYTES)
    for number, (part, place) in enumerate(zip(parts, places, strict=True)):
        place[:] = encrypt_bytes(key, part, _part_context(context, number, encrypted, len(parts)))
    return encrypted


def decrypt_array(
    key: bytes,
    encrypted: np.ndarray,
    session: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    bound_to: bytes = b"",
    part_bytes: int = PART_BYTES,
) -> np.ndarray:
    """Inverse of `encrypt_array`; read-only.

    Raises:
      DecryptionError: altered, or made for another session, shape, dtype or size of parts, or
        bound otherwise.
    """
    context = array_context(session, shape, dtype, bound_to)
    encrypted = np.ascontiguousarray(encrypted)
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes <= part_bytes:
        plain = decrypt_bytes(key, encrypted.data, context)
        return np.frombuffer(plain, dtype).reshape(shape)
    if encrypted.nbytes != encrypted_bytes(nbytes, part_bytes):
        raise DecryptionError(NOT_AUTHENTIC)
    opened = np.empty(nbytes, np.uint8)
    parts = _parts(encrypted, part_bytes + OVERHEAD_BYTES)
    for number, (part, place) in enumerate(zip(parts, _parts(opened, part_bytes), strict=True)):
        place[:] = decrypt_bytes(key, part, _part_context(context, number, encrypted, len(parts)))
    opened.flags.writeable = False
    return opened.view(dtype).reshape(shape)


def _part_context(context: bytes, number: int, encrypted: np.ndarray, count: int) -> bytes:
    """What a part of an array is bound to; `encrypted` begins with the first part's nonce."""
    first = encrypted[:NONCE_BYTES].tobytes().hex() if number else ""
    return f"part {number} of {count} {first}|".encode() + context


def authenticate(key: bytes, content: np.ndarray, part_bytes: int = PART_BYTES) -> list[bytes]:
    """Tags by which an array's bytes are known again: AES-GCM of nothing, with them as context.

    That is GMAC (NIST SP 800-38D), four times as fast as a hash; one tag for each `part_bytes`.
    """
    return [encrypt_bytes(key, b"", part) for part in _parts(content, part_bytes)]


def check_authentic(
    key: bytes, content: np.ndarray, tags: list[bytes], part_bytes: int = PART_BYTES
) -> None:
    """Checks that an array has the very bytes that `authenticate` saw.

    Raises:
      DecryptionError: it has others.
    """
    parts = _parts(content, part_bytes)
    if len(parts) != len(tags):
        raise DecryptionError("another number of parts than was authenticated")
    for part, tag in zip(parts, tags, strict=True):
        decrypt_bytes(key, tag, part)


def _parts(content: np.ndarray, part_bytes: int) -> list[memoryview]:
    flat = np.ascontiguousarray(content).reshape(-1).view(np.uint8).data
    return [flat[at : at + part_bytes] for at in range(0, max(len(flat), 1), part_bytes)]
