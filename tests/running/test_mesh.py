"""Several workers: the same results as one device, work really split, and no hang."""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import optax
import pytest
from jax.extend.core import primitives as prims

import tempo_jax as tempo
from enclave_runtime.protocol.memory import sharded_axis
from enclave_runtime.protocol.program import KeyClass, Layout
from tempo_jax.errors import EnclaveDiedError
from tempo_jax.jaxprs import equations as equations_module
from tempo_jax.jaxprs import primitives
from tempo_jax.jaxprs import types as jaxpr_types
from tempo_jax.planning.mesh import choose_sharded, local_shape
from tempo_jax.running.call import Runtime
from tempo_jax.running.host_run import HostRun
from tests.support.faults import interrupt, runs_ended
from tests.support.steps import assert_close, shield_all
from tests.support.workers import (
    ADAMW,
    MLP,
    STEPS,
    Attention,
    ConvNet,
    Task,
    make_task,
    mesh_of,
    train,
)


@pytest.fixture(scope="module")
def mlp() -> Task:
    return make_task(MLP(), (8, 6), ADAMW)


@pytest.fixture(scope="module")
def convnet() -> Task:
    return make_task(ConvNet(), (8, 4, 4, 2), ADAMW)


@pytest.fixture(scope="module")
def attention() -> Task:
    return make_task(Attention(), (8, 3, 6), ADAMW)


# Equal results


def assert_equals_one_device(enclave: tempo.Enclave, shielded: tempo.Shielded, task: Task) -> None:
    state, losses = train(shielded, enclave.seal(task.state), task.batch)
    assert_close((enclave.open(state), losses), task.result)


def host_equations(
    enclave: tempo.Enclave, shielded: tempo.Shielded, task: Task
) -> list[jaxpr_types.JaxprEqn]:
    """The equations of the program that the workers run, at any depth."""
    arguments = enclave.seal((task.state, *task.batch))
    return list(equations_module.equations(jax.make_jaxpr(shielded)(*arguments).jaxpr))


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("model", ["mlp", "convnet", "attention"])
def test_workers_equal_one_device(enclave, request, model, workers):
    task = request.getfixturevalue(model)
    shielded = shield_all(task.step, enclave=enclave, mesh=mesh_of(workers))
    report = shielded.explain(task.state, *task.batch)
    sharded = report.plan.sharded
    assert sharded and report.resident
    assert f"{workers} workers; classes split over them: k{min(sharded)}" in str(report)
    equations = host_equations(enclave, shielded, task)
    # Gradients sum over the batch, which is split, so the parts are added up.
    assert any(e.primitive is prims.psum_p for e in equations)
    # Every product has a part of the work.
    whole = {
        tuple(v.aval.shape for v in (*e.invars, *e.outvars))
        for e in report.plan.jaxpr.eqns
        if e.primitive in (prims.dot_general_p, primitives.conv_p)
    }
    products = [e for e in equations if e.primitive in (prims.dot_general_p, primitives.conv_p)]
    assert products
    for eqn in products:
        assert tuple(v.aval.shape for v in (*eqn.invars, *eqn.outvars)) not in whole
    assert_equals_one_device(enclave, shielded, task)


def test_traffic_is_that_of_one_device(enclave, mlp):
    # Each worker brings its part, so together they move each tensor once.
    shielded = shield_all(mlp.step, enclave=enclave, mesh=mesh_of(2))
    report = shielded.explain(mlp.state, *mlp.batch)
    shielded(enclave.seal(mlp.state), *mlp.batch)
    traffic = shielded.traffic(mlp.state, *mlp.batch)
    assert (traffic.up, traffic.down) == (report.bytes_up, report.bytes_down)
    assert (traffic.round_trips, traffic.runs) == (report.round_trips, 1)


def test_mesh_of_one_worker(enclave, mlp):
    shielded = shield_all(mlp.step, enclave=enclave, mesh=mesh_of(1))
    assert not shielded.explain(mlp.state, *mlp.batch).plan.sharded
    assert_equals_one_device(enclave, shielded, mlp)


def test_batch_that_does_not_divide(enclave):
    task = make_task(MLP(), (7, 6), ADAMW)
    shielded = shield_all(task.step, enclave=enclave, mesh=mesh_of(4))
    report = shielded.explain(task.state, *task.batch)
    assert not report.plan.sharded and "classes split over them: none" in str(report)
    assert_equals_one_device(enclave, shielded, task)


def test_workers_divide_only_some_classes(enclave):
    # Nothing is resident, so features could be split too; of 7 rows, 6, 8 and 5 features only the
    # 8 hidden ones divide by 4: local in the first layer, contracted in the second.
    task = make_task(MLP(), (7, 6), optax.adamw(1e-2))
    shielded = shield_all(task.step, enclave=enclave, mesh=mesh_of(4))
    report = shielded.explain(task.state, *task.batch)
    classes = report.plan.program.classes
    assert report.plan.sharded and not report.resident
    assert {classes[c].size for c in report.plan.sharded} == {8}
    assert {c.size for c in classes} == {5, 6, 7, 8}
    equations = host_equations(enclave, shielded, task)
    assert any(e.primitive is prims.psum_p for e in equations)
    assert_equals_one_device(enclave, shielded, task)


def test_steps_in_jit_and_scan(enclave, mlp):
    shielded = shield_all(mlp.step, enclave=enclave, mesh=mesh_of(2))
    batch = enclave.seal(mlp.batch)
    state, first = shielded(enclave.seal(mlp.state), *batch)

    state, losses = rest_of(shielded)(state, batch)
    assert_close((enclave.open(state), [first, *losses]), mlp.result)


def rest_of(shielded: tempo.Shielded) -> Callable[..., Any]:
    """All steps but the first inside a user's own `jit` and `scan`."""
    return jax.jit(
        lambda state, batch: jax.lax.scan(
            lambda s, _: shielded(s, *batch), state, None, length=STEPS - 1
        )
    )


def test_commit_waits_for_a_late_worker(enclave, mlp, monkeypatch):
    # A commit that overtook it ended the run below its feet, and XLA then ended the process.
    shielded = shield_all(mlp.step, enclave=enclave, mesh=mesh_of(2))
    batch = enclave.seal(mlp.batch)
    state, first = shielded(enclave.seal(mlp.state), *batch)
    fetch, commit = Runtime._fetch, HostRun.commit
    fetched: list[int] = []
    last = shielded.explain(state, *batch).round_trips - 1

    def late(self: Any, run: Any, worker: int, index: int) -> Any:
        if worker == 1:
            time.sleep(0.1)
        downloads = fetch(self, run, worker, index)
        fetched.extend([worker] * (index == last))
        return downloads

    def committing(self: Any, donated: Any) -> Any:
        assert sorted(fetched) == [0, 1], "the other worker has yet to fetch"
        fetched.clear()
        return commit(self, donated)

    monkeypatch.setattr(Runtime, "_fetch", late)
    monkeypatch.setattr(HostRun, "commit", committing)
    state, losses = rest_of(shielded)(state, batch)
    assert_close((enclave.open(state), [first, *losses]), mlp.result)


def test_state_moves_between_meshes(enclave, mlp):
    steps = [
        shield_all(mlp.step, enclave=enclave, mesh=mesh) for mesh in (mesh_of(2), None, mesh_of(4))
    ]
    state, losses = enclave.seal(mlp.state), []
    for step in steps:
        state, loss = step(state, *mlp.batch)
        losses.append(loss)
    assert_close((enclave.open(state), losses), mlp.result)


# Failures


@contextlib.contextmanager
def watched(enclave: tempo.Enclave, seconds: float = 20.0) -> Iterator[None]:
    """Kills the enclave if what is inside hangs, so that the test fails instead."""
    hung = threading.Event()

    def kill() -> None:
        hung.set()
        enclave.connection.process.kill()

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    assert not hung.is_set(), "the workers waited for one that had failed"


@pytest.fixture(scope="module")
def launched() -> Iterator[list[tuple[tempo.Enclave, Any]]]:
    """What `fragile` has launched; the last may live."""
    made: list[tuple[tempo.Enclave, Any]] = []
    yield made
    for running, _ in made:
        running.close()


def lost(enclave: tempo.Enclave) -> bool:
    """Whether an enclave answers no more."""
    try:
        enclave.statistics()
    except EnclaveDiedError:
        return True
    return False


@pytest.fixture
def fragile(mlp, launched) -> tuple[tempo.Enclave, Any]:
    """An enclave that a test may lose, and the step of an MLP on four workers.

    Tests come in any order, so whoever finds it lost gets another.
    """
    if not launched or lost(launched[-1][0]):
        running = tempo.Enclave.launch()
        shielded = shield_all(mlp.step, enclave=running, mesh=mesh_of(4))
        launched.append((running, shielded))
        shielded.traffic(running.seal(mlp.state), *mlp.batch)
    return launched[-1]


@pytest.mark.parametrize(("worker", "segment"), [(0, 0), (1, 0), (3, 2)])
def test_failing_worker_ends_all(fragile, mlp, monkeypatch, worker, segment):
    enclave, shielded = fragile
    visit = Runtime._bring

    def failing(self: Any, run: Any, number: int, index: int, uploads: Any) -> Any:
        if (number, index) == (worker, segment):
            raise OSError("planted")
        return visit(self, run, number, index, uploads)

    state = enclave.seal(mlp.state)
    with watched(enclave):
        with monkeypatch.context() as patched:
            patched.setattr(Runtime, "_bring", failing)
            with pytest.raises(OSError, match="planted"):
                shielded(state, *mlp.batch)
        assert runs_ended(enclave)
        state, losses = train(shielded, state, mlp.batch)
    assert_close((enclave.open(state), losses), mlp.result)


