"""Connections that wait for a request: none that is broken is used for one."""

import pytest

from enclave_runtime.protocol import wire
from enclave_runtime.protocol.wire import Kind
from tempo_jax.errors import EnclaveError
from tempo_jax.transport.loopback import Calls


def test_request_given_up_just_as_its_reply_came_breaks_no_other(enclave, monkeypatch):
    lines, receive = enclave.connection, wire.receive

    def giving_up(*arguments):
        frame = receive(*arguments)
        if frame.kind is Kind.REPLY:
            calls.cancel()
        return frame

    for _ in range(3):
        calls = Calls()
        with monkeypatch.context() as patched:
            patched.setattr(wire, "receive", giving_up)
            assert "runs" in lines.request(Kind.STATISTICS, {}, calls=calls)
        assert "runs" in lines.request(Kind.STATISTICS, {})
    with pytest.raises(EnclaveError, match="the request was given up"):
        lines.request(Kind.STATISTICS, {}, calls=calls)
