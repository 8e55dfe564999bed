"""Processes of one machine train together, and those that are left go on when one is lost."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fresh import ROOT, environment
from tests.support.processes import nothing_left_behind

SECONDS = 120.0
COMMAND = ("-m", "examples.workers", "--width", "32", "--batch-size", "64")
SCHEME = ("--scheme", "signed-permutation", "--offload", "all")  # which let small products out


@contextlib.contextmanager
def training(*options: str) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """Starts the example; gives the process and what it and its children wrote by now."""
    with tempfile.NamedTemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *COMMAND, *SCHEME, *options],
            cwd=ROOT,
            env=environment() | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process, lambda: Path(output.name).read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(wrote: Callable[[], str], pattern: str) -> str:
    """Waits until something was written."""
    end = time.monotonic() + SECONDS
    while not re.search(pattern, wrote()):
        assert time.monotonic() < end, f"nothing like {pattern}:\n{wrote()}"
        time.sleep(0.1)
    return wrote()


def child(parent: int, index: int) -> int:
    """The number of the process with an index."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if int(status[1]) == parent and words[words.index(b"--index") + 1] == b"%d" % index:
                return int(entry.name)
    raise AssertionError(f"no process {index}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "index", "count"),
    [(signal.SIGKILL, 2, 4), (signal.SIGSTOP, 1, 3), (signal.SIGKILL, 0, 3)],
    ids=["killed", "stopped", "first"],
)
def test_training_goes_on_without_a_lost_process(signum, index, count):
    options = ("--processes", f"{count}", "--steps", "200")
    going_on = f"going on with {count - 1}"
    with nothing_left_behind(), training(*options) as (process, wrote):
        wait_for(wrote, r"step +3: ")
        os.kill(child(process.pid, index), signum)
        text = wait_for(wrote, f"process {index} is lost; {going_on}")
        if index:
            # The others say who is lost.
            named = re.findall(rf"no sign of life of process {index} \((\d+) s\)", text)
            assert len(named) >= count - 1 and max(map(int, named)) < 10
        last = max(int(n) for n in re.findall(r"step +(\d+): ", text))
        wait_for(wrote, rf"{going_on}(?s:.*)step +{last + 1}: ")
        assert process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--shard-weights",)])
def test_two_processes_train(options):
    command = ("--processes", "2", "--steps", "2", *options)
    with nothing_left_behind(), training(*command) as (process, wrote):
        assert process.wait(SECONDS) == 0, wrote()
        text = wrote()
    assert len(re.findall(r"step +[12]: loss \d", text)) == 2
    assert "process 0 of 2: " in text and "process 1 of 2: " in text
