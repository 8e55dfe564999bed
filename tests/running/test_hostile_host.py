"""A host that does not keep to the protocol gets an error, and the enclave goes on."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from enclave_runtime.protocol.memory import Arena, Lane, Shares, input_bytes
from enclave_runtime.protocol.program import ArrayType, Program
from enclave_runtime.protocol.wire import Frame, Kind, Label, blocks_bytes
from tempo_jax.errors import (
    EnclaveError,
    SealedValueError,
    TempoError,
)
from tempo_jax.running.host_run import HostRun
from tempo_jax.sealing.array import handle_text
from tempo_jax.transport.loopback import Shipment
from tests.support.chain import CHAIN, V, W, chain
from tests.support.faults import promptly
from tests.support.steps import MOMENTUM_BATCH, assert_close, shield_all
from tests.support.steps import momentum_state as initial_state

X, Y = MOMENTUM_BATCH


class Provisioned(NamedTuple):
    """A provisioned program and shared memory with its inputs, for requests made by hand."""

    enclave: tempo.Enclave
    program: Program
    number: int
    name: str
    arena: Arena
    inputs: Sequence[tempo.SealedArray]
    runs: list[int]

    def request(self, kind: Kind, **fields: Any) -> Any:
        """Asks the enclave."""
        return self.enclave.connection.request(kind, fields)

    def begin(self, **changes: Any) -> int:
        """Begins a run and returns its number."""
        offsets, offset = [], 0
        for port, sealed in zip(self.program.inputs, self.inputs, strict=True):
            content = np.asarray(sealed.content)
            np.copyto(self.arena.view(ArrayType(content.shape, "uint8"), offset), content)
            offsets.append(offset)
            offset += input_bytes(port.array)
        fields = {
            "program": self.number,
            "arena": self.name,
            "workers": 1,
            "inputs": [{"offset": o} for o in offsets],
            "blind_at": offsets,
        }
        self.runs.append(self.request(Kind.BEGIN, **{**fields, **changes})["run"])
        return self.runs[-1]

    def segment(self, run: Any, index: Any, worker: Any = 0) -> list[np.ndarray]:
        """Asks for a segment and returns its downloads."""
        self.request(Kind.SEGMENT, run=run, segment=index, worker=worker)
        crossings = self.program.segments[index].downloads
        return [self.arena.view(c.array, c.offset).copy() for c in crossings]

    def upload(self, index: int, values: Sequence[np.ndarray]) -> None:
        """Writes a segment's uploads."""
        for crossing, value in zip(self.program.segments[index].uploads, values, strict=True):
            np.copyto(self.arena.view(crossing.array, crossing.offset), value)


@pytest.fixture
def provisioned(enclave) -> Iterator[Provisioned]:
    """`chain`, provisioned once for the session."""
    shielded = _provisioned_chain(enclave)
    arguments = enclave.seal((X, W, V))
    runtime = shielded._runtime(shielded._program(shielded._signature(arguments, {})))
    with enclave.arena(runtime._program.arena_bytes) as (name, arena):
        host = Provisioned(
            enclave, runtime._program, runtime._served.number, name, arena, arguments, []
        )
        yield host
        for run in host.runs:
            host.request(Kind.ABORT, run=run)


_chains: dict[int, Any] = {}


def _provisioned_chain(enclave: tempo.Enclave) -> Any:
    if id(enclave) not in _chains:
        _chains[id(enclave)] = shield_all(chain, enclave=enclave, donate=False)
    return _chains[id(enclave)]


def run_by_hand(host: Provisioned, run: int) -> np.ndarray:
    """Carries a run of `chain` through and returns what it reveals."""
    operands = {a.shape: a for a in host.segment(run, 0)}
    host.upload(1, [operands[X.shape] @ operands[W.shape]])
    (hidden,) = host.segment(run, 1)
    host.upload(2, [hidden @ operands[V.shape]])
    (out,) = host.segment(run, 2)
    return out


def refused(host: Provisioned, text: str | None, kind: Kind, **fields: Any) -> None:
    """Asserts that a request is refused, with this text."""
    with promptly(), pytest.raises(TempoError, match=text):
        host.request(kind, **fields)


def test_run_by_hand(provisioned):
    run = provisioned.begin()
    out = run_by_hand(provisioned, run)
    np.testing.assert_allclose(out, CHAIN, rtol=1e-12)
    committed = provisioned.request(Kind.COMMIT, run=run, donate=[])
    assert committed.keys() == {"handles", "busy_seconds"} and committed["handles"] == []
    assert committed["busy_seconds"] > 0
    refused(provisioned, "no such run", Kind.COMMIT, run=run, donate=[])


