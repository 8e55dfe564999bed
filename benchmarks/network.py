"""How fast a process's parts travel to an enclave on another machine, against iperf3.

Claim: on links of 1 and 10 Gbit/s iperf3 moves at most 1.15 times as many bytes a second as
cross to and from a process that shares no memory with the enclave; nothing is asserted.

Two network namespaces are the machines (`benchmarks.namespaces`), joined by a cable that `tc` holds
to a rate. In each runs one process of `jax.distributed`. The second one has seven of eight devices,
whose parts of a product's operands and result travel: both share this machine's processors, and
what the first computes meanwhile keeps them from the cable (`--others 1` gives both one device, to
see how much). Each round iperf3 moves as many bytes up, then down, and then both processes take a
step; the step's rates are those of `Shielded.traffic`. Of what goes up, as much as may still have
lain in the sender's buffer is not counted. Needs root, iproute2 and iperf3.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

import tempo_jax as tempo
from benchmarks.machine import describe, environment
from benchmarks.namespaces import Machine, Network, obstacle, two_machines
from tempo_jax.schemes import SignedPermutation

COLUMNS = 64  # of the operands: few, so that most of a step is the way there and back
PORT, LISTEN = 7443, "0.0.0.0:7444"
ROW_BYTES = COLUMNS * 4


# The two processes


def work(index: int, coordinator: str, megabytes: int, others: int) -> None:
    """One process: a step for each line that it is sent, and how fast its parts travelled."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, index)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("workers",))
    rows = megabytes * 10**6 // ROW_BYTES // others * (others + 1)
    x = np.random.default_rng(0).normal(size=(rows, COLUMNS)).astype(np.float32)
    w = np.eye(COLUMNS, dtype=np.float32)
    buffer = int(pathlib.Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2])
    with tempo.Enclave.across_processes(lambda: tempo.Enclave.launch(listen=LISTEN)) as enclave:
        shielded = tempo.shield(
            lambda x, w: tempo.reveal(jnp.mean(jnp.square(x @ w))),
            enclave=enclave,
            mesh=mesh,
            scheme=SignedPermutation(),
            offload="all",
            donate=False,
        )
        arguments = enclave.seal((x, w))
        shielded(*arguments)
        print("{}", flush=True)  # ready
        for _ in sys.stdin:
            before = counted(shielded, arguments)
            shielded(*arguments)
            after = counted(shielded, arguments)
            sent, received, sending, receiving = (a - b for a, b in zip(after, before, strict=True))
            up = (sent - buffer) / sending if sent else 0.0
            down = received / receiving if received else 0.0
            print(json.dumps({"up": up, "down": down, "bytes": [sent, received]}), flush=True)


def counted(shielded: Any, arguments: Any) -> tuple[float, ...]:
    """What has travelled so far, and for how long."""
    t = shielded.traffic(*arguments)
    return t.sent, t.received, t.sending_seconds, t.receiving_seconds


@contextlib.contextmanager
def workers(network: Network, megabytes: int, others: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts both processes; they end when their input does."""
    coordinator = f"{network.machines[0].address}:{PORT}"
    flag = "--xla_force_host_platform_device_count"
    with contextlib.ExitStack() as stack:
        started = []
        for index, (place, devices) in enumerate(zip(network.machines, (1, others), strict=True)):
            own = ["--worker", str(index), "--coordinator", coordinator]
            command = [sys.executable, "-m", "benchmarks.network", *own]
            process = subprocess.Popen(
                place.command([*command, "--megabytes", str(megabytes), "--others", str(others)]),
                env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flag}={devices}"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            hear(process)
        yield started
        for process in started:
            pipe(process.stdin).close()
        for process in started:
            process.wait(60)


def pipe(end: IO[str] | None) -> IO[str]:
    """A pipe of a process that has it."""
    assert end is not None
    return end


def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next object that a process writes; gloo writes lines of its own."""
    for line in pipe(process.stdout):
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("a process ended; what it wrote stands above")


def step(started: list[subprocess.Popen[str]]) -> dict[str, Any]:
    """Has both take a step; how fast the second one's parts travelled, in bytes a second."""
    for process in started:
        print("step", file=pipe(process.stdin), flush=True)
    return [hear(process) for process in started][1]


# iperf3


def iperf(place: Machine, address: str, megabytes: int, *options: str) -> float:
    """Bytes a second that iperf3 moves to a machine, or from it with ``-R``."""
    amount = ("-n", str(megabytes * 10**6))
    command = ["ip", "netns", "exec", place.namespace, "iperf3", "-c", address, "-J"]
    found = subprocess.run([*command, *amount, *options], capture_output=True, text=True)
    figures = json.loads(found.stdout)
    if "error" in figures:
        raise SystemExit(f"iperf3: {figures['error']}")
    return figures["end"]["sum_received"]["bits_per_second"] / 8


# The comparison


def measure(gigabits: float, megabytes: int, rounds: int, others: int) -> dict[str, Any]:
    """Rates of both, round by round."""
    with two_machines() as network:
        lead, other = network.machines
        network.shape(gigabits)
        server = subprocess.Popen(
            ["ip", "netns", "exec", lead.namespace, "iperf3", "-s"], stdout=subprocess.DEVNULL
        )
        try:
            with workers(network, megabytes, others) as started:
                taken = []
                for _ in range(rounds):
                    up = iperf(other, lead.address, megabytes)
                    down = iperf(other, lead.address, megabytes, "-R")
                    taken.append({"iperf3": {"up": up, "down": down}, "ours": step(started)})
        finally:
            server.kill()
            server.wait()
    return {"gigabits": gigabits, "megabytes": megabytes, "rounds": taken}


def row(found: dict[str, Any], way: str) -> str:
    """One line of the table."""
    theirs = [r["iperf3"][way] for r in found["rounds"]]
    ours = [r["ours"][way] for r in found["rounds"]]
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    gigabits = [statistics.median(rates) * 8 / 1e9 for rates in (theirs, ours)]
    return (
        f"| {found['gigabits']:g} | {way} | {gigabits[0]:.2f} | {gigabits[1]:.2f} "
        f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
    )


def main() -> None:
    """Measures and prints a table, or is one of the two processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabits", type=float, nargs="+", default=[1, 10])
    parser.add_argument("--megabytes", type=int, default=256, help="that travel each way in a step")
    parser.add_argument("--others", type=int, default=7, help="devices of the second process")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, help="file for the figures, JSON")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker, options.coordinator, options.megabytes, options.others)
        return
    why = obstacle()
    if why is not None:
        raise SystemExit(f"benchmarks.network: {why}")
    about = environment()
    print(f"{describe(about)}; medians of {options.rounds} rounds.\n")
    print("| Gbit/s | way | iperf3, Gbit/s | tensors, Gbit/s | iperf3 ÷ tensors |")
    print("|--:|:--|--:|--:|--:|")
    links = []
    for gigabits in options.gigabits:
        links.append(measure(gigabits, options.megabytes, options.rounds, options.others))
        for way in ("up", "down"):
            print(row(links[-1], way), flush=True)
    if options.out is not None:
        found = {"environment": about, "links": links}
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
