"""Counts who holds the handles of values in an enclave, so that what nobody holds is freed.

What a run inside a user's `jit` makes is held by no array of this process until that program ends,
and may be used many times before: by an evaluation and then by a step, or stacked by a `scan`.
Such handles are kept until an array holds them or a call donates them; of those that neither
happens to, the ones used least recently are dropped when they name too much.

In a loop a state keeps the types that it entered with, so that one freshly sealed, which has no
array for blinded content, still has none when its successor lies blinded on the devices. The host
then keeps that content beside the handle, see `Lying`.

Untrusted: the host counts its own arrays.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from tempo_jax.jaxprs import opaque

NO_HANDLE = bytes(16)  # beside ciphertext, which the enclave does not know yet
MAX_LOOSE = 1 << 30  # bytes that handles which no array holds may name, or four runs' results
_MIN_BYTES = 1 << 12  # what the smallest value costs the enclave


@dataclasses.dataclass(frozen=True)
class Lying:
    """What a handle names, where that is not what the array around it was declared to be.

    Attributes:
      form: where the value is.
      weak_type: of the value.
      content: blinded, for which the array has no room.
    """

    form: str
    weak_type: bool
    content: np.ndarray | None = None


class Handles:
    """The handles of one enclave, in text, and the arrays of this process that hold them.

    A forked child's copies of these arrays count for nothing: the handles are its parent's.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._owned: collections.Counter[str] = collections.Counter()
        self._counted: dict[int, weakref.finalize[..., Any]] = {}
        self._released: collections.deque[tuple[int, tuple[str, ...]]] = collections.deque()
        self._dropped: list[str] = []
        self._kept: set[str] = set()
        self._loose: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._most = MAX_LOOSE
        self._lying: dict[str, Lying] = {}
        self._lock = threading.RLock()

    def adopt(self, handle: Any) -> None:
        """Counts an array that holds a handle; when the last one is gone, the handle is dropped."""
        key = id(handle)
        if os.getpid() != self._process or self._is_counted(key):
            return
        # Reading it may wait for a program whose callbacks need the lock, so it comes first.
        texts = _texts(handle)
        with self._lock:
            self._count_released()
            if not self._is_counted(key):
                for text in texts:
                    self._loose.pop(text, None)
                self._owned.update(texts)
                self._counted[key] = weakref.finalize(handle, self._released.append, (key, texts))

    def _is_counted(self, key: int) -> bool:
        # The number of an array that is gone may name another one by now.
        finalizer = self._counted.get(key)
        return finalizer is not None and finalizer.alive

    def _count_released(self) -> None:
        """Takes note of arrays that are gone.

        A finalizer runs at any point of any thread, so it takes no lock and only appends.
        """
        while self._released:
            key, texts = self._released.popleft()
            if not self._is_counted(key):
                self._counted.pop(key, None)
            for text in texts:
                self._owned[text] -= 1
                if self._owned[text] <= 0:
                    del self._owned[text]
                    if text not in self._kept:
                        self._drop(text)

    def _drop(self, text: str) -> None:
        self._forget(text)
        self._dropped.append(text)

    def _forget(self, text: str) -> None:
        self._loose.pop(text, None)
        self._lying.pop(text, None)

    @property
    def any_loose(self) -> bool:
        """Whether arrays declared as ciphertext may come with a handle."""
        return bool(self._loose or self._lying)

    def made(self, nbytes: Mapping[str, int], lying: Mapping[str, Lying]) -> None:
        """Takes note of what a run inside a user's `jit` made, which no array holds yet.

        Args:
          nbytes: of the values, by their handles.
          lying: of those whose arrays are declared as something else.
        """
        with self._lock:
            self._lying.update(lying)
            self._loose.update((text, max(size, _MIN_BYTES)) for text, size in nbytes.items())
            self._most = max(self._most, 4 * sum(nbytes.values()))
            excess = sum(self._loose.values()) - self._most
            while excess > 0:
                text, size = next(iter(self._loose.items()))
                self._drop(text)
                excess -= size

    def used(self, text: str) -> None:
        """Takes note that a run inside a user's `jit` uses a handle."""
        with self._lock:
            if text in self._loose:
                self._loose.move_to_end(text)

    def donated(self, text: str) -> None:
        """Takes note that the enclave gave up what a handle named."""
        with self._lock:
            self._forget(text)

    def lying(self, text: str) -> Lying | None:
        """What a handle names; None if that is what its array was declared to be."""
        return self._lying.get(text)

    def keep(self, text: str) -> None:
        """Exempts a handle: arrays that go no longer drop it."""
        with self._lock:
            self._kept.add(text)

    def drop(self, text: str) -> None:
        """Drops a handle now, whoever holds it."""
        with self._lock:
            self._kept.discard(text)
            self._drop(text)

    def take_dropped(self) -> list[str]:
        """The handles dropped since the last time; none in a forked child."""
        if os.getpid() != self._process:
            return []
        with self._lock:
            self._count_released()
            dropped, self._dropped = self._dropped, []
        return dropped


def _texts(handle: Any) -> tuple[str, ...]:
    """The handles in an array of one or, stacked, of several; what is none counts for nothing."""
    rows = np.asarray(opaque.words_of(handle)).reshape(-1, opaque.WORDS)
    names = [opaque.name_of(row) for row in rows]
    return tuple(name.hex() for name in names if name not in (None, NO_HANDLE))
