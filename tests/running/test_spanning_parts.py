"""Workers of several processes that keep parts of what lies on the devices."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils

import tempo_jax as tempo
from tempo_jax.enclave import processes as processes_module
from tempo_jax.errors import EnclaveError, SealedValueError
from tempo_jax.running.host_run import HostRun
from tempo_jax.schemes import Orthogonal, SignedPermutation, Tempo
from tempo_jax.sealing.array import is_sealed
from tests.running.test_shard_weights import compiled, on_devices
from tests.support.cluster import run_processes
from tests.support.processes import nothing_left_behind
from tests.support.steps import assert_close, shield_all
from tests.support.workers import ADAMW, MLP, STEPS, Attention, ConvNet, Task, make_task, mesh_of, train

MOMENTUM = tempo.cheap_update(optax.sgd(1e-2, momentum=0.9))


def mlp(optimizer: Any = ADAMW) -> Task:
    return make_task(MLP(16, 8), (8, 8), optimizer)


def shield(task: Task, enclave: tempo.Enclave, **options: Any) -> Any:
    options = {"scheme": SignedPermutation(), "shard_weights": True, **options}
    return shield_all(task.step, enclave=enclave, mesh=mesh_of(jax.device_count()), **options)


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


def equal() -> None:
    task = mlp()
    with tempo.Enclave.across_processes() as enclave:
        shielded = shield(task, enclave)
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
        shielded = shield(task, enclave)
        state, first = shielded(enclave.seal(task.state), *task.batch)
        after = task.result[1][1]
        # Functions of other signatures take the state, where it is or inside.
        for options in ({}, {"shard_weights": False}, {"shard_weights": False, "placement": "enclave"}):
            predict = shield(Task(predicting(task), *[None] * 3), enclave, **options)
            assert_close(predict(state, *task.batch), after)
        copied = enclave.copy(state)
        if not enclave.follows:
            with pytest.raises(SealedValueError, match="each process has only a part"):
                tempo.save_sealed(os.devnull, state)
        # A whole state becomes one in parts and the other way round.
        losses = [first]
        for sharded in (False, True):
            state, loss = shield(task, enclave, shard_weights=sharded)(state, *task.batch)
            losses.append(loss)
        assert_result(enclave, task, state, losses)
        again, last = train(shielded, copied, task.batch)
        assert_close(last[: STEPS - 1], losses[1:])


test = functools.partial
def test_parts():
    print(run_processes(equal, opened_copied_and_predicted, processes=2))
