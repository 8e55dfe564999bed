"""Counts who holds the handles of values in an enclave, so that what nobody holds is freed.

Untrusted: the host counts its own arrays.
"""

from __future__ import annotations

import collections
import os
import threading
import weakref
from typing import Any

import numpy as np

from tempo_jax.jaxprs import opaque


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
                        self._dropped.append(text)

    def keep(self, text: str) -> None:
        """Exempts a handle: arrays that go no longer drop it."""
        with self._lock:
            self._kept.add(text)

    def drop(self, text: str) -> None:
        """Drops a handle now, whoever holds it."""
        with self._lock:
            self._kept.discard(text)
            self._dropped.append(text)

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
    return tuple(name.hex() for name in names if name is not None)
