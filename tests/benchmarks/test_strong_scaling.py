"""The benchmark of workers: from how many on more stop helping, and what its table says."""

import json

import jax
import pytest

from benchmarks import workers
from benchmarks.machine import environment
from benchmarks.perceptron import batch, build
from tests.support.steps import shield_all


def test_what_is_shared_out_shrinks_and_what_is_not_stays():
    assert workers.step_seconds(1, 2.0, 8.0, 0.5) == 10.0
    assert workers.step_seconds(4, 2.0, 8.0, 0.5) == 2.0 + 2.0 + 1.5


@pytest.mark.parametrize(
    ("enclave", "devices", "visiting", "found"),
    [
        (1.0, 0.0, 0.0, 1),  # nothing to share out
        (0.0, 1.0, 0.0, workers.LIMIT),  # nothing else
        # 1 + 1/n: from 1.125 at 8 to 1.0625 at 16 it is 5.6 %, then to 1.03125 it is 2.9 %.
        (1.0, 1.0, 0.0, 16),
        # The visits of 4 more cost 0.4, and save 0.125.
        (1.0, 1.0, 0.1, 2),
        (1.0, 0.05, 0.0, 1),
    ],
)
def test_more_workers_stop_helping(enclave, devices, visiting, found):
    assert workers.useful_workers(enclave, devices, visiting) == found


def test_limits_follow_from_the_plan(enclave):
    step, state = build(64)
    report = shield_all(step, enclave=enclave).explain(state, batch(64, 32))
    found = workers.limits(report)
    assert found["enclave"] == report.costs.inside_seconds + report.costs.blinding_seconds > 0
    assert found["visiting"] == report.round_trips * report.model.latency
    counts = [found["workers"][str(rate)] for rate in workers.RATES]
    assert counts == sorted(counts, reverse=True), "faster devices need fewer"
    seconds = report.offloaded_work[0] / report.model.dot_flops
    assert counts[0] == workers.useful_workers(found["enclave"], seconds, found["visiting"])


def measured(**changes):
    limits = {"workers": {str(rate): 64 // rate or 1 for rate in workers.RATES}}
    found = {"seconds": [3.0, 2.0], "busy": [0.6, 0.5], "up": 8e6, "down": 4e6, "round_trips": 7.0}
    return {**found, "transfers": 0.02, "limits": limits, **changes}


def test_bytes_and_copies_are_a_workers():
    one = workers.summary(4, "mixing", [measured()])
    assert (one["up"], one["down"], one["transfers"]) == (2e6, 1e6, 0.005)
    assert (one["step"], one["busy"], one["round_trips"]) == (2.0, 0.5, 7.0)
    # Of two processes each counts its own parts; the first one asks the enclave.
    two = workers.summary(2, "mixing", [measured(), measured(up=6e6, busy=[0.0], seconds=[9.0])])
    assert (two["up"], two["busy"], two["step"]) == (7e6, 0.5, 2.0)


def test_the_table_compares_with_one_worker():
    results = {"environment": environment(), "width": 8, "rows": 4, "steps": 2, "processes": False}
    results["launches"] = 1
    points = [workers.summary(1, "mixing", [measured()])]
    points.append(workers.summary(2, "mixing", [measured(seconds=[1.0], busy=[0.75])]))
    lines = workers.table(results | {"results": points}).splitlines()
    assert "| mixing | 2 | 1.50 | 0.50 | 75% | 4.0 | 2.0 | 7 | 10.0 |" in lines
    assert lines[-1].startswith("mixing: more stop helping from 64, 6, 1 workers on")


def test_launches_keep_the_least_times():
    slow = workers.summary(2, "mixing", [measured(seconds=[3.0], busy=[0.4])])
    fast = workers.summary(2, "mixing", [measured(transfers=0.01)])
    assert workers.better(None, slow) == slow
    found = workers.better(slow, fast)
    assert (found["step"], found["busy"], found["transfers"]) == (2.0, 0.4, 0.005)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [False, True])
def test_workers_are_measured(tmp_path, processes):
    options = ["--workers", "2", "--width", "64", "--rows", "64", "--steps", "1", "--launches", "1"]
    options += ["--schemes", "signed-permutation", "--out", str(tmp_path)]
    workers.main(options + ["--processes"] * processes)
    (found,) = json.loads((tmp_path / "workers.json").read_text())["results"]
    assert found["workers"] == 2 and found["busy"] > 0 and found["up"] > 0
    assert found["transfers"] > 0 and found["round_trips"] >= 1
    assert jax.device_count() == 8, "measured in processes of its own"
