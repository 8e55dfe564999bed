"""The sealed format: what is written is read again, and whatever was done to it is refused."""

import json
import os
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from enclave_runtime.protocol import checkpoint
from enclave_runtime.protocol.checkpoint import (
    CHUNK,
    HEADER,
    MAX_LEAVES,
    MAX_NAME,
    TAG_BYTES,
    CheckpointReader,
    CheckpointWriter,
    Recipient,
    RefusedCheckpointError,
    head_of,
    lineage_name,
    read_checkpoint,
    split,
)
from enclave_runtime.sessions.lineage import Lineages
from tests.fuzz import fuzz_checkpoint
from tests.fuzz.harness import CORPUS
from tests.support.written import ALTERED, OTHER_SECRET, SECRET, VALUES, leaf, written


def assert_holds(data: bytes, values: dict[str, np.ndarray]) -> None:
    reader, read = read_checkpoint(SECRET, data)
    assert [held.name for held in reader.leaves] == list(values)
    for actual, expected in zip(read, values.values(), strict=True):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.tobytes() == expected.tobytes()


# Reading inverts writing


def test_reading_inverts_writing():
    assert_holds(written(), VALUES)
    assert_holds(written({}), {})


@given(
    sizes=st.lists(st.integers(0, 40), max_size=4),
    chunk=st.integers(1, 16),
    seed=st.integers(0, 2**32 - 1),
)
def test_leaves_of_any_size_in_parts_of_any_size(sizes, chunk, seed):
    rng = np.random.default_rng(seed)
    values = {str(i): rng.integers(0, 256, n, np.uint8) for i, n in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "CHUNK", chunk)
        assert_holds(written(values), values)


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_leaf_at_a_parts_edge(size):
    value = np.frombuffer(os.urandom(size), np.uint8)
    data = written({"x": value})
    parts = -(-size // CHUNK)
    assert len(data) == len(head_of(data)) + 56 + size + (1 + parts) * TAG_BYTES
    assert_holds(data, {"x": value})


def test_layout_is_frozen():
    """A second reader, written from the module's drawing alone."""
    data = written(VALUES, number=5)
    assert data[:12].hex() == b"TEMPOCKP".hex() + "0002" + "0001"
    manifest_bytes = int.from_bytes(data[12:16], "big")
    assert int.from_bytes(data[16:24], "big") == 5

    def derived(purpose: bytes, length: int) -> bytes:
        return HKDF(hashes.SHA256(), length, None, b"tempo_jax/" + purpose).derive(SECRET)

    assert data[24:40] == derived(b"checkpoint lineage", 16)
    cipher = AESGCM(derived(b"checkpoint " + data[40:72].hex().encode(), 32))

    def part(nonce: int, start: int, length: int, leaf: int, number: bytes = bytes(8)) -> bytes:
        context = data[:72] + leaf.to_bytes(8, "big") + number
        return cipher.decrypt(nonce.to_bytes(12, "big"), data[start : start + length], context)

    manifest = json.loads(part(0, 72, manifest_bytes, 2**64 - 1))
    assert manifest["leaves"][1] == {
        "name": "narrow",
        "array": {"shape": [2], "dtype": "bfloat16"},
        "dtype": "bfloat16",
        "weak": False,
    }
    start = 72 + manifest_bytes
    for number, value in enumerate(VALUES.values()):
        tag = part(2 * number + 1, start, 56 + 16, number, b"\xff" * 8)
        assert tag == b"p" * 32 + b"o" * 16 + (7).to_bytes(8, "big")
        start += 56 + 16
        assert part(2 * number + 2, start, value.nbytes + 16, number) == value.tobytes()
        start += value.nbytes + 16
    assert start == len(data)


def test_two_checkpoints_of_a_state_share_nothing():
    first, second = written(), written()
    assert first[:40] == second[:40]
    same = sum(a == b for a, b in zip(first[40:], second[40:], strict=True))
    assert same < len(first[40:]) / 16  # by chance one byte in 256


# Whatever was done to it


def test_every_altered_byte_is_refused():
    data = written()
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 0x20
        with pytest.raises(RefusedCheckpointError):
            read_checkpoint(SECRET, bytes(altered))


def test_every_length_but_its_own_is_refused():
    data = written()
    for length in range(len(data)):
        with pytest.raises(RefusedCheckpointError):
            read_checkpoint(SECRET, data[:length])
    with pytest.raises(RefusedCheckpointError, match=ALTERED):
        read_checkpoint(SECRET, data + b"\0")


def test_wrong_key_is_refused():
    with pytest.raises(RefusedCheckpointError, match="sealed under another key"):
        read_checkpoint(OTHER_SECRET, written())
    # Also by one who makes the header say otherwise.
    forged = bytearray(written())
    forged[24:40] = lineage_name(OTHER_SECRET)
    with pytest.raises(RefusedCheckpointError, match=ALTERED):
        read_checkpoint(OTHER_SECRET, bytes(forged))


def _sections(data: bytes) -> list[bytes]:
    leaves = [leaf(name, value) for name, value in VALUES.items()]
    return [head_of(data), *(part.tobytes() for part in split(data, leaves))]


@pytest.mark.parametrize("position", [0, 1, 4])
def test_parts_of_another_checkpoint_are_refused(position):
    first, second = (_sections(written(number=n)) for n in (1, 2))
    swapped = [*first[:position], second[position], *first[position + 1 :]]
    with pytest.raises(RefusedCheckpointError, match=ALTERED):
        read_checkpoint(SECRET, b"".join(swapped))


def test_leaves_in_another_order_are_refused():
    values = {"a": np.ones(4), "b": np.zeros(4)}
    data = written(values)
    head = head_of(data)
    first, second = (
        part.tobytes() for part in split(data, [leaf(n, v) for n, v in values.items()])
    )
    for parts in ((second, first), (first, first), (second, second)):
        with pytest.raises(RefusedCheckpointError, match=ALTERED):
            read_checkpoint(SECRET, head + b"".join(parts))


def test_chunks_in_another_order_are_refused():
    data = written({"x": np.zeros(3 * CHUNK, np.uint8)})
    start, size = len(head_of(data)) + 56 + TAG_BYTES, CHUNK + TAG_BYTES
    chunks = [data[start + i * size : start + (i + 1) * size] for i in range(3)]
    for order in ((1, 0, 2), (0, 0, 2), (0, 2, 1)):
        with pytest.raises(RefusedCheckpointError, match=ALTERED):
            read_checkpoint(SECRET, data[:start] + b"".join(chunks[i] for i in order))


def _header(**fields: Any) -> bytes:
    values = {"magic": b"TEMPOCKP", "version": 2, "recipient": 1, "length": 16, "number": 1}
    return HEADER.pack(*(values | fields).values(), bytes(16), bytes(32))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "begins with 72 bytes of header, got 0"),
        (_header()[:71], "got 71"),
        (_header(magic=b"TEMPOCKQ"), "wrong magic"),
        (_header(version=1), "checkpoint version 1, expected 2"),
        (_header(recipient=3), "out of bounds"),
        (_header(length=15), "out of bounds"),
        (_header(length=(1 << 24) + 1), "out of bounds"),
        (_header(number=(1 << 62) + 1), "out of bounds"),
        (_header(length=1 << 24), ALTERED),
    ],
)
def test_header_out_of_bounds_is_refused(data, text):
    with pytest.raises(RefusedCheckpointError, match=text):
        head_of(data)