@pytest.mark.parametrize(
    ("owner", "name", "worker"),
    [
        (Runtime, "_bring", 0),
        (Runtime, "_bring", 1),
        (Runtime, "_fetch", 0),
        (Runtime, "_fetch", 1),
        (HostRun, "begin", None),
        (HostRun, "commit", None),
    ],
)
def test_failure_inside_jit_ends_all(enclave, mlp, monkeypatch, owner, name, worker):
    # A worker that raised alone would leave the others in a collective, until XLA gives up.
    shielded = shield_all(mlp.step, enclave=enclave, mesh=mesh_of(2))
    batch = enclave.seal(mlp.batch)
    state, first = shielded(enclave.seal(mlp.state), *batch)
    rest, original = rest_of(shielded), getattr(owner, name)

    def failing(self: Any, *arguments: Any) -> Any:
        if worker is None or arguments[1] == worker:
            raise OSError("planted")
        return original(self, *arguments)

    with watched(enclave):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, failing)
            with pytest.raises(OSError, match="planted"), tempo.errors.original_errors():
                jax.block_until_ready(rest(state, batch))
        assert runs_ended(enclave)
        state, losses = rest(state, batch)
    assert_close((enclave.open(state), [first, *losses]), mlp.result)


def test_two_threads_share_the_workers(fragile, mlp):
    enclave, shielded = fragile

    def run() -> Any:
        state, losses = train(shielded, enclave.seal(mlp.state), mlp.batch)
        return enclave.open(state), losses

    with watched(enclave, 40), ThreadPoolExecutor() as pool:
        for future in [pool.submit(run) for _ in range(4)]:
            assert_close(future.result(), mlp.result)


def test_interrupt_ends_all_workers(fragile, mlp, monkeypatch):
    enclave, shielded = fragile
    visit, count = Runtime._bring, itertools.count()

    def interrupting(*arguments: Any) -> Any:
        if next(count) == 5:
            interrupt()
        return visit(*arguments)

    state = enclave.seal(mlp.state)
    with watched(enclave):
        with monkeypatch.context() as patched:
            patched.setattr(Runtime, "_bring", interrupting)
            with pytest.raises(KeyboardInterrupt):
                shielded(state, *mlp.batch)
                threading.Event().wait(1)  # the signal may come when the step has just ended
        assert runs_ended(enclave)


def test_killed_enclave_ends_all_workers(fragile, mlp, monkeypatch):
    # The last test with this enclave.
    enclave, shielded = fragile
    visit, count = Runtime._bring, itertools.count()

    def killing(*arguments: Any) -> Any:
        if next(count) == 5:
            os.kill(enclave.connection.process.pid, signal.SIGKILL)
        return visit(*arguments)

    monkeypatch.setattr(Runtime, "_bring", killing)
    with watched(enclave):
        with pytest.raises(EnclaveDiedError, match="was killed by signal 9"):
            shielded(enclave.seal(mlp.state), *mlp.batch)


# The choice of classes


CLASSES = (KeyClass(8), KeyClass(6), KeyClass(4), KeyClass(3), KeyClass(9, decoys=1))


def layout(*classes: int | None) -> Layout:
    return Layout(classes, (1,) * len(classes))


@pytest.mark.parametrize(
    ("values", "fixed", "workers", "chosen"),
    [
        ([(layout(0, 1), 100)], [], 1, set()),
        ([(layout(0, 1), 100)], [], 2, {0}),
        ([(layout(0, 1), 100)], [], 3, {1}),
        ([(layout(0, 1), 100)], [], 5, set()),
        # What divides more bytes comes first, and no value is split twice.
        ([(layout(0, 2), 10), (layout(2, 3), 5)], [], 4, {2}),
        ([(layout(0, 1), 10), (layout(2, 3), 5)], [], 2, {0, 2}),
        # Every worker holds resident leaves whole.
        ([(layout(0, 1), 10), (layout(1, 2), 50)], [layout(1, 2)], 2, {0}),
        # Both axes of a Gram matrix share a class, and only one axis of a value can be split.
        ([(layout(0, 0), 10)], [], 2, set()),
        ([(layout(0, 1), 10), (layout(0, 0), 1)], [], 2, {1}),
        ([(layout(None, 2), 10)], [], 4, {2}),
        # What is split is the axis together with its decoys.
        ([(layout(4, 1), 10)], [], 5, {4}),
        ([(layout(4, 1), 10)], [], 3, {1}),
        ([], [], 4, set()),
    ],
)
def test_choice_of_classes(values, fixed, workers, chosen):
    assert choose_sharded(CLASSES, values, fixed, workers) == chosen


def test_local_shapes():
    sharded = frozenset({2})
    assert sharded_axis(layout(0, 2), sharded) == 1
    assert sharded_axis(layout(0, None), sharded) is None
    assert local_shape((8, 4), layout(0, 2), sharded, 4) == (8, 1)
    assert local_shape((8, 4), layout(0, 1), sharded, 4) == (8, 4)
    assert local_shape((), layout(), sharded, 4) == ()