@pytest.mark.parametrize("index", [1, 2, 3, -2, 10**30])
def test_segment_out_of_order_ends_the_run(provisioned, index):
    run = provisioned.begin()
    fields = {"run": run, "segment": index, "worker": 0}
    refused(
        provisioned, f"segment {index} was asked for, segment 0 is next", Kind.SEGMENT, **fields
    )
    refused(provisioned, "no such run", Kind.SEGMENT, run=run, segment=0, worker=0)
    refused(provisioned, "no such run", Kind.COMMIT, run=run, donate=[])


def test_segment_before_the_first_is_not_repeated(provisioned):
    fields = {"run": provisioned.begin(), "segment": -1, "worker": 0}
    refused(provisioned, "segment -1 was asked for, segment 0 is next", Kind.SEGMENT, **fields)
    refused(provisioned, "no such run", Kind.COMMIT, run=fields["run"], donate=[])


def test_segment_after_the_last_is_refused(provisioned):
    run = provisioned.begin()
    run_by_hand(provisioned, run)
    fields = {"run": run, "segment": 3, "worker": 0}
    refused(provisioned, "segment 3 was asked for after the last", Kind.SEGMENT, **fields)


@pytest.mark.parametrize("number", [0.0, 0.5, False, "0", None, [0]], ids=repr)
@pytest.mark.parametrize("name", ["segment", "worker"])
def test_segments_and_workers_are_whole_numbers(provisioned, name, number):
    # A fraction would be one more worker, and end the wait for the others.
    run = provisioned.begin()
    fields = {"run": run, "segment": 0, "worker": 0, name: number}
    refused(provisioned, f"`{name}` is not a whole number", Kind.SEGMENT, **fields)
    np.testing.assert_allclose(run_by_hand(provisioned, run), CHAIN, rtol=1e-12)


def test_skipped_and_earlier_segments_are_refused(provisioned):
    for index in (0, 3):
        run = provisioned.begin()
        provisioned.segment(run, 0)
        provisioned.upload(1, [np.ones((6, 4))])
        provisioned.segment(run, 1)
        match = f"segment {index} was asked for, segment 2 is next"
        refused(provisioned, match, Kind.SEGMENT, run=run, segment=index, worker=0)


@pytest.mark.parametrize("worker", [1, -1, 10**30])
def test_unknown_worker_is_refused(provisioned, worker):
    fields = {"run": provisioned.begin(), "segment": 0, "worker": worker}
    refused(provisioned, f"worker {worker} of a run with 1", Kind.SEGMENT, **fields)


@pytest.mark.parametrize("number", [10**6, -1, None, "0", True, [0], 0.0], ids=repr)
def test_unknown_program_is_refused(provisioned, number):
    text = "no such program" if type(number) is int else "`program` is not a whole number"
    with pytest.raises(EnclaveError, match=text):
        provisioned.begin(program=number)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"workers": 0}, "`workers` is not between 1 and 4096"),
        ({"workers": 4097}, "`workers` is not between 1 and 4096"),
        ({"workers": True}, "`workers` is not between 1 and 4096"),
        ({"inputs": []}, "takes 3 inputs"),
        ({"blind_at": [0]}, "takes 3 inputs"),
        ({"inputs": [{"offset": 0}] * 2, "blind_at": [0] * 2}, "takes 3 inputs"),
        ({"arena": "tempo_jax-" + "0" * 32}, "no such shared memory"),
        ({"inputs": [{"handle": "00" * 16}] * 3}, "not in this enclave"),
        ({"inputs": [{"offset": 1}] * 3}, "failed its authentication"),
        ({"inputs": [{"offset": -64}] * 3}, "outside the shared memory"),
        ({"inputs": [{"offset": 1 << 40}] * 3}, "outside the shared memory"),
        ({"inputs": [{"offset": "0"}] * 3}, "`inputs` is not a whole number"),
        ({"inputs": [{}] * 3}, "malformed BEGIN"),
        ({"inputs": [None] * 3}, "malformed BEGIN"),
        ({"inputs": None}, "malformed BEGIN"),
    ],
    ids=repr,
)
def test_malformed_begin_is_refused(provisioned, changes, text):
    with promptly(), pytest.raises(TempoError, match=text):
        provisioned.begin(**changes)


