"""The ports of an enclave that serves: who may ask what, and what breaks the protocol."""

import socket
import threading

import pytest

import tempo_jax as tempo
from enclave_runtime.protocol import wire
from enclave_runtime.protocol.wire import Frame, Kind
from enclave_runtime.serving import peers
from tempo_jax.cli.serve import served
from tempo_jax.errors import (
    EnclaveDiedError,
    EnclaveError,
)
from tempo_jax.transport.channel import Channel, dial, parse_address
from tempo_jax.transport.host_key import read_host_key
from tempo_jax.transport.loopback import Attachment
from tests.support.ports import (
    BREAKING,
    breaks,
    client_socket,
    host_socket,
    is_closed,
    numbered,
    still_serves,
)
from tests.support.serving import IDENTITY, INSECURE

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
