"""Runs functions as a user's program runs: in an interpreter of its own, with default settings.

This process optimises little, has eight devices and computes in float64 (see `conftest`), and so
hides what only compiled, large or multi-device programs do. Whatever may depend on that is tested
with `run_fresh`, at sizes a user has, as `tests/as_a_user` does for each feature. An interpreter
takes seconds to start, so several functions share one.
"""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SET_HERE = ("XLA_FLAGS", "OPENBLAS_NUM_THREADS", "JAX_ENABLE_X64")


def environment() -> dict[str, str]:
    """The variables of a user's process: without what `conftest` sets."""
    return {k: v for k, v in os.environ.items() if k not in _SET_HERE}


def run_fresh(
    *functions: Callable[[], object],
    devices: int = 1,
    cores: int | None = None,
    seconds: float = 240,
    optimized: bool = True,
) -> str:
    """Calls functions, in order, in one fresh interpreter and returns what they printed.

    Args:
      *functions: take no argument; found by module and name, so they stand at a module's top.
      devices: how many CPU devices JAX is told to make.
      cores: how many of this machine's cores it may use; all by default.
      seconds: after which it counts as hung.
      optimized: whether XLA compiles as it does for a user; what is about processes, names or
        memory shows as well, and sooner, under the flags of `support.quick`.

    Raises:
      AssertionError: one failed, or they hung; with what it printed.
    """
    variables = environment()
    if devices > 1:
        variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    usable = sorted(os.sched_getaffinity(0))[:cores]
    lines = [f"import os; os.sched_setaffinity(0, {usable!r})"]
    if not optimized:
        lines.append("from tests.support.quick import compile_quickly; compile_quickly()")
    for function in functions:
        # pytest imports test modules by their last name alone.
        module = ".".join(Path(inspect.getfile(function)).relative_to(ROOT).with_suffix("").parts)
        lines.append(f"from {module} import {function.__name__} as run; run()")
    try:
        ended = subprocess.run(
            [sys.executable, "-c", "\n".join(lines)],
            env=variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as hung:
        raise AssertionError(f"hung after {seconds} s: {hung.stdout!r} {hung.stderr!r}") from hung
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout
