"""Parts of several processes: they cover every value once, and only who is awaited brings them."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from enclave_runtime.crypto.encryption import DecryptionError
from enclave_runtime.protocol.memory import Arena, ArenaError, Lane, Shares
from enclave_runtime.protocol.program import Program
from enclave_runtime.protocol.requests import BeatRequest
from enclave_runtime.protocol.wire import Label, WireError, blocks_bytes, send_blocks
from enclave_runtime.sessions.cargo import Cargo
from enclave_runtime.sessions.lanes import Lanes, Presence
from tests.support.verification import V, W, X, chain, planned

KEY = bytes(16)
NONE = Cargo()


@pytest.fixture(scope="module")
def program() -> Program:
    """Two products, over three segments."""
    return planned(chain, X, W, V).program


def divisible(program: Program) -> list[int]:
    """Classes that two, three or four devices divide, no two of them on one value."""
    crossings = [c for s in program.segments for c in (*s.uploads, *s.downloads)]
    rows = {c.layout.classes[0] for c in crossings if c.layout.classes[0] is not None}
    return [c for c in rows if all(x.layout.classes.count(c) < 2 for x in crossings)]


def arena(size: int) -> Arena:
    made = Arena(f"tempo_jax-{secrets.token_hex(16)}", size, create=True)
    made.unlink()
    return made


def joined(program: Program, shares: Shares) -> tuple[Lanes, list[Lane], list[Arena]]:
    lanes = Lanes(program, shares)
    outside = [Lane(program, shares, p) for p in range(len(shares.devices))]
    arenas = [arena(lane.size) for lane in outside]
    for process, memory in enumerate(arenas):
        assert not lanes.complete
        lanes.join(process, memory)
    assert lanes.complete
    return lanes, outside, arenas


@hypothesis.given(
    devices=st.lists(st.integers(1, 3), min_size=1, max_size=4), split=st.booleans(), data=st.data()
)
def test_parts_cover_the_whole(program, devices, split, data):
    classes = divisible(program)
    sharded = frozenset({data.draw(st.sampled_from(classes))} if split else ())
    shares = Shares(sharded, tuple(devices))
    try:
        shares.check(program)
    except ArenaError as error:
        assert "do not divide" in str(error)
        hypothesis.reject()
    lanes, outside, arenas = joined(program, shares)
    rng = np.random.default_rng(0)
    for index, segment in enumerate(program.segments):
        wholes = [rng.normal(size=c.blinded.shape).astype(c.blinded.dtype) for c in segment.uploads]
        for process, lane in enumerate(outside):
            for piece, whole in zip(lane.uploads[index], wholes, strict=True):
                if piece is not None:
                    view = arenas[process].view(piece.array, piece.offset)
                    np.copyto(view, whole[piece.where])
        for process in range(len(devices)):
            lanes.take(index, process, KEY, NONE)
            lanes.check(index, process, KEY, NONE)
        for one, other in zip(lanes.taken(index), wholes, strict=True):
            np.testing.assert_array_equal(one, other)
        for position, crossing in enumerate(segment.downloads):
            whole = rng.normal(size=crossing.blinded.shape).astype(crossing.blinded.dtype)
            lanes.put(index, position, whole)
            for process, lane in enumerate(outside):
                piece = lane.downloads[index][position]
                view = arenas[process].view(piece.array, piece.offset)
                np.testing.assert_array_equal(view, whole[piece.where])


def test_pieces_of_a_segment_do_not_overlap(program):
    shares = Shares(frozenset(divisible(program)[:1]), (1, 1))
    for process in range(2):
        lane = Lane(program, shares, process)
        # Also with the uploads of the next segment, which may come while these are still read.
        for index in range(len(program.segments)):
            after = lane.uploads[index + 1] if index + 1 < len(program.segments) else []
            for uploads in (lane.uploads[index], after):
                pieces = [p for p in (*uploads, *lane.downloads[index]) if p is not None]
                ends = sorted((p.offset, p.offset + p.array.nbytes) for p in pieces)
                assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False))
                assert all(end <= lane.size for _, end in ends)


def test_what_is_brought_beside_a_segment_lies_apart(program):
    awaited = next(s for s in program.segments if s.uploads and s.downloads)
    alone = dataclasses.replace(awaited, downloads=())
    program = dataclasses.replace(program, segments=(awaited, alone))
    lane = Lane(program, Shares(frozenset(), (1,)), 0)
    pieces = [*lane.uploads[0], *lane.downloads[0], *lane.uploads[1]]
    ends = sorted((p.offset, p.offset + p.array.nbytes) for p in pieces if p is not None)
    assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False))
    assert ends[-1][1] <= lane.size


def test_what_is_sent_ahead_lies_apart(program):
    awaited = next(s for s in program.segments if s.uploads and s.downloads)
    ahead = dataclasses.replace(awaited, uploads=())
    beside = dataclasses.replace(awaited, downloads=())
    segments = (awaited, ahead, awaited, beside, ahead, awaited, ahead)
    program = dataclasses.replace(program, segments=segments)
    assert program.ahead == (1, 4, 6)
    lane = Lane(program, Shares(frozenset(), (1,)), 0)
    # While the last but one are fetched with those behind them, the last are being written.
    pieces = [lane.uploads[0], lane.downloads[0], lane.uploads[3]]
    pieces += [lane.downloads[1], lane.downloads[4]]
    ends = [(p.offset, p.offset + p.array.nbytes) for each in pieces for p in each if p is not None]
    assert ends == sorted(ends)
    assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False))
    assert ends[-1][1] <= lane.size and lane.downloads[6] == lane.downloads[1]


def test_other_bytes_are_noticed(program):
    shares = Shares(frozenset(), (1, 1))
    lanes, outside, arenas = joined(program, shares)
    index = next(i for i, s in enumerate(program.segments) if s.uploads)
    for process in range(2):
        lanes.take(index, process, KEY, NONE)
    piece = outside[0].uploads[index][0]
    assert piece is not None
    arenas[0].view(piece.array, piece.offset).reshape(-1).view(np.uint8)[0] ^= 1
    lanes.check(index, 1, KEY, NONE)  # which brought nothing
    with pytest.raises(DecryptionError):
        lanes.check(index, 0, KEY, NONE)


# Parts that travel


LABEL = Label(7, 0, 1)


def travelling(program: Program) -> tuple[Lanes, int, Lane]:
    """Lanes of two processes of which the second shares no memory, and a segment with uploads."""
    shares = Shares(frozenset(divisible(program)[:1]), (1, 1))
    lanes, lane = Lanes(program, shares), Lane(program, shares, 1)
    lanes.join(0, arena(Lane(program, shares, 0).size))
    lanes.join(1, None)
    return lanes, next(i for i, pieces in enumerate(lane.uploads) if any(pieces)), lane


def parts(lane: Lane, index: int) -> list[np.ndarray]:
    rng = np.random.default_rng(index)
    pieces = [piece.array for piece in lane.uploads[index] if piece is not None]
    return [rng.normal(size=array.shape).astype(array.dtype) for array in pieces]


@contextlib.contextmanager
def brought(
    content: list[np.ndarray], index: int, label: Label | None = None, size: int | None = None
) -> Iterator[tuple[Cargo, socket.socket]]:
    """What a worker sends behind its request, and the worker's end of the connection."""
    label = label or LABEL._replace(segment=index)
    own, theirs = socket.socketpair()
    with own, theirs:
        send_blocks(theirs, label, content)
        cargo = Cargo(own)
        told = blocks_bytes(content) if size is None else size
        cargo.announce(LABEL._replace(segment=index), told)
        yield cargo, theirs


