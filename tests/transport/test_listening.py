"""Where the host's processes on other machines reach an enclave, and how each finds its way."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

import tempo_jax as tempo
from enclave_runtime.protocol import memory
from enclave_runtime.protocol.configuration import Listen
from enclave_runtime.protocol.wire import Kind
from tempo_jax.cli.serve import served
from tempo_jax.errors import ChannelError, EnclaveDiedError, EnclaveError
from tempo_jax.transport.channel import Channel, parse_address, parse_listen
from tempo_jax.transport.host_key import read_host_key
from tempo_jax.transport.joined import Joined
from tempo_jax.transport.loopback import Attachment
from tests.support.cluster import free_port
from tests.support.serving import IDENTITY, INSECURE


@pytest.fixture(scope="module")
def told() -> Iterator[dict[str, Any]]:
    """What other processes are told of an enclave that listens on one port more."""
    with tempo.Enclave.launch(listen="127.0.0.1:0") as enclave:
        yield enclave.connection.invitation()


def elsewhere(told: dict[str, Any]) -> dict[str, Any]:
    """The same, as heard on a machine on which nothing answers at the enclave's own port."""
    return told | {"port": free_port()}


def test_here_memory_is_shared(told):
    lines = Joined(told)
    assert (lines.host, lines.port, lines.carries) == ("127.0.0.1", told["port"], False)
    name, arena = lines.reserve(64)
    assert name is not None and arena.size == 64
    lines.close()


def test_what_may_travel_does_if_asked(told):
    lines = Joined(told, share_memory=False)
    name, arena = lines.reserve(64)
    assert lines.carries and name is None and arena.size == 64
    lines.give_back((name, arena))
    assert lines.reserve(128)[1].size == 128
    lines.close()


def test_memory_that_is_not_shared_is_noticed(told, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "DIRECTORY", str(tmp_path))
    lines = Joined(told)
    assert lines.carries
    assert not list(tmp_path.iterdir())
    lines.close()


def test_a_connection_that_breaks_may_be_the_link(told):
    lines = Joined(told, share_memory=False)
    lines._idle.pop().close()
    lines.host, lines.port = "127.0.0.2", free_port()  # as another machine, where nothing answers
    with pytest.raises(EnclaveDiedError, match="broke. It is on another machine: .*the link may"):
        lines.request(Kind.STATISTICS, {})
    lines.close()


@pytest.mark.parametrize("listens", ["127.0.0.1", "0.0.0.0"])
def test_where_nothing_answers_the_other_port_does(told, listens):
    _, port = told["listens"]
    lines = Joined(elsewhere(told) | {"listens": [listens, port]}, "127.0.0.1")
    assert lines.port == port
    assert lines.request(Kind.STATISTICS, {})["runs"] == 0
    # There a host asks, whoever launched the enclave.
    with pytest.raises(EnclaveError, match="refused; the enclave's own log"):
        lines.request(Kind.COMPILE, {}, b"program")
    lines.close()


def test_another_service_on_the_port_is_not_the_enclave(told):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        lines = Joined(told | {"port": stranger.getsockname()[1]})
        assert lines.port == told["listens"][1]
        lines.close()


def test_an_enclave_that_is_not_reached(told):
    with pytest.raises(ChannelError, match=r"it listens on none but its own.*listen="):
        Joined(elsewhere(told) | {"listens": None})
    with pytest.raises(ChannelError, match=r"does not answer at port \d+, where it listens"):
        Joined(elsewhere(told) | {"listens": ["127.0.0.1", free_port()]})
    with pytest.raises(ChannelError, match="does not answer"):
        Joined(elsewhere(told) | {"key": "00" * 32})


def test_a_served_enclave_listens_under_the_hosts_key(tmp_path):
    with served(host_key=tmp_path / "key", listen=Listen("127.0.0.1", 0)) as running:
        Channel(running.client, INSECURE, IDENTITY).close()
        assert running.listens is not None
        _, port = parse_address(running.host)
        host = Attachment(port, read_host_key(port, running.host_key))
        invitation = host.invitation()
        assert invitation["listens"] == [*parse_address(running.listens)]
        lines = Joined(elsewhere(invitation))
        assert lines.request(Kind.STATISTICS, {})["runs"] == 0
        for line in (lines, host):
            line.close()


def test_by_default_it_listens_nowhere_else():
    with tempo.Enclave.launch() as enclave:
        assert enclave.connection.invitation()["listens"] is None


@pytest.mark.parametrize("address", ["localhost:1", "0.0.0.0", "", ":7443"])
def test_it_listens_on_numeric_addresses(address):
    with pytest.raises(ChannelError, match="numeric address|is no address"):
        tempo.Enclave.launch(listen=address)
    assert parse_listen("[::1]:5") == Listen("::1", 5)


def test_a_port_that_is_taken(told):
    with pytest.raises(EnclaveDiedError):
        tempo.Enclave.launch(listen=f"127.0.0.1:{told['listens'][1]}")
