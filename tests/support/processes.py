"""What tests of processes share: whether one runs, what it left, and a script of its own."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import enclave_runtime
from enclave_runtime.protocol.memory import DIRECTORY

ROOT = Path(enclave_runtime.__file__).parent.parent
SECONDS = 10.0  # far more than a process needs to end


def wait_until(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes true within `SECONDS`."""
    end = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_running(process: int) -> bool:
    """Whether a process lives; one that nobody has waited for yet does not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def is_stopped(process: int) -> bool:
    """Whether a process has stopped, all its threads: they do one after the other."""
    threads = Path(f"/proc/{process}/task").glob("*/stat")
    return all(t.read_text().rpartition(")")[2].split()[0] == "T" for t in threads)


def shared_files() -> set[str]:
    """Names of the shared memory that any session on this machine has now."""
    return {name for name in os.listdir(DIRECTORY) if name.startswith("tempo_jax-")}


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Asserts that no shared memory keeps its name; other sessions' names are short-lived."""
    before = shared_files()
    yield
    new = shared_files() - before
    assert wait_until(lambda: not new & shared_files())


@contextlib.contextmanager
def host_script(text: str) -> Iterator[tuple[int, IO[str]]]:
    """Runs a Python script as a process of its own; gives its number and what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", text]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.pid, process.stdout
        finally:
            process.kill()
