"""Serves one session over TCP: to a parent that launched it, or to a client and a host.

Launched, the parent hands the session secret over the standard input, a pipe that only it holds,
and one port on loopback answers everything. Serving, two ports answer what `peers` lets each
kind of peer ask: the client's over TLS with evidence (`tls`), the host's on loopback. If it is told
to `listen`, one port more answers what a host may ask, for the host's processes on other machines:
whoever can read or write on the way there is a host to the enclave. Either way the enclave says on
its standard output where it listens, and when the pipe closes, its parent is gone and it ends at
once, whatever it was doing.

A connection proves itself before anything else is read from it. Its requests are numbered
upwards, so that none can be repeated or taken out of order, and every reply carries its
request's number. What breaks the protocol ends the connection, and what a host asks for that does
not fit its run ends the run. The host learns that it was refused and the error's code, and the
detail goes to the enclave's own log; see `_EXPLAINED_TO_HOSTS` for what a host is told in full.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from enclave_runtime.crypto.encryption import DecryptionError, derive_key
from enclave_runtime.protocol import handshake, wire
from enclave_runtime.protocol.checkpoint import RefusedCheckpointError
from enclave_runtime.protocol.configuration import (
    ConfigurationError,
    Launched,
    Listen,
    Serving,
    read_configuration,
)
from enclave_runtime.protocol.limits import MAX_STRANGERS
from enclave_runtime.protocol.memory import ArenaError
from enclave_runtime.protocol.program import ProgramError
from enclave_runtime.protocol.refusals import ErrorCode, refusal
from enclave_runtime.protocol.requests import RequestError
from enclave_runtime.protocol.wire import Frame, Kind, WireError
from enclave_runtime.serving import log
from enclave_runtime.serving.peers import CLIENT, HOST, PARENT, Ownership, Role, UnownedError
from enclave_runtime.serving.tls import ServerIdentity
from enclave_runtime.sessions.admission import RefusedInputError
from enclave_runtime.sessions.cargo import Cargo
from enclave_runtime.sessions.programs import UnknownProgramError
from enclave_runtime.sessions.run import RunError
from enclave_runtime.sessions.session import Session
from enclave_runtime.sessions.store import UnknownHandleError
from enclave_runtime.verifying.integrity import WrongProductError

HANDSHAKE_BYTES = 1024  # the largest body before a peer has proved itself
HANDSHAKE_SECONDS = 10.0  # in all, until a peer has proved itself

_log = logging.getLogger("enclave_runtime")

# The codes of errors whose texts are written for the peer; of any other error only that something
# failed leaves. A class not named here has its base's code.
_CODES: dict[type[BaseException], ErrorCode] = {
    RefusedInputError: ErrorCode.ADMISSION,
    ArenaError: ErrorCode.SHARED_MEMORY,
    RefusedCheckpointError: ErrorCode.CHECKPOINT,
    DecryptionError: ErrorCode.DECRYPTION,
    WrongProductError: ErrorCode.INTEGRITY,
    ProgramError: ErrorCode.PROGRAM,
    RequestError: ErrorCode.REQUEST,
    RunError: ErrorCode.RUN,
    UnknownHandleError: ErrorCode.UNKNOWN_HANDLE,
    UnownedError: ErrorCode.UNOWNED,
    UnknownProgramError: ErrorCode.UNPROVISIONED,
    WireError: ErrorCode.WIRE,
}
# Those whose text the host of a serving enclave gets too: it cannot act on them otherwise, and
# they speak of what the host itself holds or of what the client did not do.
_EXPLAINED_TO_HOSTS = frozenset(
    {
        *(ErrorCode.SHARED_MEMORY, ErrorCode.CHECKPOINT, ErrorCode.INTEGRITY),
        *(ErrorCode.UNOWNED, ErrorCode.UNPROVISIONED, ErrorCode.ADMISSION),
    }
)
# Requests that belong to a run.
_OF_A_RUN = frozenset({Kind.JOIN, Kind.SETTLE, Kind.SEGMENT, Kind.COMMIT})
# What a peer can bring about before it has proved itself.
_REFUSED = (WireError, OSError, KeyError, ValueError, TypeError)
# No descriptor, memory or thread is left: a state that passes.
_EXHAUSTED = (OSError, RuntimeError, MemoryError)
_EXHAUSTED_SECONDS = 0.1
# What `accept` says of a listener that was closed, which no peer can do.
_CLOSED = (errno.EBADF, errno.EINVAL)
# Seconds of silence until a peer is asked for a sign of life, between two questions, and their
# number: what is left of a peer that vanished must not take its next connection's place for ever.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
# Milliseconds after which what is sent to such a peer fails; by itself the system tries for longer.
_KEEPALIVE[socket.TCP_USER_TIMEOUT] = 120_000

# Hears a peer out until a time of `time.monotonic`, and gives the answer to its proof.
Authenticate = Callable[[socket.socket, float], Frame]


def _proven(own_role: str, role: str, key: bytes, challenge: bytes, proof: Frame) -> Frame:
    """Checks the peer's proof; returns the enclave's own."""
    if proof.kind is not Kind.PROOF:
        raise WireError("expected a proof of the session key")
    nonce = bytes.fromhex(proof.fields["nonce"])
    wire.check_proof(key, role, challenge, nonce, bytes.fromhex(proof.fields["proof"]))
    own = wire.prove(key, own_role, nonce, challenge)
    return Frame(Kind.PROOF, 0, {"proof": own.hex()})


def _greet(connection: socket.socket, ownership: Ownership, listens: Listen | None = None) -> bytes:
    challenge = secrets.token_bytes(wire.NONCE_BYTES)
    fields: dict[str, Any] = {
        "challenge": challenge.hex(),
        "session": ownership.identity,
        "owned": ownership.owned,
    }
    if listens is not None:
        fields["listens"] = listens
    wire.send(connection, Frame(Kind.HELLO, 0, fields))
    return challenge


def _host_peer(ownership: Ownership, key: bytes, listens: Listen | None) -> Authenticate:
    """A peer of the host proves that it knows a key, and hears where its others may come."""

    def authenticate(connection: socket.socket, deadline: float) -> Frame:
        challenge = _greet(connection, ownership, listens)
        proof = wire.receive(connection, HANDSHAKE_BYTES, deadline)
        return _proven("enclave", "host", key, challenge, proof)

    return authenticate


def _tls_client(ownership: Ownership, public_key: bytes) -> Authenticate:
    """A client brings the session's secret if the enclave has none, and proves it in any case."""

    def authenticate(connection: socket.socket, deadline: float) -> Frame:
        challenge = _greet(connection, ownership)
        frame = wire.receive(connection, HANDSHAKE_BYTES, deadline)
        if frame.kind is Kind.OWN:
            ownership.claim(frame.attachment)
            frame = wire.receive(connection, HANDSHAKE_BYTES, deadline)
        own, theirs = (handshake.proof_role(r, public_key) for r in ("enclave", "client"))
        return _proven(own, theirs, ownership.connection_key, challenge, frame)

    return authenticate


