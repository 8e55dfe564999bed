"""Whose figures a plan is made from."""

import os

import pytest

from tempo_jax.planning.calibration import machine_costs
from tempo_jax.planning.cost import CostModel
from tempo_jax.transport import launch
from tempo_jax.transport.child import Connection


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Asks for costs with an empty cache; tells how often they had to be measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    times = []

    def measure():
        times.append(1)
        return {"latency": 1e-3 * len(times)}

    def ask(kind="process"):
        return machine_costs(kind, measure), len(times)

    return ask


def test_figures_are_measured_once(measured):
    assert measured() == measured() == (CostModel(latency=1e-3), 1)


def test_each_kind_of_enclave_has_its_own_figures(measured):
    kinds = ("process", "gramine-direct", "gramine-sgx")
    assert [measured(kind)[1] for kind in kinds * 2] == [1, 2, 3, 3, 3, 3]
    assert measured("gramine-sgx")[0] == CostModel(latency=3e-3)


def test_figures_of_fewer_cores_are_others(measured, monkeypatch):
    measured()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5})
    assert measured()[1] == 2


def test_launched_enclaves_know_their_kind(monkeypatch, tmp_path):
    (tmp_path / "enclave.manifest").touch()
    monkeypatch.setattr(launch.shutil, "which", lambda _: "/usr/bin/true")
    monkeypatch.setattr(launch, "_check", lambda _: None)  # an empty manifest breaks every rule
    assert launch.command("gramine-direct", tmp_path).kind == "gramine-direct"
    connection = Connection()
    assert connection.kind == "process"
    connection.close()