def test_handle_of_another_type_is_refused(enclave, provisioned):
    other = tempo.shield(lambda x: x, enclave=enclave)(jnp.ones(3))
    handle = handle_text(other.handle)
    with pytest.raises(EnclaveError, match=r"input 0 is float64\[3\], expected float64\[6, 5\]"):
        provisioned.begin(inputs=[{"handle": handle}] * 3)


def test_repeated_segment_is_answered_again_or_refused(provisioned):
    run = provisioned.begin()
    first = provisioned.segment(run, 0)
    for _ in range(2):
        again = provisioned.segment(run, 0)
        assert [a.tobytes() for a in again] == [a.tobytes() for a in first]
    product = np.ones((6, 4))
    provisioned.upload(1, [product])
    hidden = provisioned.segment(run, 1)
    for crossing in provisioned.program.segments[1].downloads:
        provisioned.arena.view(crossing.array, crossing.offset)[...] = 0
    again = provisioned.segment(run, 1)
    assert [a.tobytes() for a in again] == [a.tobytes() for a in hidden]
    product[0, 3] = np.nextafter(1, 2)
    provisioned.upload(1, [product])
    fields = {"run": run, "segment": 1, "worker": 0}
    refused(provisioned, "segment 1 was asked for again with other bytes", Kind.SEGMENT, **fields)
    refused(provisioned, "no such run", Kind.SEGMENT, run=run, segment=2, worker=0)


def test_commit_too_early_is_refused(provisioned):
    handles = provisioned.enclave.statistics()["handles"]
    run = provisioned.begin()
    refused(provisioned, "commit after 0 of 3 segments", Kind.COMMIT, run=run, donate=[])
    provisioned.segment(run, 0)
    refused(provisioned, "commit after 1 of 3 segments", Kind.COMMIT, run=run, donate=[])
    assert provisioned.enclave.statistics()["handles"] == handles
    provisioned.request(Kind.ABORT, run=run)
    refused(provisioned, "no such run", Kind.COMMIT, run=run, donate=[])


@pytest.mark.parametrize("donate", [[2], [-3], ["0"], [None], 3, None], ids=repr)
def test_malformed_commit_commits_nothing(enclave, provisioned, donate):
    shielded = tempo.shield(lambda x: x + 1, enclave=enclave)
    kept = shielded(X)
    runtime = shielded._runtime(shielded._program(shielded._signature((kept,), {})))
    handles = enclave.statistics()["handles"]
    run = HostRun(runtime._served)
    run.begin([kept])
    provisioned.request(Kind.SEGMENT, run=run.number, segment=0, worker=0)
    refused(provisioned, None, Kind.COMMIT, run=run.number, donate=donate)
    run.abort(EnclaveError("the test is over"))
    assert enclave.statistics()["handles"] == handles
    assert_close(enclave.open(kept), X + 1)


def test_worker_that_comes_twice_ends_the_run_for_all(provisioned):
    run = provisioned.begin(workers=2)
    fields = {"run": run, "segment": 0, "worker": 0}
    with promptly(), ThreadPoolExecutor() as pool:
        futures = [pool.submit(provisioned.request, Kind.SEGMENT, **fields) for _ in range(2)]
        for future in futures:
            with pytest.raises(EnclaveError, match="asked for|failed or was aborted|no such run"):
                future.result()


def test_aborted_run_wakes_its_workers(provisioned):
    run = provisioned.begin(workers=3)
    with promptly(), ThreadPoolExecutor() as pool:
        waiting = [
            pool.submit(provisioned.request, Kind.SEGMENT, run=run, segment=0, worker=worker)
            for worker in (0, 2)
        ]
        time.sleep(0.2)
        assert not any(future.done() for future in waiting)
        provisioned.request(Kind.ABORT, run=run)
        for future in waiting:
            with pytest.raises(EnclaveError, match="failed or was aborted|no such run"):
                future.result()


def test_run_whose_number_was_not_heard_is_aborted_by_its_name(provisioned):
    run = provisioned.begin(name="heard of")
    provisioned.request(Kind.ABORT, name="another")
    provisioned.segment(run, 0)
    provisioned.request(Kind.ABORT, name="heard of")
    refused(provisioned, "no such run", Kind.SEGMENT, run=run, segment=1, worker=0)


def test_run_that_was_given_up_does_not_begin(provisioned):
    open_runs = provisioned.enclave.statistics()["runs"]
    provisioned.request(Kind.ABORT, name="given up")
    with pytest.raises(EnclaveError, match="aborted the run before it began"):
        provisioned.begin(name="given up")
    assert provisioned.enclave.statistics()["runs"] == open_runs
    provisioned.segment(provisioned.begin(name="not given up"), 0)


