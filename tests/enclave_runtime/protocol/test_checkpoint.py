"""The sealed format: what is written is read again, and whatever was done to it is refused."""

import json
import os
from typing import Any

import ml_dtypes
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
    CheckpointError,
    CheckpointReader,
    CheckpointWriter,
    Header,
    Leaf,
    Recipient,
    Seen,
    head_of,
    lineage_name,
    read_checkpoint,
    sealed_bytes,
    split,
)
from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.protocol.tags import TagRecord
from enclave_runtime.sessions import lineage
from enclave_runtime.sessions.lineage import Lineages
from tests.fuzz import fuzz_checkpoint
from tests.fuzz.harness import CORPUS

SECRET, OTHER_SECRET = bytes(range(32)), bytes(range(1, 33))
ORDER_ID = "00" * 16
ALTERED = "failed its authentication"
VALUES = {
    "matrix": np.arange(6, dtype=np.float64).reshape(2, 3),
    "narrow": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.int8),
    "scalar": np.array(7, np.uint32),
}


def leaf(name: str, value: np.ndarray) -> Leaf:
    return Leaf(name, ArrayType(value.shape, value.dtype.name), value.dtype.name, False)


def written(
    values: dict[str, np.ndarray] = VALUES, number: int = 1, secret: bytes = SECRET
) -> bytes:
    """A whole checkpoint."""
    leaves = [leaf(name, value) for name, value in values.items()]
    writer = CheckpointWriter(secret, Recipient.CLIENT, number, leaves)
    parts = [writer.head]
    for value in values.values():
        out = np.empty(sealed_bytes(ArrayType(value.shape, value.dtype.name)), np.uint8)
        writer.seal(value, TagRecord(b"p" * 32, b"o" * 16, 7), out)
        parts.append(out.tobytes())
    return b"".join(parts)


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
        with pytest.raises(CheckpointError):
            read_checkpoint(SECRET, bytes(altered))


def test_every_length_but_its_own_is_refused():
    data = written()
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            read_checkpoint(SECRET, data[:length])
    with pytest.raises(CheckpointError, match=ALTERED):
        read_checkpoint(SECRET, data + b"\0")


def test_wrong_key_is_refused():
    with pytest.raises(CheckpointError, match="sealed under another key"):
        read_checkpoint(OTHER_SECRET, written())
    # Also by one who makes the header say otherwise.
    forged = bytearray(written())
    forged[24:40] = lineage_name(OTHER_SECRET)
    with pytest.raises(CheckpointError, match=ALTERED):
        read_checkpoint(OTHER_SECRET, bytes(forged))


def _sections(data: bytes) -> list[bytes]:
    leaves = [leaf(name, value) for name, value in VALUES.items()]
    return [head_of(data), *(part.tobytes() for part in split(data, leaves))]


@pytest.mark.parametrize("position", [0, 1, 4])
def test_parts_of_another_checkpoint_are_refused(position):
    first, second = (_sections(written(number=n)) for n in (1, 2))
    swapped = [*first[:position], second[position], *first[position + 1 :]]
    with pytest.raises(CheckpointError, match=ALTERED):
        read_checkpoint(SECRET, b"".join(swapped))


def test_leaves_in_another_order_are_refused():
    values = {"a": np.ones(4), "b": np.zeros(4)}
    data = written(values)
    head = head_of(data)
    first, second = (
        part.tobytes() for part in split(data, [leaf(n, v) for n, v in values.items()])
    )
    for parts in ((second, first), (first, first), (second, second)):
        with pytest.raises(CheckpointError, match=ALTERED):
            read_checkpoint(SECRET, head + b"".join(parts))


def test_chunks_in_another_order_are_refused():
    data = written({"x": np.zeros(3 * CHUNK, np.uint8)})
    start, size = len(head_of(data)) + 56 + TAG_BYTES, CHUNK + TAG_BYTES
    chunks = [data[start + i * size : start + (i + 1) * size] for i in range(3)]
    for order in ((1, 0, 2), (0, 0, 2), (0, 2, 1)):
        with pytest.raises(CheckpointError, match=ALTERED):
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
    with pytest.raises(CheckpointError, match=text):
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
    with pytest.raises(CheckpointError, match=text):
        checkpoint.decode_leaves(leaves)


