"""The ports of an enclave that serves: who may speak to them, and what breaks the protocol."""

import contextlib
import datetime
import errno
import logging
import os
import re
import resource
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import tempo_jax as tempo
from enclave_runtime.crypto.encryption import session_keys
from enclave_runtime.protocol import handshake, limits, wire
from enclave_runtime.protocol.evidence import make_evidence
from enclave_runtime.protocol.refusals import ErrorCode, refusal, refused
from enclave_runtime.protocol.wire import Frame, Kind, WireError
from enclave_runtime.serving import log, peers, server, tls
from enclave_runtime.serving.tls import ServerIdentity
from tempo_jax.cli.serve import Served, served
from tempo_jax.errors import (
    AttestationError,
    ChannelError,
    EnclaveDiedError,
    EnclaveError,
    SealedValueError,
    SharedMemoryError,
    UnprovisionedError,
)
from tempo_jax.transport import channel
from tempo_jax.transport.channel import Channel, dial, parse_address
from tempo_jax.transport.host_key import read_host_key
from tempo_jax.transport.loopback import Attachment, fields_of
from tests.support.toy_pki import der

INSECURE = tempo.AttestationPolicy(insecure_accept_no_sgx=True)
DATA = Path(__file__).parent.parent / "data"
IDENTITY = tempo.ClientIdentity(bytes(range(32)))


@pytest.fixture(scope="module")
def enclave_ports(tmp_path_factory) -> Iterator[Served]:
    """A serving enclave that `IDENTITY` owns."""
    with served(host_key=tmp_path_factory.mktemp("host") / "key") as running:
        Channel(running.client, INSECURE, IDENTITY).close()
        yield running


@pytest.fixture
def client(enclave_ports: Served) -> Iterator[Channel]:
    """The owner's connection."""
    connection = Channel(enclave_ports.client, INSECURE, IDENTITY)
    yield connection
    connection.close()


@pytest.fixture
def host(enclave_ports: Served) -> Iterator[Attachment]:
    """A host's lines."""
    _, port = parse_address(enclave_ports.host)
    lines = Attachment(port, read_host_key(port, enclave_ports.host_key))
    yield lines
    lines.close()


def still_serves(ports: Served) -> None:
    """Asserts that the enclave lives and answers its owner."""
    connection = Channel(ports.client, INSECURE, IDENTITY)
    with pytest.raises(EnclaveError, match="not a request"):
        connection.request(Kind.HELLO, {})
    connection.close()


# Each port takes its own requests

REQUESTS = peers.CLIENT_KINDS | peers.HOST_KINDS


@pytest.mark.parametrize("kind", sorted(REQUESTS - peers.CLIENT_KINDS), ids=lambda k: k.name)
def test_client_port_refuses_the_hosts_requests(client, kind):
    match = f"{kind.name} is not a request that the client may make"
    with pytest.raises(EnclaveError, match=match):
        client.request(kind, {})


@pytest.mark.parametrize("kind", sorted(REQUESTS - peers.HOST_KINDS), ids=lambda k: k.name)
def test_host_port_refuses_the_clients_requests(host, kind):
    with pytest.raises(EnclaveError, match=f"^enclave: {wire.REFUSAL}$"):
        host.request(kind, {})


def test_every_kind_is_a_greeting_an_answer_or_somebodys_request():
    greetings = {Kind.HELLO, Kind.PROOF, Kind.OWN, Kind.REPLY, Kind.ERROR}
    assert REQUESTS | greetings == set(Kind) and not REQUESTS & greetings
    assert peers.CLIENT_KINDS & peers.HOST_KINDS == {Kind.CALIBRATE}
    assert REQUESTS == peers.PARENT.kinds


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.PROOF, Kind.OWN, Kind.REPLY], ids=str)
def test_greeting_after_the_greeting_is_no_request(client, host, kind):
    for line, text in ((client, f"kind {kind.name} is not a request"), (host, wire.REFUSAL)):
        with pytest.raises(EnclaveError, match=text):
            line.request(kind, {}, bytes(32))


def test_costs_are_measured_once_for_both_sides(client, host):
    costs = client.request(Kind.CALIBRATE, {})
    assert costs["dot_flops"] > 0
    assert host.request(Kind.CALIBRATE, {}) == costs == client.request(Kind.CALIBRATE, {})


