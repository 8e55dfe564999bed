"""The frame format: golden bytes, round trips, and every malformed frame refused."""

import json
import os
import socket
import threading
import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from enclave_runtime.protocol import wire
from enclave_runtime.protocol.wire import Frame, Kind, Label, WireError

KEY = bytes(range(32))
CHALLENGE, NONCE = b"c" * wire.NONCE_BYTES, b"n" * wire.NONCE_BYTES

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=8), JSON, max_size=5)
FRAMES = st.builds(
    Frame,
    st.sampled_from(Kind),
    st.integers(0, 2**64 - 1),
    OBJECTS,
    st.binary(max_size=200),
)


def decode(encoded: bytes) -> Frame:
    kind, request, length = wire.decode_header(encoded[: wire.HEADER.size])
    assert length == len(encoded) - wire.HEADER.size
    return wire.decode_body(kind, request, encoded[wire.HEADER.size :])


def header(
    magic: bytes = wire.MAGIC,
    version: int = wire.VERSION,
    kind: int = Kind.BEGIN,
    request: int = 1,
    length: int = 6,
) -> bytes:
    return wire.HEADER.pack(magic, version, kind, request, length)


def body(text: bytes, length: int | None = None) -> bytes:
    return wire.JSON_LENGTH.pack(len(text) if length is None else length) + text


# Layout


def test_frame_layout_is_frozen():  # golden bytes; bump the version before changing them
    encoded = Frame(Kind.BEGIN, 5, {"a": 1}, b"xyz").encode()
    golden = "544d504f 0001 0008 0000000000000005 0000000e 00000007 7b2261223a317d 78797a"
    assert encoded == bytes.fromhex(golden)


def test_block_layout_is_frozen():
    header = Label(5, 6, 7).header(2, np.zeros((3, 2), np.float32))
    golden = "544d5042 0001 0002 0000000000000005 00000006 00000007 0000000000000018"
    assert header == bytes.fromhex(golden)


def test_kinds_are_frozen():  # numbers on the wire; append, never renumber
    assert [kind.name for kind in Kind] == [
        *("REPLY", "ERROR", "HELLO", "PROOF", "MAP", "UNMAP", "COMPILE", "PROVISION", "BEGIN"),
        *("SETTLE", "SEGMENT", "COMMIT", "ABORT", "OPEN", "FREE", "STATISTICS", "CALIBRATE"),
        *("CHECKPOINT_KEY", "CHECKPOINT", "CHECKPOINT_LEAF", "RESTORE", "RESTORE_LEAF"),
        *("OWN", "FIND", "RELEASE", "JOIN", "BEAT", "PREPARE"),
    ]
    assert [int(kind) for kind in Kind] == list(range(len(Kind)))


def test_frame_shows_sizes_and_no_content():
    secret = bytes(range(32))
    for frame in (
        Frame(Kind.OWN, 3, {"proof": secret.hex()}, secret),
        decode(Frame(Kind.OWN, 3, {"proof": secret.hex()}, secret).encode()),
    ):
        for shown in (repr(frame), str(frame), f"{frame}"):
            assert shown == "Frame(OWN, 3, 1 fields, 32 bytes)"


@given(frame=FRAMES)
def test_decoding_inverts_encoding(frame):
    assert decode(frame.encode()) == frame


@given(frames=st.lists(FRAMES, min_size=1, max_size=3))
def test_frames_arrive_in_order(frames):
    here, there = socket.socketpair()
    with here, there:
        for frame in frames:
            wire.send(here, frame)
        assert [wire.receive(there) for _ in frames] == frames


def test_frame_in_single_bytes():
    frame = Frame(Kind.REPLY, 3, {"text": "é"}, b"\0\1")
    here, there = socket.socketpair()
    with here, there:
        for byte in frame.encode():
            here.send(bytes([byte]))
        assert wire.receive(there) == frame


# Refusals


