"""What tests of failures share: something happens at a visit to the enclave, or soon enough."""

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import tempo_jax as tempo
from tempo_jax.running.call import Runtime
from tests.support.processes import wait_until


def at_visit(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], Any]) -> None:
    """Does something before one of the visits that follow, counted from 0."""
    visit, count = Runtime._bring, itertools.count()

    def intercepted(*arguments: Any) -> Any:
        if next(count) == number:
            action()
        return visit(*arguments)

    monkeypatch.setattr(Runtime, "_bring", intercepted)


def fail() -> None:
    raise OSError("planted")


@contextlib.contextmanager
def promptly(seconds: float = 5.0) -> Iterator[None]:
    """Asserts that what is inside ends soon."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def interrupt() -> None:
    """What Ctrl-C does to this process."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def runs_ended(enclave: tempo.Enclave) -> bool:
    """Whether no run is open soon: nobody waits for a segment that is at work to end."""
    return wait_until(lambda: enclave.statistics()["runs"] == 0)
