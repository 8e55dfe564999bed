"""A process that the benchmark starts, and what that tells it: JSON objects, one a line."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.machine import Json

SECONDS = 300.0


def tell(**fields: Any) -> None:
    """Tells the process that started this one."""
    print(json.dumps(fields), flush=True)


def tell_saved(count: int) -> None:
    """Tells how many steps the last checkpoint holds."""
    tell(saved=count)


def benchmark_command(*options: str) -> list[str]:
    """What starts this benchmark anew."""
    return [sys.executable, "-m", "benchmarks.faults", *options]


def run(command: Sequence[str]) -> tuple[int, Json, str]:
    """Runs a process to its end; returns its status, the last of each thing it told, its errors."""
    # The enclave holds the pipe of errors as well: reading it to its end waits for both.
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    told: Json = {}
    for line in done.stdout.splitlines():
        told |= json.loads(line)
    return done.returncode, told, done.stderr
