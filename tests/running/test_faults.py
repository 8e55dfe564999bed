"""What goes wrong while a step runs: every failure is an error, and the last state is kept."""

import errno
import gc
import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from enclave_runtime.crypto.encryption import session_keys
from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.execution.executor import Executables
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.protocol.tags import NOWHERE, Rules
from enclave_runtime.protocol.wire import Frame, Kind
from enclave_runtime.schemes import SignedPermutation, make_scheme
from enclave_runtime.sessions.admission import Admission, Origin, Tag
from enclave_runtime.sessions.run import Run
from enclave_runtime.sessions.session import Session
from enclave_runtime.sessions.store import Blinded
from enclave_runtime.verifying.integrity import private_copy
from tempo_jax.errors import (
    EnclaveDiedError,
    EnclaveError,
    SharedMemoryError,
)
from tests.support.boundary import mappings
from tests.support.chain import CHAIN, V, W, chain
from tests.support.faults import at_visit, fail, promptly, runs_ended
from tests.support.interpreter import plan
from tests.support.processes import is_running, nothing_left_behind
from tests.support.steps import MOMENTUM_BATCH, assert_close, shield_all
from tests.support.steps import momentum_after as plain_state
from tests.support.steps import momentum_state as initial_state
from tests.support.steps import momentum_step as train_step

X, Y = MOMENTUM_BATCH
VISITS = 4  # of one step


def held(enclave: tempo.Enclave) -> int:
    """How many handles are in use."""
    gc.collect()
    return enclave.statistics()["handles"]


# The enclave dies


@pytest.mark.parametrize("visit", [0, 1, 2])
def test_killed_enclave_ends_the_step(monkeypatch, visit):
    with nothing_left_behind(), tempo.Enclave.launch() as running:
        process = running.connection.process
        shielded = shield_all(chain, enclave=running, donate=False)
        shielded.traffic(X, W, V)  # compiles
        at_visit(monkeypatch, visit, lambda: os.kill(process.pid, signal.SIGKILL))
        with promptly(), pytest.raises(EnclaveDiedError, match="was killed by signal 9"):
            shielded(X, W, V)
        with promptly(), pytest.raises(EnclaveDiedError, match="launch a new one"):
            shielded(X, W, V)


def test_killed_enclave_ends_a_step_in_jit(monkeypatch):
    with nothing_left_behind(), tempo.Enclave.launch() as running:
        process = running.connection.process
        shielded = shield_all(chain, enclave=running, donate=False)
        step, sealed = jax.jit(shielded), running.seal((X, W, V))
        assert_close(step(*sealed), CHAIN)
        at_visit(monkeypatch, 1, lambda: os.kill(process.pid, signal.SIGKILL))
        with promptly(), pytest.raises(Exception, match="was killed by signal 9"):
            jax.block_until_ready(step(*sealed))


def test_closing_ends_the_step(monkeypatch):
    with nothing_left_behind():
        running = tempo.Enclave.launch()
        shielded = shield_all(chain, enclave=running, donate=False)
        shielded.traffic(X, W, V)
        at_visit(monkeypatch, 1, running.close)
        with promptly(), pytest.raises(EnclaveError):
            shielded(X, W, V)
        assert not is_running(running.connection.process.pid)


def test_enclave_ignores_the_terminals_interrupt(enclave):
    os.kill(enclave.connection.process.pid, signal.SIGINT)
    assert enclave.statistics()["process"] == enclave.connection.process.pid


# A visit fails


@pytest.mark.parametrize("visit", range(VISITS))
def test_failed_visit_keeps_the_state(enclave, train, state, monkeypatch, visit):
    handles = held(enclave)
    with monkeypatch.context() as patched:
        at_visit(patched, visit, fail)
        with promptly(), pytest.raises(OSError, match="planted"):
            train(state, X, Y)
    assert held(enclave) == handles
    assert runs_ended(enclave)
    state, _ = train(state, X, Y)
    assert_close(enclave.open(state), plain_state(2))


