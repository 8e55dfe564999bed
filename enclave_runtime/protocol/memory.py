"""Shared memory between host and enclave: one file of `/dev/shm` for each concurrent run.

The host may change this memory at any time, so the enclave takes shapes and offsets from
the provisioned program, never from here, and copies what it reads before using it. Only blinded
tensors, ciphertext and values the host may know lie in it. Both sides use this module;
the host creates the file and removes its name as soon as the enclave has mapped it, so
that nothing is left behind however either process ends.
"""

from __future__ import annotations

import mmap
import os
import re

import numpy as np

from enclave_runtime.protocol.program import ArrayType, aligned
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

    def __init__(self, name: str, size: int, *, create: bool = False):
        """Maps `/dev/shm/<name>`, creating it with `size` bytes if asked.

        Raises:
          ArenaError: the name is not an arena's, or `/dev/shm` has too little room.
        """
        if not _NAME.fullmatch(name):
            raise ArenaError("a shared-memory file's name is not of the expected form")
        self.path = os.path.join(DIRECTORY, name)
        self.size = size
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags | (os.O_CREAT | os.O_EXCL if create else 0), 0o600)
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
