"""Wrong products are counted, each once, and end what verifies when there are too many.

Each lie has a small chance to pass, so a host must not get to try as often as it likes.
"""

import collections
import concurrent.futures
import dataclasses
import threading
import types
from typing import Any

import numpy as np
import pytest

from enclave_runtime.crypto.encryption import authenticate, session_keys
from enclave_runtime.execution.executor import Executables
from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.protocol.requests import RequestError
from enclave_runtime.protocol.tags import Rules
from enclave_runtime.protocol.wire import Frame, Kind
from enclave_runtime.schemes import make_scheme
from enclave_runtime.sessions.admission import Admission
from enclave_runtime.sessions.run import Run, RunError
from enclave_runtime.sessions.session import Session
from enclave_runtime.verifying import checksum, integrity
from enclave_runtime.verifying.integrity import Verifier, WrongProductError
from tests.support.verification import SCHEDULE, V, W, X, chain, planned


class Zeros:
    """In place of shared memory."""

    def view(self, array: ArrayType, _: int) -> np.ndarray:
        return np.zeros(array.shape, array.dtype)


def opened(session: Session, workers: int = 1) -> tuple[int, Run]:
    """A run that verifies and awaits the products of `chain`'s first segment."""
    program = planned(chain, X, W, V).program
    scheme = make_scheme(program.scheme, program.parameters)
    memory: Any = Zeros()
    claim = Admission().admit(Rules("", ("",) * len(program.outputs)), "", ())
    run = Run(program, scheme, {}, memory, workers, 1, SCHEDULE, Executables({}, ()), claim)
    run._next, run._tensors = 1, collections.defaultdict(lambda: None)
    number = next(session._run_numbers)
    session._runs.admit(number, run)
    return number, run


def bring(session: Session, number: int, worker: int = 0) -> Any:
    """Asks for the segment after the first product."""
    return session.handle(Frame(Kind.SEGMENT, 1, {"run": number, "segment": 1, "worker": worker}))


def abort(session: Session, number: int) -> Any:
    return session.handle(Frame(Kind.ABORT, 2, {"run": number}))


@pytest.fixture
def session() -> Session:
    """A session without a process or a port."""
    return Session(session_keys(bytes(32)), "00" * 16)


def test_too_many_lies_end_what_verifies(session):
    refused = "256 wrong products .* launch a new enclave"
    number, run = opened(session)
    session._attempts.wrong = integrity.MAX_WRONG_PRODUCTS - 1
    session._attempts.refuse_after_lies()
    session._attempts.wrong += 1
    for request in (
        lambda: session._attempts.refuse_after_lies(),
        lambda: opened(session),
        lambda: session.handle(Frame(Kind.COMMIT, 1, {"run": number, "donate": []})),
        lambda: bring(session, number),
    ):
        with pytest.raises(WrongProductError, match=refused):
            request()
    # What was refused is not a wrong product, and the run has ended.
    assert session._attempts.wrong == integrity.MAX_WRONG_PRODUCTS and not len(session._runs)
    unverified = dataclasses.replace(run.program, verify=False)
    run.program = unverified
    session._runs.admit(number, run)


def test_open_runs_are_no_more_than_lies_that_are_left(session):
    # Else a host could try in a thousand runs at once before any of them has been counted.
    session._attempts.wrong = integrity.MAX_WRONG_PRODUCTS - 3
    numbers = [opened(session)[0] for _ in range(3)]
    with pytest.raises(RequestError, match="3 runs that verify are open and 253 wrong products"):
        opened(session)
    abort(session, numbers[0])
    opened(session)
    with pytest.raises(RequestError, match="commit or abort a run first"):
        opened(session)


