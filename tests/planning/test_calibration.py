"""Whose figures a plan is made from."""

import dataclasses
import os

import pytest

import tempo_jax
from tempo_jax.errors import CostFileError
from tempo_jax.planning import calibration
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


def test_figures_of_another_version_are_measured_anew(measured, monkeypatch):
    measured()
    monkeypatch.setattr(tempo_jax, "__version__", "9.9.9")
    assert measured()[1] == 2


def test_a_file_gives_the_same_figures_anywhere(measured, monkeypatch, tmp_path):
    measured()
    (path,) = calibration.cached_costs()
    kept = tmp_path / "costs.json"
    kept.write_text(path.read_text())
    monkeypatch.setenv(calibration.SHIPPED, str(kept))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5})
    assert measured("gramine-sgx") == (CostModel(latency=1e-3), 1)


def test_figures_that_runs_disagree_with_are_measured_anew_until_two_agree(measured):
    first, _ = measured()
    assert "next enclave is launched (" in calibration.doubt("process", first)
    (stale,) = calibration.cached_costs().values()
    assert stale == first and stale.stale
    assert calibration.described(stale).endswith("since runs disagreed")
    again, times = measured()
    assert times == 2 and again.confirmed  # in all rates; latency is none
    assert "Two measurements agree" in calibration.doubt("process", again)
    assert measured() == (again, 2)


def test_figures_that_came_out_otherwise_may_be_doubted_again(measured, monkeypatch):
    def ask(**rates):
        return machine_costs("process", lambda: rates)

    def doubted(model):
        return "next enclave is launched" in calibration.doubt("process", model)

    measured()
    assert doubted(calibration.cached_costs().popitem()[1])
    assert doubted(ask(dot_flops=1.6e11))
    assert doubted(ask(dot_flops=2e11, nanoseconds_per_byte=0.1))
    assert not doubted(ask(dot_flops=2.9e11, nanoseconds_per_byte=0.14))


def test_figures_that_were_replaced_or_are_a_files_are_not_doubted(measured, monkeypatch):
    first, _ = measured()
    older = dataclasses.replace(first, measured_at=first.measured_at - 1)
    assert "measured anew since" in calibration.doubt("process", older)
    assert "in no cache" in calibration.doubt("gramine-sgx", first)
    monkeypatch.setenv(calibration.SHIPPED, "costs.json")
    assert "stays as it is" in calibration.doubt("process", first)
    assert not any(model.stale for model in calibration.cached_costs().values())


@pytest.mark.parametrize("content", [None, "", "[]", '{"speed": 1}', '{"schemes": {"mixing": {}}}'])
def test_a_file_without_figures_is_refused(measured, monkeypatch, tmp_path, content):
    kept = tmp_path / "costs.json"
    if content is not None:
        kept.write_text(content)
    monkeypatch.setenv(calibration.SHIPPED, str(kept))
    with pytest.raises(CostFileError, match="costs.json, which has no figures of this version"):
        measured()


def test_rates_are_told_with_their_age(monkeypatch):
    model = CostModel(dot_flops=5e10, measured_at=1_000_000_000)
    monkeypatch.setattr(calibration.time, "time", lambda: 1_000_000_000 + 3.5 * 86400)
    assert calibration.described(model).startswith("50 GFLOP/s inside, ")
    assert calibration.described(model).endswith("measured 3 days ago")
    assert calibration.described(CostModel()).endswith("of unknown age")


def test_launched_enclaves_know_their_kind(monkeypatch, tmp_path):
    (tmp_path / "enclave.manifest").touch()
    monkeypatch.setattr(launch.shutil, "which", lambda _: "/usr/bin/true")
    monkeypatch.setattr(launch, "_check", lambda _: None)  # an empty manifest breaks every rule
    assert launch.command("gramine-direct", tmp_path).kind == "gramine-direct"
    connection = Connection()
    assert connection.kind == "process"
    connection.close()
