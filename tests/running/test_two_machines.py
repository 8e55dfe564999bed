"""Processes on two machines, which are network namespaces: they train, and a cut is noticed."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import STDOUT, Popen

import pytest

import tempo_jax as tempo
from benchmarks.namespaces import Network, obstacle, two_machines
from tests.running.test_processes import assert_equal
from tests.support.cluster import free_port, run_processes
from tests.support.fresh import ROOT, environment
from tests.support.processes import nothing_left_behind, wait_until
from tests.support.workers import ADAMW, MLP, ConvNet, make_task

pytestmark = pytest.mark.slow
SECONDS = 120.0
NOTICED_SECONDS = 10.0
OPTIONS = ("--width", "64", "--batch-size", "240", "--scheme", "signed-permutation")


@pytest.fixture
def network() -> Iterator[Network]:
    """Two machines and their cable."""
    why = obstacle()
    if why is not None:
        pytest.skip(why)
    with nothing_left_behind(), two_machines() as made:
        yield made


def equal_from_elsewhere() -> None:
    launch = tempo.Enclave.launch
    with tempo.Enclave.across_processes(lambda: launch(listen="0.0.0.0:0")) as enclave:
        assert enclave.connection.host == ("10.213.0.1" if enclave.follows else "127.0.0.1")
        assert enclave.connection.carries == enclave.follows
        assert_equal(enclave, make_task(MLP(), (8, 6), ADAMW))
        assert_equal(enclave, make_task(ConvNet(), (8, 4, 4, 2), ADAMW), verify=True)


def test_two_machines_equal_one_device(network):
    run_processes(equal_from_elsewhere, machines=network.machines)


def not_reached() -> None:
    tempo.Enclave.across_processes()


def test_an_enclave_that_does_not_listen_says_so(network):
    with pytest.raises(AssertionError, match=r"ChannelError: .* listens on none but its own"):
        run_processes(not_reached, machines=network.machines)


def train(network: Network, stack: ExitStack) -> list[tuple[Popen[bytes], Callable[[], str]]]:
    """Starts the example, twice on the first; gives the processes and what each wrote by now."""
    (lead, other), started = network.machines, []
    cluster = ("--coordinator", f"{lead.address}:{free_port()}", "--count", "3")
    for index, machine in enumerate((lead, lead, other)):
        own = ("--index", str(index), "--steps", "1000", "--listen", f"{lead.address}:0")
        command = (sys.executable, "-m", "examples.workers", *OPTIONS, *cluster, *own)
        output = stack.enter_context(tempfile.NamedTemporaryFile())
        variables = environment() | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        process = Popen(
            machine.command(command), cwd=ROOT, env=variables, stdout=output, stderr=STDOUT
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        started.append((process, Path(output.name).read_text))
    return started


def wait_for(wrote: Callable[[], str], pattern: str, seconds: float = SECONDS) -> float:
    """Waits until something was written; returns how long, in seconds."""
    start = time.monotonic()
    while not re.search(pattern, wrote()):
        assert time.monotonic() < start + seconds, f"nothing like {pattern}:\n{wrote()}"
        time.sleep(0.05)
    return time.monotonic() - start


def test_a_cut_is_named_on_both_sides(network):
    with ExitStack() as stack:
        *near, (far, far_wrote) = train(network, stack)
        wait_for(near[0][1], r"step +3: ")
        network.cut()
        left = NOTICED_SECONDS
        for _, wrote in near:
            left -= wait_for(wrote, "no sign of life of process 2", left)
        wait_for(far_wrote, "the link may be down", left)
        for process in (far, *(process for process, _ in near)):
            assert process.wait(SECONDS) != 0
        # The enclave ended with the first.
        assert wait_until(lambda: not any(machine.processes() for machine in network.machines))
