"""Meshes that span processes: the results of one device, and sentences of our own."""

from __future__ import annotations

import threading
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import tempo_jax as tempo
from tempo_jax.enclave import processes as processes_module
from tempo_jax.errors import EnclaveError, RoleError, UnsupportedError
from tempo_jax.planning.cost import CostModel
from tempo_jax.running.call import Runtime
from tempo_jax.running.host_run import HostRun
from tempo_jax.schemes import Mixing, Orthogonal, SecretShares, SignedPermutation, Tempo
from tests.running.test_spanning_parts import equal_in_parts
from tests.support.cluster import cluster, run_processes, said
from tests.support.processes import nothing_left_behind
from tests.support.steps import assert_close, shield_all
from tests.support.workers import ADAMW, MLP, Attention, ConvNet, Task, make_task, mesh_of, train


def of_everyone() -> Any:
    return mesh_of(jax.device_count())


def assert_equal(enclave: tempo.Enclave, task: Task, **options: Any) -> Any:
    """Trains a task in every process and compares; returns the shielded step."""
    shielded = shield_all(task.step, enclave=enclave, mesh=of_everyone(), **options)
    state, losses = train(shielded, enclave.seal(task.state), task.batch)
    assert_close(losses, task.result[1])
    if not enclave.follows:
        assert_close(enclave.open(state), task.result[0])
    return shielded


def wide() -> Task:
    """Large enough to leave under every scheme, its optimizer one that magnifies no rounding."""
    return make_task(MLP(64, 64), (128, 64), tempo.cheap_update(optax.sgd(0.1, momentum=0.9)))


# Equal results


def equal_by_default() -> None:
    with tempo.Enclave.across_processes() as enclave:
        mlp = make_task(MLP(), (8, 6), ADAMW)
        shielded = assert_equal(enclave, mlp)
        report = shielded.explain(mlp.state, *mlp.batch)
        assert report.plan.sharded and report.resident
        traffic = shielded.traffic(mlp.state, *mlp.batch)
        # Each process carried its own devices' part alone.
        whole = 3 * (report.bytes_up + report.bytes_down)
        assert 0 < traffic.up + traffic.down < whole
        assert traffic.runs == 3
        if not enclave.follows:
            assert enclave.statistics()["runs"] == 0


def equal_over_tcp() -> None:
    """All parts of the second process travel."""
    with tempo.Enclave.across_processes(share_memory=False) as enclave:
        assert enclave.connection.carries == enclave.follows
        task = make_task(MLP(), (8, 6), ADAMW)
        for verify in (False, True):
            shielded = assert_equal(enclave, task, verify=verify)
            traffic = shielded.traffic(task.state, *task.batch)
            assert traffic.runs == 3
            if enclave.follows:
                assert traffic.up < traffic.sent and traffic.down < traffic.received
                assert all(rate > 0 for rate in traffic.rates)
            else:
                assert traffic.sent == traffic.received == 0
        # Weights that are updated inside are sent ahead, however small: a process of its own.
        CostModel.may_go_ahead = lambda self, aval, scheme: True
        task = make_task(MLP(), (8, 6), optax.adam(1e-2))
        shielded = assert_equal(enclave, task)
        assert shielded.explain(task.state, *task.batch).plan.program.ahead
        if not enclave.follows:
            assert enclave.statistics()["runs"] == 0


def equal_models_over_tcp() -> None:
    with tempo.Enclave.across_processes(share_memory=False) as enclave:
        for verify in (False, True):
            assert_equal(enclave, make_task(ConvNet(), (8, 4, 4, 2), ADAMW), verify=verify)
            assert_equal(enclave, make_task(Attention(), (8, 3, 6), ADAMW), verify=verify)


def equal_where_nothing_divides() -> None:
    with tempo.Enclave.across_processes() as enclave:
        shielded = assert_equal(enclave, make_task(MLP(7), (7, 6), ADAMW))
        task = make_task(MLP(7), (7, 6), ADAMW)
        assert not shielded.explain(task.state, *task.batch).plan.sharded


def equal_models() -> None:
    with tempo.Enclave.across_processes() as enclave:
        assert_equal(enclave, make_task(ConvNet(), (8, 4, 4, 2), ADAMW))
        assert_equal(enclave, make_task(Attention(), (8, 3, 6), ADAMW))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (4, 1), (2, 2)])
def test_processes_equal_one_device(processes, devices):
    run_processes(equal_models, equal_where_nothing_divides, processes=processes, devices=devices)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_processes_that_share_no_memory(processes, devices):
    run_processes(equal_models_over_tcp, processes=processes, devices=devices)


def equal_schemes() -> None:
    task = wide()
    with tempo.Enclave.across_processes() as enclave:
        for scheme in (Mixing(), Orthogonal(), SignedPermutation(), Tempo()):
            # With four processes only what has most to do, for each start takes its seconds.
            for verify in (False, True)[jax.process_count() > 2 :]:
                assert_equal(enclave, task, scheme=scheme, verify=verify)


# One cluster a test: what costs most is to start it.
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_scheme(processes):
    run_processes(equal_schemes, processes=processes)


def equal_pools() -> None:
    with tempo.Enclave.across_processes() as enclave:
        task = wide()
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("pools",))
        shielded = shield_all(task.step, enclave=enclave, mesh=mesh, scheme=SecretShares())
        _, losses = train(shielded, enclave.seal(task.state), task.batch)
        # Fixed point rounds, so it is not exact.
        np.testing.assert_allclose(losses, task.result[1], rtol=1e-4)