LEAF = {"name": "x", "array": {"shape": [2], "dtype": "int8"}, "dtype": "int8", "weak": False}


@pytest.mark.parametrize(
    ("leaves", "text"),
    [
        (None, "not a list"),
        ({}, "not a list"),
        ([LEAF] * 2 + [3], "not an object"),
        ([{**LEAF, "name": 3}], "wrong type"),
        ([{**LEAF, "weak": 1}], "wrong type"),
        ([{**LEAF, "name": "x" * (MAX_NAME + 1)}], "too long a name"),
        ([{**LEAF, "array": {"shape": [-1], "dtype": "int8"}}], "dimension is out of range"),
        ([{**LEAF, "array": {"shape": [1 << 39] * 9, "dtype": "int8"}}], "array is too large"),
        ([{**LEAF, "array": {"shape": [2], "dtype": "object"}}], "unknown dtype"),
        ([{**LEAF, "array": {"shape": [1] * 33, "dtype": "int8"}}], "rank is too large"),
    ],
)
def test_malformed_leaves_are_refused(leaves, text):
    with pytest.raises(RefusedCheckpointError, match=text):
        checkpoint.decode_leaves(leaves)


def test_too_many_leaves_are_refused(monkeypatch):
    with pytest.raises(RefusedCheckpointError, match="too many"):
        checkpoint.decode_leaves([LEAF] * (MAX_LEAVES + 1))
    monkeypatch.setattr(checkpoint, "MAX_MANIFEST", 100)
    with pytest.raises(RefusedCheckpointError, match="expected at most"):
        written()


@pytest.mark.parametrize("manifest", ["", "{", "[]", "3", "{}", '{"leaves":0}', "[" * 100000])
def test_malformed_manifest_is_refused(monkeypatch, manifest):
    # It is authentic, so this would be an enclave's own defect.
    monkeypatch.setattr(checkpoint.json, "dumps", lambda _: manifest)
    writer = CheckpointWriter(SECRET, Recipient.CLIENT, 1, [])
    with pytest.raises(RefusedCheckpointError, match="manifest|not a list"):
        CheckpointReader(SECRET, writer.head)


def test_reading_past_the_end_is_refused():
    data = written()
    reader, _ = read_checkpoint(SECRET, data)
    with pytest.raises(RefusedCheckpointError, match=ALTERED):
        reader.open(np.empty(16, np.uint8))


def test_secrets_do_not_show():
    writer = CheckpointWriter(SECRET, Recipient.CLIENT, 1, [])
    reader = CheckpointReader(SECRET, writer.head)
    lineages = Lineages()
    lineages.provision({"recipient": 1, "secret": SECRET.hex(), "newest": None})
    shown = "".join(
        map(repr, (*vars(writer).values(), *vars(reader).values(), *vars(lineages).values()))
    )
    assert "secret" in shown
    assert SECRET.hex() not in shown and repr(SECRET) not in shown


# The fuzzer's seeds get past each layer's first checks; `test_fuzz` does the rest


@pytest.mark.parametrize("name", ["whole", "manifest", "key", "newest", "rollback", "ledger"])
def test_seed_is_accepted_by_its_layer(name):
    content = fuzz_checkpoint.made_seeds()[name]
    if name == "newest":  # its identifier is not that of the checkpoint with the number
        with pytest.raises(RefusedCheckpointError, match="several checkpoints 3"):
            fuzz_checkpoint.LAYERS[content[:1]](content[1:])
        return
    for seed in (content, (CORPUS / "checkpoint" / name).read_bytes()):
        fuzz_checkpoint.LAYERS[seed[:1]](seed[1:])
