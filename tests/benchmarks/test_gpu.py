"""The command for a machine with a GPU: budgets are kept, and what was measured is never lost."""

import json
import pathlib
import sys
import time

import pytest

from benchmarks import gpu
from benchmarks.machine import environment
from tests.support.processes import ROOT, is_running, wait_until

# Writes a result, starts a process of its own, and hangs.
HANGS = """
import json, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1], "found.json").write_text(json.dumps({"child": child.pid}))
print("so far", flush=True)
time.sleep(600)
"""


def script(text: str, *, name: str = "script", budget: float = 30.0) -> gpu.Part:
    def command(folder: pathlib.Path, _: float) -> list[str]:
        return [sys.executable, "-c", text, str(folder)]

    return gpu.Part(name, budget, command, "found.json")


def test_all_parts_fit_in_the_time():
    for small in (True, False):
        assert sum(part.budget for part in gpu.parts(small)) <= gpu.SECONDS
    assert gpu.SECONDS < 9 * 60
    names = [part.name for part in gpu.parts(False)]
    assert len(set(names)) == len(names)
    assert {name for name, _ in gpu.GOALS} <= set(names)
    assert all((ROOT / name).exists() for name in (*gpu.TESTS, *gpu.SMALL_TESTS))


def test_a_part_gets_what_those_after_it_do_not_need():
    parts = [script("", budget=b) for b in (30.0, 20.0, 10.0)]
    assert gpu.allowed(parts, 0, 100.0) == 70.0
    assert gpu.allowed(parts, 1, 95.0) == 85.0
    assert gpu.allowed(parts, 2, 95.0) == 95.0
    # One that came late has its own budget, and no more than there is.
    assert gpu.allowed(parts, 1, 25.0) == 20.0
    assert gpu.allowed(parts, 2, 4.0) == 4.0


def test_a_part_that_hangs_is_ended_with_what_it_started_and_keeps_its_result():
    began = time.monotonic()
    found = gpu.run(script(HANGS), 3.0)
    assert time.monotonic() - began < 30
    assert found["status"] == "timed out" and "so far" in found["said"]
    child = found["result"]["child"]
    assert wait_until(lambda: not is_running(child))


def test_a_part_that_fails_does_not_take_the_others_with_it(tmp_path, capsys):
    parts = [
        script("raise SystemExit('no such device')", name="first"),
        script(
            "import pathlib, sys; pathlib.Path(sys.argv[1], 'found.json').write_text('[1]')",
            name="second",
        ),
    ]
    gpu.main(["--small", "--out", str(tmp_path)], parts)
    results = json.loads((tmp_path / "gpu.json").read_text())
    first, second = results["parts"]["first"], results["parts"]["second"]
    assert first["status"] == "failed" and "no such device" in first["said"]
    assert second["status"] == "done" and second["result"] == [1]
    text = (tmp_path / "gpu.md").read_text()
    assert "* first: failed" in text and "nothing was measured" in text
    assert text.strip() in capsys.readouterr().out


def test_without_a_gpu_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "_device", lambda: ("cpu", "cpu"))
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)], [script("")])
    assert "tempo-jax[cuda12]" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--small", "--parts", "unknown"], [script("")])
    assert "no part is called unknown" in capsys.readouterr().err


def test_the_table_leaves_out_what_was_not_measured():
    def variant(seconds, busy):
        counted = {"outside": 0.5, "up": 2_000_000, "down": 1_000_000, "round_trips": 3}
        return {"seconds": seconds, "busy": busy, **(counted if busy else {})}

    variants = {
        gpu.PLAIN: variant([9.0, 1.0, 1.0], []),
        "mixing": variant([9.0, 2.0], [9.0, 1.0]),
        gpu.ENCLAVE: variant([9.0, 8.0], [9.0, 8.0]),
    }
    model = {"title": "wide", "batch_size": 4, "variants": variants}
    part = {"status": "done", "seconds": 5.0, "budget": 9.0, "said": ""}
    results = {
        "environment": environment(),
        "device": "a card",
        "parts": {
            "transformer-1024": {**part, "result": model},
            "tests": {**part, "result": None, "said": "1 failed, 7 passed in 3s"},
            "placement": {**part, "result": {}, "said": "noise\n| a | b |"},
        },
    }
    lines = gpu.table(results).splitlines()
    assert "| wide (4) | plain | 2 | 1.00 | 8.00 | – | – | – | – | – |" in lines
    assert "| wide (4) | mixing | 1 | 2.00 | 4.00 (≥ 4) | 0.12 | 50% | 3 | 2 | 1 |" in lines
    assert "* tests: done after 5 of 9 s; 1 failed, 7 passed" in lines
    assert lines[-1] == "| a | b |" and "noise" not in lines
    # Ended in the all-in-enclave contender's first call: nothing is compared with it.
    variants[gpu.ENCLAVE] = variant([9.0], [9.0])
    assert "| wide (4) | mixing | 1 | 2.00 | – (≥ 4) | – | 50% | 3 | 2 | 1 |" in gpu.table(results)


@pytest.mark.slow
def test_a_small_model_is_measured_under_every_contender(tmp_path):
    gpu.main(["--small", "--parts", "transformer-1024", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "gpu.json").read_text())
    part = results["parts"]["transformer-1024"]
    assert part["status"] == "done", part["said"]
    variants = part["result"]["variants"]
    assert set(variants) == set(gpu.CONTENDERS)
    assert all(len(found["seconds"]) == 3 for found in variants.values())
    assert variants["mixing"]["outside"] > 0.5 and variants[gpu.ENCLAVE]["outside"] == 0