def test_input_on_the_devices_is_taken_over_once(enclave, train, state):
    # Under new keys the enclave blinds it again; asking twice with other bytes would map one key
    # to the other, element by element.
    runtime = train._runtime(train._program(train._signature((state, X, Y), {})))
    program, request = runtime._program, enclave.connection.request
    other, _ = train(enclave.seal(initial_state()), X, Y)
    mixed = ({**state[0], "first": other[0]["first"]}, state[1])
    inputs = [*jax.tree.leaves(mixed, is_leaf=lambda x: isinstance(x, tempo.SealedArray))]
    with enclave.arena(program.arena_bytes) as (name, arena):
        given, offsets, offset = [], [], 0
        for port, sealed in zip(program.inputs, [*inputs, *enclave.seal((X, Y))], strict=True):
            offsets.append(offset)
            given.append({"offset": offset})
            if sealed.form == "encrypted":
                content = np.asarray(sealed.content)
                np.copyto(arena.view(ArrayType(content.shape, "uint8"), offset), content)
            else:
                given[-1] = {"handle": handle_text(sealed.handle)}
            offset += input_bytes(port.array)
        fields = {"program": runtime._served.number, "arena": name, "workers": 1}
        reply = request(Kind.BEGIN, {**fields, "inputs": given, "blind_at": offsets})
        assert reply["upload"]
        index, run = reply["upload"][0], reply["run"]
        where = {str(index): offsets[index]}
        view = arena.view(program.inputs[index].array, offsets[index])
        settle = {"run": run, "offsets": where, "blind_at": where}
        np.copyto(view, np.asarray(inputs[index].content))
        request(Kind.SETTLE, settle)
        view[...] = np.arange(view.size).reshape(view.shape)
        try:
            with pytest.raises(EnclaveError):
                request(Kind.SETTLE, settle)
        finally:
            request(Kind.ABORT, {"run": run})


@pytest.mark.parametrize("kind", [Kind.REPLY, Kind.ERROR, Kind.HELLO, Kind.PROOF])
def test_frame_that_is_no_request_is_refused(provisioned, kind):
    refused(provisioned, f"kind {kind.name} is not a request", kind)


MALFORMED = [
    *((kind, {}) for kind in Kind if Kind.MAP <= kind <= Kind.FREE and kind is not Kind.COMPILE),
    (Kind.MAP, {"name": "../../etc/passwd", "size": 64}),
    (Kind.MAP, {"name": "tempo_jax-" + "0" * 32, "size": 64}),
    (Kind.MAP, {"name": "tempo_jax-" + "0" * 32, "size": -1}),
    (Kind.MAP, {"name": "tempo_jax-" + "0" * 32, "size": True}),
    (Kind.MAP, {"name": ["tempo_jax"], "size": 64}),
    (Kind.COMPILE, {}),
    (Kind.SEGMENT, {"run": [], "segment": 0, "worker": 0}),
    (Kind.SEGMENT, {"run": 10**9, "segment": 0, "worker": 0}),
    (Kind.COMMIT, {"run": None, "donate": []}),
    (Kind.SETTLE, {"run": 10**9, "offsets": {}, "blind_at": {}}),
    (Kind.OPEN, {"handle": "00" * 16, "arena": "", "offset": 0}),
    (Kind.OPEN, {"handle": [], "arena": "", "offset": 0}),
    (Kind.FREE, {"handles": 3}),
]


@pytest.mark.parametrize(("kind", "fields"), MALFORMED, ids=repr)
def test_malformed_request_is_refused_and_the_enclave_goes_on(provisioned, kind, fields):
    with promptly(), pytest.raises(TempoError) as caught:
        provisioned.request(kind, **fields)
    assert "Traceback" not in str(caught.value)
    assert provisioned.request(Kind.STATISTICS)["process"]


def test_foreign_ciphertext_is_no_program(enclave):
    sealed = np.asarray(enclave.seal(X).content).tobytes()
    compiled = enclave.encrypt(b"{}", "compile")
    for kind, attachment in (
        (Kind.COMPILE, sealed),
        (Kind.PROVISION, sealed),
        (Kind.PROVISION, compiled),
        (Kind.COMPILE, enclave.encrypt(b"", "provision")),
        (Kind.COMPILE, b""),
    ):
        with pytest.raises(SealedValueError, match="failed its authentication"):
            enclave.connection.request(kind, {}, attachment)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"scheme": "signed_permutation"}']
)
def test_malformed_program_is_refused(enclave, content):
    attachment = enclave.encrypt(content, "provision")
    with pytest.raises(EnclaveError):
        enclave.connection.request(Kind.PROVISION, {"arena": "", "offsets": []}, attachment)


