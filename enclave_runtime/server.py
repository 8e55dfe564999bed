"""Serves one session over TCP: to a parent that launched it, or to a client and a host.

Launched, the parent hands the session secret over the standard input, a pipe that only it holds,
and one port on loopback answers everything. Serving, two ports answer what `peers` lets each
kind of peer ask: the client's over TLS with evidence (`tls`), the host's on loopback. Either way
the enclave says on its standard output where it listens, and when the pipe closes, its parent is
gone and it ends at once, whatever it was doing.

A connection proves itself before anything else is read from it. Its requests are numbered
upwards, so that none can be repeated or taken out of order, and every reply carries its
request's number. What breaks the protocol ends the connection: the peer learns that much, and
the detail goes to the enclave's own log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from enclave_runtime import channel, wire
from enclave_runtime.checkpoint import CheckpointError
from enclave_runtime.configuration import ConfigurationError, Launched, Serving, read_configuration
from enclave_runtime.encryption import DecryptionError, derive_key
from enclave_runtime.integrity import IntegrityError
from enclave_runtime.memory import ArenaError
from enclave_runtime.peers import CLIENT, HOST, PARENT, Ownership, Role
from enclave_runtime.program import ProgramError
from enclave_runtime.run import RunError
from enclave_runtime.session import RequestError
from enclave_runtime.store import UnknownHandleError
from enclave_runtime.tls import ServerIdentity
from enclave_runtime.wire import Frame, Kind, WireError

HANDSHAKE_BYTES = 1024  # the largest body before a peer has proved itself
HANDSHAKE_SECONDS = 10.0  # in all, until a peer has proved itself
MAX_STRANGERS = 32  # connections of one port that have not proved themselves yet

_log = logging.getLogger("enclave_runtime")

# Texts of these are written for the peer; of any other only that something failed leaves.
_EXPLAINED = (
    ArenaError,
    CheckpointError,
    DecryptionError,
    IntegrityError,
    ProgramError,
    RequestError,
    RunError,
    UnknownHandleError,
    WireError,
)
# What a peer can bring about before it has proved itself.
_REFUSED = (WireError, OSError, KeyError, ValueError, TypeError)

Authenticate = Callable[[socket.socket], None]


def _prove(
    connection: socket.socket, own_role: str, role: str, key: bytes, challenge: bytes, proof: Frame
) -> None:
    """Checks the peer's proof and answers with the enclave's own."""
    if proof.kind is not Kind.PROOF:
        raise WireError("expected a proof of the session key")
    nonce = bytes.fromhex(proof.fields["nonce"])
    wire.check_proof(key, role, challenge, nonce, bytes.fromhex(proof.fields["proof"]))
    own = wire.prove(key, own_role, nonce, challenge)
    wire.send(connection, Frame(Kind.PROOF, 0, {"proof": own.hex()}))


def _greet(connection: socket.socket, ownership: Ownership) -> bytes:
    challenge = secrets.token_bytes(wire.NONCE_BYTES)
    fields = {
        "challenge": challenge.hex(),
        "session": ownership.identity,
        "owned": ownership.owned,
    }
    wire.send(connection, Frame(Kind.HELLO, 0, fields))
    return challenge


def _loopback_peer(ownership: Ownership, key: bytes) -> Authenticate:
    """A peer on this machine proves that it knows a key."""

    def authenticate(connection: socket.socket) -> None:
        challenge = _greet(connection, ownership)
        proof = wire.receive(connection, HANDSHAKE_BYTES)
        _prove(connection, "enclave", "host", key, challenge, proof)

    return authenticate


def _tls_client(ownership: Ownership, public_key: bytes) -> Authenticate:
    """A client brings the session's secret if the enclave has none, and proves it in any case."""

    def authenticate(connection: socket.socket) -> None:
        challenge = _greet(connection, ownership)
        frame = wire.receive(connection, HANDSHAKE_BYTES)
        if frame.kind is Kind.OWN:
            ownership.claim(frame.attachment)
            frame = wire.receive(connection, HANDSHAKE_BYTES)
        own, theirs = (channel.proof_role(r, public_key) for r in ("enclave", "client"))
        _prove(connection, own, theirs, ownership.connection_key, challenge, frame)

    return authenticate


def _answer(ownership: Ownership, role: Role, frame: Frame) -> Frame:
    try:
        role.check(frame.kind)
        fields, attachment = ownership.session.handle(frame)
        return Frame(Kind.REPLY, frame.request, fields, attachment)
    except _EXPLAINED as error:
        _log.info("refused %s: %s", frame.kind.name, error)
        text, kind = str(error), type(error).__name__
    except (KeyError, TypeError, ValueError, AttributeError):
        _log.exception("malformed %s", frame.kind.name)
        text, kind = f"a malformed {frame.kind.name} request", "RequestError"
    except Exception:
        _log.exception("failed in %s", frame.kind.name)
        text, kind = f"{frame.kind.name} failed inside the enclave (see its log)", "InternalError"
    return Frame(Kind.ERROR, frame.request, {"error": kind, "text": text})


