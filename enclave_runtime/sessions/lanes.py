"""The memory of a run whose workers are processes, and how their parts make one array.

Each process brings its parts of a segment's uploads in shared memory of its own. They are copied
out as they come, on the thread of the process that brought them, each to its place in one private
array: nothing is gathered outside, and when the last has come the whole is there. The host chooses
who brings what, which says nothing that it does not know; the parts cover the whole by the way
they are counted, so that no byte of private memory is taken for one that was brought.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

import numpy as np

from enclave_runtime.crypto.encryption import authenticate, check_authentic
from enclave_runtime.protocol.memory import Arena, ArenaError, Lane, Shares
from enclave_runtime.protocol.program import Program
from enclave_runtime.protocol.requests import BeatRequest
from enclave_runtime.verifying.integrity import private, private_copy


class Lanes:
    """The lanes of one run's processes, each of which has to `join` with its memory."""

    def __init__(self, program: Program, shares: Shares):
        """Lays out the lanes.

        Args:
          program: what the run runs.
          shares: how it is shared out.

        Raises:
          ArenaError: the shares do not cover the program's values.
        """
        shares.check(program)
        self._program = program
        self._lanes = [Lane(program, shares, p) for p in range(len(shares.devices))]
        self._arenas: dict[int, Arena] = {}
        self._wholes: dict[int, list[np.ndarray]] = {}  # by segment
        self._tags: dict[int, list[list[bytes]]] = {}  # of what each process brought last
        self._lock = threading.Lock()

    @property
    def complete(self) -> bool:
        """Whether every process has joined."""
        return len(self._arenas) == len(self._lanes)

    def join(self, process: int, arena: Arena) -> None:
        """Takes the memory of a process.

        Raises:
          ArenaError: there is no such process, it has joined already, or the memory is too small.
        """
        with self._lock:
            if not 0 <= process < len(self._lanes) or process in self._arenas:
                raise ArenaError(f"process {process} is not awaited in this run")
            if arena.size < self._lanes[process].size:
                raise ArenaError(
                    f"a process brings {arena.size} bytes of shared memory, expected at least "
                    f"{self._lanes[process].size}"
                )
            self._arenas[process] = arena

    def take(self, index: int, process: int, key: bytes) -> None:
        """Copies what a process brought of a segment's uploads; `key` tags it for `check`."""
        with self._lock:
            if index not in self._wholes:
                uploads = self._program.segments[index].uploads
                self._wholes[index] = [private(c.blinded) for c in uploads]
            wholes = self._wholes[index]
        tags: list[list[bytes]] = []
        for piece, whole in zip(self._lanes[process].uploads[index], wholes, strict=True):
            if piece is not None:
                own = whole[piece.where]
                np.copyto(own, self._arenas[process].view(piece.array, piece.offset))
                tags.append(authenticate(key, own))
        self._tags[process] = tags

    def taken(self, index: int) -> list[np.ndarray]:
        """A segment's uploads, joined, when every process's were taken; they are asked for once."""
        with self._lock:
            return self._wholes.pop(index)

    def check(self, index: int, process: int, key: bytes) -> None:
        """Checks that a process that comes again brings the bytes that it brought.

        Raises:
          DecryptionError: it brings others.
        """
        arena = self._arenas[process]
        pieces = [piece for piece in self._lanes[process].uploads[index] if piece is not None]
        for piece, tags in zip(pieces, self._tags[process], strict=True):
            check_authentic(key, private_copy(arena.view(piece.array, piece.offset)), tags)

    def put(self, index: int, position: int, whole: np.ndarray) -> None:
        """Gives every process its part of one of a segment's downloads."""
        for process, lane in enumerate(self._lanes):
            piece = lane.downloads[index][position]
            out = self._arenas[process].view(piece.array, piece.offset)
            np.copyto(out, whole[piece.where])


class SignsOfLife(NamedTuple):
    """What the processes of a host said of themselves.

    Attributes:
      silent: seconds since each gave its last sign of life.
      at: the run and the segment to which each came last.
      left: those that have left.
    """

    silent: dict[int, float]
    at: dict[int, tuple[int, int]]
    left: list[int]


class Presence:
    """When the processes of a host gave their last signs of life, and how far they are.

    A host that says nothing, or too much, harms itself: its processes give up, or do not.
    """

    MOST_GROUPS = 16  # the oldest is forgotten

    def __init__(self) -> None:
        self._groups: dict[str, dict[int, tuple[float, BeatRequest]]] = {}
        self._lock = threading.Lock()

    def beat(self, sign: BeatRequest) -> SignsOfLife:
        """Notes a sign of life; returns what is known of all."""
        now = time.monotonic()
        with self._lock:
            if sign.group not in self._groups and len(self._groups) >= self.MOST_GROUPS:
                del self._groups[next(iter(self._groups))]
            group = self._groups.setdefault(sign.group, {})
            group[sign.process] = now, sign
            return SignsOfLife(
                {p: now - when for p, (when, _) in group.items()},
                {p: (last.run, last.segment) for p, (_, last) in group.items()},
                sorted(p for p, (_, last) in group.items() if last.leaves),
            )
