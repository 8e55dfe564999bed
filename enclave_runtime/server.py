"""Serves one session over TCP on loopback.

The parent hands the session secret over the standard input, a pipe that only it holds;
the enclave answers on its standard output with the port. When that pipe closes, the
parent is gone and the enclave ends at once, whatever it was doing. A connection has to
prove that it knows the session key before anything else is read from it.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
from typing import BinaryIO

from enclave_runtime import wire
from enclave_runtime.encryption import DecryptionError, session_keys
from enclave_runtime.integrity import IntegrityError
from enclave_runtime.memory import ArenaError
from enclave_runtime.program import ProgramError
from enclave_runtime.run import RunError
from enclave_runtime.session import RequestError, Session
from enclave_runtime.store import UnknownHandleError
from enclave_runtime.wire import Frame, Kind, WireError

HANDSHAKE_BYTES = 1024  # the largest body before a peer has proved itself
HANDSHAKE_SECONDS = 10.0

_log = logging.getLogger("enclave_runtime")

# Texts of these are written for the peer; of any other only that something failed leaves.
_EXPLAINED = (
    ArenaError,
    DecryptionError,
    IntegrityError,
    ProgramError,
    RequestError,
    RunError,
    UnknownHandleError,
    WireError,
)


def _authenticate(connection: socket.socket, key: bytes) -> None:
    connection.settimeout(HANDSHAKE_SECONDS)
    challenge = secrets.token_bytes(wire.NONCE_BYTES)
    wire.send(connection, Frame(Kind.HELLO, 0, {"challenge": challenge.hex()}))
    proof = wire.receive(connection, HANDSHAKE_BYTES)
    if proof.kind is not Kind.PROOF:
        raise WireError("expected a proof of the session key")
    nonce = bytes.fromhex(proof.fields["nonce"])
    wire.check_proof(key, "host", challenge, nonce, bytes.fromhex(proof.fields["proof"]))
    own = wire.prove(key, "enclave", nonce, challenge)
    wire.send(connection, Frame(Kind.PROOF, 0, {"proof": own.hex()}))
    connection.settimeout(None)


def _answer(session: Session, frame: Frame) -> Frame:
    try:
        return Frame(Kind.REPLY, frame.request, session.handle(frame))
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


def _serve_connection(connection: socket.socket, key: bytes, session: Session) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            _authenticate(connection, key)
        except (WireError, OSError, KeyError, ValueError, TypeError) as error:
            _log.warning("refused a connection: %s", error)
            return
        while True:
            try:
                frame = wire.receive(connection)
            except WireError as error:
                _log.warning("closed a connection: %s", error)
                return
            except OSError:
                return
            try:
                wire.send(connection, _answer(session, frame))
            except OSError:
                return


def _end_with_parent(pipe: BinaryIO) -> None:
    while pipe.read(1):
        pass
    os._exit(0)


def serve() -> None:
    """Runs the enclave until its parent closes the pipe or is gone."""
    logging.basicConfig(format="enclave: %(message)s", level=logging.WARNING, stream=sys.stderr)
    pipe = sys.stdin.buffer
    secret = bytes.fromhex(pipe.readline().decode("ascii").strip())
    identity = secrets.token_hex(16)
    keys = session_keys(secret)
    session = Session(keys, identity)
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], identity, flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(
                target=_serve_connection, args=(connection, keys.connection, session), daemon=True
            ).start()