def test_host_before_the_client_is_told_to_wait(tmp_path):
    with served(host_key=tmp_path / "key") as running:
        _, port = parse_address(running.host)
        lines = Attachment(port, read_host_key(port, running.host_key))
        with pytest.raises(EnclaveError, match="has no owner yet"):
            lines.request(Kind.STATISTICS, {})
        lines.close()
        # Nor does knowing nothing of a secret make a client of anyone.
        connection, _ = dial(running.client)
        with connection:
            assert wire.receive(connection).fields["owned"] is False
            proof = {"nonce": "00" * 32, "proof": "00" * 32}
            wire.send(connection, Frame(Kind.PROOF, 0, proof))
            assert is_closed(connection)
        inspected = Channel(running.client, INSECURE, IDENTITY)
        inspected.close()


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


@pytest.mark.parametrize("name", BREAKING)
def test_frame_that_breaks_the_protocol_ends_the_connection(enclave_ports, client, host, name):
    frames, _ = BREAKING[name]
    breaks(client_socket(client), frames)
    with host_socket(host) as connection:
        breaks(connection, frames)
    still_serves(enclave_ports)


@pytest.mark.parametrize("sent", [1, wire.HEADER.size, wire.HEADER.size + 3])
def test_truncated_frame_ends_the_connection(enclave_ports, client, host, sent):
    truncated = numbered(1)[:sent]
    with host_socket(host) as connection:
        connection.sendall(truncated)
        connection.shutdown(socket.SHUT_WR)
        assert is_closed(connection)
    connection = client_socket(client)
    connection.sendall(truncated)
    connection.close()
    still_serves(enclave_ports)


def test_reply_to_another_request_is_refused(host):
    here, there = socket.socketpair()
    with host._lock:
        host._idle.append(here)

    def answer() -> None:
        frame = wire.receive(there)
        wire.send(there, Frame(Kind.REPLY, frame.request + 1, {}))

    with there:
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(EnclaveDiedError, match="broke") as caught:
            host.request(Kind.STATISTICS, {})
        thread.join()
    assert "answers another request" in str(caught.value.__cause__)


# Who may speak at all


def test_second_owner_is_refused(enclave_ports):
    match = "has an owner already, whose identity is not this one"
    with pytest.raises(ChannelError, match=match):
        Channel(enclave_ports.client, INSECURE, tempo.ClientIdentity.generate())
    # Nor by claiming it in spite of what the enclave said.
    connection, _ = dial(enclave_ports.client)
    with connection:
        wire.receive(connection)
        wire.send(connection, Frame(Kind.OWN, 0, {}, bytes(32)))
        assert is_closed(connection)
    still_serves(enclave_ports)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_secret_of_another_length_owns_nothing(length):
    ownership = peers.Ownership("00" * 16)
    with pytest.raises(WireError, match=f"a secret has {length} bytes, expected 32"):
        ownership.claim(bytes(length))
    assert not ownership.owned


def test_owner_is_kept_by_sessions_that_share_no_secret():
    named = [("00" * 16, b"key"), ("01" * 16, b"key"), ("00" * 16, b"another key")]
    derived = [IDENTITY.session_secret(*of) for of in named]
    assert len(set(derived)) == len(named) and {len(secret) for secret in derived} == {32}
    assert derived == [IDENTITY.session_secret(*of) for of in named]


