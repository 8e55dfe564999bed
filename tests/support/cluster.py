"""Runs functions in several processes of `jax.distributed` on this machine."""

from __future__ import annotations

import contextlib
import inspect
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from benchmarks.namespaces import Machine
from tests.support.fresh import ROOT, environment
from tests.support.quick import FLAGS

# Processes compute what tests compare with sums in another order.
_START = """
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("{address}:{port}", {processes}, {index})
"""


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def cluster(
    functions: Sequence[Callable[[], object]],
    processes: int,
    devices: int = 1,
    machines: Sequence[Machine] = (),
) -> Iterator[list[tuple[subprocess.Popen[str], IO[str]]]]:
    """Starts functions in processes of one cluster; ends those that are left.

    Args:
      functions: each takes no argument, and stands at a module's top; called in this order.
      processes: how many.
      devices: of the CPU, in each.
      machines: where each runs; without any, all run here.

    Yields:
      Each process, with a file that it writes both its outputs to.
    """
    calls = []
    for function in functions:
        module = ".".join(Path(inspect.getfile(function)).relative_to(ROOT).with_suffix("").parts)
        calls.append(f"from {module} import {function.__name__} as run; run()")
    port = free_port()
    variables = environment() | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    variables["XLA_FLAGS"] = " ".join((*FLAGS, f"--xla_force_host_platform_device_count={devices}"))
    with contextlib.ExitStack() as stack:
        started = []
        for index in range(processes):
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            address = machines[0].address if machines else "127.0.0.1"
            script = _START.format(address=address, port=port, processes=processes, index=index)
            command = [sys.executable, "-c", "\n".join((script, *calls))]
            process = subprocess.Popen(
                machines[index].command(command) if machines else command,
                env=variables,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append((process, output))
        yield started


def said(output: IO[str]) -> str:
    """What a process has written by now."""
    output.flush()
    with open(f"/proc/self/fd/{output.fileno()}") as again:
        return again.read()


def run_processes(
    *functions: Callable[[], object],
    processes: int = 2,
    devices: int = 1,
    seconds: float = 240,
    machines: Sequence[Machine] = (),
) -> list[str]:
    """Calls functions in every process of a cluster and returns what each wrote.

    Raises:
      AssertionError: it failed in one, or they hung; with what they wrote.
    """
    end = time.monotonic() + seconds
    with cluster(functions, processes, devices, machines) as started:
        states: list[int | None] = [None]
        while None in states and not any(states) and time.monotonic() < end:
            time.sleep(0.05)
            states = [process.poll() for process, _ in started]
        texts = [said(output) for _, output in started]
        wrote = "\n".join(f"--- process {i}:\n{text}" for i, text in enumerate(texts))
        assert not any(states), f"ended with {states}\n{wrote}"
        assert None not in states, f"hung after {seconds:g} s\n{wrote}"
    return texts
