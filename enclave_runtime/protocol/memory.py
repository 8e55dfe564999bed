"""Shared memory between host and enclave: one file of `/dev/shm` for each concurrent run.

The host may change this memory at any time, so the enclave takes shapes and offsets from
the provisioned program, never from here, and copies what it reads before using it. Only blinded
tensors, ciphertext and values the host may know lie in it. Both sides use this module;
the host creates the file and removes its name as soon as the enclave has mapped it, so
that nothing is left behind however either process ends.

Where a host's devices belong to several processes, each process has memory of its own for its
parts of what crosses: a *lane*, see `Lane`. One that shares no memory with the enclave has its lane
in its own memory, and what lies there travels (`wire.send_blocks`).
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from enclave_runtime.protocol.program import ArrayType, Crossing, Layout, Program, aligned
from enclave_runtime.protocol.tags import seal_bytes

DIRECTORY = "/dev/shm"
_NAME = re.compile(r"tempo_jax-[0-9a-f]{32}")


class ArenaError(Exception):
    """Shared memory that is too small, or a name or range that is not the arena's."""


class Arena:
    """A mapped shared-memory file.

    Attributes:
      size: in bytes.
    """

    def __init__(self, name: str | None, size: int, *, create: bool = False):
        """Maps `/dev/shm/<name>`, creating it with `size` bytes if asked.

        Without a name it is memory of this process alone, for a worker whose parts travel.

        Raises:
          ArenaError: the name is not an arena's, it names nothing in this machine's `/dev/shm`, or
            there is too little room.
        """
        self.size = size
        if name is None:
            self._map = mmap.mmap(-1, size)
            return
        if not _NAME.fullmatch(name):
            raise ArenaError("a shared-memory file's name is not of the expected form")
        self.path = os.path.join(DIRECTORY, name)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        flags |= os.O_CREAT | os.O_EXCL if create else 0
        try:
            descriptor = os.open(self.path, flags, 0o600)
        except FileNotFoundError as error:
            raise ArenaError(f"{DIRECTORY} is not shared with whoever made this memory") from error
        try:
            if create:
                self._reserve(descriptor)
            elif os.fstat(descriptor).st_size < size:
                raise ArenaError("a shared-memory file is smaller than announced")
            self._map = mmap.mmap(descriptor, size)
        except BaseException:
            if create:
                self.unlink()
            raise
        finally:
            os.close(descriptor)

    def _reserve(self, descriptor: int) -> None:
        try:
            # Reserving now turns a full file system into an error instead of a SIGBUS later.
            os.posix_fallocate(descriptor, 0, self.size)
        except OSError as error:
            free = os.statvfs(DIRECTORY)
            raise ArenaError(
                f"{DIRECTORY} is too small for this step: it needs {self.size} bytes of shared "
                f"memory and {free.f_bavail * free.f_frsize} bytes are free. Enlarge it (for "
                "example `mount -o remount,size=4G /dev/shm`, or `docker run --shm-size=4g`), "
                "or use a smaller batch."
            ) from error

    def unlink(self) -> None:
        """Removes the file's name; the mappings stay."""
        os.unlink(self.path)

    def view(self, array: ArrayType, offset: int) -> np.ndarray:
        """The array at `offset` bytes, backed by the shared memory itself.

        Raises:
          ArenaError: it would reach past the end.
        """
        if offset < 0 or offset + array.nbytes > self.size:
            raise ArenaError("a tensor lies outside the shared memory")
        flat = np.frombuffer(self._map, np.uint8, array.nbytes, offset)
        return flat.view(np.dtype(array.dtype)).reshape(array.shape)


def input_bytes(array: ArrayType) -> int:
    """Room for an input in the arena, in whatever form it comes."""
    return aligned(seal_bytes(array.nbytes))


def sharded_axis(layout: Layout, sharded: frozenset[int], pools: int = 1) -> int | None:
    """The axis of a value, as the host has it, that is split over the workers, if any.

    Workers that are pools have one place each along the first axis of all that is blinded.
    """
    if pools > 1 and layout.keyed:
        return 0
    for axis, c in enumerate(layout.classes):
        if c in sharded:
            return axis
    return None


@dataclasses.dataclass(frozen=True)
class Shares:
    """How what crosses is shared out among the processes of a host.

    Attributes:
      sharded: numbers of the key classes whose axes are split.
      devices: how many each process has; its share of a split axis is as large.
      pools: that the devices are, see `sharded_axis`.
    """

    sharded: frozenset[int]
    devices: tuple[int, ...]
    pools: int = 1

    def axis(self, crossing: Crossing) -> int | None:
        """The axis of what crosses that is split, if any."""
        return sharded_axis(crossing.layout, self.sharded, self.pools)

    def check(self, program: Program) -> None:
        """Refuses shares that do not cover every value of a program exactly.

        Raises:
          ArenaError: a process without a device, or an axis that the devices do not divide.
        """
        if not all(n > 0 for n in self.devices):
            raise ArenaError("every process of a run has a device at least")
        for segment in program.segments:
            for crossing in (*segment.uploads, *segment.downloads):
                axis = self.axis(crossing)
                if axis is not None and crossing.blinded.shape[axis] % sum(self.devices):
                    raise ArenaError(f"{sum(self.devices)} devices do not divide a split axis")


class Piece(NamedTuple):
    """One process's part of what crosses.

    Attributes:
      array: its shape and dtype.
      offset: where in the process's lane it lies, in bytes.
      where: its place in the whole.
      axis: along which it is a part; None of what is whole.
    """

    array: ArrayType
    offset: int
    where: tuple[slice, ...]
    axis: int | None


class Lane:
    """Where one process lays its parts of a segment's uploads, and finds those of its downloads.

    Both sides work it out from the program. All segments use the same memory in turn, uploads from
    the start and downloads behind the longest of them: a process brings parts of the next segment
    when it has those of this one, whose last downloads another of its threads may still be reading.
    Uploads of segments without downloads lie behind both: nobody waits for such a segment, so they
    may be brought before the segment in front has run, and read when the next one's are. Behind
    these lie, in two places in turn, downloads that go ahead (`Program.ahead`): they are fetched
    with the next segment's, while those after may be on their way.

    Attributes:
      uploads: for each segment and upload the piece, None where another process brings it.
      downloads: for each segment and download the piece.
      size: of the memory, in bytes.
    """

    def __init__(self, program: Program, shares: Shares, process: int):
        """Works out the lane of one of the processes that `shares` counts."""
        self._shares = shares
        self._process = process
        self.uploads: list[list[Piece | None]] = [[] for _ in program.segments]
        self.downloads: list[list[Piece]] = [[] for _ in program.segments]
        ahead = program.ahead
        awaited = [index for index in range(len(program.segments)) if index not in ahead]
        end = self._fetch(program, awaited, self._bring(program, 0, awaited=True))
        end = self._bring(program, end, awaited=False)
        for turn in range(2):
            end = self._fetch(program, ahead[turn::2], end)
        self.size = end

    def _fetch(self, program: Program, indices: Iterable[int], start: int) -> int:
        """Lays the downloads of some segments, which take turns; returns where they end."""
        longest = start
        for index in indices:
            self.downloads[index], end = self._lay(program.segments[index].downloads, start)
            longest = max(longest, end)
        return longest

    def _bring(self, program: Program, start: int, awaited: bool) -> int:
        """Lays the uploads of segments with, or without, downloads; returns where they end."""
        longest = start
        for index, segment in enumerate(program.segments):
            if bool(segment.downloads) is not awaited:
                continue
            # What is not split every process has whole, and the first one brings it.
            own = [self._process == 0 or self._shares.axis(c) is not None for c in segment.uploads]
            pieces, end = self._lay(itertools.compress(segment.uploads, own), start)
            given = iter(pieces)
            self.uploads[index] = [next(given) if brought else None for brought in own]
            longest = max(longest, end)
        return longest

    def _lay(self, crossings: Iterable[Crossing], offset: int) -> tuple[list[Piece], int]:
        """Lays parts behind each other from an offset on; returns where they end as well."""
        pieces = []
        for crossing in crossings:
            array, axis = crossing.blinded, self._shares.axis(crossing)
            where = [slice(None)] * len(array.shape)
            if axis is not None:
                devices = self._shares.devices
                each = array.shape[axis] // sum(devices)
                first = each * sum(devices[: self._process])
                where[axis] = slice(first, first + each * devices[self._process])
                shape = list(array.shape)
                shape[axis] = each * devices[self._process]
                array = ArrayType(tuple(shape), array.dtype)
            pieces.append(Piece(array, offset, tuple(where), axis))
            offset += aligned(array.nbytes)
        return pieces, offset