@pytest.mark.slow
def test_processes_that_are_pools():
    run_processes(equal_pools, processes=3)


# Sentences of our own


def refused() -> None:
    mesh = of_everyone()
    with tempo.Enclave.launch() as own, pytest.raises(UnsupportedError, match="one process's own"):
        tempo.shield(lambda x: x, enclave=own, mesh=mesh)
    enclave = tempo.Enclave.across_processes()
    for other in (None, mesh_of(1)):
        with pytest.raises(UnsupportedError, match="2 processes share this enclave"):
            tempo.shield(lambda x: x, enclave=enclave, mesh=other)
    task = make_task(MLP(), (8, 6), ADAMW)
    shielded = shield_all(task.step, enclave=enclave, mesh=mesh)
    state = enclave.seal(task.state)
    rows = NamedSharding(mesh, PartitionSpec("workers"))
    x = np.asarray(task.batch[0])
    parts = jax.make_array_from_callback(x.shape, rows, lambda index: x[index])
    for call in (lambda: enclave.seal(parts), lambda: shielded(state, parts, task.batch[1])):
        with pytest.raises(UnsupportedError, match="spread over the devices of several processes"):
            call()
    with pytest.raises(UnsupportedError, match="inside jit, scan"):
        jax.jit(shielded)(state, *enclave.seal(task.batch))
    if enclave.follows:
        assert enclave.open(state) is state and enclave.checkpoint(state) == b""
        with pytest.raises(RoleError, match="is the first process's, and this is process 1"):
            enclave.use_checkpoint_key(tempo.CheckpointKey.generate())
    # A process that calls something else ends the run for all, and the next one is as ever.
    count = 8 + 2 * jax.process_index()
    with pytest.raises(EnclaveError) as caught:
        shielded(state, *(np.resize(a, (count, a.shape[1])) for a in task.batch))
    if enclave.follows:
        assert "calls another program than process 0" in str(caught.value)
    assert_equal(enclave, task)
    # What fails where a run begins fails everywhere.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HostRun, "begin", failing)
        with pytest.raises(EnclaveError if enclave.follows else OSError, match="planted"):
            shielded(enclave.seal(task.state), *task.batch)
    assert_equal(enclave, task)
    enclave.close()


def failing(*_: Any) -> Any:
    raise OSError("planted")


@pytest.mark.slow
def test_what_processes_are_refused():
    run_processes(refused)


def stuck() -> None:
    processes_module.WORKER_SECONDS = 2.0
    task = make_task(MLP(), (8, 6), ADAMW)
    enclave = tempo.Enclave.across_processes()
    shielded = shield_all(task.step, enclave=enclave, mesh=of_everyone())
    state, _ = shielded(enclave.seal(task.state), *task.batch)
    with pytest.MonkeyPatch.context() as patched:
        if enclave.follows:
            patched.setattr(Runtime, "_bring", lambda *_: threading.Event().wait())
        expected = (
            "has ended" if enclave.follows else r"process 1 did not come to segment \d+ within"
        )
        with pytest.raises(EnclaveError, match=expected):
            shielded(state, *task.batch)
    print("named")


@pytest.mark.slow
def test_a_stuck_worker_is_named():
    with nothing_left_behind(), cluster([stuck], 2) as started:
        for process, output in started:
            # JAX would wait for minutes for what is stuck, so they end by themselves.
            assert process.wait(120), said(output)
            assert "named" in said(output)


# Checkpoints


def resumed() -> None:
    enclave = tempo.Enclave.across_processes()
    key = tempo.CheckpointKey.generate()
    task = make_task(MLP(), (8, 6), ADAMW)
    shielded = shield_all(task.step, enclave=enclave, mesh=of_everyone())
    data, losses = b"", []
    if not enclave.follows:
        enclave.use_checkpoint_key(key)
    state = enclave.seal(task.state)
    for _ in range(3):
        state, loss = shielded(state, *task.batch)
        losses.append(loss)
        if not enclave.follows:
            data = enclave.checkpoint(state)
        state = enclave.restore(data, like=task.state)
    assert_close(losses, task.result[1])
    if not enclave.follows:
        assert_close(enclave.open(enclave.copy(state)), task.result[0])
    else:
        enclave.copy(state)
    enclave.close()


def test_two_processes_equal_one_device():
    with nothing_left_behind():
        run_processes(equal_by_default, resumed, equal_in_parts)


def test_two_processes_over_tcp():
    with nothing_left_behind():
        run_processes(equal_over_tcp)


@pytest.mark.parametrize("silence", [0.0, 1.0])
def test_an_error_waits_for_the_process_behind_it(silence, monkeypatch):
    """One process ends a run for all at once, before the silence of the lost one is long."""
    for name in ("_BEAT_SECONDS", "LOOK_SECONDS"):
        monkeypatch.setattr(processes_module, name, 0.1)
    group = processes_module.Processes(patience=30.0)
    group._silence = silence
    lost, told = EnclaveError("no sign of life"), EnclaveError("the run has failed")
    found = threading.Timer(1.0, group._fail, [lost])
    found.start()
    assert group.explain(told) is (lost if silence else told)
    found.cancel()
