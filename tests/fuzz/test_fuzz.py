"""Every fuzz target survives its corpus, and a few seconds of coverage-guided search beyond it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from enclave_runtime.protocol.program import Program
from enclave_runtime.verifying.follower import check_program
from tests.fuzz import fuzz_provision, harness

SECONDS = 3
MIN_EXECUTIONS = 100  # on a machine that other tests keep busy; a program takes milliseconds
ROOT = Path(__file__).resolve().parents[2]

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed (it has wheels for Linux on x86-64)",
)


def run_fuzzer(command: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs a target; what it finds lands below `tmp_path`."""
    found = tmp_path / "found"
    found.mkdir()
    arguments = [
        *(f"-max_total_time={SECONDS}", "-print_final_stats=1", "-timeout=10"),
        *("-rss_limit_mb=4096", f"-artifact_prefix={tmp_path}/", str(found)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *command[:2], *arguments, *command[2:]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", harness.TARGETS)
@needs_atheris
def test_fuzzer_finds_no_crash(target, tmp_path):
    module = f"tests.fuzz.fuzz_{target}"
    done = run_fuzzer(["-m", module, str(harness.CORPUS / target)], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    executions = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert executions and int(executions[1]) > MIN_EXECUTIONS, done.stderr[-4000:]


PLANTED = """
import sys
from tests.fuzz import harness

def one_input(data):
    if data[:2] == b"ok" and len(data) > 8 and data[6:8] == b"no":
        raise KeyError("planted")

if __name__ == "__main__":
    harness.fuzz(one_input, (sys.modules["__main__"],))
"""


@needs_atheris
def test_fuzzer_finds_a_planted_crash(tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    done = run_fuzzer([str(script), "-seed=1"], tmp_path)
    assert done.returncode != 0
    assert "KeyError: 'planted'" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("target", "seed"), [(t, s.name) for t in harness.TARGETS for s in harness.seeds(t)]
)
def test_corpus_is_survived(target, seed):
    harness.one_input(target)((harness.CORPUS / target / seed).read_bytes())


def test_seeds_of_programs_are_current():
    # A seed that lacks a field is refused at once, and the fuzzer gets no further either.
    for seed in harness.seeds("program"):
        if not seed.name.startswith("found"):
            Program.decode(json.loads(seed.read_bytes()))
    followed = json.loads((harness.CORPUS / "program" / "updates").read_bytes())
    check_program(Program.decode(followed))
    assert {"product", "add", "scale", "transpose"} <= {u["kind"] for u in followed["updates"]}


@pytest.mark.parametrize("seed", ["behind", "shared"])
def test_seeds_of_requests_to_provision_are_accepted(monkeypatch, seed):
    monkeypatch.setattr(fuzz_provision, "_REFUSALS", ())
    fuzz_provision.one_input((harness.CORPUS / "provision" / seed).read_bytes())


@pytest.mark.parametrize("target", harness.TARGETS)
def test_target_has_seeds(target):
    assert len(harness.seeds(target)) >= 2


def test_seeds_do_not_say_where_they_were_made():
    folders = re.compile(rb"/(work|home|tmp|root|Users)/")
    assert folders.search(b"dot_general at /home/me/model.py:3")
    for seed in (s for target in harness.TARGETS for s in harness.seeds(target)):
        content = seed.read_bytes()
        assert not folders.search(content) and bytes(ROOT) not in content, seed.name