FIRST_FRAMES: dict[str, bytes] = {
    "a request": Frame(Kind.STATISTICS, 1, {}).encode(),
    "no proof": Frame(Kind.PROOF, 0, {}).encode(),
    "no numbers": Frame(Kind.PROOF, 0, {"nonce": 3, "proof": None}).encode(),
    "a guess": Frame(Kind.PROOF, 0, {"nonce": "00" * 32, "proof": "11" * 32}).encode(),
    "a long frame": wire.HEADER.pack(wire.MAGIC, wire.VERSION, Kind.PROOF, 0, 1 << 20),
    "another protocol": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("name", FIRST_FRAMES)
def test_stranger_is_refused_without_a_word(enclave_ports, name):
    over_tls, _ = dial(enclave_ports.client)
    plain = socket.create_connection(parse_address(enclave_ports.host), 10)
    for connection in (over_tls, plain):
        with connection:
            assert wire.receive(connection).kind is Kind.HELLO
            connection.sendall(FIRST_FRAMES[name])
            assert is_closed(connection)
    still_serves(enclave_ports)


def test_wrong_host_key_is_refused(enclave_ports):
    _, port = parse_address(enclave_ports.host)
    with pytest.raises(ChannelError, match="no enclave on port .* accepts this host"):
        Attachment(port, bytes(32))


@pytest.mark.parametrize("relayed", [True, False])
def test_proof_counts_for_the_channel_it_was_made_for(enclave_ports, relayed):
    # A relay that ends TLS itself gets proofs for its own key, and they are worth nothing.
    connection, certificate = dial(enclave_ports.client)
    public_key = ServerIdentity().public_key if relayed else certificate.public_key
    with connection:
        greeting = wire.receive(connection).fields
        secret = IDENTITY.session_secret(greeting["session"], certificate.public_key)
        key = session_keys(secret).connection
        challenge, nonce = bytes.fromhex(greeting["challenge"]), bytes(32)
        proof = wire.prove(key, handshake.proof_role("client", public_key), challenge, nonce)
        fields = {"nonce": nonce.hex(), "proof": proof.hex()}
        wire.send(connection, Frame(Kind.PROOF, 0, fields))
        if relayed:
            assert is_closed(connection)
        else:
            assert wire.receive(connection).kind is Kind.PROOF


# Refusals


def raises(error: Exception) -> Callable[..., Any]:
    """A function that raises an error, whatever it is given."""

    def function(*_: Any) -> Any:
        raise error

    return function


class SpecialRunError(server.RunError):
    """An error that the table of codes does not name."""


# What goes wrong inside, its code for the outside, and whether the host of a serving enclave is
# told more than that.
DETAIL = "detail of shape [3, 4]"
INSIDE: list[tuple[Exception, ErrorCode, bool]] = [
    (server.RunError(DETAIL), ErrorCode.RUN, False),
    (SpecialRunError(DETAIL), ErrorCode.RUN, False),
    (server.RequestError(DETAIL), ErrorCode.REQUEST, False),
    (server.ProgramError(DETAIL), ErrorCode.PROGRAM, False),
    (server.DecryptionError(DETAIL), ErrorCode.DECRYPTION, False),
    (server.UnknownHandleError(DETAIL), ErrorCode.UNKNOWN_HANDLE, False),
    (server.WireError(DETAIL), ErrorCode.WIRE, False),
    (server.ArenaError(DETAIL), ErrorCode.SHARED_MEMORY, True),
    (server.CheckpointError(DETAIL), ErrorCode.CHECKPOINT, True),
    (server.IntegrityError(DETAIL), ErrorCode.INTEGRITY, True),
    (server.UnownedError(DETAIL), ErrorCode.UNOWNED, True),
    (server.UnprovisionedError(DETAIL), ErrorCode.UNPROVISIONED, True),
]
# Errors that were not written for a peer.
UNSPOKEN: list[tuple[Exception, ErrorCode]] = [
    (KeyError(DETAIL), ErrorCode.REQUEST),
    (TypeError(DETAIL), ErrorCode.REQUEST),
    (ZeroDivisionError(DETAIL), ErrorCode.INTERNAL),
]


def answer_to(monkeypatch: pytest.MonkeyPatch, role: peers.Role, error: Exception) -> Frame:
    """What a peer of an owned enclave is told of an error inside."""
    ownership = peers.Ownership("00" * 16)
    ownership.claim(bytes(32))
    monkeypatch.setattr(ownership.session, "handle", raises(error))
    return server._answer(ownership, role, Frame(Kind.CALIBRATE, 7, {}))


@pytest.mark.parametrize(("error", "code", "told"), INSIDE, ids=lambda value: type(value).__name__)
def test_host_of_a_serving_enclave_gets_one_text(monkeypatch, error, code, told):
    text = DETAIL if told else wire.REFUSAL
    assert answer_to(monkeypatch, peers.HOST, error) == refusal(7, code, text)
    # Who holds the session's secret is told more.
    for role in (peers.CLIENT, peers.PARENT):
        assert answer_to(monkeypatch, role, error) == refusal(7, code, DETAIL)


@pytest.mark.parametrize(("error", "code"), UNSPOKEN, ids=lambda value: type(value).__name__)
def test_nobody_is_told_what_was_not_written_for_a_peer(monkeypatch, error, code):
    assert answer_to(monkeypatch, peers.HOST, error) == refusal(7, code, wire.REFUSAL)
    for role in (peers.CLIENT, peers.PARENT):
        shown, text = refused(answer_to(monkeypatch, role, error))
        assert shown is code and DETAIL not in text and text != wire.REFUSAL


def test_host_learns_what_it_can_act_on(host):
    for kind, fields, error, text in (
        (Kind.FREE, {}, EnclaveError, f"^enclave: {wire.REFUSAL}$"),
        (Kind.SEGMENT, {"run": 3}, EnclaveError, f"^enclave: {wire.REFUSAL}$"),
        (Kind.SEGMENT, {"run": [3]}, EnclaveError, f"^enclave: {wire.REFUSAL}$"),
        (Kind.FIND, {"digest": "00"}, UnprovisionedError, "the client provisioned no such program"),
        (Kind.MAP, {"name": "passwd", "size": 3}, SharedMemoryError, "not of the expected form"),
    ):
        with pytest.raises(error, match=text):
            host.request(kind, fields)
    # Of two codes it is said here what most often causes them.
    for code, hint in (
        (ErrorCode.UNKNOWN_HANDLE, "was donated"),
        (ErrorCode.DECRYPTION, "was altered"),
    ):
        with pytest.raises(SealedValueError, match=f"^enclave: {wire.REFUSAL}. .*{hint}"):
            fields_of(refusal(1, code, wire.REFUSAL))


def test_log_of_the_enclave_has_the_detail(tmp_path, capfd):
    with served(host_key=tmp_path / "key") as running:
        Channel(running.client, INSECURE, IDENTITY).close()
        _, port = parse_address(running.host)
        lines = Attachment(port, read_host_key(port, running.host_key))
        for frames, _ in BREAKING.values():
            with host_socket(lines) as connection:
                breaks(connection, frames)
        segment = {"run": 3, "segment": 0, "worker": 0}
        for kind, fields in ((Kind.FREE, {}), (Kind.SEGMENT, segment)):
            with pytest.raises(EnclaveError, match=wire.REFUSAL):
                lines.request(kind, fields)
        # A peer that repeats itself fills nobody's disk.
        for _ in range(2 * log.BURST):
            with pytest.raises(UnprovisionedError):
                lines.request(Kind.FIND, {"digest": "00"})
        lines.close()
    written = capfd.readouterr().err
    for _, detail in BREAKING.values():
        assert re.search(f"^enclave: closed a connection: .*{detail}", written, re.MULTILINE)
    assert "enclave: refused SEGMENT: no such run" in written
    assert "enclave: refused FREE: a malformed FREE request: it has no `handles`" in written
    assert 0 < written.count("refused FIND") <= log.BURST


def test_log_is_limited_by_place_and_says_so(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limit = log.RateLimit()

    def written(line: int) -> str | None:
        record = logging.LogRecord("enclave_runtime", 30, "f.py", line, "text %s", ("x",), None)
        return record.getMessage() if limit.filter(record) else None

    assert [written(1) for _ in range(log.BURST + 3)] == ["text x"] * log.BURST + [None] * 3
    assert written(2) == "text x"  # another place has a budget of its own
    now[0] += log.SECONDS
    assert [written(1), written(1)] == ["text x (and 3 like it before, left out)", None]
    now[0] += log.SECONDS * log.BURST * 2
    assert [written(1) is None for _ in range(log.BURST + 1)] == [False] * log.BURST + [True]


def test_long_records_are_cut():
    formatter = log.ShortFormatter("%(message)s")
    for length in (log.MAX_CHARACTERS, log.MAX_CHARACTERS + 1, 1 << 20):
        text = "a" + "b" * (length - 2) + "c"
        shown = formatter.format(logging.LogRecord("", 30, "", 1, text, None, None))
        assert len(shown) <= log.MAX_CHARACTERS + 5
        assert (shown == text) == (length == log.MAX_CHARACTERS)
        assert shown[0] == "a" and shown[-1] == "c"


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


# What strangers can bring about


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ECONNABORTED], ids=errno.errorcode.get)
def test_accept_that_fails_does_not_end_a_port(monkeypatch, number):
    accept, failures = socket.socket.accept, [OSError(number, os.strerror(number))] * 3

    def failing(listener: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", failing)
    with in_process(one_frame) as port:
        assert wait_for(lambda: accepts(port))
    assert not failures


def test_thread_that_does_not_start_does_not_end_a_port(monkeypatch):
    monkeypatch.setattr(server, "MAX_STRANGERS", 1)
    start, failures = threading.Thread.start, [RuntimeError("can't start new thread")] * 3

    def failing(thread: Any) -> None:
        if failures and thread._target.__name__ == "_welcome":
            raise failures.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with in_process(one_frame) as port:
        for left in (2, 1, 0):
            with socket.create_connection(("127.0.0.1", port), 10) as connection:
                assert is_closed(connection) and len(failures) == left
        # Nor did they keep their places, of which there is one.
        assert wait_for(lambda: accepts(port))


def test_strangers_do_not_end_an_enclave_that_runs_out_of_descriptors(tmp_path):
    with served(host_key=tmp_path / "key") as running:
        Channel(running.client, INSECURE, IDENTITY).close()
        resource.prlimit(running.child.process.pid, resource.RLIMIT_NOFILE, (24, 24))
        for address in (running.client, running.host):
            with contextlib.ExitStack() as stack:
                for _ in range(40):
                    stack.enter_context(socket.create_connection(parse_address(address), 10))
                time.sleep(0.5)
                assert running.child.process.poll() is None
        assert wait_for(lambda: comes_back(running))


def comes_back(running: Served) -> bool:
    """Whether the enclave answers its owner."""
    try:
        still_serves(running)
    except ChannelError:
        return False
    return True


def threads_of(running: Served) -> int:
    """How many threads an enclave has."""
    status = Path(f"/proc/{running.child.process.pid}/status").read_text()
    return int(re.findall(r"^Threads:\s+(\d+)$", status, re.MULTILINE)[0])


def test_connections_are_as_many_threads_and_limited(tmp_path):
    with served(host_key=tmp_path / "key") as running, contextlib.ExitStack() as stack:
        Channel(running.client, INSECURE, IDENTITY).close()
        _, port = parse_address(running.host)
        lines = Attachment(port, read_host_key(port, running.host_key))
        time.sleep(0.5)
        at_rest = threads_of(running)
        for _ in range(limits.CLIENT_CONNECTIONS):
            stack.callback(Channel(running.client, INSECURE, IDENTITY).close)
        for _ in range(limits.HOST_CONNECTIONS):
            stack.enter_context(host_socket(lines))
        full = "serves {} connections of the {} at a time, and all are open; close some first"
        with pytest.raises(EnclaveError, match=full.format(limits.CLIENT_CONNECTIONS, "client")):
            Channel(running.client, INSECURE, IDENTITY)
        with pytest.raises(EnclaveError, match=full.format(limits.HOST_CONNECTIONS, "host")):
            lines.request(Kind.STATISTICS, {})
        for address in (running.client, running.host):
            for _ in range(limits.MAX_STRANGERS + 8):
                stack.enter_context(socket.create_connection(parse_address(address), 10))
        assert wait_for(lambda: threads_of(running) == at_rest + limits.CONNECTIONS)
        time.sleep(0.5)
        assert threads_of(running) == at_rest + limits.CONNECTIONS
        # Those that leave make room.
        stack.close()
        assert wait_for(lambda: comes_back(running))
        assert lines.request(Kind.STATISTICS, {})["runs"] == 0
        lines.close()


def test_peer_that_vanished_is_noticed():
    with in_process() as port, socket.create_connection(("127.0.0.1", port), 10) as near:
        assert wire.receive(near) == PROVED
        table = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
        local = f":{port:04X}"
        (row,) = [r.split() for r in table if r.split()[1].endswith(local) and " 01 " in r]
        assert row[5].startswith("02:"), "no timer for keeping the connection alive"


def test_stranger_that_trickles_is_disconnected(monkeypatch):
    monkeypatch.setattr(server, "HANDSHAKE_SECONDS", 0.5)
    for context in (None, ServerIdentity().context()):
        with in_process(one_frame, context) as port:
            start = time.monotonic()
            with socket.create_connection(("127.0.0.1", port), 10) as connection:
                # One byte at a time, more slowly than a frame can ever be complete.
                with contextlib.suppress(OSError):
                    for byte in b"\x16\x03\x01\x02\x00" + bytes(100):
                        connection.send(bytes([byte]))
                        time.sleep(0.05)
                assert is_closed(connection)
            assert time.monotonic() - start < 5


def test_too_many_strangers_are_turned_away(monkeypatch):
    monkeypatch.setattr(server, "MAX_STRANGERS", 2)
    with in_process(one_frame) as port:
        with contextlib.ExitStack() as stack:
            waiting = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
                for _ in range(3)
            ]
            assert is_closed(waiting[2])
        # Those that left made room.
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            assert wait_for(lambda: accepts(port))
            connection.close()


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


