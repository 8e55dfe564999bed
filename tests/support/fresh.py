"""Runs a function as a user's program runs: in an interpreter of its own, with default settings.

This process optimises little, has eight devices and computes in float64 (see `conftest`), and so
hides what only compiled, large or multi-device programs do.
"""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SET_HERE = ("XLA_FLAGS", "OPENBLAS_NUM_THREADS", "JAX_ENABLE_X64")


def run_fresh(
    function: Callable[[], object],
    *,
    devices: int = 1,
    cores: int | None = None,
    seconds: float = 240,
) -> str:
    """Calls a module's function in a fresh interpreter and returns what it printed.

    Args:
      function: takes no argument; found by its module and name, so it stands at a module's top.
      devices: how many CPU devices JAX is told to make.
      cores: how many of this machine's cores it may use; all by default.
      seconds: after which it counts as hung.

    Raises:
      AssertionError: it failed or hung; with what it printed.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _SET_HERE}
    if devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    usable = sorted(os.sched_getaffinity(0))[:cores]
    # pytest imports test modules by their last name alone.
    module = ".".join(Path(inspect.getfile(function)).relative_to(ROOT).with_suffix("").parts)
    code = (
        f"import os; os.sched_setaffinity(0, {usable!r})\n"
        f"from {module} import {function.__name__} as run; run()"
    )
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as hung:
        raise AssertionError(f"hung after {seconds} s: {hung.stdout!r} {hung.stderr!r}") from hung
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout
