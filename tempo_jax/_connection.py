"""The host's line to the enclave: its process, connections, and shared memory.

Untrusted. A request travels on a connection of its own as long as it lasts, so threads and
the workers of a mesh do not wait for each other. Used by `_enclave`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import enclave_runtime
from enclave_runtime import wire
from enclave_runtime.encryption import SECRET_BYTES, SessionKeys, session_keys
from enclave_runtime.memory import Arena, ArenaError
from enclave_runtime.wire import Frame, Kind, WireError
from tempo_jax.errors import (
    EnclaveDiedError,
    EnclaveError,
    IntegrityError,
    SealedValueError,
    SharedMemoryError,
    TempoError,
)

START_SECONDS = 120.0
STOP_SECONDS = 5.0

# glibc returns large blocks to the system at once and then pays a page fault for every page of
# the next result; keeping them made elementwise segments several times faster (mallopt(3)).
ALLOCATOR_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
# The enclave shares NumPy's products out itself; two pools of threads would wait for each other.
_ENCLAVE_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
ENCLAVE_MODULE = "enclave_runtime"
# The enclave serves one processor; flags meant for the host's devices would mislead it.
_NOT_INHERITED = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")

_ERRORS: dict[str, type[Exception]] = {
    "ArenaError": SharedMemoryError,
    "DecryptionError": SealedValueError,
    "IntegrityError": IntegrityError,
    "UnknownHandleError": SealedValueError,
}


def _environment() -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    root = str(Path(enclave_runtime.__file__).resolve().parent.parent)
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = root if not path else os.pathsep.join((root, path))
    return {**environment, **ALLOCATOR_ENVIRONMENT, **_ENCLAVE_ENVIRONMENT}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process: closing its pipe asks, and after a while it is killed."""
    with contextlib.suppress(OSError):
        if process.stdin:
            process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


class Connection:
    """A launched enclave process and the means to ask it things.

    Attributes:
      session: the session's public name.
      keys: the session's keys; in development client and host share a process.
      process: the child.
    """

    def __init__(self) -> None:
        secret = secrets.token_bytes(SECRET_BYTES)
        self.keys: SessionKeys = session_keys(secret)
        self.process = subprocess.Popen(
            [sys.executable, "-m", ENCLAVE_MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
        )
        self._finalizer = weakref.finalize(self, _stop, self.process)
        assert self.process.stdin and self.process.stdout
        # A child that ended already breaks the pipe; its missing greeting tells below.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(secret.hex().encode() + b"\n")
            self.process.stdin.flush()
        timer = threading.Timer(START_SECONDS, self.process.kill)
        timer.start()
        greeting = self.process.stdout.readline().split()
        timer.cancel()
        if len(greeting) != 2:
            raise self._died()
        self.port = int(greeting[0])
        self.session = greeting[1].decode()
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()
        self._requests = itertools.count(1)
        self._arenas: list[tuple[str, Arena]] = []
        self.closed = False

    def _died(self) -> EnclaveDiedError:
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return EnclaveDiedError(
                f"the connection to the enclave (process {self.process.pid}) broke"
            )
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return EnclaveDiedError(
            f"the enclave (process {self.process.pid}) {how}. What it held is lost: launch a new "
            "one and seal the state again from your last checkpoint."
        )

    # Requests

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            challenge = bytes.fromhex(wire.receive(connection).fields["challenge"])
            nonce = secrets.token_bytes(wire.NONCE_BYTES)
            proof = wire.prove(self.keys.connection, "host", challenge, nonce)
            fields = {"nonce": nonce.hex(), "proof": proof.hex()}
            wire.send(connection, Frame(Kind.PROOF, 0, fields))
            answer = bytes.fromhex(wire.receive(connection).fields["proof"])
            wire.check_proof(self.keys.connection, "enclave", nonce, challenge, answer)
        except BaseException:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[socket.socket]:
        """A connection for one request; one that was interrupted is not used again."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        connection = connection or self._connect()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)

    def request(self, kind: Kind, fields: dict[str, Any], attachment: bytes = b"") -> Any:
        """Asks the enclave and returns the reply's fields.

        Raises:
          EnclaveDiedError: the process ended or the connection broke.
          EnclaveError: it refused; `SealedValueError` or `SharedMemoryError` where those fit.
        """
        if self.closed:
            raise EnclaveError("this enclave was closed; launch a new one")
        try:
            with self._borrowed() as connection:
                number = next(self._requests)
                wire.send(connection, Frame(kind, number, fields, attachment))
                reply = wire.receive(connection)
                if reply.request != number:
                    raise WireError("a reply answers another request")
        except (OSError, WireError) as error:
            raise self._died() from error
        if reply.kind is Kind.ERROR:
            error = _ERRORS.get(reply.fields.get("error", ""), EnclaveError)
            raise error(f"enclave: {reply.fields.get('text')}")
        return reply.fields

    # Shared memory

    def reserve(self, size: int) -> tuple[str, Arena]:
        """Shared memory of at least `size` bytes for one run, mapped on both sides.

        Raises:
          SharedMemoryError: `/dev/shm` is too small; the message says how much is needed.
        """
        with self._lock:
            fitting = [a for a in self._arenas if a[1].size >= size]
            if fitting:
                chosen = min(fitting, key=lambda a: a[1].size)
                self._arenas.remove(chosen)
                return chosen
            outgrown, self._arenas = self._arenas, []
        for name, _ in outgrown:
            self.request(Kind.UNMAP, {"name": name})
        name = f"tempo_jax-{secrets.token_hex(16)}"
        try:
            arena = Arena(name, size, create=True)
        except ArenaError as error:
            raise SharedMemoryError(str(error)) from error
        try:
            self.request(Kind.MAP, {"name": name, "size": size})
        finally:
            # Both sides have mapped it: without a name nothing can be left behind.
            arena.unlink()
        return name, arena

    def give_back(self, reserved: tuple[str, Arena]) -> None:
        """Keeps shared memory for a later run."""
        with self._lock:
            self._arenas.append(reserved)

    def discard(self, reserved: tuple[str, Arena]) -> None:
        """Forgets shared memory that a failed run may still be using."""
        with contextlib.suppress(TempoError):
            self.request(Kind.UNMAP, {"name": reserved[0]})

    def close(self) -> None:
        """Ends the enclave."""
        self.closed = True
        with self._lock:
            for connection in self._idle:
                connection.close()
            self._idle.clear()
            self._arenas.clear()
        self._finalizer()