def _encoded(reply: Frame) -> bytes:
    try:
        return reply.encode()
    except WireError as error:
        fields = {"error": "WireError", "text": str(error)}
        return Frame(Kind.ERROR, reply.request, fields).encode()


class _Port:
    """A listening socket and what it takes to speak to it."""

    def __init__(
        self,
        listener: socket.socket,
        ownership: Ownership,
        role: Role,
        authenticate: Authenticate,
        context: ssl.SSLContext | None = None,
    ):
        self.number: int = listener.getsockname()[1]
        self._listener = listener
        self._ownership = ownership
        self._role = role
        self._authenticate = authenticate
        self._context = context
        self._strangers = threading.BoundedSemaphore(MAX_STRANGERS)

    def serve(self) -> None:
        """Accepts connections for ever."""
        while True:
            connection, _ = self._listener.accept()
            if not self._strangers.acquire(blocking=False):
                _log.warning("refused a connection: too many that have not proved themselves")
                connection.close()
                continue
            threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()

    def _welcome(self, plain: socket.socket) -> None:
        connection = plain
        try:
            try:
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._context is not None:
                    connection = self._context.wrap_socket(
                        plain, server_side=True, do_handshake_on_connect=False
                    )
                with _deadline(connection):
                    if isinstance(connection, ssl.SSLSocket):
                        connection.do_handshake()
                    self._authenticate(connection)
            finally:
                self._strangers.release()
            self._converse(connection)
        except _REFUSED as error:
            _log.warning("refused a connection: %s", error)
        finally:
            connection.close()

    def _converse(self, connection: socket.socket) -> None:
        last = 0
        while True:
            try:
                frame = wire.receive(connection)
                if frame.request <= last:
                    raise WireError(f"request {frame.request} came after request {last}")
            except WireError as error:
                _log.warning("closed a connection: %s", error)
                text = "the connection broke the protocol and is closed"
                with contextlib.suppress(OSError):
                    fields = {"error": "WireError", "text": text}
                    wire.send(connection, Frame(Kind.ERROR, 0, fields))
                return
            except (OSError, ValueError):
                return
            last = frame.request
            reply = _encoded(_answer(self._ownership, self._role, frame))
            try:
                connection.sendall(reply)
            except OSError:
                return


@contextlib.contextmanager
def _deadline(connection: socket.socket) -> Iterator[None]:
    """Breaks the connection if what is inside takes too long, however slowly bytes trickle in."""

    def expire() -> None:
        # Not the method of an SSL socket, which would take its state from under the other thread.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    timer = threading.Timer(HANDSHAKE_SECONDS, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_with_parent(pipe: BinaryIO) -> None:
    while pipe.read(1):
        pass
    os._exit(0)


def _ports(configuration: Launched | Serving, identity: str) -> list[_Port]:
    ownership = Ownership(identity)
    if isinstance(configuration, Launched):
        ownership.claim(configuration.secret)
        listener = socket.create_server(("127.0.0.1", 0))
        peer = _loopback_peer(ownership, ownership.connection_key)
        return [_Port(listener, ownership, PARENT, peer)]
    own = ServerIdentity()
    family = socket.AF_INET6 if ":" in configuration.address else socket.AF_INET
    address: Any = (configuration.address, configuration.client_port)
    outside = socket.create_server(address, family=family)
    client = _tls_client(ownership, own.public_key)
    inside = socket.create_server(("127.0.0.1", configuration.host_port))
    host = _loopback_peer(ownership, derive_key(configuration.host_key, "host port"))
    return [
        _Port(outside, ownership, CLIENT, client, own.context()),
        _Port(inside, ownership, HOST, host),
    ]


def serve() -> None:
    """Runs the enclave until its parent closes the pipe or is gone."""
    logging.basicConfig(format="enclave: %(message)s", level=logging.WARNING, stream=sys.stderr)
    pipe = sys.stdin.buffer
    identity = secrets.token_hex(16)
    try:
        ports = _ports(read_configuration(pipe), identity)
    except (ConfigurationError, OSError) as error:
        _log.error("cannot start: %s", error)
        raise SystemExit(2) from None
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    print(*(port.number for port in ports), identity, flush=True)
    for port in ports[1:]:
        threading.Thread(target=port.serve, daemon=True).start()
    ports[0].serve()
