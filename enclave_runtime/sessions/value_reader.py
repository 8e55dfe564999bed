"""The client's values on their way in and out: decrypted, unblinded, encrypted to the client.

Whatever the host writes is copied out of shared memory before it is looked at, since the host may
change it meanwhile. Trusts the session's keys, under which the client encrypts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.crypto import encryption
from enclave_runtime.crypto.encryption import SessionKeys
from enclave_runtime.protocol.memory import Arena
from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.protocol.requests import RequestError
from enclave_runtime.protocol.tags import (
    Seal,
    TagRecord,
    published_array,
    published_bytes,
    seal_bytes,
    unseal_array,
)
from enclave_runtime.sessions.attempts import Attempts
from enclave_runtime.sessions.store import Blinded, Resident, Store
from enclave_runtime.verifying import checksum
from enclave_runtime.verifying.integrity import private_copy


class ValueReader:
    """Reads what a client sealed and what lies blinded on the devices, in one session."""

    def __init__(self, keys: SessionKeys, identity: str, store: Store, attempts: Attempts):
        """Takes the session's keys and store.

        Args:
          keys: shared with the client.
          identity: of the session, to which everything encrypted is bound.
          store: has the values that handles name.
          attempts: counts values that come back wrong.
        """
        self._keys = keys
        self._identity = identity
        self._store = store
        self._attempts = attempts

    def decrypt(self, attachment: bytes, purpose: str) -> bytes:
        """What the client encrypted for a purpose."""
        context = f"{purpose}|{self._identity}".encode()
        return encryption.decrypt_bytes(self._keys.to_enclave, attachment, context)

    def unsealed(
        self, arena: Arena, array: ArrayType, offset: int, read: Callable[..., Any] = unseal_array
    ) -> tuple[Seal, jax.Array]:
        """What the owner sealed or published, and what it said of it."""
        length = published_bytes if read is published_array else seal_bytes
        size = length(array.nbytes)
        own = private_copy(arena.view(ArrayType((size,), "uint8"), offset))
        seal, plain = read(
            self._keys.to_enclave, own, self._identity, array.shape, np.dtype(array.dtype)
        )
        return seal, jnp.array(plain)

    def decrypted(self, arena: Arena, array: ArrayType, offset: int) -> jax.Array:
        """An array that the client encrypted, from its place in shared memory."""
        size = encryption.encrypted_bytes(array.nbytes)
        # A private copy first: the host may change shared memory while it is being decrypted.
        own = private_copy(arena.view(ArrayType((size,), "uint8"), offset))
        return self.decrypted_copy(own, array)

    def decrypted_copy(self, private: np.ndarray, array: ArrayType) -> jax.Array:
        """An array that the client encrypted, from bytes that nobody else can change."""
        plain = encryption.decrypt_array(
            self._keys.to_enclave, private, self._identity, array.shape, np.dtype(array.dtype)
        )
        return jnp.array(plain)

    def opened(self, entry: Resident | Blinded, content: bytes) -> bytes:
        """A value encrypted to the client; the content of a blinded one comes from it."""
        if isinstance(entry, Blinded):
            if len(content) != entry.array.nbytes:
                raise RequestError(
                    f"a blinded value of {entry.array.nbytes} bytes comes with {len(content)}"
                )
            blinded = np.frombuffer(content, np.dtype(entry.array.dtype)).reshape(entry.array.shape)
            value = self.unblinded(entry, blinded)
        else:
            value = entry.value
        return self.encrypted(np.asarray(value)).tobytes()

    def encrypted(self, value: np.ndarray) -> np.ndarray:
        """A value for the client's eyes alone, as bytes."""
        return encryption.encrypt_array(self._keys.to_client, value, self._identity)

    def value(
        self, arena: Arena, offset: int, handle: str | None, array: ArrayType
    ) -> tuple[TagRecord, np.ndarray]:
        """A sealed value's tag, and the value in the clear, whatever its form.

        Args:
          arena: has at `offset` what the host holds of it.
          offset: in bytes.
          handle: names it; without one, the value is the client's ciphertext.
          array: its shape and dtype.
        """
        if handle is None:
            seal, plain = self.unsealed(arena, array, offset)
            return TagRecord(*seal, generation=0), np.asarray(plain)
        entry = self._store.get(handle)
        if entry.array != array:
            raise RequestError(
                f"a sealed value is {entry.array.dtype}{list(entry.array.shape)}, expected "
                f"{array.dtype}{list(array.shape)}"
            )
        if isinstance(entry, Blinded):
            own = private_copy(arena.view(entry.array, offset))
            return entry.tag.record(), np.asarray(self.unblinded(entry, own))
        return entry.tag.record(), np.asarray(entry.value)

    def unblinded(self, entry: Blinded, blinded: np.ndarray) -> jax.Array:
        """A value that comes back from the devices, held to its checksum if it has one.

        Args:
          entry: its keys.
          blinded: a private copy: the host may change shared memory after it was checked.

        Raises:
          WrongProductError: it is another one, or too many wrong ones came back before.
          RequestError: too much that may bring a wrong one is going on.
        """
        if entry.checksum is not None:
            with self._attempts.comparison():
                checksum.check_leaf(entry.checksum, blinded, entry.source)
        return entry.scheme.unblind(blinded, entry.layout, entry.keys, operands=None)
