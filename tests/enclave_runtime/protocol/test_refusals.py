"""Errors cross the wire as numbers that keep their meaning."""

import pytest

from enclave_runtime.protocol import wire
from enclave_runtime.protocol.refusals import ErrorCode, refusal, refused
from enclave_runtime.protocol.wire import Frame, Kind


def test_codes_are_frozen():  # a number that changes its meaning needs another wire.VERSION
    assert wire.VERSION == 1
    assert {code.name: code.value for code in ErrorCode} == {
        "INTERNAL": 0,
        "WIRE": 1,
        "REQUEST": 2,
        "PROGRAM": 3,
        "RUN": 4,
        "SHARED_MEMORY": 5,
        "DECRYPTION": 6,
        "UNKNOWN_HANDLE": 7,
        "CHECKPOINT": 8,
        "INTEGRITY": 9,
        "UNPROVISIONED": 10,
        "UNOWNED": 11,
        "ADMISSION": 12,
    }


@pytest.mark.parametrize("code", ErrorCode)
def test_a_refusal_survives_the_wire(code):
    encoded = refusal(3, code, "no").encode()
    header, body = encoded[: wire.HEADER.size], encoded[wire.HEADER.size :]
    kind, request, _ = wire.decode_header(header)
    assert (kind, request) == (Kind.ERROR, 3)
    assert refused(wire.decode_body(kind, request, body)) == (code, "no")


@pytest.mark.parametrize("code", [None, True, 1.0, -1, 999, "WIRE", [1], {}])
def test_what_is_no_code_is_an_error_all_the_same(code):
    assert refused(Frame(Kind.ERROR, 1, {"code": code, "text": "no"})) == (ErrorCode.INTERNAL, "no")
    assert refused(Frame(Kind.ERROR, 1, {})) == (ErrorCode.INTERNAL, "")
