"""Workers of several processes that keep parts of what lies on the devices."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils

import tempo_jax as tempo
from tempo_jax.enclave import parts as parts_module
from tempo_jax.enclave import processes as processes_module
from tempo_jax.enclave import values as values_module
from tempo_jax.errors import EnclaveError, SealedValueError
from tempo_jax.running.host_run import HostRun
from tempo_jax.schemes import Orthogonal, SignedPermutation, Tempo
from tests.running.test_shard_weights import compiled, on_devices
from tests.support.cluster import cluster, run_processes, said
from tests.support.processes import nothing_left_behind
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

MOMENTUM = tempo.cheap_update(optax.sgd(1e-2, momentum=0.9))


def mlp(optimizer: Any = ADAMW) -> Task:
    return make_task(MLP(16, 8), (8, 8), optimizer)


def shield(step: Callable[..., Any], enclave: tempo.Enclave, **options: Any) -> Any:
    options = {"scheme": SignedPermutation(), "shard_weights": True, **options}
    return shield_all(step, enclave=enclave, mesh=mesh_of(jax.device_count()), **options)


def assert_result(enclave: tempo.Enclave, task: Task, state: Any, losses: Any) -> None:
    assert_close(losses, task.result[1])
    opened = enclave.open(state)
    if enclave.follows:
        assert opened is state
    else:
        assert_close(opened, task.result[0])


def predicting(task: Task) -> Any:
    """The loss of a state, which stays as it is."""
    return lambda state, x, y: task.step(state, x, y)[1]


# Equal results, and really less memory


def equal_in_parts() -> None:
    task = mlp()
    with tempo.Enclave.across_processes() as enclave:
        shielded = shield(task.step, enclave)
        report = shielded.explain(task.state, *task.batch)
        kept, whole = report.resident_bytes
        assert report.resident and kept * jax.device_count() == whole
        state, losses = train(shielded, enclave.seal(task.state), task.batch)
        for x in on_devices(state):
            here = sum(s.data.nbytes for s in x.addressable_shards)
            assert here * jax.process_count() == x.nbytes
        text = compiled(shielded)
        gathers, scatters = (
            len(re.findall(rf" {n}(?:-start)?\(", text)) for n in ("all-gather", "reduce-scatter")
        )
        assert gathers >= 2 and scatters >= 2
        assert_result(enclave, task, state, losses)


def opened_copied_and_predicted() -> None:
    task = mlp()
    with tempo.Enclave.across_processes() as enclave:
        shielded = shield(task.step, enclave)
        state, first = shielded(enclave.seal(task.state), *task.batch)
        after = task.result[1][1]
        # Functions of other signatures take the state, where it is or inside.
        for options in (
            {},
            {"shard_weights": False},
            {"shard_weights": False, "placement": "enclave"},
        ):
            predict = shield(predicting(task), enclave, **options)
            assert_close(predict(state, *task.batch), after)
        copied = enclave.copy(state)
        inside = shield(
            lambda x: x, enclave, shard_weights=False, placement="enclave", donate=False
        )
        brought, opened = inside(state), enclave.open(state)
        if not enclave.follows:
            with pytest.raises(SealedValueError, match="each process has only a part"):
                tempo.save_sealed(os.devnull, state)
            with tempfile.NamedTemporaryFile() as file:
                tempo.save_sealed(file.name, brought)
                whole = enclave.open(tempo.load_sealed(file.name, like=brought))
            assert_close(whole, opened)
        # A whole state becomes one in parts and the other way round.
        losses = [first]
        for sharded in (False, True):
            state, loss = shield(task.step, enclave, shard_weights=sharded)(state, *task.batch)
            losses.append(loss)
        assert_result(enclave, task, state, losses)
        again, last = train(shielded, copied, task.batch)
        assert_close(last[: STEPS - 1], losses[1:])


def equal_models() -> None:
    """Also where all that a process of several devices carries travels."""
    with tempo.Enclave.across_processes(share_memory=jax.local_device_count() == 1) as enclave:
        # Of the last, the workers divide neither the rows nor every leaf.
        tasks = [make_task(Attention(), (8, 3, 8), ADAMW), make_task(MLP(12, 5), (7, 8), ADAMW)]
        if jax.device_count() == 2:  # more have no part of it
            tasks.append(make_task(ConvNet(), (8, 4, 4, 2), ADAMW))
        for task in tasks:
            shielded = shield(task.step, enclave)
            assert shielded.explain(task.state, *task.batch).plan.parts
            assert_result(enclave, task, *train(shielded, enclave.seal(task.state), task.batch))


def equal_schemes() -> None:
    task = mlp(MOMENTUM)
    with tempo.Enclave.across_processes() as enclave, pytest.MonkeyPatch.context() as patched:
        settled = counted(patched)
        for scheme in (Tempo(), Orthogonal(budget=2)):
            for verify in (False, True):
                shielded = shield(task.step, enclave, scheme=scheme, verify=verify)
                assert shielded.explain(task.state, *task.batch).plan.parts
                assert_result(enclave, task, *train(shielded, enclave.seal(task.state), task.batch))
        # Keys that may serve no more steps, for which the enclave gets the whole leaves.
        assert bool(settled) != enclave.follows


def counted(patched: pytest.MonkeyPatch) -> list[int]:
    """The leaves that the enclave asks for where a run begins."""
    asked: list[int] = []
    original = HostRun._settle

    def settle(self: HostRun, contents: Any, positions: Any, offsets: Any) -> Any:
        asked.extend(positions)
        return original(self, contents, positions, offsets)

    patched.setattr(HostRun, "_settle", settle)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (2, 2), (4, 1)])
def test_parts_equal_one_device(processes, devices):
    run_processes(
        equal_in_parts,
        equal_models,
        equal_schemes,
        opened_copied_and_predicted,
        processes=processes,
        devices=devices,
    )


# Checkpoints, onto other numbers of processes

FOLDER = "TEMPO_JAX_TEST_FOLDER"


def saved() -> None:
    task, folder = mlp(), Path(os.environ[FOLDER])
    with tempo.Enclave.across_processes() as enclave:
        key = tempo.CheckpointKey.generate()
        if not enclave.follows:
            (folder / "key").write_bytes(key.to_bytes())
            enclave.use_checkpoint_key(key)
        state, _ = shield(task.step, enclave)(enclave.seal(task.state), *task.batch)
        assert on_devices(state)
        data = enclave.checkpoint(state)
        assert bool(data) != enclave.follows
        if data:
            (folder / "step-1").write_bytes(data)


def resumed() -> None:
    task, folder = mlp(), Path(os.environ[FOLDER])
    with tempo.Enclave.across_processes() as enclave:
        enclave_key = tempo.CheckpointKey.from_bytes((folder / "key").read_bytes())
        if not enclave.follows:
            enclave.use_checkpoint_key(enclave_key)
        data = b"" if enclave.follows else (folder / "step-1").read_bytes()
        state = enclave.restore(data, like=task.state)
        losses = task.result[1][:1]
        shielded = shield(task.step, enclave)
        for _ in range(STEPS - 1):
            state, loss = shielded(state, *task.batch)
            losses.append(loss)
        assert_result(enclave, task, state, losses)


@pytest.mark.slow
def test_a_checkpoint_is_restored_by_fewer_processes(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    run_processes(saved, processes=4)
    run_processes(resumed, processes=2)


# Processes that do not do the same


def refused() -> None:
    task = mlp()
    enclave = tempo.Enclave.across_processes()
    shielded = shield(task.step, enclave)
    state, first = shielded(enclave.seal(task.state), *task.batch)
    leads, strays = not enclave.follows, jax.process_index() == 1
    # One goes on where the others open.
    whose = "process 0 calls `enclave.open`" if strays else "process 1 calls a shielded function"
    with pytest.raises(EnclaveError, match=f"{whose}.*leave out the `if"):
        shielded(state, *task.batch) if strays else enclave.open(state)
    # The first goes on, and the others open.
    why = "aborted" if leads else "process 0 calls a shielded function"
    with pytest.raises(EnclaveError, match=why):
        shielded(state, *task.batch) if leads else enclave.open(state)
    # One opens something else.
    with pytest.raises(EnclaveError, match="`enclave.open` with other arguments"):
        enclave.open(state[0] if strays else state)
    # An error on the first process leaves nobody waiting for it.
    with pytest.MonkeyPatch.context() as patched:
        if leads:
            patched.setattr(values_module, "_opened", failing)
            with pytest.raises(OSError, match="planted"):
                enclave.open(state)
        else:
            assert enclave.open(state) is state
    losses = [first]
    for _ in range(STEPS - 1):
        state, loss = shielded(state, *task.batch)
        losses.append(loss)
    assert_result(enclave, task, state, losses)
    # Nor do they wait for one that does not come.
    if leads:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(processes_module, "WORKER_SECONDS", 1.0)
            with pytest.raises(EnclaveError, match="process 1 did not come to `enclave.open` with"):
                enclave.open(state)
    multihost_utils.sync_global_devices("opened")
    enclave.close()


def refused_where_keys_run_out() -> None:
    """The enclave asks for whole leaves where a run begins, and a process runs another program."""
    task = mlp(MOMENTUM)
    with tempo.Enclave.across_processes() as enclave:
        shielded = shield(task.step, enclave, scheme=Orthogonal(budget=1))
        state, first = shielded(enclave.seal(task.state), *task.batch)
        count = 16 if jax.process_index() == 1 else 8
        with pytest.raises(EnclaveError, match="a shielded function with other arguments"):
            shielded(state, *(np.resize(a, (count, a.shape[1])) for a in task.batch))
        losses = [first]
        for _ in range(STEPS - 1):
            state, loss = shielded(state, *task.batch)
            losses.append(loss)
        assert_result(enclave, task, state, losses)


def failing(*_: Any) -> Any:
    raise OSError("planted")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_what_processes_with_parts_are_refused(processes):
    run_processes(refused, refused_where_keys_run_out, processes=processes)


def stopped() -> None:
    task = make_task(MLP(12, 6), (9, 6), ADAMW)
    enclave = tempo.Enclave.across_processes()
    state, _ = shield(task.step, enclave)(enclave.seal(task.state), *task.batch)
    if jax.process_index() == 1:
        parts_module._gathered = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    with pytest.raises(EnclaveError, match="no sign of life of process 1"):
        enclave.open(state)
    print("named")


@pytest.mark.slow
def test_a_process_lost_while_they_open_is_named():
    with nothing_left_behind(), cluster([stopped], 3) as started:
        for index, (process, output) in enumerate(started):
            if index != 1:
                assert process.wait(120), said(output)
                assert "named" in said(output)
