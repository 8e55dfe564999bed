"""Fuzzes the decoders of frames and requests: they read whatever connects to the enclave's port."""

from __future__ import annotations

import contextlib

from enclave_runtime.protocol import checkpoint, requests, wire
from enclave_runtime.protocol.checkpoint import RefusedCheckpointError
from enclave_runtime.protocol.requests import RequestError
from enclave_runtime.protocol.wire import WireError
from tests.fuzz import harness


def one_input(data: bytes) -> None:
    """Decodes a frame; what is accepted has to survive being sent on."""
    try:
        kind, request, length = wire.decode_header(data[: wire.HEADER.size])
        # The decoder of bodies must not rely on the length that the header claims.
        frame = wire.decode_body(kind, request, data[wire.HEADER.size :][:length])
    except WireError:
        return
    with contextlib.suppress(RequestError, RefusedCheckpointError):
        requests.decode(frame)
    encoded = frame.encode()
    body = encoded[wire.HEADER.size :]
    assert wire.decode_header(encoded[: wire.HEADER.size]) == (kind, request, len(body))
    assert wire.decode_body(kind, request, body) == frame


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Changes a frame's JSON and makes its lengths right; every third time any bytes."""
    start = wire.HEADER.size + wire.JSON_LENGTH.size
    if seed % 3 and len(data) >= start:
        text = harness.mutate_json(data[start:], max_size - start, seed)
        body = wire.JSON_LENGTH.pack(len(text)) + text
        return data[: wire.HEADER.size - 4] + wire.JSON_LENGTH.pack(len(body)) + body
    return harness.mutate_bytes(data, max_size)


if __name__ == "__main__":
    harness.fuzz(one_input, (checkpoint, requests, wire), mutate)
