"""The ports of a serving enclave by hand: raw connections, and frames that break the protocol."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from enclave_runtime.protocol import wire
from enclave_runtime.protocol.refusals import ErrorCode, refusal
from enclave_runtime.protocol.wire import Frame, Kind
from enclave_runtime.serving import peers, server
from tempo_jax.cli.serve import ServingProcess
from tempo_jax.errors import (
    ChannelError,
    EnclaveError,
)
from tempo_jax.transport.channel import Channel
from tempo_jax.transport.loopback import Attachment
from tests.support.serving import IDENTITY, INSECURE


def still_serves(ports: ServingProcess) -> None:
    """Asserts that the enclave lives and answers its owner."""
    connection = Channel(ports.client, INSECURE, IDENTITY)
    with pytest.raises(EnclaveError, match="not a request"):
        connection.request(Kind.HELLO, {})
    connection.close()


# Frames that break the protocol


def is_closed(connection: socket.socket) -> bool:
    """Whether the peer closed the connection without another word."""
    connection.settimeout(10)
    try:
        return connection.recv(1) == b""
    except (ConnectionError, ssl.SSLError):
        return True


def client_socket(line: Channel) -> socket.socket:
    """The connection of an owner that has proved itself."""
    return line._connection


@contextlib.contextmanager
def host_socket(line: Attachment) -> Iterator[socket.socket]:
    """A connection of a host that has proved itself."""
    with line._connect(None) as connection:
        yield connection


def numbered(number: int) -> bytes:
    return Frame(Kind.CALIBRATE, number, {}).encode()


OVERSIZED = wire.HEADER.pack(wire.MAGIC, wire.VERSION, Kind.MAP, 9, wire.MAX_BODY + 1)
BREAKING: dict[str, tuple[list[bytes], str]] = {
    "replayed": ([numbered(1), numbered(1)], "request 1 came after request 1"),
    "reordered": ([numbered(7), numbered(6)], "request 6 came after request 7"),
    "without a number": ([numbered(0)], "request 0 came after request 0"),
    "oversized": ([OVERSIZED], "expected 4 to"),
    "unknown": ([wire.HEADER.pack(wire.MAGIC, wire.VERSION, 999, 1, 6)], "unknown frame kind 999"),
    "another version": ([wire.HEADER.pack(wire.MAGIC, 9, Kind.MAP, 1, 6)], "protocol version 9"),
    "another protocol": ([b"GET / HTTP/1.1\r\nHost: x\r\n"], "wrong magic"),
    "no JSON": (
        [wire.HEADER.pack(wire.MAGIC, wire.VERSION, Kind.MAP, 1, 6) + b"\0\0\0\2[["],
        "JSON",
    ),
}


def breaks(connection: socket.socket, frames: list[bytes]) -> None:
    """Asserts that frames end a connection with the one short text, the last frame unanswered."""
    for frame in frames[:-1]:
        connection.sendall(frame)
        assert wire.receive(connection).kind is Kind.REPLY
    connection.sendall(frames[-1])
    answer = wire.receive(connection)
    assert answer == refusal(0, ErrorCode.WIRE, wire.REFUSAL)
    assert is_closed(connection)


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes true soon."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


PROVED = Frame(Kind.PROOF, 0, {})


@contextlib.contextmanager
def in_process(
    authenticate: server.Authenticate = lambda connection, deadline: PROVED,
    context: ssl.SSLContext | None = None,
    role: peers.Role = peers.PARENT,
) -> Iterator[int]:
    """A port of this process, owned by nobody special; gives its number."""
    ownership = peers.Ownership("00" * 16)
    ownership.claim(bytes(32))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = server._Listener(listener, ownership, role, authenticate, context)
        thread = threading.Thread(target=port.serve, daemon=True)
        thread.start()
        yield port.number
        listener.shutdown(socket.SHUT_RDWR)
    # A listener that was closed ends the port without an error.
    thread.join(10)
    assert not thread.is_alive()


def one_frame(connection: socket.socket, deadline: float) -> Frame:
    """Takes any frame for a proof."""
    wire.receive(connection, deadline=deadline)
    return PROVED


def comes_back(running: ServingProcess) -> bool:
    """Whether the enclave answers its owner."""
    try:
        still_serves(running)
    except ChannelError:
        return False
    return True


def accepts(port: int) -> bool:
    """Whether a port takes a frame that proves nothing, and then a request."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        try:
            wire.send(connection, Frame(Kind.PROOF, 0, {}))
            wire.send(connection, Frame(Kind.STATISTICS, 1, {}))
            assert wire.receive(connection) == PROVED
            return wire.receive(connection).kind is Kind.REPLY
        except OSError:
            return False