def test_parts_travel_and_come_again(program):
    lanes, index, lane = travelling(program)
    content = parts(lane, index)
    lanes.take(index, 0, KEY, NONE)
    for take in (lanes.take, lanes.check):
        with brought(content, index) as (cargo, _):
            take(index, 1, KEY, cargo)
            cargo.discard()  # and nothing is left
    pieces = [piece for piece in lane.uploads[index] if piece is not None]
    wholes = lanes.taken(index)
    for piece, part in zip(pieces, content, strict=True):
        assert any(
            whole[piece.where].shape == part.shape and np.array_equal(whole[piece.where], part)
            for whole in wholes
        )
    content[0].reshape(-1).view(np.uint8)[0] ^= 1
    with brought(content, index) as (cargo, _), pytest.raises(DecryptionError):
        lanes.check(index, 1, KEY, cargo)


@pytest.mark.parametrize("field", ["run", "segment", "worker"])
def test_parts_of_something_else_are_refused(program, field):
    lanes, index, lane = travelling(program)
    label = LABEL._replace(segment=index)
    label = label._replace(**{field: getattr(label, field) + 1})
    with brought(parts(lane, index), index, label) as (cargo, theirs):
        with pytest.raises(WireError, match=f"expected block 0 of worker 1 in segment {index}"):
            lanes.take(index, 1, KEY, cargo)
        cargo.discard()  # so that the reply is understood
        theirs.sendall(b"next")
        assert cargo._connection is not None and cargo._connection.recv(4) == b"next"


