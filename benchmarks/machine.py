"""The machine and the versions that a figure holds for; every benchmark prints and keeps them."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
from collections.abc import Sequence
from typing import Any

from enclave_runtime.environment import ALLOCATOR_ENVIRONMENT

Json = dict[str, Any]


def environment() -> Json:
    """Returns the machine and the versions, without waking JAX's devices."""
    packages = ("jax", "jaxlib", "flax", "optax")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "allocator": ALLOCATOR_ENVIRONMENT,
    }


def _processor() -> str:
    information = pathlib.Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def describe(environment: Json, devices: Sequence[str] = ()) -> str:
    """One line on the machine, its accelerators and the versions, from `environment`."""
    machine = [f"{environment['processor']}, {environment['cores']} cores", *devices]
    versions = (f"{name} {version}" for name, version in environment["versions"].items())
    return f"{'; '.join(machine)}; {', '.join(versions)}"