# TLS


def test_channel_is_tls_1_3_and_resumes_nothing(enclave_ports):
    seen = set()
    for _ in range(2):
        connection, certificate = dial(enclave_ports.client)
        with connection:
            assert connection.version() == "TLSv1.3"
            wire.receive(connection)  # tickets would have come by now
            session = connection.session
            assert session is None or not session.has_ticket
        seen.add((certificate.public_key, certificate.evidence))
    (first, one), (second, other) = seen
    assert first == second and one != other, "one key, and evidence for each handshake"


def test_older_tls_is_refused(enclave_ports):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    name = handshake.server_name(bytes(32))
    with (
        socket.create_connection(parse_address(enclave_ports.client), 10) as plain,
        pytest.raises(ssl.SSLError, match="version|VERSION"),
    ):
        context.wrap_socket(plain, server_hostname=name)
    still_serves(enclave_ports)


NAMES = [None, "localhost", "enclave.example.org", f"{'a' * 52}.tempo", f"{'a' * 51}.tempo"]


@pytest.mark.parametrize(
    "name", [*NAMES[:3], NAMES[4], handshake.server_name(bytes(32)) + ".tempo"]
)
def test_handshake_without_a_nonce_is_refused(enclave_ports, name):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(parse_address(enclave_ports.client), 10) as plain,
        pytest.raises(ssl.SSLError, match="(?i)unrecognized.name"),
    ):
        context.wrap_socket(plain, server_hostname=name)
    still_serves(enclave_ports)