def _answer(ownership: Ownership, role: Role, frame: Frame, cargo: Cargo) -> Frame:
    try:
        role.check(frame.kind)
        fields, attachment = ownership.session.handle(frame, cargo)
        return Frame(Kind.REPLY, frame.request, fields, attachment)
    except tuple(_CODES) as error:
        # Who launched the enclave shares its standard error, and is told by the reply.
        level = logging.INFO if role is PARENT else logging.WARNING
        _log.log(level, "refused %s: %s", frame.kind.name, error)
        code = next(_CODES[base] for base in type(error).__mro__ if base in _CODES)
        text = str(error)
    except (KeyError, TypeError, ValueError, AttributeError):
        _log.exception("malformed %s", frame.kind.name)
        code, text = ErrorCode.REQUEST, f"a malformed {frame.kind.name} request"
    except Exception:
        _log.exception("failed in %s", frame.kind.name)
        code = ErrorCode.INTERNAL
        text = f"{frame.kind.name} failed inside the enclave (see its log)"
    if not role.is_client and ownership.owned:
        _end_run(ownership.session, frame)
    told = role.is_client or code in _EXPLAINED_TO_HOSTS
    return refusal(frame.request, code, text if told else wire.REFUSAL)


def _end_run(session: Session, frame: Frame) -> None:
    """Ends the run that a refused request names: its host has lost its place, or lies."""
    if frame.kind in _OF_A_RUN:
        with contextlib.suppress(RequestError):  # what names no run at all
            session.handle(Frame(Kind.ABORT, frame.request, {"run": frame.fields.get("run")}))


def _encoded(reply: Frame) -> bytes:
    try:
        return reply.encode()
    except WireError as error:
        return refusal(reply.request, ErrorCode.WIRE, str(error)).encode()