# A worker that shares no memory


ALONE = Shares(frozenset(), (1,))


def travel(
    host: Provisioned, label: Label, up: Sequence[np.ndarray], carried: int | None = None
) -> list[np.ndarray]:
    """Asks for a segment whose parts travel, and returns its downloads."""
    pieces = Lane(host.program, ALONE, 0).downloads[label.segment]
    down = [np.empty(piece.array.shape, piece.array.dtype) for piece in pieces]
    shipment = Shipment(label, up, down)
    fields = label._asdict() | {"carried": shipment.up_bytes if carried is None else carried}
    host.enclave.connection.request(Kind.SEGMENT, fields, shipment=shipment)
    return down


def begin_apart(host: Provisioned) -> Label:
    run = host.begin(devices=[1])
    host.request(Kind.JOIN, run=run, worker=0)
    return Label(run, 0, 0)


def test_run_whose_parts_travel(provisioned):
    label = begin_apart(provisioned)
    operands = {a.shape: a for a in travel(provisioned, label, [])}
    product = operands[X.shape] @ operands[W.shape]
    for _ in range(2):  # the same bytes again
        (hidden,) = travel(provisioned, label._replace(segment=1), [product])
    product = hidden @ operands[V.shape]
    (out,) = travel(provisioned, label._replace(segment=2), [product])
    np.testing.assert_allclose(out, CHAIN, rtol=1e-12)
    assert provisioned.request(Kind.COMMIT, run=label.run, donate=[])["handles"] == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda product: [np.append(product, 0.0)], "bytes behind its request for segment 1"),
        (lambda product: [product[:-1]], "bytes behind its request for segment 1"),
        (lambda product: [product, product], "bytes behind its request for segment 1"),
        (lambda product: [], "brings 0 bytes behind its request for segment 1"),
        (lambda product: [product[0], product[1:]], "bytes behind its request for segment 1"),
    ],
)
def test_parts_of_another_length_end_the_run(provisioned, change, text):
    label = begin_apart(provisioned)
    operands = {a.shape: a for a in travel(provisioned, label, [])}
    product = operands[X.shape] @ operands[W.shape]
    with promptly(), pytest.raises(EnclaveError, match=text):
        travel(provisioned, label._replace(segment=1), change(product))
    refused(provisioned, "no such run", Kind.COMMIT, run=label.run, donate=[])


@pytest.mark.parametrize("field", ["run", "segment", "worker"])
def test_parts_of_something_else_end_the_run(provisioned, field):
    label = begin_apart(provisioned)
    operands = {a.shape: a for a in travel(provisioned, label, [])}
    product = operands[X.shape] @ operands[W.shape]
    wrong = label._replace(segment=1)
    other = wrong._replace(**{field: getattr(wrong, field) + 1})
    shipment = Shipment(other, [product], [])
    fields = wrong._asdict() | {"carried": shipment.up_bytes}
    with promptly(), pytest.raises(EnclaveError, match="expected block 0 of worker 0 in segment 1"):
        provisioned.enclave.connection.request(Kind.SEGMENT, fields, shipment=shipment)
    refused(provisioned, "no such run", Kind.COMMIT, run=label.run, donate=[])


def test_parts_for_no_run_are_read_and_refused(provisioned):
    for label in (Label(1 << 40, 0, 0), Label(provisioned.begin(), 0, 0)):
        expected = "no such run|share their memory, and bytes follow"
        with promptly(), pytest.raises(EnclaveError, match=expected):
            travel(provisioned, label, [np.zeros(1 << 20)])
    assert provisioned.enclave.statistics()["handles"] >= 0  # the same connection serves on


def test_parts_that_are_cut_off_end_the_run(provisioned):
    label = begin_apart(provisioned)
    operands = {a.shape: a for a in travel(provisioned, label, [])}
    product = operands[X.shape] @ operands[W.shape]
    lines, wanted = provisioned.enclave.connection, label._replace(segment=1)
    carried = blocks_bytes([product])
    frame = Frame(Kind.SEGMENT, 1, {**wanted._asdict(), "carried": carried})
    with lines._connect(None) as connection:
        connection.sendall(frame.encode() + wanted.header(0, product) + product.tobytes()[:-1])
    with promptly():
        while provisioned.enclave.statistics()["runs"]:
            time.sleep(0.02)
    refused(provisioned, "no such run", Kind.COMMIT, run=label.run, donate=[])