def test_server_name_carries_the_nonce():
    nonce = os.urandom(32)
    assert handshake.nonce_of(handshake.server_name(nonce)) == nonce
    assert handshake.nonce_of(NAMES[3]) == bytes(32)
    for name in (*NAMES[:3], NAMES[4], handshake.server_name(nonce).upper(), "é.tempo", ""):
        with pytest.raises(WireError, match="carries no nonce"):
            handshake.nonce_of(name)


def test_plain_tcp_on_the_tls_port_is_refused(enclave_ports):
    for sent in (b"", numbered(1), bytes(64)):
        with socket.create_connection(parse_address(enclave_ports.client), 10) as connection:
            connection.sendall(sent)
            # At most an alert (RFC 8446, 6), and nothing of the enclave's.
            received = b""
            with contextlib.suppress(OSError):  # it may be gone already
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(64):
                    received += part
            assert received == b"" or received[0] == 21
    still_serves(enclave_ports)


def test_client_on_a_port_without_tls_is_told(enclave_ports, monkeypatch):
    monkeypatch.setattr(channel, "CONNECT_SECONDS", 2.0)
    with pytest.raises(ChannelError, match=r"did not complete a TLS 1\.3 handshake"):
        Channel(enclave_ports.host, INSECURE, IDENTITY)
    with pytest.raises(ChannelError, match="nothing answers at 127.0.0.1:1: Connection refused"):
        Channel("127.0.0.1:1", INSECURE, IDENTITY)


