"""The host's lines to the enclave: connections and shared memory.

Untrusted. A request travels on a connection of its own as long as it lasts, so threads and the
workers of a mesh do not wait for each other. `transport.child` launches an enclave, `Attachment`
joins one that serves on this machine. Another process of the host comes by `Joined`, from this
machine or another one; where it shares no memory with the enclave, its parts of what crosses travel
behind the requests (`Shipment`).
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import secrets
import select
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from enclave_runtime.crypto.encryption import SessionKeys, derive_key
from enclave_runtime.protocol import wire
from enclave_runtime.protocol.memory import Arena, ArenaError
from enclave_runtime.protocol.refusals import ErrorCode, refused
from enclave_runtime.protocol.wire import Frame, Kind, Label, WireError
from tempo_jax.errors import (
    AdmissionError,
    ChannelError,
    CheckpointError,
    EnclaveDiedError,
    EnclaveError,
    EnclaveTimeoutError,
    IntegrityError,
    SealedValueError,
    SharedMemoryError,
    TempoError,
    UnprovisionedError,
)
from tempo_jax.transport.ownership import Owned

PATIENCE_SECONDS = 10.0  # of waiting for a reply before the enclave is asked whether it answers
ANSWER_SECONDS = 20.0  # within which a busy enclave answers that
INSIST_SECONDS = 600.0  # of asking an enclave that answers nothing for what must not be left undone
HERE = "127.0.0.1"

_ERRORS: dict[ErrorCode, type[TempoError]] = {
    ErrorCode.ADMISSION: AdmissionError,
    ErrorCode.SHARED_MEMORY: SharedMemoryError,
    ErrorCode.CHECKPOINT: CheckpointError,
    ErrorCode.DECRYPTION: SealedValueError,
    ErrorCode.INTEGRITY: IntegrityError,
    ErrorCode.UNKNOWN_HANDLE: SealedValueError,
    ErrorCode.UNPROVISIONED: UnprovisionedError,
}
# A serving enclave tells its host the code of an error and no more. What most often causes it:
_HINTS = {
    ErrorCode.DECRYPTION: ". What the host carried failed its authentication: it was altered, or "
    "made for another enclave",
    ErrorCode.UNKNOWN_HANDLE: ". A sealed value is not in this enclave: it was donated to an "
    "earlier call, was freed, or belongs to another enclave",
}


def fields_of(reply: Frame) -> dict[str, Any]:
    """The fields of a reply.

    Raises:
      EnclaveError: the enclave refused, `SealedValueError` and others where those fit.
    """
    if reply.kind is Kind.ERROR:
        code, text = refused(reply)
        hint = _HINTS.get(code, "") if text == wire.REFUSAL else ""
        raise _ERRORS.get(code, EnclaveError)(f"enclave: {text}{hint}")
    return reply.fields


class Calls:
    """Requests that can be given up together, from another thread.

    Attributes:
      cancelled: whether they were.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self.cancelled = False

    @contextlib.contextmanager
    def on(self, connection: socket.socket) -> Iterator[None]:
        """While this lasts, `cancel` breaks the connection, which is closed then in any case."""
        with self._lock:
            if self.cancelled:
                raise ConnectionAbortedError
            self._connections.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._connections.discard(connection)
                if self.cancelled:  # perhaps just as the reply came
                    connection.close()

    def cancel(self) -> None:
        """Breaks the connections of all requests under way, and of those that come later."""
        with self._lock:
            self.cancelled = True
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class Shipment:
    """What travels behind one request for a segment and behind its reply.

    Attributes:
      up_seconds: that the system took to accept all that went.
      down_seconds: from the first byte that came to the last.
    """

    def __init__(self, label: Label, up: Sequence[np.ndarray], down: Sequence[np.ndarray]):
        """Takes C-contiguous arrays: those that go, and those that take what comes."""
        self._label, self._up, self._down = label, up, down
        self.up_seconds = self.down_seconds = 0.0

    @property
    def up_bytes(self) -> int:
        """Bytes that go, with the headers of the blocks."""
        return wire.blocks_bytes(self._up)

    @property
    def down_bytes(self) -> int:
        """Bytes that come, with the headers of the blocks."""
        return wire.blocks_bytes(self._down)

    def send(self, connection: socket.socket) -> None:
        """Sends what goes."""
        start = time.perf_counter()
        wire.send_blocks(connection, self._label, self._up)
        self.up_seconds = time.perf_counter() - start

    def receive(self, connection: socket.socket) -> None:
        """Receives what comes.

        Raises:
          WireError: something else comes, or it is cut off.
        """
        start = time.perf_counter()
        for position, array in enumerate(self._down):
            wire.receive_block(connection, self._label, position, array)
        self.down_seconds = time.perf_counter() - start