@pytest.mark.parametrize("kind", [Kind.BEGIN, Kind.SEGMENT, Kind.COMMIT])
def test_failed_request_keeps_the_state(enclave, train, state, monkeypatch, kind):
    connection = enclave.connection
    request = connection.request

    def failing(asked: Kind, *arguments: Any, **options: Any) -> Any:
        if asked is kind:
            raise EnclaveError("planted")
        return request(asked, *arguments, **options)

    handles = held(enclave)
    with monkeypatch.context() as patched:
        patched.setattr(connection, "request", failing)
        with promptly(), pytest.raises(EnclaveError, match="planted"):
            train(state, X, Y)
    assert held(enclave) == handles
    assert runs_ended(enclave)
    state, _ = train(state, X, Y)
    assert_close(enclave.open(state), plain_state(2))


def test_run_that_the_enclave_gave_up_keeps_the_state(enclave, train, state, monkeypatch):
    def give_up() -> None:
        (number,) = train._runtime(_program(train, state))._runs
        with pytest.raises(EnclaveError, match="segment 99 was asked for"):
            enclave.connection.request(Kind.SEGMENT, {"run": number, "segment": 99, "worker": 0})

    with monkeypatch.context() as patched:
        at_visit(patched, 2, give_up)
        with promptly(), pytest.raises(EnclaveError, match="no such run"):
            train(state, X, Y)
    state, _ = train(state, X, Y)
    assert_close(enclave.open(state), plain_state(2))


def _program(shielded: tempo.Shielded, state: Any) -> Any:
    return shielded._program(shielded._signature((state, X, Y), {}))


def mapped(enclave: tempo.Enclave) -> int:
    """How many pieces of shared memory the enclave has mapped."""
    return mappings(enclave.connection.process.pid).count("/dev/shm/tempo_jax-")


@pytest.mark.parametrize("what", [Kind.BEGIN, 0, 2, Kind.COMMIT], ids=str)
def test_failed_step_in_jit_keeps_the_state(enclave, train, state, monkeypatch, what):
    step, batch = jax.jit(train), enclave.seal((X, Y))
    request, before = enclave.connection.request, mapped(enclave)

    def failing(asked: Kind, *arguments: Any, **options: Any) -> Any:
        if asked is what:
            fail()
        return request(asked, *arguments, **options)

    for _ in range(3):
        with monkeypatch.context() as patched:
            if isinstance(what, Kind):
                patched.setattr(enclave.connection, "request", failing)
            else:
                at_visit(patched, what, fail)
            with promptly(20), pytest.raises(Exception, match="planted"):
                jax.block_until_ready(step(state, *batch))
    assert runs_ended(enclave), "the run was not aborted"
    gc.collect()
    assert mapped(enclave) <= before + 1, "shared memory of failed runs stays mapped"
    state, _ = step(state, *batch)
    assert_close(enclave.open(state), plain_state(2))


# Threads


def test_two_functions_from_two_threads(enclave, train):
    shielded = shield_all(chain, enclave=enclave, donate=False)

    def repeat_chain() -> None:
        for _ in range(10):
            assert_close(shielded(X, W, V), CHAIN)

    def repeat_steps() -> Any:
        state = enclave.seal(initial_state())
        for _ in range(5):
            state, _ = train(state, X, Y)
        return enclave.open(state)

    with ThreadPoolExecutor() as pool:
        futures: list[Future[Any]] = [
            pool.submit(run) for run in (repeat_chain, repeat_steps, repeat_steps, repeat_chain)
        ]
        results = [future.result(timeout=60) for future in futures]
    for result in results[1:3]:
        assert_close(result, plain_state(5))
    assert enclave.statistics()["runs"] == 0


# Values that are no numbers


def test_nans_pass_through(enclave, train):
    shielded = shield_all(chain, enclave=enclave, donate=False)
    for values in (jnp.nan, jnp.inf, -jnp.inf):
        x = X.at[2, 1].set(values)
        out = shielded(x, W, V)
        np.testing.assert_allclose(out, jnp.tanh(x @ W) @ V, rtol=1e-12, equal_nan=True)
    assert np.isnan(shielded(X.at[2, 1].set(jnp.nan), W, V)).any(axis=1).tolist() == [
        *(False, False, True, False, False, False)
    ]
    x = X.at[0, 0].set(jnp.nan)
    state, loss = train(enclave.seal(initial_state()), x, Y)
    expected, expected_loss = jax.jit(train_step)(initial_state(), x, Y)
    assert np.isnan(loss) and np.isnan(expected_loss)
    assert_close(enclave.open(state), expected)