@pytest.mark.parametrize("address", ["", "host", ":7441", "host:", "host:x", "host:-1", "h:65536"])
def test_address_without_a_port_is_refused(address):
    with pytest.raises(ChannelError, match="expected HOST:PORT"):
        parse_address(address)


def test_address_of_ipv6_stands_in_brackets():
    assert parse_address("[::1]:7441") == ("::1", 7441)


def test_key_is_never_in_a_file_in_the_clear(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loaded = []
    load = ssl.SSLContext.load_cert_chain

    def recording(context: ssl.SSLContext, name: str, **options: Any) -> None:
        loaded.append((Path(name).read_bytes(), os.stat(name).st_mode & 0o777))
        load(context, name, **options)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", recording)
    identity = ServerIdentity()
    identity._certified(bytes(32))
    ((content, mode),) = loaded
    assert mode == 0o600
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in content and b"BEGIN PRIVATE KEY" not in content
    assert b"BEGIN EC PRIVATE KEY" not in content
    assert list(tmp_path.iterdir()) == []
    assert repr(identity) == "ServerIdentity(<secret>)"


# What a client refuses, before it sends anything


@contextlib.contextmanager
def impostor(
    certificate: Callable[[bytes], tuple[bytes, bytes]], session: str = "00" * 16
) -> Iterator[tuple[str, list]]:
    """A TLS server that shows what `certificate(nonce)` gives: certificate and key, PEM.

    It says that it is `session`. Gives its address and, once a client left, what that sent after
    the handshake.
    """
    received: list[bytes] = []
    context = tls._bare_context()

    def choose(connection: Any, name: str | None, _: Any) -> None:
        chosen = tls._bare_context()
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"".join(certificate(handshake.nonce_of(name))))
            file.flush()
            chosen.load_cert_chain(file.name)
        connection.context = chosen

    context.sni_callback = choose

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, context.wrap_socket(connection, server_side=True) as secure:
            secure.settimeout(10)
            challenge = {"challenge": "00" * 32, "session": session, "owned": False}
            with contextlib.suppress(OSError):
                wire.send(secure, Frame(Kind.HELLO, 0, challenge))
                received.append(secure.recv(1 << 16))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", received
        thread.join(20)


