"""A forked child touches nothing of its parent's enclave, and is told so; the parent goes on."""

import atexit
import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from enclave_runtime.protocol.wire import Kind
from tempo_jax.errors import ForkedError
from tempo_jax.transport.channel import Channel
from tempo_jax.transport.ownership import Owned
from tests.support.fresh import run_fresh
from tests.support.processes import is_running, wait_until

SENTENCE = r"belongs to process \d+, and this is process \d+, forked from it"


def forked(function: Callable[[], object]) -> int:
    """Starts a child that calls a function and exits as scripts do; returns its process id."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX and Python warn of forks with threads
        child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(SystemExit):
            function()
            status = 0
        # `sys.exit` would go up through the parent's frames; what it does at the end is this.
        atexit._run_exitfuncs()
        os._exit(status)
    return child


def succeeds(child: int) -> None:
    """Asserts that a child ends by itself and without an error."""
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def double(x):
    return tempo.reveal(x + x)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Asserts that what is inside is refused with the sentence."""
    with pytest.raises(ForkedError, match=SENTENCE):
        yield


def every_use_is_refused() -> None:
    enclave = tempo.Enclave.launch()
    sealed = enclave.seal(np.arange(3.0, dtype=np.float32))
    shielded = tempo.shield(double, enclave=enclave, donate=False)
    kept = tempo.shield(lambda x: x * 2, enclave=enclave, donate=False)(sealed)
    np.testing.assert_array_equal(shielded(sealed), [0, 2, 4])
    handles = enclave.statistics()["handles"]
    mine = [sealed, kept]

    def child() -> None:
        # What the child drops was its parent's.
        mine.clear()
        gc.collect()
        for use in (
            lambda: enclave.seal(np.ones(3)),
            lambda: enclave.open(sealed),
            lambda: enclave.open(kept),
            enclave.statistics,
            lambda: enclave.checkpoint(sealed),
            lambda: shielded(sealed),
            lambda: enclave.connection.reserve(1),
        ):
            with refused():
                use()
        with enclave:  # leaving it ends nothing
            pass
        enclave.connection._child.stop()

    for _ in range(2):
        succeeds(forked(child))
    assert enclave.statistics()["handles"] == handles
    np.testing.assert_array_equal(shielded(sealed), [0, 2, 4])
    np.testing.assert_array_equal(enclave.open(kept), [0, 2, 4])
    enclave.close()
    assert enclave.connection.process.returncode == 0  # ended in good order


def test_every_use_is_refused():
    run_fresh(every_use_is_refused, optimized=False)


def children_hold_nothing_open() -> None:
    enclave = tempo.Enclave.launch()
    process = enclave.connection.process.pid
    enclave.statistics()
    ends = {os.readlink(f"/proc/self/fd/{c.fileno()}") for c in enclave.connection._idle}
    ends |= {os.readlink(f"/proc/self/fd/{enclave.connection.process.stdin.fileno()}")}
    child = forked(lambda: time.sleep(60))

    def held() -> set[str]:
        found = set()
        for name in os.listdir(f"/proc/{child}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.add(os.readlink(f"/proc/{child}/fd/{name}"))
        return found

    assert len(ends) == 2
    assert wait_until(lambda: not ends & held())
    start = time.monotonic()
    enclave.close()
    # The enclave saw its pipe closed although the child lives: it did not have to be killed.
    assert enclave.connection.process.returncode == 0 and time.monotonic() - start < 4
    assert not is_running(process)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_children_hold_nothing_open():
    run_fresh(children_hold_nothing_open, optimized=False)


def requests_go_on_while_children_come_and_go() -> None:
    enclave = tempo.Enclave.launch()
    values = [np.full(64, i, np.float32) for i in range(2)]
    shielded = tempo.shield(double, enclave=enclave, donate=False)
    np.testing.assert_array_equal(shielded(enclave.seal(values[0])), 0)
    ended, failures = threading.Event(), []

    def work(value: np.ndarray) -> None:
        try:
            while not ended.is_set():
                np.testing.assert_array_equal(shielded(enclave.seal(value)), 2 * value)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(value,)) for value in values]
    for worker in workers:
        worker.start()

    def child() -> None:
        gc.collect()
        with refused():
            enclave.statistics()

    for _ in range(3):
        succeeds(forked(child))
    ended.set()
    for worker in workers:
        worker.join()
    assert not failures, failures
    enclave.close()


def test_requests_go_on_while_children_come_and_go():
    run_fresh(requests_go_on_while_children_come_and_go, optimized=False)


def test_a_channel_is_its_makers(monkeypatch):
    near, far = socket.socketpair()
    channel = Channel.__new__(Channel)
    channel._connection = near  # pyright: ignore[reportAttributeAccessIssue]
    channel.closed = False
    Owned.__init__(channel)
    child = os.getpid() + 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: child)
        with refused():
            channel.exchange(Kind.FREE, {})
        channel.close()  # leaves the parent's open
        near.sendall(b"open")
        assert far.recv(4) == b"open"
        channel.leave_to_parent()
    assert near.fileno() == -1
    far.close()


def test_the_parent_may_use_it(enclave):
    enclave.check_process()
    np.testing.assert_array_equal(enclave.open(enclave.seal(jnp.arange(3))), [0, 1, 2])