# Shared memory


def test_too_little_shared_memory_is_said_before_anything_runs(enclave, train, state, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    program = train._runtime(_program(train, state))._program
    before = train.traffic(state, X, Y).round_trips
    with nothing_left_behind(), monkeypatch.context() as patched:
        patched.setattr(enclave.connection, "_arenas", [])
        patched.setattr(os, "posix_fallocate", full)
        match = rf"too small for this step: it needs {program.arena_bytes} bytes"
        with pytest.raises(SharedMemoryError, match=match) as caught:
            train(state, X, Y)
        assert "Enlarge it" in str(caught.value)
        # Provisioning needs shared memory as well, for closed-over arrays.
        late = tempo.shield(lambda x: tempo.reveal(x + X), enclave=enclave, donate=False)
        with pytest.raises(SharedMemoryError, match="too small"):
            late(X)
    assert train.traffic(state, X, Y).round_trips == before
    assert enclave.statistics()["runs"] == 0
    assert_close(late(X), 2 * X)
    state, _ = train(state, X, Y)
    assert_close(enclave.open(state), plain_state(2))


class Shared:
    """In place of shared memory: the host changes it whenever a scheme is about to use it."""

    def __init__(self, content: np.ndarray):
        self.content = private_copy(content)  # aligned, so that XLA would use it in place

    def view(self, array: ArrayType, _: int) -> np.ndarray:
        return self.content

    def change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Has the host write over it as soon as a value is to be unblinded."""
        unblind = SignedPermutation.unblind

        def raced(*arguments: Any, **named: Any) -> Any:
            self.content[...] = -1
            return unblind(*arguments, **named)

        monkeypatch.setattr(SignedPermutation, "unblind", raced)


NO_CLAIM = Admission().admit(Rules("", ()), "", ())


def unverified_run(memory: Any) -> Run:
    """A run of `chain` that checks nothing."""
    program = plan(chain, X, W, V, scheme=SignedPermutation()).plan.program
    scheme = make_scheme(program.scheme, program.parameters)
    return Run(program, scheme, {}, memory, 1, 1, KeySchedule(), Executables({}, ()), NO_CLAIM)


def test_memory_that_changes_while_a_product_is_read(monkeypatch):
    content = np.asarray(X @ W)
    memory = Shared(content)
    run = unverified_run(memory)
    crossing = run.program.segments[1].uploads[0]
    expected = np.array(run._receive(crossing, run._private(crossing)))
    memory.change(monkeypatch)
    received = run._receive(crossing, run._private(crossing))
    assert (memory.content == -1).all()
    np.testing.assert_array_equal(received, expected)


@pytest.mark.parametrize("layout", ["keyed", "clear"])
def test_memory_that_changes_while_a_leaf_is_read(monkeypatch, layout):
    session = Session(session_keys(bytes(32)), "00" * 16)
    content = np.asarray(X)
    memory = Shared(content)
    run = unverified_run(memory)
    (port,) = (p for p in run.program.inputs if p.array.shape == X.shape)
    index, keys = run.program.inputs.index(port), {}
    blinded = Layout.clear(2)
    if layout == "keyed":
        stream = KeySchedule().stream("test")
        keys = {0: SignedPermutation().draw(KeyClass(6), stream)}
        blinded = Layout((0, None), (1, 0))
        SignedPermutation().blind(content, blinded, keys, memory.content, lambda: stream)
    tag = Tag(NOWHERE, Origin.new(), 0)
    entry = Blinded(port.array, tag, SignedPermutation(), blinded, keys, {}, {})
    run.handles[index], run.awaiting = session._store.put(entry), {index}
    session._runs.admit(1, run)
    memory.change(monkeypatch)
    fields = {"run": 1, "offsets": {str(index): 0}, "blind_at": {}}
    session.handle(Frame(Kind.SETTLE, 1, fields))
    memory.content[...] = -2
    np.testing.assert_array_equal(run._values[port.value], X)
