"""What on this machine tempo_jax needs, and what it finds: for ``tempo-jax doctor``.

Each check is a function of where it looks and says, besides what is there, what to do. `fail` means
that nothing runs, `warn` that something the user may want does not: a GPU, or an enclave that
protects. It only looks; no enclave is started.
"""

from __future__ import annotations

import ctypes.util
import dataclasses
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from enclave_runtime.protocol.memory import DIRECTORY

OLDEST_JAX = (0, 10, 2)
OLDEST_GLIBC = (2, 27)  # jaxlib's wheels are `manylinux_2_27`
SHARED_BYTES = 1 << 30  # of /dev/shm; a step of the larger examples takes some 0.3 GB each way
PROCESS_MEMORY = 4 << 30  # for host and enclave of the examples
SGX_MEMORY = 8 << 30  # the least size of an enclave, all of it committed at its start

FindingStatus = Literal["ok", "warn", "fail"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check's result.

    Attributes:
      name: of what was checked.
      status: `ok`, `warn` (something optional is missing) or `fail` (nothing works without it).
      detail: what is there.
      fix: what to do; empty if there is nothing to do.
    """

    name: str
    status: FindingStatus
    detail: str
    fix: str = ""


def diagnose() -> list[Finding]:
    """Checks this machine; never raises for what it finds."""
    checks: Sequence[Callable[[], Finding]] = (
        _system,
        _jax,
        _devices,
        _glibc,
        _shared_memory,
        _memory,
        _gramine,
        _sgx_devices,
        _quoting,
        _signing_key,
        _rates,
    )
    return [check() for check in checks]


def format_findings(findings: Sequence[Finding]) -> str:
    """The findings as lines for a terminal, each fix below its finding."""
    width = max((len(f.name) for f in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<4}  {finding.name:<{width}}  {finding.detail}")
        if finding.fix:
            lines.append(f"{'':{width + 8}}-> {finding.fix}")
    return "\n".join(lines)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _system() -> Finding:
    detail = f"{sys.platform} {platform.machine()}, Python {platform.python_version()}"
    if sys.platform != "linux":
        return Finding(
            "system", "fail", detail, "use Linux: the enclave shares memory through /dev/shm"
        )
    if platform.machine() != "x86_64":
        return Finding("system", "warn", detail, "SGX needs x86_64; kind='process' does not")
    return Finding("system", "ok", detail)


def _rates() -> Finding:
    from tempo_jax.errors import CostFileError
    from tempo_jax.planning import calibration

    try:
        shipped = calibration.shipped_costs()
    except CostFileError as error:
        return Finding("rates", "warn", str(error), f"unset {calibration.SHIPPED}")
    if shipped is not None:
        path = os.environ[calibration.SHIPPED]
        return Finding("rates", "ok", f"{path}: {calibration.described(shipped)}")
    found = calibration.cached_costs()
    if not found:
        return Finding("rates", "ok", "not measured yet: the first plan measures them")
    lines = [f"{path}: {calibration.described(model)}" for path, model in found.items()]
    return Finding("rates", "ok", "; ".join(lines))


def _jax() -> Finding:
    try:
        import jax
        from jaxlib.version import __version__ as jaxlib_version
    except ImportError as error:
        return Finding("jax", "fail", str(error), "pip install -U tempo-jax")
    oldest = ".".join(map(str, OLDEST_JAX))
    detail = f"{jax.__version__}, jaxlib {jaxlib_version}"
    if _version(jax.__version__) < OLDEST_JAX:
        fix = f"pip install -U 'jax>={oldest}'"
        return Finding("jax", "fail", f"{detail}, expected {oldest} or later", fix)
    return Finding("jax", "ok", detail)


def _devices() -> Finding:
    try:
        import jax

        kinds = [f"{device.platform}:{device.device_kind}" for device in jax.devices()]
    except (ImportError, RuntimeError) as error:
        fix = "install a jaxlib for your accelerator, or set JAX_PLATFORMS=cpu"
        return Finding("devices", "fail", str(error).splitlines()[0], fix)
    detail = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    if all(kind.startswith("cpu:") for kind in kinds):
        fix = "for a GPU install JAX's own build, for example pip install -U 'jax[cuda12]'"
        return Finding("devices", "warn", f"{detail}: products run on the host's processors", fix)
    return Finding("devices", "ok", detail)


def _glibc() -> Finding:
    # confstr raises where the C library does not know the name.
    try:
        name = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):
        name = ""
    if not name.startswith("glibc"):
        fix = "use a distribution with glibc: jaxlib's wheels need it"
        return Finding("glibc", "fail", name or "another C library", fix)
    if _version(name) < OLDEST_GLIBC:
        fix = "use a distribution of 2018 or later"
        return Finding("glibc", "fail", f"{name}, expected 2.27 or later", fix)
    return Finding("glibc", "ok", name)


def _shared_memory(directory: str = DIRECTORY) -> Finding:
    name = "shared memory"
    if not os.path.isdir(directory):
        fix = f"mount -t tmpfs tmpfs {directory}"
        return Finding(name, "fail", f"{directory} does not exist", fix)
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        fix = f"chmod 1777 {directory}"
        return Finding(name, "fail", f"{directory} cannot be written by this user", fix)
    status = os.statvfs(directory)
    free, size = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    detail = f"{directory}: {_gigabytes(free)} of {_gigabytes(size)} free"
    if free < SHARED_BYTES:
        fix = f"mount -o remount,size=4G {directory}, or docker run --shm-size=4g"
        return Finding(name, "warn", f"{detail}; large steps need more", fix)
    return Finding(name, "ok", detail)


def _memory(path: str = "/proc/meminfo") -> Finding:
    try:
        text = Path(path).read_text()
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return Finding("memory", "warn", f"{path} does not say", "")
    detail = f"{_gigabytes(free)} available"
    if free < PROCESS_MEMORY:
        fix = "free memory or use small models: the examples need about 4 GB"
        return Finding("memory", "warn", detail, fix)
    if free < SGX_MEMORY:
        fix = "kind='gramine-sgx' commits the enclave's whole size, at least 8 GB, at its start"
        return Finding("memory", "warn", f"{detail}, enough without SGX", fix)
    return Finding("memory", "ok", detail)


def _gramine(path: str | None = None) -> Finding:
    tools = ("gramine-direct", "gramine-sgx", "gramine-manifest", "gramine-sgx-sign")
    missing = [tool for tool in tools if shutil.which(tool, path=path) is None]
    if not missing:
        return Finding("gramine", "ok", f"{', '.join(tools)} on the PATH")
    found = [tool for tool in tools if tool not in missing]
    detail = f"not on the PATH: {', '.join(missing)}" + (
        f"; found: {', '.join(found)}" * bool(found)
    )
    if "gramine-direct" in found and "gramine-sgx" in missing:
        # As a build of Gramine without SGX installs it; it runs, and manifests are rendered here.
        detail = f"direct only, without SGX; {detail}"
        fix = (
            "kind='gramine-direct' starts and protects where the operating system does; for "
            "kind='gramine-sgx' install Gramine 1.9 or later with SGX "
            "(https://gramine.readthedocs.io)"
        )
    elif "gramine-sgx" in found:
        fix = (
            "enclaves that are built and signed start; to build them here, or to try them without "
            "SGX, install all of Gramine 1.9 or later (https://gramine.readthedocs.io)"
        )
    else:
        fix = (
            "install Gramine 1.9 or later (https://gramine.readthedocs.io); without it only "
            "kind='process' starts, which protects where the operating system does"
        )
    return Finding("gramine", "warn", detail, fix)


def _sgx_devices(directory: str = "/dev", cpuinfo: str = "/proc/cpuinfo") -> Finding:
    name = "sgx"
    nodes = [os.path.join(directory, node) for node in ("sgx_enclave", "sgx_provision")]
    missing = [node for node in nodes if not os.path.exists(node)]
    if missing:
        try:
            flags = re.search(r"^flags\s*:.*\bsgx\b", Path(cpuinfo).read_text(), re.MULTILINE)
        except OSError:
            flags = None
        detail = f"no {', '.join(missing)}; the processor {'has' if flags else 'shows no'} SGX"
        fix = (
            "use a kernel of 5.11 or later and pass the nodes into containers"
            if flags
            else "use a machine with SGX and enable it in the firmware; kind='gramine-direct' and "
            "'process' start without it and prove nothing"
        )
        return Finding(name, "warn", detail, fix)
    denied = [node for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if denied:
        fix = "add this user to the nodes' groups (sgx, sgx_prv), then log in again"
        return Finding(name, "warn", f"this user may not open {', '.join(denied)}", fix)
    return Finding(name, "ok", f"{' and '.join(nodes)} can be opened")


def _quoting(
    socket: str = "/var/run/aesmd/aesm.socket",
    find: Callable[[str], str | None] = ctypes.util.find_library,
) -> Finding:
    name = "quotes"
    absent = [] if os.path.exists(socket) else [f"{socket} (service aesmd)"]
    absent += [f"lib{lib}" for lib in ("sgx_dcap_ql", "dcap_quoteprov") if find(lib) is None]
    if not absent:
        return Finding(name, "ok", "aesmd and the DCAP libraries are there")
    fix = (
        "for attestation install Intel's sgx-aesm-service, libsgx-aesm-ecdsa-plugin, "
        "libsgx-dcap-ql and libsgx-dcap-default-qpl (or your cloud's provider), and start aesmd"
    )
    return Finding(name, "warn", f"missing: {', '.join(absent)}", fix)


def _signing_key(path: str = "~/.config/gramine/enclave-key.pem") -> Finding:
    key = Path(path).expanduser()
    if not key.exists():
        fix = "gramine-sgx-gen-private-key; only who builds enclaves for SGX needs one"
        return Finding("signing key", "warn", f"no {key}", fix)
    if key.stat().st_mode & 0o077:
        return Finding("signing key", "warn", f"{key} can be read by others", f"chmod 600 {key}")
    return Finding("signing key", "ok", str(key))


def _gigabytes(size: int) -> str:
    return f"{size / (1 << 30):.1f} GB"
