"""The benchmark of placement: its tables, and that two checkouts are compared in turn."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import placement
from benchmarks.overhead import ENCLAVE, PLAIN, SHIELDED
from benchmarks.perceptron import batch

ROOT = Path(placement.__file__).parents[1]


def test_examples_of_any_number_of_rows():
    examples = batch(8, 5)
    assert examples["x"].shape == (5, 8) and examples["y"].shape == (5,)


def test_the_table_has_rows_and_the_largest_gain():
    result = {
        "width": 64,
        "rows": 32,
        "scheme": "mixing",
        "busy": {SHIELDED: 1.0, ENCLAVE: 4.0},
        "processor": {SHIELDED: 3.0, ENCLAVE: 4.0},
        "seconds": {PLAIN: 2.0, SHIELDED: 3.0, ENCLAVE: 5.0},
        "offloaded": 0.5,
    }
    both = {"here": 1.0, "there": 2.0}
    results = {
        "environment": placement.environment(),
        "steps": 1,
        "launches": 1,
        "against": "older",
        "results": [result, {**result, "rows": 64, "against": {"busy": both, "processor": both}}],
    }
    lines = placement.table(results).splitlines()
    assert "| mixing | 64 | 32 | 0.25 | 0.75 | 4.0 | 50% | 1.50 | 2.50 |" in lines
    assert "| mixing | 64 | 64 | 0.50 | 0.50 |" in lines
    assert any("Against older" in line for line in lines)


def test_two_checkouts_run_in_turn(monkeypatch, tmp_path):
    ran = []

    def run(command, cwd, env, **_):
        ran.append(cwd)
        assert env["PYTHONPATH"] == str(cwd) and command[-4:] == ["64", "32", "mixing", "2"]
        seconds = [3.0, 1.0 + len(ran)]
        told = json.dumps({"busy": seconds, "processor": seconds})
        return subprocess.CompletedProcess(command, 0, told)

    monkeypatch.setattr(placement.subprocess, "run", run)
    least = placement.compare(tmp_path, 64, 32, "mixing", 2, 2)
    assert ran == [ROOT, tmp_path, ROOT, tmp_path]
    assert least["busy"] == least["processor"] == {"here": 2.0, "there": 3.0}


def test_a_checkout_that_does_not_run_is_an_error(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        placement.compare(tmp_path, 64, 32, "mixing", 1, 1)
