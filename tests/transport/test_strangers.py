"""Who may speak to an enclave that serves, and what strangers can bring about."""

import contextlib
import errno
import os
import re
import resource
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import tempo_jax as tempo
from enclave_runtime.crypto.encryption import session_keys
from enclave_runtime.protocol import handshake, limits, wire
from enclave_runtime.protocol.configuration import Listen
from enclave_runtime.protocol.wire import Frame, Kind, WireError
from enclave_runtime.serving import peers, server
from enclave_runtime.serving.tls import ServerIdentity
from tempo_jax.cli.serve import ServingProcess, served
from tempo_jax.errors import (
    ChannelError,
    EnclaveError,
)
from tempo_jax.transport.channel import Channel, dial, parse_address
from tempo_jax.transport.host_key import read_host_key
from tempo_jax.transport.loopback import Attachment
from tests.support.ports import (
    PROVED,
    accepts,
    comes_back,
    host_socket,
    in_process,
    is_closed,
    one_frame,
    still_serves,
    wait_for,
)
from tests.support.serving import IDENTITY, INSECURE


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


def threads_of(running: ServingProcess) -> int:
    """How many threads an enclave has."""
    status = Path(f"/proc/{running.child.process.pid}/status").read_text()
    return int(re.findall(r"^Threads:\s+(\d+)$", status, re.MULTILINE)[0])


def test_connections_are_as_many_threads_and_limited(tmp_path):
    more = Listen("127.0.0.1", 0)
    with (
        served(host_key=tmp_path / "key", listen=more) as running,
        contextlib.ExitStack() as stack,
    ):
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
        assert running.listens is not None
        for address in (running.client, running.host, running.listens):
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