def test_a_lie_counts_once_for_all_workers(session, monkeypatch):
    def wrong(*_: Any) -> np.ndarray:
        raise WrongProductError("wrong")

    monkeypatch.setattr(Verifier, "checked", wrong)
    number, _ = opened(session, workers=2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for request in [pool.submit(bring, session, number, worker) for worker in range(2)]:
            with pytest.raises(WrongProductError, match="wrong"):
                request.result(30)
    assert session._attempts.wrong == 1 and not len(session._runs)


def test_an_abort_does_not_hide_a_lie(session, monkeypatch):
    checking, aborting = threading.Event(), threading.Event()

    def wrong(*_: Any) -> np.ndarray:
        checking.set()
        assert aborting.wait(30)
        raise WrongProductError("wrong")

    def fail(run: Run, failure: BaseException) -> bool:
        aborting.set()
        return ended(run, failure)

    ended = Run.fail
    monkeypatch.setattr(Verifier, "checked", wrong)
    monkeypatch.setattr(Run, "fail", fail)
    number, _ = opened(session)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        lie = pool.submit(bring, session, number)
        assert checking.wait(30)
        pool.submit(abort, session, number).result(30)
        with pytest.raises(WrongProductError, match="wrong"):
            lie.result(30)
    assert session._attempts.wrong == 1 and not len(session._runs)


def test_other_bytes_at_a_repeat_are_not_compared_and_end_the_run(session, monkeypatch):
    # A comparison would be one more try, of bytes that can do no good.
    def compared(*_: Any) -> np.ndarray:
        raise WrongProductError("compared")

    number, run = opened(session)
    run._next, run._brought = 2, [authenticate(run._repeat_key, np.ones((18, 20)))]
    monkeypatch.setattr(Verifier, "checked", compared)
    with pytest.raises(RunError, match="asked for again with other bytes"):
        run.segment(1, 0)
    with pytest.raises(RunError, match="failed or was aborted"):
        run.segment(1, 0)  # the run itself refuses, before the session forgets it
    abort(session, number)
    assert session._attempts.wrong == 0 and not len(session._runs)


def leaf_with_a_checksum() -> Any:
    """In place of a stored leaf, for what is asked of it before it is unblinded."""
    return types.SimpleNamespace(checksum={}, source="here")


def test_leaves_that_come_back_are_no_more_tries_than_are_left(session, monkeypatch):
    # Else a host could bring a thousand wrong leaves at once before any of them has been counted.
    entry, content = leaf_with_a_checksum(), np.zeros(0)
    comparing, going_on, tries = threading.Event(), threading.Event(), []

    def wrong(*_: Any) -> None:
        tries.append(1)
        comparing.set()
        assert going_on.wait(30)
        raise WrongProductError("wrong leaf")

    monkeypatch.setattr(checksum, "check_leaf", wrong)
    session._attempts.wrong = integrity.MAX_WRONG_PRODUCTS - 2
    number, _ = opened(session)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(session._values.unblinded, entry, content)
        assert comparing.wait(30)
        for request in (lambda: session._values.unblinded(entry, content), lambda: opened(session)):
            with pytest.raises(RequestError, match="1 leaves are being compared, together at most"):
                request()
        going_on.set()
        with pytest.raises(WrongProductError, match="wrong leaf"):
            first.result(30)
    assert len(tries) == 1 and session._attempts.wrong == integrity.MAX_WRONG_PRODUCTS - 1
    with pytest.raises(RequestError, match="commit or abort a run first"):
        session._values.unblinded(entry, content)
    abort(session, number)
    with pytest.raises(WrongProductError, match="wrong leaf"):
        session._values.unblinded(entry, content)
    with pytest.raises(WrongProductError, match="256 wrong products"):
        session._values.unblinded(entry, content)
    assert len(tries) == 2


def test_a_leaf_that_is_right_is_no_try(session, monkeypatch):
    entry = leaf_with_a_checksum()
    monkeypatch.setattr(checksum, "check_leaf", lambda *_: None)
    session._attempts.wrong = integrity.MAX_WRONG_PRODUCTS - 1
    for _ in range(3):
        with pytest.raises(AttributeError):  # only after the comparison: there is no scheme
            session._values.unblinded(entry, np.zeros(0))
    assert session._attempts.wrong == integrity.MAX_WRONG_PRODUCTS - 1
    opened(session)


def test_a_wrong_leaf_ends_the_run_that_it_was_brought_for(session):
    number, run = opened(session)
    run.awaiting = {0}
    with pytest.raises(RequestError, match="does not lie on the devices"):
        session.handle(Frame(Kind.SETTLE, 1, {"run": number, "offsets": {"0": 0}, "blind_at": {}}))
    assert not len(session._runs)
    with pytest.raises(RunError, match="has failed"):
        run.segment(1, 0)