@pytest.mark.parametrize(
    ("encoded", "text"),
    [
        (b"", "has 20 bytes, got 0"),
        (header()[:-1], "has 20 bytes, got 19"),
        (header() + b"\0", "has 20 bytes, got 21"),
        (header(magic=b"TMPX"), "wrong magic"),
        (header(magic=b"tmpo"), "wrong magic"),
        (header(version=0), "protocol version 0, expected 1"),
        (header(version=2), "protocol version 2, expected 1"),
        (header(kind=len(Kind)), f"unknown frame kind {len(Kind)}"),
        (header(kind=0xFFFF), "unknown frame kind 65535"),
        (header(length=3), "a body of 3 bytes"),
        (header(length=wire.MAX_BODY + 1), f"expected 4 to {wire.MAX_BODY}"),
        (header(length=0xFFFFFFFF), "a body of 4294967295 bytes"),
    ],
)
def test_malformed_header_is_refused(encoded, text):
    with pytest.raises(WireError, match=text):
        wire.decode_header(encoded)


@pytest.mark.parametrize(
    ("encoded", "text"),
    [
        (b"", "shorter than its JSON length"),
        (b"\0\0\0", "shorter than its JSON length"),
        (body(b"{}", 3), "longer than its body"),
        (body(b"{}", wire.MAX_JSON + 1), "longer than its body"),
        (body(b"{}", 0xFFFFFFFF), "longer than its body"),
        (body(b""), "does not parse"),
        (body(b'{"a":'), "does not parse"),
        (body(b'{"a":1}', 6), "does not parse"),
        (body(b"{} {}"), "does not parse"),
        (body(b'{"a":\xff}'), "does not parse"),
        (body(b'{"a":"\xed\xa0\x80"}'), "does not parse"),  # half of a surrogate pair
        (body('{"a":1}'.encode("utf-16")), "does not parse"),
        (body(b"[" * 200_000), "does not parse"),
        (body(b'{"a":' + b"9" * 5000 + b"}"), "does not parse"),
        (body(b"[]"), "not an object"),
        (body(b"null"), "not an object"),
        (body(b"1"), "not an object"),
        (body(b'"a"'), "not an object"),
    ],
)
def test_malformed_body_is_refused(encoded, text):
    with pytest.raises(WireError, match=text):
        wire.decode_body(Kind.BEGIN, 1, encoded)