class _Listener:
    """A listening socket and what it takes to speak to it."""

    def __init__(
        self,
        listener: socket.socket,
        ownership: Ownership,
        role: Role,
        authenticate: Authenticate,
        context: ssl.SSLContext | None = None,
        proved: threading.BoundedSemaphore | None = None,
    ):
        self.number: int = listener.getsockname()[1]
        self._listener = listener
        self._ownership = ownership
        self._role = role
        self._authenticate = authenticate
        self._context = context
        self._strangers = threading.BoundedSemaphore(MAX_STRANGERS)
        self._proved = proved or threading.BoundedSemaphore(role.connections)

    def serve(self) -> None:
        """Accepts connections until the listener is closed; nothing that a peer does ends it."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except _EXHAUSTED as error:
                if isinstance(error, OSError) and error.errno in _CLOSED:
                    return
                _log.warning("cannot accept a connection: %s", error)
                time.sleep(_EXHAUSTED_SECONDS)
                continue
            if not self._strangers.acquire(blocking=False):
                _log.warning("refused a connection: too many that have not proved themselves")
                connection.close()
                continue
            try:
                threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()
            except _EXHAUSTED as error:
                _log.warning("cannot serve a connection: %s", error)
                self._strangers.release()
                connection.close()
                time.sleep(_EXHAUSTED_SECONDS)

    def _welcome(self, plain: socket.socket) -> None:
        connection, admitted = plain, False
        try:
            try:
                deadline = time.monotonic() + HANDSHAKE_SECONDS
                _prepare(plain)
                if self._context is not None:
                    connection = self._context.wrap_socket(
                        plain, server_side=True, do_handshake_on_connect=False
                    )
                connection.settimeout(HANDSHAKE_SECONDS)
                if isinstance(connection, ssl.SSLSocket):
                    connection.do_handshake()  # in this time in all, however bytes trickle in
                proof = self._authenticate(connection, deadline)
                admitted = self._proved.acquire(blocking=False)
                wire.send(connection, proof if admitted else self._full())
            finally:
                self._strangers.release()
            if not admitted:
                raise WireError(f"{self._role.connections} of the {self._role.name} are open")
            connection.settimeout(None)
            self._converse(connection)
        except wire.PeerLeftError:
            pass  # who only looked (`tempo-jax enclave inspect`) was refused nothing
        except _REFUSED as error:
            _log.warning("refused a connection: %s", error)
        except Exception:
            _log.exception("failed in a connection")
        finally:
            if admitted:
                self._proved.release()
            connection.close()

    def _full(self) -> Frame:
        text = (
            f"it serves {self._role.connections} connections of the {self._role.name} at a time, "
            "and all are open; close some first"
        )
        return refusal(0, ErrorCode.REQUEST, text)

    def _converse(self, connection: socket.socket) -> None:
        last = 0
        while True:
            try:
                frame = wire.receive(connection)
                if frame.request <= last:
                    raise WireError(f"request {frame.request} came after request {last}")
            except WireError as error:
                _log.warning("closed a connection: %s", error)
                with contextlib.suppress(OSError):
                    wire.send(connection, refusal(0, ErrorCode.WIRE, wire.REFUSAL))
                return
            except (OSError, ValueError):
                return
            last, cargo = frame.request, Cargo(connection)
            reply = _answer(self._ownership, self._role, frame, cargo)
            try:
                cargo.discard()
                connection.sendall(_encoded(reply))
                if reply.kind is not Kind.ERROR:
                    cargo.send()
            except OSError:
                return


def _prepare(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with contextlib.suppress(OSError):  # these times are not everywhere a choice
        for option, value in _KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _end_with_parent(pipe: BinaryIO) -> None:
    while pipe.read(1):
        pass
    os._exit(0)


def _bound(listen: Listen) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen.address else socket.AF_INET
    return socket.create_server((listen.address, listen.port), family=family)


def _host_ports(
    ownership: Ownership, role: Role, number: int, key: bytes, listen: Listen | None
) -> list[_Listener]:
    """The host's port on this machine, and that for its other machines."""
    inside, outside = _bound(Listen("127.0.0.1", number)), None
    if listen is not None:
        outside = _bound(listen)
        listen = listen._replace(port=outside.getsockname()[1])
    peer, proved = _host_peer(ownership, key, listen), threading.BoundedSemaphore(role.connections)
    ports = [_Listener(inside, ownership, role, peer, proved=proved)]
    if outside is not None:
        ports.append(_Listener(outside, ownership, HOST, peer, proved=proved))
    return ports


def _ports(configuration: Launched | Serving, identity: str) -> list[_Listener]:
    ownership = Ownership(identity)
    if isinstance(configuration, Launched):
        ownership.claim(configuration.secret)
        key = ownership.connection_key
        return _host_ports(ownership, PARENT, 0, key, configuration.listen)
    own = ServerIdentity()
    outside = _bound(Listen(configuration.address, configuration.client_port))
    client = _tls_client(ownership, own.public_key)
    key, number = derive_key(configuration.host_key, "host port"), configuration.host_port
    return [
        _Listener(outside, ownership, CLIENT, client, own.context()),
        *_host_ports(ownership, HOST, number, key, configuration.listen),
    ]


def serve() -> None:
    """Runs the enclave until its parent closes the pipe or is gone."""
    log.configure()
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