def test_parts_in_another_order_or_of_another_length_are_refused(program):
    lanes, index, lane = travelling(program)
    content = parts(lane, index)
    for wrong in (content[:-1], [*content, content[0]], [np.append(a, a) for a in content]):
        with brought(wrong, index) as (cargo, _), pytest.raises(WireError, match="bytes behind"):
            lanes.take(index, 1, KEY, cargo)
    size = blocks_bytes(content)
    shifted = [np.append(content[0], content[0][:1])]
    with brought(shifted, index, size=size) as (cargo, _):
        with pytest.raises(WireError, match="expected block 0"):
            lanes.take(index, 1, KEY, cargo)
    with pytest.raises(WireError, match="brings 8 bytes behind .*, expected 0"):
        with brought([], index, size=8) as (cargo, _):
            lanes.take(index, 0, KEY, cargo)  # which shares memory


def test_parts_that_are_cut_off_are_refused(program):
    lanes, index, lane = travelling(program)
    content = parts(lane, index)
    with brought([], index, size=blocks_bytes(content)) as (cargo, theirs):
        theirs.sendall(LABEL._replace(segment=index).header(0, content[0]) + bytes(5))
        theirs.close()
        with pytest.raises(WireError, match=f"cut off: {content[0].nbytes - 5} of"):
            lanes.take(index, 1, KEY, cargo)
        with pytest.raises(ConnectionError):
            cargo.discard()


def test_downloads_that_travel(program):
    lanes, _, lane = travelling(program)
    index = next(i for i, pieces in enumerate(lane.downloads) if pieces)
    rng = np.random.default_rng(1)
    crossings = program.segments[index].downloads
    wholes = [rng.normal(size=c.blinded.shape).astype(c.blinded.dtype) for c in crossings]
    for position, whole in enumerate(wholes):
        lanes.put(index, position, whole)
    outgoing = lanes.outgoing(index, 1)
    for piece, part, whole in zip(lane.downloads[index], outgoing, wholes, strict=True):
        assert part.flags.c_contiguous
        np.testing.assert_array_equal(part, whole[piece.where])
    assert lanes.outgoing(index, 0) == []


@pytest.mark.parametrize("process", [-1, 2, 0])
def test_who_is_not_awaited(program, process):
    lanes = Lanes(program, Shares(frozenset(), (1, 1)))
    lanes.join(0, arena(1 << 20))
    with pytest.raises(ArenaError, match=f"process {process} is not awaited"):
        lanes.join(process, arena(1 << 20))


def test_memory_that_is_too_small(program):
    shares = Shares(frozenset(), (1, 1))
    size = Lane(program, shares, 1).size
    lanes = Lanes(program, shares)
    with pytest.raises(ArenaError, match=f"expected at least {size}"):
        lanes.join(1, arena(size - 1))
    assert not lanes.complete


def test_a_process_without_devices(program):
    with pytest.raises(ArenaError, match="a device at least"):
        Lanes(program, Shares(frozenset(), (1, 0)))


def test_signs_of_life(monkeypatch):
    now = 100.0
    monkeypatch.setattr("enclave_runtime.sessions.lanes.time.monotonic", lambda: now)
    presence = Presence()
    presence.beat(BeatRequest("a", 0, run=2, segment=7))
    now = 103.0
    assert presence.beat(BeatRequest("a", 1, leaves=1)) == (
        {0: 3.0, 1: 0.0},
        {0: (2, 7), 1: (0, 0)},
        [1],
    )
    assert presence.beat(BeatRequest("b", 0)) == ({0: 0.0}, {0: (0, 0)}, [])
    for other in range(Presence.MOST_GROUPS):
        presence.beat(BeatRequest(f"other {other}", 0))
    assert presence.beat(BeatRequest("a", 0)) == ({0: 0.0}, {0: (0, 0)}, [])
