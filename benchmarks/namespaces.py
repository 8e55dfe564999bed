"""Two machines on one: network namespaces joined by a cable whose speed can be chosen.

Needs root. Each has an address, shares no loopback with the other and, started by `command`, no
`/dev/shm`. What runs in them is seen by this machine as ever.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Own shared memory, and a name of the machine that leads to its own address, as libraries look for.
_ENTER = 'mount -t tmpfs tmpfs /dev/shm && mount --bind "$1" /etc/hosts && shift && exec "$@"'


class Machine(NamedTuple):
    """One end of the cable.

    Attributes:
      namespace: its name.
      address: its own.
      cable: name of its end, in it.
      hosts: file with the names that it knows.
    """

    namespace: str
    address: str
    cable: str
    hosts: Path

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What starts a program there, as the process that is started."""
        inside = ["unshare", "--mount", "sh", "-c", _ENTER, "sh", str(self.hosts), *arguments]
        return ["ip", "netns", "exec", self.namespace, *inside]

    def processes(self) -> list[int]:
        """Those that run there."""
        command = ("ip", "netns", "pids", self.namespace)
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        return [int(process) for process in found.stdout.split()]

    def run(self, *arguments: str) -> None:
        """Runs a command of the system there."""
        _run("ip", "netns", "exec", self.namespace, *arguments)


class Network(NamedTuple):
    """Two machines and the cable between them."""

    machines: tuple[Machine, Machine]

    def shape(self, gigabits: float) -> None:
        """Lets so many Gbit/s through, each way; with as long a queue as 10 ms fill."""
        burst = max(int(gigabits * 1e9 / 8 / 1000), 1 << 16)
        limits = ["burst", str(burst), "limit", str(10 * burst)]
        for machine in self.machines:
            place = ["dev", machine.cable, "root", "tbf", "rate", f"{gigabits:g}gbit"]
            machine.run("tc", "qdisc", "replace", *place, *limits)

    def cut(self) -> None:
        """Takes the cable out at the second machine."""
        other = self.machines[1]
        other.run("ip", "link", "set", other.cable, "down")


def _run(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True, text=True)


def obstacle() -> str | None:
    """Why no two machines can be made here; None if they can."""
    if os.geteuid():
        return "network namespaces need root"
    name = f"tempo-{os.getpid()}-try"
    try:
        _run("ip", "netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespace can be made: {error}"
    try:
        _run("ip", "netns", "exec", name, "unshare", "--mount", "mount", "-t", "tmpfs", "x", "/mnt")
    except subprocess.CalledProcessError as error:
        return f"nothing can be mounted in a namespace: {error}"
    finally:
        _run("ip", "netns", "delete", name)
    return None


@contextlib.contextmanager
def two_machines() -> Iterator[Network]:
    """Makes them, and takes them away with all that still runs in them."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        machines = []
        for number in (1, 2):
            name = f"tempo-{os.getpid()}-{number}"
            address, hosts = f"10.213.0.{number}", folder / f"hosts-{number}"
            hosts.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "delete", name)
            machines.append(Machine(name, address, f"cable{number}", hosts))
            stack.callback(_end_all, machines[-1])
        one, two = machines
        ends = ("link", "add", one.cable, "netns", one.namespace, "type", "veth")
        _run("ip", *ends, "peer", "name", two.cable, "netns", two.namespace)
        for machine in machines:
            machine.run("ip", "address", "add", f"{machine.address}/24", "dev", machine.cable)
            for link in ("lo", machine.cable):
                machine.run("ip", "link", "set", link, "up")
        yield Network((one, two))


def _end_all(machine: Machine) -> None:
    for process in machine.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
