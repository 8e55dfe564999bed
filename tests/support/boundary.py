"""Records every byte that leaves an enclave process, at the process's own boundary.

The enclave runs unchanged but for a root secret that the test knows. All that it can write to is
what the kernel lists as its open files and shared mappings (`Boundary.check_nothing_else`): the
sockets, which end in proxies here; its standard output and error; and shared memory, of which a
picture is taken before each reply passes on to the host, and in between as fast as one thread
can. What the host sends crosses as well, and is recorded alike.

Not recorded: what shared memory holds between two pictures and no longer; and what is no byte,
such as the time that something takes.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from benchmarks.attacks.open_enclave import ROOT_VARIABLE
from enclave_runtime.protocol.memory import Arena
from tempo_jax.transport import launch, loopback
from tempo_jax.transport.launch import Command

PAGE = 4096
_PAUSE_SECONDS = 0.0005  # between two pictures


def open_command(root: bytes, errors: Path) -> Command:
    """Starts an enclave with this root secret; its standard error goes to a file."""
    with mock.patch.object(launch, "ENCLAVE_MODULE", "benchmarks.attacks.open_enclave"):
        command = launch.command()
    assert "benchmarks.attacks.open_enclave" in command.arguments
    # The shell becomes the enclave, so that the process's number stays.
    arguments = ("/bin/sh", "-c", 'exec "$@" 2>"$0"', str(errors), *command.arguments)
    return Command(arguments, {**command.environment, ROOT_VARIABLE: root.hex()})


class Boundary:
    """The recording of one enclave process.

    Attributes:
      recorded: what crossed, by where it did so.
    """

    def __init__(self) -> None:
        self.recorded: dict[str, list[bytes]] = {}
        self._arenas: list[tuple[Arena, np.ndarray]] = []
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._ports: set[int] = set()
        self._ended = threading.Event()

    def record(self, where: str, content: bytes) -> None:
        """Adds bytes that crossed."""
        if content:
            with self._lock:
                self.recorded.setdefault(where, []).append(bytes(content))

    def joined(self, where: str) -> bytes:
        """All bytes of one place, in order."""
        return b"".join(self.recorded.get(where, []))

    # Sockets

    def proxy(self, port: int, name: str) -> int:
        """A port that leads to the enclave's and records both directions."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._sockets.append(listener)
        self._ports.add(port)

        def serve() -> None:
            with contextlib.suppress(OSError):
                for number in range(1 << 20):
                    near, _ = listener.accept()
                    far = socket.create_connection(("127.0.0.1", port))
                    self._sockets += near, far
                    for one in (near, far):
                        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    for source, target, way in ((near, far, "in"), (far, near, "out")):
                        label = f"{name} {number} {way}"
                        self._start(self._forward, source, target, label)

        self._start(serve)
        return listener.getsockname()[1]

    def _start(self, function: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _forward(self, source: socket.socket, target: socket.socket, label: str) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                self.record(label, content)
                # Before the host learns that the enclave is done, and before the enclave learns
                # what the host has put there.
                self.picture()
                target.sendall(content)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    # Shared memory

    def add(self, arena: Arena) -> None:
        """Records this shared memory from now on."""
        with self._lock:
            self._arenas.append((arena, np.zeros(arena.size, np.uint8)))

    def picture(self) -> None:
        """Records what changed in shared memory since the last picture, page by page."""
        with self._lock:
            for arena, last in self._arenas:
                now = np.frombuffer(arena._map, np.uint8).copy()
                starts = np.arange(0, len(now), PAGE)
                changed = np.add.reduceat((now != last).astype(np.int32), starts) > 0
                edges = np.flatnonzero(np.diff(np.concatenate([[0], changed, [0]])))
                for first, after in edges.reshape(-1, 2):
                    part = now[first * PAGE : after * PAGE].tobytes()
                    self.recorded.setdefault("shared memory", []).append(part)
                last[:] = now

    def watch(self) -> None:
        """Takes pictures until the recording ends."""
        while not self._ended.wait(_PAUSE_SECONDS):
            self.picture()

    # The process

    def check_nothing_else(self, pid: int, errors: Path) -> None:
        """Holds that the enclave can write to nothing that is not recorded, as the kernel has it.

        Raises:
          AssertionError: it can.
        """
        table = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        rows = [line.split() for line in table]
        sockets = {row[9] for row in rows if int(row[1].split(":")[1], 16) in self._ports}
        shared = {f"{arena.path} (deleted)" for arena, _ in self._arenas}
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except FileNotFoundError:
                continue  # closed meanwhile
            flags = int(re.findall(r"flags:\s+(\d+)", _info(pid, link.name))[0], 8)
            if flags & os.O_ACCMODE == os.O_RDONLY or target in (
                *shared,
                "/dev/null",
                str(errors),
            ):
                continue
            if link.name == "1" and target.startswith("pipe:"):
                continue
            if target.startswith("anon_inode:[event"):
                continue  # wakes threads of the same process
            inode = re.fullmatch(r"socket:\[(\d+)\]", target)
            assert inode and inode.group(1) in sockets, f"{link.name} -> {target}"
        for line in mappings(pid).splitlines():
            if line.split()[1].startswith("rw-s"):
                assert "/" + line.partition("/")[2] in shared, line

    def close(self) -> None:
        """Ends the recording."""
        self._ended.set()
        for one in self._sockets:
            # Wakes whoever waits for it.
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()


def mappings(pid: int) -> str:
    """What an enclave process has mapped; skips a test to which the kernel does not tell it."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except PermissionError:
        pytest.skip("only root, with CAP_SYS_PTRACE, may look at an enclave's mappings")


def _info(pid: int, descriptor: str) -> str:
    return Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text()


@contextlib.contextmanager
def recording() -> Iterator[Boundary]:
    """Records shared memory that the host makes while this lasts; see `Boundary.proxy`."""
    boundary = Boundary()

    class Recorded(Arena):
        """Shared memory that is recorded."""

        def __init__(self, name: str, size: int, *, create: bool = False):
            super().__init__(name, size, create=create)
            boundary.add(self)

    # Threads take turns more often, so that pictures are taken while the enclave is at work.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    watcher = threading.Thread(target=boundary.watch, daemon=True)
    watcher.start()
    try:
        with mock.patch.object(loopback, "Arena", Recorded):
            yield boundary
    finally:
        boundary.close()
        watcher.join()
        sys.setswitchinterval(interval)