def test_too_many_leaves_are_refused(monkeypatch):
    with pytest.raises(CheckpointError, match="too many"):
        checkpoint.decode_leaves([LEAF] * (MAX_LEAVES + 1))
    monkeypatch.setattr(checkpoint, "MAX_MANIFEST", 100)
    with pytest.raises(CheckpointError, match="expected at most"):
        written()


@pytest.mark.parametrize("manifest", ["", "{", "[]", "3", "{}", '{"leaves":0}', "[" * 100000])
def test_malformed_manifest_is_refused(monkeypatch, manifest):
    # It is authentic, so this would be an enclave's own defect.
    monkeypatch.setattr(checkpoint.json, "dumps", lambda _: manifest)
    writer = CheckpointWriter(SECRET, Recipient.CLIENT, 1, [])
    with pytest.raises(CheckpointError, match="manifest|not a list"):
        CheckpointReader(SECRET, writer.head)


def test_reading_past_the_end_is_refused():
    data = written()
    reader, _ = read_checkpoint(SECRET, data)
    with pytest.raises(CheckpointError, match=ALTERED):
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


# Which may be restored


def provisioned(newest: Seen | None = None) -> Lineages:
    lineages = Lineages()
    encoded = None if newest is None else newest.encode()
    lineages.provision({"recipient": 1, "secret": SECRET.hex(), "newest": encoded})
    return lineages


def order(
    newest: Seen | None = None,
    allow: int | Seen | None = None,
    values: dict[str, np.ndarray] = VALUES,
) -> dict[str, Any]:
    """An order of its own to restore."""
    leaves = [leaf(name, value).encode() for name, value in values.items()]
    encoded = None if newest is None else newest.encode()
    named = allow.encode() if isinstance(allow, Seen) else allow
    fields = {"newest": encoded, "allow_rollback_to": named, "leaves": leaves}
    return {"id": os.urandom(16).hex(), **fields}


def seen(data: bytes) -> Seen:
    header = Header.decode(data)
    return Seen(header.number, header.identifier)


def test_older_checkpoint_is_refused_unless_named():
    old, new = written(number=1), written(number=2)
    for lineages, newest in ((provisioned(seen(new)), None), (provisioned(), seen(new))):
        with pytest.raises(CheckpointError, match=r"1 is older than checkpoint 2.*to=1"):
            lineages.reader(head_of(old), order(newest))
        with pytest.raises(CheckpointError, match="names another"):
            lineages.reader(head_of(new), order(newest, allow=1))
        assert lineages.reader(head_of(old), order(newest, allow=1)).header.number == 1
        assert lineages.reader(head_of(new), order(newest)).header.number == 2
        # That a rollback was allowed once allows no other.
        with pytest.raises(CheckpointError, match="older"):
            lineages.reader(head_of(old), order(newest))


def test_checkpoint_of_a_second_enclave_with_the_number_is_refused_unless_named():
    mine, forked = written(number=3), written(number=3)
    lineages = provisioned(seen(mine))
    with pytest.raises(CheckpointError, match="several checkpoints 3"):
        lineages.reader(head_of(forked), order())
    lineages.reader(head_of(mine), order())
    lineages.reader(head_of(forked), order(allow=3))
    # A number takes either of them, its identifier this one only.
    lineages.reader(head_of(forked), order(allow=seen(forked)))
    for head, allow in ((forked, seen(mine)), (mine, seen(forked))):
        with pytest.raises(CheckpointError, match="names another"):
            lineages.reader(head_of(head), order(allow=allow))


