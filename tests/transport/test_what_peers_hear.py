"""What an enclave tells of what went wrong: a peer little, its own log the detail."""

import logging
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

import tempo_jax as tempo
from enclave_runtime.protocol import wire
from enclave_runtime.protocol.refusals import ErrorCode, refusal, refused
from enclave_runtime.protocol.wire import Frame, Kind
from enclave_runtime.serving import log, peers, server
from tempo_jax.cli.serve import served
from tempo_jax.errors import (
    EnclaveError,
    SealedValueError,
    SharedMemoryError,
    UnprovisionedError,
)
from tempo_jax.transport.channel import Channel, parse_address
from tempo_jax.transport.host_key import read_host_key
from tempo_jax.transport.loopback import Attachment, fields_of
from tests.support.ports import BREAKING, breaks, host_socket
from tests.support.serving import IDENTITY, INSECURE


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
    (server.RefusedCheckpointError(DETAIL), ErrorCode.CHECKPOINT, True),
    (server.WrongProductError(DETAIL), ErrorCode.INTEGRITY, True),
    (server.UnownedError(DETAIL), ErrorCode.UNOWNED, True),
    (server.UnknownProgramError(DETAIL), ErrorCode.UNPROVISIONED, True),
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
    return server._answer(ownership, role, Frame(Kind.CALIBRATE, 7, {}), server.Cargo())


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


def test_who_launched_the_enclave_hears_of_a_refusal_once(capfd):
    with tempo.Enclave.launch() as enclave, pytest.raises(EnclaveError, match="no such run"):
        enclave.connection.request(Kind.SEGMENT, {"run": 3, "segment": 0, "worker": 0})
    assert capfd.readouterr().err == ""


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
