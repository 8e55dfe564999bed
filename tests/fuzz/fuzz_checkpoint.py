"""Fuzzes the readers of checkpoints: storage, the client's orders, and the kept ledger.

Altered bytes rarely get past a tag, so an input's first byte says which layer the rest is for:
``c`` a whole checkpoint, ``m`` the content of an authentic manifest, ``k`` an order for a key,
``r`` an order to restore, ``l`` a ledger.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from enclave_runtime.protocol import checkpoint
from enclave_runtime.protocol.checkpoint import (
    CheckpointReader,
    CheckpointWriter,
    Header,
    Leaf,
    Recipient,
    Seen,
    decode_leaves,
    head_of,
    read_checkpoint,
    sealed_bytes,
)
from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.protocol.tags import NOWHERE, TagRecord
from enclave_runtime.sessions import lineage
from enclave_runtime.sessions.lineage import Lineages
from tempo_jax import CheckpointLedger, errors
from tests.fuzz import harness

SECRET = bytes(range(32))
KEY_ORDER = {"recipient": 1, "secret": SECRET.hex(), "newest": None}
LEAVES = [
    Leaf("['w']", ArrayType((2, 3), "float32"), "float32", False),
    Leaf("['key']", ArrayType((2,), "uint32"), "key<fry>", True),
]


def _checkpoint(number: int = 3) -> bytes:
    writer = CheckpointWriter(SECRET, Recipient.CLIENT, number, LEAVES)
    parts = [writer.head]
    for leaf in LEAVES:
        out = np.empty(sealed_bytes(leaf.array), np.uint8)
        tag = TagRecord(NOWHERE, bytes(16), 0)
        writer.seal(np.ones(leaf.array.shape, leaf.array.dtype), tag, out)
        parts.append(out.tobytes())
    return b"".join(parts)


HEAD = head_of(_checkpoint())


def _whole(data: bytes) -> None:
    reader, values = read_checkpoint(SECRET, data)
    assert head_of(data)[:72] == reader.header.encode()
    assert [v.dtype.name for v in values] == [leaf.array.dtype for leaf in reader.leaves]


def _manifest(data: bytes) -> None:
    length = len(data) + checkpoint.TAG_BYTES
    name = checkpoint.lineage_name(SECRET)
    header = Header(Recipient.CLIENT, length, 1, name, bytes(checkpoint.IDENTIFIER_BYTES))
    cipher = checkpoint._Cipher(SECRET, header)
    head = header.encode() + cipher.seal(data, checkpoint._MANIFEST_PLACE, 0)
    leaves = CheckpointReader(SECRET, head).leaves
    assert decode_leaves([leaf.encode() for leaf in leaves]) == list(leaves)


def _key_order(data: bytes) -> None:
    Lineages().provision(_parsed(data))


def _restore_order(data: bytes) -> None:
    lineages = Lineages()
    lineages.provision(KEY_ORDER)
    lineages.reader(HEAD, _parsed(data))


def _ledger(data: bytes) -> None:
    ledger = CheckpointLedger.from_json(data.decode("utf-8", "replace"))
    assert CheckpointLedger.from_json(ledger.to_json()) == ledger


def _parsed(data: bytes) -> Any:
    """JSON, as the session reads it before it looks at an order."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


LAYERS: dict[bytes, Callable[[bytes], None]] = {
    b"c": _whole,
    b"m": _manifest,
    b"k": _key_order,
    b"r": _restore_order,
    b"l": _ledger,
}


def one_input(data: bytes) -> None:
    """Gives the rest of an input to the layer that its first byte names."""
    layer = LAYERS.get(data[:1])
    if layer is not None:
        try:
            layer(data[1:])
        except (checkpoint.RefusedCheckpointError, errors.CheckpointError):
            pass


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Changes an order's, a manifest's or a ledger's JSON, and a whole checkpoint's bytes."""
    if data[:1] in (b"m", b"k", b"r", b"l") and seed % 8:
        return data[:1] + harness.mutate_json(data[1:], max_size - 1, seed)
    return harness.mutate_bytes(data, max_size)


def made_seeds() -> dict[str, bytes]:
    """The corpus's seeds by file name; made anew when the format changes."""
    encoded = [leaf.encode() for leaf in LEAVES]
    seen = Seen(3, bytes(32))
    common = {"id": "ab" * checkpoint.ORDER_BYTES, "leaves": encoded}
    orders = {
        "newest": {**common, "newest": seen.encode(), "allow_rollback_to": None},
        "rollback": {**common, "newest": None, "allow_rollback_to": 3},
    }
    return {
        "whole": b"c" + _checkpoint(),
        "head": b"c" + HEAD,
        "manifest": b"m" + json.dumps({"leaves": encoded}).encode(),
        "key": b"k" + json.dumps(KEY_ORDER | {"newest": seen.encode()}).encode(),
        "identity": b"k" + json.dumps(KEY_ORDER | {"recipient": 2, "run": "r"}).encode(),
        **{name: b"r" + json.dumps(order).encode() for name, order in orders.items()},
        "ledger": b"l" + CheckpointLedger({"ab" * 16: seen}).to_json().encode(),
    }


if __name__ == "__main__":
    harness.fuzz(one_input, (checkpoint, lineage), mutate)