@pytest.mark.parametrize("allow", [None, 1])
def test_order_serves_once(allow):
    data, lineages, used = head_of(written(number=1)), provisioned(), order(allow=allow)
    # One that was refused has not served.
    with pytest.raises(CheckpointError, match=ALTERED):
        lineages.reader(data[:-1], used)
    lineages.reader(data, used)
    for replayed in (used, {**used, "id": used["id"].upper()}, {**used, "allow_rollback_to": 1}):
        with pytest.raises(CheckpointError, match="was used before, and each serves once"):
            lineages.reader(data, replayed)
    # Nor does it after another key was in use.
    lineages.provision({"recipient": 1, "secret": OTHER_SECRET.hex(), "newest": None})
    lineages.provision({"recipient": 1, "secret": SECRET.hex(), "newest": None})
    with pytest.raises(CheckpointError, match="was used before"):
        lineages.reader(data, used)
    lineages.reader(data, order(allow=allow))


def test_spent_orders_are_not_forgotten_for_room(monkeypatch):
    monkeypatch.setattr(lineage, "MAX_SPENT", 2)
    data, lineages, used = head_of(written()), provisioned(), [order(), order()]
    for one in used:
        lineages.reader(data, one)
    with pytest.raises(CheckpointError, match="an enclave restores 2 times: start another"):
        lineages.reader(data, order())
    with pytest.raises(CheckpointError, match="was used before"):
        lineages.reader(data, used[0])


def test_old_news_change_nothing():
    old, new = written(number=1), written(number=2)
    lineages = provisioned(seen(new))
    lineages.provision({"recipient": 1, "secret": SECRET.hex(), "newest": seen(old).encode()})
    with pytest.raises(CheckpointError, match="older"):
        lineages.reader(head_of(old), order(newest=seen(old)))


def test_numbers_go_on_from_the_highest_known():
    assert [provisioned().writer([]).header.number for _ in range(2)] == [1, 1]
    lineages = provisioned(Seen(7, bytes(32)))
    assert [lineages.writer([]).header.number for _ in range(2)] == [8, 9]
    lineages.reader(head_of(written(number=20)), order())
    assert lineages.writer([]).header.number == 21
    # A key that comes into use again goes on as well.
    lineages.provision({"recipient": 1, "secret": OTHER_SECRET.hex(), "newest": None})
    assert lineages.writer([]).header.number == 1
    lineages.provision({"recipient": 1, "secret": SECRET.hex(), "newest": None})
    assert lineages.writer([]).header.number == 22


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({k: v for k, v in VALUES.items() if k != "scalar"}, "4 leaves, expected 3"),
        ({**VALUES, "more": np.ones(2)}, "4 leaves, expected 5"),
        ({**VALUES, "narrow": np.ones(2)}, r"leaf 1 is narrow bfloat16\[2\], expected narrow floa"),
        ({**VALUES, "matrix": np.ones((3, 2))}, r"leaf 0 is matrix float64\[2, 3\], expected"),
        (dict(zip("abcd", VALUES.values(), strict=True)), "leaf 0 is matrix .*, expected a "),
    ],
)
def test_another_tree_is_refused(values, text):
    with pytest.raises(CheckpointError, match=text):
        provisioned().reader(head_of(written()), order(values=values))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ([], "not an object"),
        ({}, "the client's or the enclave's"),
        ({"recipient": 3}, "the client's or the enclave's"),
        ({"recipient": 1}, "has 32 bytes"),
        ({"recipient": 1, "secret": "00" * 31}, "has 32 bytes"),
        ({"recipient": 1, "secret": "zz" * 32}, "has 32 bytes"),
        ({"recipient": 2, "run": "r"}, "has 32 bytes"),
        ({"recipient": 2, "run": "r", "secret": "00" * 16}, "has 32 bytes"),
        ({"recipient": 2, "run": "", "secret": "00" * 32}, "1 to 256 characters"),
        ({"recipient": 2, "run": 3, "secret": "00" * 32}, "1 to 256 characters"),
        ({"recipient": 1, "secret": "00" * 32, "newest": 3}, "malformed"),
        ({"recipient": 1, "secret": "00" * 32, "newest": {"number": 1}}, "malformed"),
        *(
            (
                {
                    "recipient": 1,
                    "secret": "00" * 32,
                    "newest": {"number": n, "identifier": "00" * size},
                },
                "out of bounds",
            )
            for n, size in ((0, 32), (1 << 62, 32), (True, 32), (1, 31))
        ),
    ],
)
def test_malformed_key_is_refused(wrong, text):
    with pytest.raises(CheckpointError, match=text):
        Lineages().provision(wrong)


