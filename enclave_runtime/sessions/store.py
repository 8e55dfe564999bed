"""What the enclave keeps between runs, named outside by opaque handles.

A handle is 128 random bits. It names either a plaintext array that stays inside or, for
an array that lies blinded on the devices, the keys that unblind it.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax

from enclave_runtime.crypto.encryption import refuse_pickling
from enclave_runtime.protocol.program import ArrayType, Layout
from enclave_runtime.schemes import Scheme
from enclave_runtime.sessions.admission import Tag
from enclave_runtime.verifying.checksum import Checksum

HANDLE_BYTES = 16


class UnknownHandleError(Exception):
    """A handle that names nothing: donated, freed, or of another enclave."""


class KeyUses:
    """How many runs one key has served, whether or not they were committed.

    Attributes:
      count: of runs.
    """

    def __init__(self) -> None:
        self.count = 0


class Resident(NamedTuple):
    """A plaintext array inside the enclave, and what it is."""

    array: ArrayType
    value: jax.Array
    tag: Tag

    def __repr__(self) -> str:
        return f"Resident({self.array}, <secret>)"

    __reduce__ = refuse_pickling


class Blinded(NamedTuple):
    """The keys of an array that lies on the devices.

    Attributes:
      array: its shape and dtype.
      tag: what it is.
      scheme: the scheme.
      layout: classes by number, meaningful together with `keys`.
      keys: each class of the layout's key.
      batches: whether each class's key is that of a batch axis.
      uses: how often each class's key was used; shared by all entries under that key.
      checksum: what the array is held to; None if nothing followed it.
      source: names the array in an error's text.
    """

    array: ArrayType
    tag: Tag
    scheme: Scheme
    layout: Layout
    keys: dict[int, Any]
    batches: dict[int, bool]
    uses: dict[int, KeyUses]
    checksum: Checksum | None = None
    source: str = ""

    def __repr__(self) -> str:
        return f"Blinded({self.array}, {self.scheme.name}, <secret>)"

    __reduce__ = refuse_pickling


class Store:
    """Handles and what they name."""

    def __init__(self) -> None:
        self._entries: dict[str, Resident | Blinded] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, entry: Resident | Blinded) -> str:
        """Stores an entry and returns its new handle, in hex."""
        handle = os.urandom(HANDLE_BYTES).hex()
        self._entries[handle] = entry
        return handle

    def get(self, handle: str) -> Resident | Blinded:
        """Returns what a handle names.

        Raises:
          UnknownHandleError: nothing.
        """
        try:
            return self._entries[handle]
        except KeyError:
            raise UnknownHandleError(
                "a sealed value is not in this enclave: it was donated to an earlier call, was "
                "freed, or belongs to another enclave"
            ) from None

    def free(self, handle: str) -> None:
        """Forgets a handle; freeing one twice does nothing."""
        self._entries.pop(handle, None)