class Loopback(Owned):
    """Lines to one enclave.

    Attributes:
      host: address of its machine; this one but for `Joined`.
      carries: whether this process shares no memory with the enclave, so that what crosses travels.
      session: the session's public name.
      keys: the session's keys where client and host share this process, else None.
      closed: whether `close` was called.
    """

    keys: SessionKeys | None
    session: str
    host = HERE
    carries = False

    def __init__(self, port: int):
        self.port = port
        self._listens: Any = None
        self._idle: list[socket.socket] = []
        self._connections: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._requests = itertools.count(1)
        self._arenas: list[tuple[str | None, Arena]] = []
        self.closed = False
        super().__init__()

    @abc.abstractmethod
    def _connection_key(self) -> bytes:
        """The key that both ends of a connection prove they know."""

    @abc.abstractmethod
    def _died(self) -> EnclaveDiedError:
        """What a broken connection means."""

    def invitation(self) -> dict[str, Any]:
        """What another process of this host needs to join, see `Joined`; all of it the host's."""
        with self._borrowed(None):
            pass  # the enclave says where else it listens when it is greeted
        key = self._connection_key().hex()
        told = {"port": self.port, "key": key, "session": self.session}
        return told | {"listens": self._listens}

    def leave_to_parent(self) -> None:
        """Closes a forked child's copies; see `Owned`."""
        for connection in list(self._connections):
            connection.close()
        self._idle, self._arenas = [], []

    # Requests

    def _connect(self, seconds: float | None) -> socket.socket:
        seconds = seconds or ANSWER_SECONDS
        connection = socket.create_connection((self.host, self.port), seconds)
        self._connections.add(connection)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._listens = greet(connection, self._connection_key()).get("listens")
            connection.settimeout(None)
        except BaseException:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def _borrowed(self, seconds: float | None) -> Iterator[socket.socket]:
        """A connection for one request; one that was interrupted is not used again."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        connection = connection or self._connect(seconds)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        if connection.fileno() >= 0:  # else its request was given up
            with self._lock:
                self._idle.append(connection)

    def request(
        self,
        kind: Kind,
        fields: dict[str, Any],
        attachment: bytes = b"",
        *,
        calls: Calls | None = None,
        seconds: float | None = None,
        shipment: Shipment | None = None,
    ) -> Any:
        """Asks the enclave and returns the reply's fields.

        Args:
          kind: of request.
          fields: the request's.
          attachment: bytes that come with it.
          calls: those with which this request can be given up.
          seconds: within which the reply has to come. Without it a request may take as long as the
            enclave works on it, as long as it answers others meanwhile.
          shipment: what travels behind the request and the reply.

        Raises:
          EnclaveDiedError: the process ended or the connection broke.
          ForkedError: this is a forked child of the process that made the connection.
          EnclaveTimeoutError: no reply came, or the enclave does not answer at all.
          EnclaveError: it refused; `SealedValueError` or `SharedMemoryError` where those fit.
        """
        self.check_process()
        self.check_open()
        calls = calls or Calls()
        try:
            with self._borrowed(seconds) as connection, calls.on(connection):
                # Numbers rise on every connection, since each carries one request at a time.
                number = next(self._requests)
                wire.send(connection, Frame(kind, number, fields, attachment))
                if shipment is not None:
                    shipment.send(connection)
                self._await(connection, seconds)
                reply = wire.receive(connection)
                if reply.request != number:
                    raise WireError("a reply answers another request")
                if shipment is not None and reply.kind is not Kind.ERROR:
                    shipment.receive(connection)
        except (OSError, WireError) as error:
            if calls.cancelled:
                raise EnclaveError("the request was given up: its run was aborted") from error
            if isinstance(error, TimeoutError):
                waited = f"{seconds or ANSWER_SECONDS:.3g} s"
                raise EnclaveTimeoutError(
                    f"{self!r}: no reply to {kind.name} in {waited}. If the "
                    "enclave is stopped, continue it (SIGCONT); if the machine is overloaded, call "
                    f"again.{self._why_silent()}"
                ) from error
            raise self._died() from error
        return fields_of(reply)

    def insist(self, kind: Kind, fields: dict[str, Any]) -> Any:
        """As `request`, and asks a silent enclave again for some minutes: it may be stopped."""
        end = time.monotonic() + INSIST_SECONDS
        while True:
            try:
                return self.request(kind, fields)
            except EnclaveTimeoutError:
                if time.monotonic() > end:
                    raise

    def _why_silent(self) -> str:
        here = self.host == HERE
        return "" if here else " It is on another machine: that one or the link may be down."

    def _await(self, connection: socket.socket, seconds: float | None) -> None:
        """Waits for a reply to begin; of an enclave that is busy only while it answers others.

        Raises:
          TimeoutError: it did not begin in time.
          EnclaveTimeoutError: the enclave answers nothing.
        """
        while not select.select([connection], [], [], seconds or PATIENCE_SECONDS)[0]:
            if seconds is not None:
                raise TimeoutError
            self.request(Kind.STATISTICS, {}, seconds=ANSWER_SECONDS)

    # Shared memory

    def reserve(self, size: int) -> tuple[str | None, Arena]:
        """Memory of at least `size` bytes for one run, mapped on both sides under a name.

        Where none is shared, it is this process's alone and has no name.

        Raises:
          SharedMemoryError: `/dev/shm` is too small; the message says how much is needed.
          ForkedError: this is a forked child of the process that made the connection.
        """
        self.check_process()
        with self._lock:
            fitting = [a for a in self._arenas if a[1].size >= size]
            if fitting:
                chosen = min(fitting, key=lambda a: a[1].size)
                self._arenas.remove(chosen)
                return chosen
            outgrown, self._arenas = self._arenas, []
        for name, _ in outgrown:
            self._unmap(name)
        return (None, Arena(None, size)) if self.carries else self._shared(size)

    def _shared(self, size: int) -> tuple[str, Arena]:
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

    def _unmap(self, name: str | None) -> None:
        if name is not None:
            self.request(Kind.UNMAP, {"name": name})

    def give_back(self, reserved: tuple[str | None, Arena]) -> None:
        """Keeps memory for a later run."""
        with self._lock:
            self._arenas.append(reserved)

    def discard(self, reserved: tuple[str | None, Arena]) -> None:
        """Forgets memory that a failed run may still be using."""
        name, _ = reserved
        with contextlib.suppress(TempoError):
            if name is not None:
                self.insist(Kind.UNMAP, {"name": name})

    def check_open(self) -> None:
        """Refuses use after `close`.

        Raises:
          EnclaveError: it was closed.
        """
        if self.closed:
            raise EnclaveError("this enclave was closed; launch a new one")

    def close(self) -> None:
        """Closes all connections; a forked child leaves its parent's as they are."""
        if not self.is_owned:
            return
        self.closed = True
        with self._lock:
            for connection in self._idle:
                connection.close()
            self._idle.clear()
            self._arenas.clear()