def certificate_with(
    extensions: dict[str, bytes],
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey | None = None,
) -> x509.Certificate:
    """A certificate of `key`, with contents by object identifier; signs itself without `signer`."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "impostor")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2099, 1, 1, tzinfo=datetime.UTC))
    )
    for arcs, content in extensions.items():
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(arcs), content)
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(signer or key, hashes.SHA256())


def forged(
    evidence: Callable[[bytes, bytes], bytes | None], signed_by_another: bool = False
) -> Callable[[bytes], tuple[bytes, bytes]]:
    """A certificate whose evidence is `evidence(public_key, nonce)`."""
    key = ec.generate_private_key(ec.SECP256R1())
    signer = ec.generate_private_key(ec.SECP256R1()) if signed_by_another else key
    public_key = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )

    def make(nonce: bytes) -> tuple[bytes, bytes]:
        content = evidence(public_key, nonce)
        extensions = {} if content is None else {handshake.EVIDENCE_OID: content}
        certificate = certificate_with(extensions, key, signer)
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return certificate.public_bytes(serialization.Encoding.PEM), private

    return make


FORGED: dict[str, tuple[Callable[[bytes], tuple[bytes, bytes]], str]] = {
    "another nonce": (
        forged(lambda key, nonce: make_evidence(key, nonce[::-1], handshake.CONFIGURATION)),
        "made for another key, nonce",
    ),
    "another key": (
        forged(lambda key, nonce: make_evidence(key[::-1], nonce, handshake.CONFIGURATION)),
        "made for another key, nonce",
    ),
    "another configuration": (
        forged(lambda key, nonce: make_evidence(key, nonce, handshake.CONFIGURATION[::-1])),
        "made for another key, nonce",
    ),
    "evidence of nothing": (forged(lambda key, nonce: b"{}"), "evidence does not do"),
    "no evidence": (forged(lambda key, nonce: None), "not one that an enclave makes"),
    "another signer": (
        forged(lambda k, n: make_evidence(k, n, handshake.CONFIGURATION), signed_by_another=True),
        "not one that an enclave makes",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_certificate_that_no_enclave_made_gets_nothing(name):
    certificate, text = FORGED[name]
    with impostor(certificate) as (address, received):
        with pytest.raises(AttestationError, match=text):
            Channel(address, INSECURE, IDENTITY)
    assert received in ([], [b""]), "the client sent something before it had verified"


# What `cryptography` raises on parts of a certificate, here with others of the same length.
ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
HOSTILE: dict[str, tuple[bytes, bytes, type[Exception]]] = {
    "version": (bytes.fromhex("a003020102"), bytes.fromhex("a003020104"), x509.InvalidVersion),
    "curve": (
        bytes.fromhex("06082a8648ce3d030107"),
        bytes.fromhex("06082a8648ce3d030155"),
        UnsupportedAlgorithm,
    ),
    "key's algorithm": (
        bytes.fromhex("06072a8648ce3d0201"),
        bytes.fromhex("06072a8648ce3d0255"),
        UnsupportedAlgorithm,
    ),
    "one extension twice": (
        bytes.fromhex("06032a0305"),
        bytes.fromhex("06032a0304"),
        x509.DuplicateExtension,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_certificate_that_cannot_be_read_is_refused(name):
    old, new, cause = HOSTILE[name]
    key = ec.generate_private_key(ec.SECP256R1())
    arcs = (handshake.EVIDENCE_OID, "1.2.3.4", "1.2.3.5")
    certificate = certificate_with(dict.fromkeys(arcs, b"{}"), key)

    def signed(content: bytes) -> bytes:
        # Signed again, so that the signature is not what is refused.
        signature = der(0x03, b"\0" + key.sign(content, ec.ECDSA(hashes.SHA256())))
        return der(0x30, content + ECDSA_WITH_SHA256 + signature)

    content = certificate.tbs_certificate_bytes
    assert content.count(old) == 1 and len(old) == len(new)
    assert channel._read(signed(content), b"").evidence == b"{}"
    with pytest.raises(AttestationError, match="not one that an enclave makes") as caught:
        channel._read(signed(content.replace(old, new)), b"")
    assert isinstance(caught.value.__cause__, cause)


def test_impostor_would_have_seen_what_a_client_sends():
    # The control of the test above: this one satisfies the (insecure) policy and gets the secret.
    honest = forged(lambda key, nonce: make_evidence(key, nonce, handshake.CONFIGURATION))
    with impostor(honest) as (address, received):
        with pytest.raises(ChannelError, match="refused this client"):
            Channel(address, INSECURE, IDENTITY)
    assert IDENTITY.session_secret("00" * 16, public_key_of(honest)) in received[0]


def public_key_of(certificate: Callable[[bytes], tuple[bytes, bytes]]) -> bytes:
    """The key of an impostor's certificates, DER."""
    shown, _ = certificate(bytes(32))
    return (
        x509.load_pem_x509_certificate(shown)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def test_peer_that_names_anothers_session_gets_another_secret(enclave_ports, client):
    # A session's name is public, and under this policy anyone's evidence will do.
    connection, certificate = dial(enclave_ports.client)
    connection.close()
    honest = forged(lambda key, nonce: make_evidence(key, nonce, handshake.CONFIGURATION))
    with impostor(honest, client.session) as (address, received):
        with pytest.raises(ChannelError, match="refused this client"):
            Channel(address, INSECURE, IDENTITY)
    owners = IDENTITY.session_secret(client.session, certificate.public_key)
    assert session_keys(owners) == client.keys
    assert owners not in received[0]
    assert IDENTITY.session_secret(client.session, public_key_of(honest)) in received[0]


def test_evidence_without_a_quote_is_refused_by_default(enclave_ports):
    collateral = tempo.Collateral.from_json((DATA / "sgx_quote_collateral.json").read_text())
    policy = tempo.AttestationPolicy(mrenclave=bytes(32), collateral=collateral)
    with pytest.raises(AttestationError, match="has no SGX quote to show"):
        tempo.Enclave.connect(enclave_ports.client, policy=policy, identity=IDENTITY)


@pytest.mark.parametrize("over_tls", [False, True])
def test_reflected_proof_does_not_pass_as_the_enclaves(over_tls):
    # A server without the key sends the peer's own proof back.
    def reflect(connection: socket.socket, deadline: float) -> Frame:
        fields = {"challenge": "00" * 32, "session": "00" * 16, "owned": True}
        wire.send(connection, Frame(Kind.HELLO, 0, fields))
        return wire.receive(connection, deadline=deadline)

    context = ServerIdentity().context() if over_tls else None
    with in_process(reflect, context) as port:
        with pytest.raises(ChannelError, match="refused this client|accepts this host") as caught:
            if over_tls:
                Channel(f"127.0.0.1:{port}", INSECURE, IDENTITY)
            else:
                Attachment(port, bytes(32))
        assert "does not know the session key" in str(caught.value.__cause__)


def test_connection_that_broke_says_how_to_come_back(enclave_ports, client):
    client_socket(client).close()
    with pytest.raises(EnclaveDiedError, match="connect again with the same identity"):
        client.request(Kind.CALIBRATE, {})
    again = Channel(enclave_ports.client, INSECURE, IDENTITY)
    assert again.session == client.session
    again.close()
    with pytest.raises(EnclaveError, match="was closed; connect again"):
        again.request(Kind.CALIBRATE, {})


def test_request_too_long_for_a_frame_is_refused_before_it_is_sent(client, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(wire, "MAX_BODY", 64)
        with pytest.raises(tempo.errors.UnsupportedError, match="pass large closed-over arrays"):
            client.request(Kind.COMPILE, {}, bytes(100))
    assert client.request(Kind.CALIBRATE, {})