def test_without_a_key_nothing_is_written_or_read():
    with pytest.raises(CheckpointError, match="no checkpoint key"):
        Lineages().writer([])
    with pytest.raises(CheckpointError, match="no checkpoint key"):
        Lineages().reader(head_of(written()), order())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (None, "an order to restore is not an object"),
        ({}, "an id of 16 bytes"),
        ({"leaves": [], "id": 3}, "an id of 16 bytes"),
        ({"leaves": [], "id": "00" * 15}, "an id of 16 bytes"),
        ({"id": ORDER_ID}, "leaves are not a list"),
        ({"id": ORDER_ID, "leaves": [], "newest": 3}, "malformed"),
        *(
            ({"id": ORDER_ID, "leaves": [], "allow_rollback_to": named}, text)
            for named, text in (
                *(("1", "names another"), (True, "names another"), (1.0, "names another")),
                *(({}, "malformed"), ({"number": 1, "identifier": "00"}, "out of bounds")),
            )
        ),
    ],
)
def test_malformed_order_is_refused(wrong, text):
    with pytest.raises(CheckpointError, match=text):
        provisioned().reader(head_of(written()), wrong)


# The fuzzer's seeds get past each layer's first checks; `test_fuzz` does the rest


@pytest.mark.parametrize("name", ["whole", "manifest", "key", "newest", "rollback", "ledger"])
def test_seed_is_accepted_by_its_layer(name):
    content = fuzz_checkpoint.made_seeds()[name]
    if name == "newest":  # its identifier is not that of the checkpoint with the number
        with pytest.raises(CheckpointError, match="several checkpoints 3"):
            fuzz_checkpoint.LAYERS[content[:1]](content[1:])
        return
    for seed in (content, (CORPUS / "checkpoint" / name).read_bytes()):
        fuzz_checkpoint.LAYERS[seed[:1]](seed[1:])


# The enclave's identity, which only SGX has: a file stands for Gramine's


def test_sealing_to_an_identity(monkeypatch, tmp_path):
    run = {"recipient": 2, "run": "my run", "secret": SECRET.hex(), "newest": None}
    with pytest.raises(CheckpointError, match="no identity to seal to, which takes SGX"):
        Lineages().provision(run)
    monkeypatch.setattr(lineage, "IDENTITY_KEY", str(tmp_path / "key"))
    for length in (0, 15, 17):
        (tmp_path / "key").write_bytes(bytes(length))
        with pytest.raises(CheckpointError, match="has 16 bytes"):
            Lineages().provision(run)
    (tmp_path / "key").write_bytes(bytes(range(16)))
    first, again, other, stranger, client = (Lineages() for _ in range(5))
    first.provision(run)
    again.provision(run)
    other.provision({**run, "run": "another run"})
    # A second instance of the enclave on this machine, with an owner who knows the run's name.
    stranger.provision({**run, "secret": OTHER_SECRET.hex()})
    # And the client's secret without the enclave's.
    client.provision({**run, "recipient": 1})
    head = first.writer([]).head
    assert Header.decode(head).recipient is Recipient.ENCLAVE
    again.reader(head, order(values={}))
    for refused in (other, stranger, client):
        with pytest.raises(CheckpointError, match="another key"):
            refused.reader(head, order(values={}))
        # Nor by one who makes the header say otherwise.
        own = refused.writer([]).header.lineage
        with pytest.raises(CheckpointError, match=ALTERED):
            refused.reader(head[:24] + own + head[40:], order(values={}))
    (tmp_path / "key").write_bytes(bytes(range(1, 17)))
    moved = Lineages()
    moved.provision(run)
    with pytest.raises(CheckpointError, match="another key"):
        moved.reader(head, order(values={}))
