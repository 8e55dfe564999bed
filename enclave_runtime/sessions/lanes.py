"""The memory of a run whose workers are processes, and how their parts make one array.

Each process brings its parts of a segment's uploads in shared memory of its own, or over its
connection (`Cargo`). They are copied out as they come, on the thread of the process that brought
them, each to its place in one private array: nothing is gathered outside, and when the last has
come the whole is there. The host chooses
who brings what, which says nothing that it does not know; the parts cover the whole by the way
they are counted, so that no byte of private memory is taken for one that was brought.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

import numpy as np

from enclave_runtime.crypto.encryption import authenticate, check_authentic
from enclave_runtime.protocol.memory import Arena, ArenaError, Lane, Piece, Shares
from enclave_runtime.protocol.program import Program
from enclave_runtime.protocol.requests import BeatRequest
from enclave_runtime.protocol.wire import WireError, blocks_bytes
from enclave_runtime.sessions.cargo import Cargo
from enclave_runtime.verifying.integrity import private

_PART_BYTES = 1 << 22  # that are tagged at a time


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
        self._arenas: dict[int, Arena | None] = {}  # None of those that share no memory
        self._wholes: dict[int, list[np.ndarray]] = {}  # by segment
        self._tags: dict[int, list[list[bytes]]] = {}  # of what each process brought last
        # For each process that shares no memory its parts of the last segment's downloads, while
        # they are made and when all are.
        self._laid: dict[int, list[np.ndarray]] = {}
        self._outgoing: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    @property
    def complete(self) -> bool:
        """Whether every process has joined."""
        return len(self._arenas) == len(self._lanes)

    def join(self, process: int, arena: Arena | None) -> None:
        """Takes the memory of a process, or learns that it shares none.

        Raises:
          ArenaError: there is no such process, it has joined already, or the memory is too small.
        """
        with self._lock:
            if not 0 <= process < len(self._lanes) or process in self._arenas:
                raise ArenaError(f"process {process} is not awaited in this run")
            if arena is not None and arena.size < self._lanes[process].size:
                raise ArenaError(
                    f"a process brings {arena.size} bytes of shared memory, expected at least "
                    f"{self._lanes[process].size}"
                )
            self._arenas[process] = arena

    def take(self, index: int, process: int, key: bytes, cargo: Cargo) -> None:
        """Copies what a process brings of a segment's uploads; `key` tags it for `check`.

        Raises:
          WireError: it comes over the connection, and is not what is to come.
        """
        self._check_size(index, process, cargo)
        with self._lock:
            if index not in self._wholes:
                uploads = self._program.segments[index].uploads
                self._wholes[index] = [private(c.blinded) for c in uploads]
            wholes = self._wholes[index]
        tags: list[list[bytes]] = []
        for piece, whole in zip(self._lanes[process].uploads[index], wholes, strict=True):
            if piece is not None:
                tags.append(self._bring(process, piece, whole[piece.where], key, cargo))
        self._tags[process] = tags

    def _check_size(self, index: int, process: int, cargo: Cargo) -> None:
        travels = self._arenas[process] is None
        expected = blocks_bytes(p.array for p in self._pieces(index, process)) if travels else 0
        if cargo.size != expected:
            raise WireError(
                f"worker {process} brings {cargo.size} bytes behind its request for segment "
                f"{index}, expected {expected}"
            )

    def _pieces(self, index: int, process: int) -> list[Piece]:
        return [piece for piece in self._lanes[process].uploads[index] if piece is not None]

    def _bring(
        self, process: int, piece: Piece, out: np.ndarray, key: bytes, cargo: Cargo
    ) -> list[bytes]:
        """Copies one part out of the host's reach, and tags it."""
        if self._arenas[process] is not None:
            self._copy(process, piece, out, cargo)
            return authenticate(key, out, _PART_BYTES)
        own = out if out.flags.c_contiguous else private(piece.array)
        tags: list[bytes] = []
        # Tagged as it comes: the system receives the next part meanwhile.
        cargo.receive(own, lambda part: tags.extend(authenticate(key, part)), _PART_BYTES)
        if own is not out:
            np.copyto(out, own)
        return tags

    def _copy(self, process: int, piece: Piece, out: np.ndarray, cargo: Cargo) -> None:
        arena = self._arenas[process]
        if arena is not None:
            np.copyto(out, arena.view(piece.array, piece.offset))
        else:
            cargo.receive(out)

    def taken(self, index: int) -> list[np.ndarray]:
        """A segment's uploads, joined, when every process's were taken; they are asked for once."""
        with self._lock:
            return self._wholes.pop(index)

    def check(self, index: int, process: int, key: bytes, cargo: Cargo) -> None:
        """Checks that a process that comes again brings the bytes that it brought.

        Raises:
          DecryptionError: it brings others.
          WireError: it brings more or fewer.
        """
        self._check_size(index, process, cargo)
        pieces = self._pieces(index, process)
        for piece, tags in zip(pieces, self._tags[process], strict=True):
            own = private(piece.array)
            self._copy(process, piece, own, cargo)
            check_authentic(key, own, tags, _PART_BYTES)

    def put(self, index: int, position: int, whole: np.ndarray) -> None:
        """Gives every process its part of one of a segment's downloads.

        Args:
          index: of the segment.
          position: of the download; they are put in order.
          whole: nobody changes it afterwards.
        """
        for process, lane in enumerate(self._lanes):
            piece, arena = lane.downloads[index][position], self._arenas[process]
            if arena is not None:
                out = arena.view(piece.array, piece.offset)
                np.copyto(out, whole[piece.where])
                continue
            laid = self._laid.setdefault(process, [])
            laid.append(np.ascontiguousarray(whole[piece.where]))
            if position == len(lane.downloads[index]) - 1:
                self._outgoing[process] = self._laid.pop(process)

    def outgoing(self, index: int, process: int) -> list[np.ndarray]:
        """A process's parts of the last segment's downloads, if they have to travel."""
        if self._arenas[process] is not None or not self._lanes[process].downloads[index]:
            return []
        return self._outgoing[process]


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
