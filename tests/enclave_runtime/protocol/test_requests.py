"""Every request is read into its dataclass, or refused with the name of what is wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from enclave_runtime.protocol import requests
from enclave_runtime.protocol.checkpoint import RefusedCheckpointError
from enclave_runtime.protocol.requests import (
    HeldInput,
    PublishedInput,
    RequestError,
    WrittenInput,
    decode,
)
from enclave_runtime.protocol.wire import Frame, Kind

LEAF = {"name": "w", "array": {"shape": [2], "dtype": "int8"}, "dtype": "int8", "weak": False}

# One of each kind, with every field.
COMPLETE: dict[Kind, dict[str, Any]] = {
    Kind.MAP: {"name": "a", "size": 1},
    Kind.UNMAP: {"name": "a"},
    Kind.COMPILE: {},
    Kind.PROVISION: {"arena": "a", "offsets": [0, 64], "program_bytes": 3},
    Kind.BEGIN: {
        "program": 0,
        "arena": "a",
        "workers": 2,
        "inputs": [{"handle": "h"}, {"offset": 64}, {"published": 128}],
        "blind_at": [0, 64],
        "devices": [1, 3],
        "sharded": [0],
        "name": "n",
    },
    Kind.JOIN: {"run": 1, "worker": 1, "arena": "a"},
    Kind.BEAT: {"group": "a", "process": 1, "leaves": 1, "run": 1, "segment": 1},
    Kind.SETTLE: {"run": 1, "offsets": {"0": 64, "12": 0}, "blind_at": {}},
    Kind.SEGMENT: {"run": 1, "segment": 0, "worker": 1, "timed": 1, "carried": 9},
    Kind.COMMIT: {"run": 1, "donate": [0], "worker": 1},
    Kind.ABORT: {"run": 1, "name": "n"},
    Kind.OPEN: {"handle": "h", "arena": "a", "offset": 0},
    Kind.FREE: {"handles": ["h"]},
    Kind.STATISTICS: {},
    Kind.CALIBRATE: {},
    Kind.CHECKPOINT_KEY: {},
    Kind.CHECKPOINT: {"leaves": [LEAF]},
    Kind.CHECKPOINT_LEAF: {"identifier": "0", "leaf": 0, "arena": "a", "offset": 0, "handle": "h"},
    Kind.RESTORE: {"head": "AAEC"},
    Kind.RESTORE_LEAF: {"identifier": "0", "leaf": 0, "arena": "a", "offset": 0},
    Kind.FIND: {"digest": "0"},
    Kind.RELEASE: {"programs": [0]},
    Kind.PREPARE: {"scheme": "mixing"},
}
FIELDS = [(kind, name) for kind, fields in COMPLETE.items() for name in fields]
# None of them is what any field takes.
WRONG = [None, True, 0.5, [[]], {"": 0}, [None], {"0": None}, {"-1": 0}, {"00": 0}, {"x": 0}]


def read(kind: Kind, fields: dict[str, Any]) -> Any:
    return decode(Frame(kind, 1, fields))


def test_every_request_is_here():
    assert COMPLETE.keys() == requests.REQUESTS.keys()


@pytest.mark.parametrize("kind", COMPLETE, ids=lambda kind: kind.name)
def test_a_complete_request_is_read(kind):
    request = read(kind, COMPLETE[kind])
    assert type(request) is requests.REQUESTS[kind]
    assert {f.name for f in dataclasses.fields(request)} == COMPLETE[kind].keys()
    with pytest.raises(RequestError, match=f"^a malformed {kind.name} request: its fields are"):
        read(kind, COMPLETE[kind] | {"unknown": 0})


def test_what_is_read():
    begin = read(Kind.BEGIN, COMPLETE[Kind.BEGIN])
    assert begin.inputs == (HeldInput("h"), WrittenInput(64), PublishedInput(128))
    assert begin.blind_at == (0, 64)
    assert read(Kind.SETTLE, COMPLETE[Kind.SETTLE]).offsets == {0: 64, 12: 0}
    assert read(Kind.RESTORE, {"head": "AAEC"}).head == b"\0\1\2"
    (leaf,) = read(Kind.CHECKPOINT, {"leaves": [LEAF]}).leaves
    assert leaf.encode() == LEAF


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=str)
def test_a_field_that_is_missing(kind, name):
    fields = {key: value for key, value in COMPLETE[kind].items() if key != name}
    optional = {
        *((Kind.PROVISION, name) for name in COMPLETE[Kind.PROVISION]),
        *((Kind.OPEN, name) for name in ("arena", "offset")),
        (Kind.CHECKPOINT_LEAF, "handle"),
        *((Kind.BEGIN, name) for name in ("devices", "sharded", "name")),
        *((Kind.ABORT, name) for name in ("run", "name")),
        (Kind.JOIN, "arena"),
        *((Kind.SEGMENT, name) for name in ("timed", "carried")),
        (Kind.COMMIT, "worker"),
        *((Kind.BEAT, name) for name in ("leaves", "run", "segment")),
    }
    if (kind, name) in optional:
        assert getattr(read(kind, fields), name) in (None, (), 0)
        return
    with pytest.raises(RequestError, match=f"^a malformed {kind.name} request: it has no `{name}`"):
        read(kind, fields)


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=str)
def test_a_field_of_another_type(kind, name, value):
    with pytest.raises((RequestError, RefusedCheckpointError)) as caught:
        read(kind, COMPLETE[kind] | {name: value})
    if kind is not Kind.CHECKPOINT:
        assert str(caught.value).startswith(f"a malformed {kind.name} request: `{name}` is not ")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (Kind.MAP, "size", 0),
        (Kind.MAP, "size", requests.MAX_ARENA_BYTES + 1),
        (Kind.BEGIN, "workers", 0),
        (Kind.BEGIN, "workers", requests.MAX_RUN_WORKERS + 1),
        (Kind.BEGIN, "inputs", [{"handle": "h", "offset": 0}]),
        (Kind.BEGIN, "inputs", [{"published": 0, "offset": 0}]),
        (Kind.BEGIN, "inputs", [{"published": "0"}]),
        (Kind.BEGIN, "inputs", [{}]),
        (Kind.BEGIN, "inputs", [{"handle": 3}]),
        (Kind.SETTLE, "offsets", {"9" * 5000: 0}),
        (Kind.SETTLE, "blind_at", {"\N{ARABIC-INDIC DIGIT THREE}": 0}),
        (Kind.SEGMENT, "timed", 2),
        (Kind.RESTORE, "head", "AAE"),
        (Kind.RESTORE, "head", "AA E"),
    ],
)
def test_a_field_out_of_bounds(kind, name, value):
    with pytest.raises(RequestError, match=f"`{name}` is not"):
        read(kind, COMPLETE[kind] | {name: value})


@pytest.mark.parametrize("kind", [Kind.REPLY, Kind.ERROR, Kind.HELLO, Kind.PROOF, Kind.OWN])
def test_other_frames_are_no_requests(kind):
    with pytest.raises(RequestError, match=f"kind {kind.name} is not a request"):
        read(kind, {})
