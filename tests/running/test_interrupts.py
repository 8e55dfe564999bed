"""Ctrl-C, a stopped enclave and a missing worker: the host is never held for long."""

import signal
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import tempo_jax as tempo
from tempo_jax.errors import EnclaveTimeoutError
from tempo_jax.transport import loopback
from tests.support.faults import at_visit, fail, interrupt, promptly, runs_ended
from tests.support.processes import is_stopped, wait_until
from tests.support.steps import (
    MOMENTUM_BATCH,
    assert_close,
    momentum_state,
    momentum_step,
    shield_all,
    uniform,
)
from tests.support.steps import momentum_after as plain_state

X, Y = MOMENTUM_BATCH


@pytest.mark.parametrize("visit", [0, 2])
def test_interrupted_step_keeps_the_state(enclave, train, state, monkeypatch, visit):
    def interrupt_and_wait() -> None:
        interrupt()
        time.sleep(0.3)

    with monkeypatch.context() as patched:
        at_visit(patched, visit, interrupt_and_wait)
        with promptly(), pytest.raises(KeyboardInterrupt):
            train(state, X, Y)
    assert runs_ended(enclave)
    state, _ = train(state, X, Y)
    assert_close(enclave.open(state), plain_state(2))


def test_second_interrupt_returns_and_harms_no_later_run(enclave, train, state, monkeypatch):
    # The program runs out later; its shared memory is not another run's by then.
    ended = threading.Event()

    def interrupt_twice() -> None:
        for _ in range(2):
            interrupt()
            time.sleep(0.2)
        time.sleep(1.0)
        ended.set()

    with monkeypatch.context() as patched:
        at_visit(patched, 1, interrupt_twice)
        with promptly(1.0), pytest.raises(KeyboardInterrupt):
            train(state, X, Y)
    assert not ended.is_set()
    for count in (2, 3):
        state, _ = train(state, X, Y)
        assert_close(enclave.open(state), plain_state(count))
    assert ended.wait(5)
    state, _ = train(state, X, Y)
    assert_close(enclave.open(state), plain_state(4))


def test_no_result_is_kept_of_programs_that_have_ended(enclave):
    double = tempo.shield(lambda x: tempo.reveal(2 * x), enclave=enclave, donate=False)
    for _ in range(3):
        assert_close(double(X), 2 * X)
    deadline = time.monotonic() + 5
    while enclave._running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not enclave._running


SLOW = 3000  # products of 160×160, in a loop that runs inside: some seconds


def slow(x: jax.Array) -> jax.Array:
    """A long segment, which the enclave does not leave halfway."""
    return lax.fori_loop(0, SLOW, lambda _, y: jnp.tanh(y @ x), x)


def test_interrupt_does_not_wait_for_the_segment(enclave):
    x = uniform(9, 160, 160)
    shielded = tempo.shield(slow, enclave=enclave, placement="enclave", donate=False)
    shielded.explain(x)
    timer = threading.Timer(1.5, interrupt)  # planned and compiled by then, or nearly so
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        start = time.monotonic()
        while True:
            shielded(x)
    assert time.monotonic() - start < 1.5 + 1.0


def test_stopped_enclave_holds_nobody(monkeypatch):
    monkeypatch.setattr(loopback, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(loopback, "ANSWER_SECONDS", 0.5)
    with tempo.Enclave.launch() as enclave:
        double = tempo.shield(lambda x: 2 * x, enclave=enclave, donate=False)
        kept = double(X)
        process = enclave.connection.process
        process.send_signal(signal.SIGSTOP)
        try:
            assert wait_until(lambda: is_stopped(process.pid))
            with promptly(4), pytest.raises(EnclaveTimeoutError, match=r"continue it \(SIGCONT\)"):
                double(X)
            monkeypatch.setattr(loopback, "PATIENCE_SECONDS", 60.0)
            threading.Timer(0.3, interrupt).start()
            with promptly(2), pytest.raises(KeyboardInterrupt):
                double(X)
        finally:
            process.send_signal(signal.SIGCONT)
        assert runs_ended(enclave)  # those too that it has begun only now
        # Slow is not dead: what it held is still there.
        assert_close(enclave.open(kept), 2 * X)
        assert_close(enclave.open(double(X)), 2 * X)


def test_stopped_enclave_hears_of_an_abort_later(monkeypatch):
    with tempo.Enclave.launch() as enclave:
        train = shield_all(momentum_step, enclave=enclave, donate=False)
        state = enclave.seal(momentum_state())
        train(state, X, Y)
        process = enclave.connection.process

        def stop_and_fail() -> None:
            process.send_signal(signal.SIGSTOP)
            assert wait_until(lambda: is_stopped(process.pid))
            fail()

        try:
            with monkeypatch.context() as patched:
                at_visit(patched, 1, stop_and_fail)
                with promptly(), pytest.raises(OSError, match="planted"):
                    train(state, X, Y)
        finally:
            process.send_signal(signal.SIGCONT)
        assert runs_ended(enclave)
        assert_close(enclave.open(train(state, X, Y)[0]), plain_state(1))


def test_original_errors_come_out_of_jit(enclave, train, state, monkeypatch):
    x, y = enclave.seal((X, Y))
    step = jax.jit(lambda state: train(state, x, y)[0])
    for planted, expected in ((fail, OSError), (interrupt_here, KeyboardInterrupt)):
        with monkeypatch.context() as patched:
            at_visit(patched, 1, planted)
            with pytest.raises(expected), tempo.errors.original_errors():
                jax.block_until_ready(step(state))
        with monkeypatch.context() as patched:
            at_visit(patched, 1, planted)
            with pytest.raises(jax.errors.JaxRuntimeError):  # without it
                jax.block_until_ready(step(state))
    with tempo.errors.original_errors():
        state = step(state)
    assert_close(enclave.open(state), plain_state(2))


def interrupt_here() -> None:
    raise KeyboardInterrupt
