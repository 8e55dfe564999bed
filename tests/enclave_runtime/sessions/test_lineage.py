"""Which checkpoints an enclave restores: none older unnamed, none twice, none of another tree."""

import os
from typing import Any

import numpy as np
import pytest

from enclave_runtime.protocol.checkpoint import (
    Header,
    Recipient,
    RefusedCheckpointError,
    Seen,
    head_of,
)
from enclave_runtime.sessions import lineage
from enclave_runtime.sessions.lineage import Lineages
from tests.support.written import ALTERED, ORDER_ID, OTHER_SECRET, SECRET, VALUES, leaf, written


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
        with pytest.raises(RefusedCheckpointError, match=r"1 is older than checkpoint 2.*to=1"):
            lineages.reader(head_of(old), order(newest))
        with pytest.raises(RefusedCheckpointError, match="names another"):
            lineages.reader(head_of(new), order(newest, allow=1))
        assert lineages.reader(head_of(old), order(newest, allow=1)).header.number == 1
        assert lineages.reader(head_of(new), order(newest)).header.number == 2
        # That a rollback was allowed once allows no other.
        with pytest.raises(RefusedCheckpointError, match="older"):
            lineages.reader(head_of(old), order(newest))


def test_checkpoint_of_a_second_enclave_with_the_number_is_refused_unless_named():
    mine, forked = written(number=3), written(number=3)
    lineages = provisioned(seen(mine))
    with pytest.raises(RefusedCheckpointError, match="several checkpoints 3"):
        lineages.reader(head_of(forked), order())
    lineages.reader(head_of(mine), order())
    lineages.reader(head_of(forked), order(allow=3))
    # A number takes either of them, its identifier this one only.
    lineages.reader(head_of(forked), order(allow=seen(forked)))
    for head, allow in ((forked, seen(mine)), (mine, seen(forked))):
        with pytest.raises(RefusedCheckpointError, match="names another"):
            lineages.reader(head_of(head), order(allow=allow))


@pytest.mark.parametrize("allow", [None, 1])
def test_order_serves_once(allow):
    data, lineages, used = head_of(written(number=1)), provisioned(), order(allow=allow)
    # One that was refused has not served.
    with pytest.raises(RefusedCheckpointError, match=ALTERED):
        lineages.reader(data[:-1], used)
    lineages.reader(data, used)
    for replayed in (used, {**used, "id": used["id"].upper()}, {**used, "allow_rollback_to": 1}):
        with pytest.raises(RefusedCheckpointError, match="was used before, and each serves once"):
            lineages.reader(data, replayed)
    # Nor does it after another key was in use.
    lineages.provision({"recipient": 1, "secret": OTHER_SECRET.hex(), "newest": None})
    lineages.provision({"recipient": 1, "secret": SECRET.hex(), "newest": None})
    with pytest.raises(RefusedCheckpointError, match="was used before"):
        lineages.reader(data, used)
    lineages.reader(data, order(allow=allow))


def test_spent_orders_are_not_forgotten_for_room(monkeypatch):
    monkeypatch.setattr(lineage, "MAX_SPENT", 2)
    data, lineages, used = head_of(written()), provisioned(), [order(), order()]
    for one in used:
        lineages.reader(data, one)
    with pytest.raises(RefusedCheckpointError, match="an enclave restores 2 times: start another"):
        lineages.reader(data, order())
    with pytest.raises(RefusedCheckpointError, match="was used before"):
        lineages.reader(data, used[0])


def test_old_news_change_nothing():
    old, new = written(number=1), written(number=2)
    lineages = provisioned(seen(new))
    lineages.provision({"recipient": 1, "secret": SECRET.hex(), "newest": seen(old).encode()})
    with pytest.raises(RefusedCheckpointError, match="older"):
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
    with pytest.raises(RefusedCheckpointError, match=text):
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
    with pytest.raises(RefusedCheckpointError, match=text):
        Lineages().provision(wrong)


def test_without_a_key_nothing_is_written_or_read():
    with pytest.raises(RefusedCheckpointError, match="no checkpoint key"):
        Lineages().writer([])
    with pytest.raises(RefusedCheckpointError, match="no checkpoint key"):
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
    with pytest.raises(RefusedCheckpointError, match=text):
        provisioned().reader(head_of(written()), wrong)


# The enclave's identity, which only SGX has: a file stands for Gramine's


def test_sealing_to_an_identity(monkeypatch, tmp_path):
    run = {"recipient": 2, "run": "my run", "secret": SECRET.hex(), "newest": None}
    with pytest.raises(RefusedCheckpointError, match="no identity to seal to, which takes SGX"):
        Lineages().provision(run)
    monkeypatch.setattr(lineage, "IDENTITY_KEY", str(tmp_path / "key"))
    for length in (0, 15, 17):
        (tmp_path / "key").write_bytes(bytes(length))
        with pytest.raises(RefusedCheckpointError, match="has 16 bytes"):
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
        with pytest.raises(RefusedCheckpointError, match="another key"):
            refused.reader(head, order(values={}))
        # Nor by one who makes the header say otherwise.
        own = refused.writer([]).header.lineage
        with pytest.raises(RefusedCheckpointError, match=ALTERED):
            refused.reader(head[:24] + own + head[40:], order(values={}))
    (tmp_path / "key").write_bytes(bytes(range(1, 17)))
    moved = Lineages()
    moved.provision(run)
    with pytest.raises(RefusedCheckpointError, match="another key"):
        moved.reader(head, order(values={}))