@pytest.mark.parametrize("constant", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1.5e400"])
def test_number_that_json_does_not_have_is_refused(constant):
    with pytest.raises(WireError, match="does not parse"):
        wire.decode_body(Kind.BEGIN, 1, body(b'{"a":' + constant + b"}"))


@given(encoded=st.binary(max_size=40) | st.binary(max_size=30).map(lambda b: wire.MAGIC + b))
def test_any_header_is_decoded_or_refused(encoded):
    try:
        kind, request, length = wire.decode_header(encoded)
    except WireError:
        return
    assert header(kind=kind, request=request, length=length) == encoded


@given(encoded=st.binary(max_size=60) | OBJECTS.map(lambda o: body(json.dumps(o).encode()[:-1])))
def test_any_body_is_decoded_or_refused(encoded):
    try:
        frame = wire.decode_body(Kind.BEGIN, 1, encoded)
    except WireError:
        return
    assert isinstance(frame.fields, dict)


@pytest.mark.parametrize(
    ("length", "limit"), [(2000, 1024), (wire.MAX_BODY, 1024), (0xFFFFFFFF, wire.MAX_BODY)]
)
def test_oversized_body_is_refused_before_memory_is_allocated(length, limit):
    here, there = socket.socketpair()
    with here, there:
        here.sendall(header(length=length))
        # Nothing follows: a receiver that waited for the body would hang.
        there.settimeout(10)
        tracemalloc.start()
        try:
            with pytest.raises(WireError, match=f"a body of {length} bytes"):
                wire.receive(there, limit)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 1 << 16


@pytest.mark.parametrize("limit", ["MAX_BODY", "MAX_JSON"])
def test_frame_over_the_limit_is_not_encoded(monkeypatch, limit):
    frame = Frame(Kind.BEGIN, 1, {"a": "b" * 100})
    assert frame.encode()
    monkeypatch.setattr(wire, limit, 64)
    with pytest.raises(WireError, match="exceeds the limit"):
        frame.encode()


def test_value_that_json_does_not_have_is_not_encoded():
    with pytest.raises(ValueError):
        Frame(Kind.BEGIN, 1, {"a": float("nan")}).encode()


@pytest.mark.parametrize("sent", [0, 5, 20, 22])
def test_peer_that_closes_in_the_middle(sent):
    here, there = socket.socketpair()
    with there:
        with here:
            here.sendall(Frame(Kind.BEGIN, 1, {"a": 1}).encode()[:sent])
        with pytest.raises(ConnectionError) as raised:
            wire.receive(there)
    assert (raised.type is wire.PeerLeftError) == (sent == 0)  # between frames anyone may leave


# Proofs


def test_proof_of_the_key_is_accepted():
    for role in ("host", "enclave"):
        proof = wire.prove(KEY, role, CHALLENGE, NONCE)
        wire.check_proof(KEY, role, CHALLENGE, NONCE, proof)


PROOF = wire.prove(KEY, "host", CHALLENGE, NONCE)


@pytest.mark.parametrize(
    ("key", "role", "challenge", "nonce", "proof"),
    [
        (KEY[::-1], "host", CHALLENGE, NONCE, PROOF),
        (KEY, "enclave", CHALLENGE, NONCE, PROOF),
        (KEY, "host", CHALLENGE[:-1] + b"C", NONCE, PROOF),
        (KEY, "host", CHALLENGE, NONCE[:-1] + b"N", PROOF),
        (KEY, "host", NONCE, CHALLENGE, PROOF),
        (KEY, "host", CHALLENGE, NONCE, PROOF[:-1]),
        (KEY, "host", CHALLENGE, NONCE, PROOF + b"\0"),
        (KEY, "host", CHALLENGE, NONCE, b""),
        (KEY, "host", CHALLENGE, NONCE, bytes([PROOF[0] ^ 1]) + PROOF[1:]),
    ],
)
def test_wrong_proof_is_refused(key, role, challenge, nonce, proof):
    with pytest.raises(WireError, match="does not know the session key"):
        wire.check_proof(key, role, challenge, nonce, proof)


def test_reflected_proof_is_refused():
    # A peer without the key answers the host's proof with that proof, once with the
    # challenge it sent and once having repeated the host's nonce as challenge.
    for challenge in (CHALLENGE, NONCE):
        sent = wire.prove(KEY, "host", challenge, NONCE)
        with pytest.raises(WireError):
            wire.check_proof(KEY, "enclave", NONCE, challenge, sent)


def test_challenge_cannot_be_moved_into_the_nonce():
    nonce = os.urandom(wire.NONCE_BYTES)
    proof = wire.prove(KEY, "host", CHALLENGE, nonce)
    with pytest.raises(WireError):
        wire.check_proof(KEY, "host", CHALLENGE[:-1], CHALLENGE[-1:] + nonce, proof)


# Blocks


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from(["float32", "float64", "int8", "bool"])


@given(
    types=st.lists(st.tuples(SHAPES, DTYPES), max_size=6),
    label=st.builds(
        Label, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)
    ),
)
def test_receiving_inverts_sending(types, label):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(dtype) for shape, dtype in types]
    own, theirs = socket.socketpair()
    with own, theirs:
        wire.send_blocks(theirs, label, arrays)
        theirs.sendall(b"end")
        for position, array in enumerate(arrays):
            out = np.empty_like(array)
            wire.receive_block(own, label, position, out)
            np.testing.assert_array_equal(out, array)
        assert own.recv(16) == b"end"
    sizes = [wire.BLOCK.size + array.nbytes for array in arrays]
    assert wire.blocks_bytes(arrays) == sum(sizes)


def test_blocks_larger_than_any_buffer():
    arrays = [np.arange(n, dtype=np.int64) for n in (1 << 20, 3, 1 << 19)] + [
        np.full(1, n) for n in range(1000)
    ]
    own, theirs = socket.socketpair()
    with own, theirs:
        sender = threading.Thread(target=wire.send_blocks, args=(theirs, Label(1, 2, 3), arrays))
        sender.start()
        for position, array in enumerate(arrays):
            out = np.empty_like(array)
            parts: list[bytes] = []
            wire.receive_block(
                *(own, Label(1, 2, 3), position, out),
                each=lambda part, parts=parts: parts.append(part.tobytes()),
                part_bytes=1 << 20,
            )
            np.testing.assert_array_equal(out, array)
            assert b"".join(parts) == array.tobytes()
            assert len(parts) == -(-array.nbytes // (1 << 20))
        sender.join()