def greet(connection: socket.socket, key: bytes) -> dict[str, Any]:
    """Proves that both ends know a key; returns what the enclave said of itself.

    Raises:
      WireError: the enclave did not prove it, or breaks the protocol.
      EnclaveError: it serves as many connections as it can.
    """
    try:
        greeting = wire.receive(connection).fields
        challenge = bytes.fromhex(greeting["challenge"])
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        proof = wire.prove(key, "host", challenge, nonce)
        wire.send(connection, Frame(Kind.PROOF, 0, {"nonce": nonce.hex(), "proof": proof.hex()}))
        answer = bytes.fromhex(fields_of(wire.receive(connection))["proof"])
    except (KeyError, TypeError, ValueError) as error:
        raise WireError("the enclave's greeting is malformed") from error
    wire.check_proof(key, "enclave", nonce, challenge, answer)
    return greeting


def gone(where: str, why: str = "") -> EnclaveDiedError:
    """What a broken connection to an enclave that is no child of this process means."""
    return EnclaveDiedError(
        f"the connection to the enclave on {where} broke.{why} If its process ended, what "
        "it held is lost: serve a new one and let its client restore the last checkpoint."
    )


class Attachment(Loopback):
    """The host's lines to an enclave that serves; holds no key of the session."""

    keys = None

    def __init__(self, port: int, host_key: bytes):
        """Joins the enclave that listens on a port of this machine.

        Raises:
          ChannelError: nothing answers there, or it does not know the host key.
        """
        super().__init__(port)
        self._key = derive_key(host_key, "host port")
        try:
            connection = socket.create_connection((HERE, port))
            with connection:
                self.session = str(greet(connection, self._key)["session"])
        except (OSError, WireError, KeyError) as error:
            raise ChannelError(
                f"no enclave on port {port} of this machine accepts this host: start one with "
                "`tempo-jax enclave serve`, and name its host port and its host key file"
            ) from error

    def __repr__(self) -> str:
        return f"port {self.port}"

    def _connection_key(self) -> bytes:
        return self._key

    def _died(self) -> EnclaveDiedError:
        return gone(repr(self))
