"""How an enclave's process is started: as an ordinary process, or under Gramine.

Untrusted: whoever verifies an enclave does not rely on how it was started.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, get_args

import enclave_runtime
from enclave_runtime.environment import ENCLAVE_ENVIRONMENT, ENCLAVE_MODULE
from tempo_jax.cache import cache_directory
from tempo_jax.errors import LaunchError

EnclaveKind = Literal["process", "gramine-direct", "gramine-sgx"]
KINDS: tuple[EnclaveKind, ...] = get_args(EnclaveKind)

APPLICATION = "enclave"  # what `python -m enclave_runtime.gramine` names what it builds
SIGNATURE = f"{APPLICATION}.sig"
# Settings that are not the enclave's: those for the host's devices would mislead it, and others
# write programs or compiled code to files, show them, or keep the process when it should end.
_NOT_INHERITED = ("JAX_", "LIBTPU_", "NUMBA_", "PYTHON", "TF_", "XLA_")
# Of these, what says where code is found or cached: Numba's cache holds this library's own kernels.
_INHERITED = frozenset(
    {
        *("NUMBA_CACHE_DIR", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONNOUSERSITE"),
        *("PYTHONPATH", "PYTHONPYCACHEPREFIX", "PYTHONUSERBASE"),
    }
)


@dataclasses.dataclass(frozen=True)
class Command:
    """What to start.

    Attributes:
      arguments: of the process.
      environment: all of its variables; under Gramine the manifest's reach the enclave, not these.
      directory: where it starts; None is where this process is.
      kind: what it starts.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str]
    directory: Path | None = None
    kind: EnclaveKind = "process"


def command(
    kind: EnclaveKind = "process", directory: str | os.PathLike[str] | None = None
) -> Command:
    """What starts an enclave of a kind.

    Args:
      kind: ``process`` protects only where the operating system does; ``gramine-direct`` is
        Gramine without SGX, which protects no more and behaves like it; ``gramine-sgx`` protects.
      directory: what ``python -m enclave_runtime.gramine build`` made; None uses one in the
        user's cache, built on first use and again when what it was built from has changed.

    Raises:
      LaunchError: this machine cannot start it, or the directory is not built.
    """
    if kind not in KINDS:
        raise LaunchError(f"an enclave of kind {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "process":
        if directory is not None:
            raise LaunchError(
                "an enclave of kind 'process' runs from no directory; pass kind='gramine-direct' "
                "or kind='gramine-sgx', or leave the directory out"
            )
        return Command((sys.executable, "-m", ENCLAVE_MODULE), _environment())
    loader = shutil.which(kind)
    if loader is None:
        raise LaunchError(
            f"{kind} is not on the PATH: install Gramine 1.9 or later "
            "(https://gramine.readthedocs.io), or launch with kind='process', which protects "
            "only where the operating system does"
        )
    built = _cached() if directory is None else Path(directory).expanduser().resolve()
    fix = f"`python -m enclave_runtime.gramine build --out {built}`"
    if not (built / f"{APPLICATION}.manifest").exists():
        raise LaunchError(f"{built} holds no enclave for Gramine: build one with {fix}")
    signature = (f"{APPLICATION}.manifest.sgx", SIGNATURE)
    if kind == "gramine-sgx" and not all((built / name).exists() for name in signature):
        raise LaunchError(
            f"the enclave in {built} is not signed: make a key with `gramine-sgx-gen-private-key` "
            f"and build again with {fix}"
        )
    _check(built)
    return Command((loader, APPLICATION), dict(os.environ), built, kind)


def _environment() -> dict[str, str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _INHERITED or not name.startswith(_NOT_INHERITED)
    }
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = _root() if not path else os.pathsep.join((_root(), path))
    return {**environment, **ENCLAVE_ENVIRONMENT}


def _root() -> str:
    return str(Path(enclave_runtime.__file__).resolve().parent.parent)


def _cached() -> Path:
    directory = cache_directory() / "gramine"
    if not (directory / f"{APPLICATION}.manifest").exists() or not _is_current(directory):
        _build(directory)
    return directory


def _check(directory: Path) -> None:
    """Holds the manifests against the rules; Gramine itself holds the files against them."""
    check = [sys.executable, "-m", "enclave_runtime.gramine", "check", "--manifests-only"]
    run = subprocess.run(
        [*check, str(directory)], env=_environment(), capture_output=True, text=True
    )
    if run.returncode:
        raise LaunchError(
            f"the enclave in {directory} breaks rules; build it again:\n"
            f"{run.stdout.strip() or run.stderr.strip()}"
        )


def _is_current(directory: Path) -> bool:
    """Whether the enclave's source is what the directory was built from."""
    build = [sys.executable, "-m", "enclave_runtime.gramine", "current", str(directory)]
    return not subprocess.run(build, env=_environment(), capture_output=True).returncode


def _build(directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Built aside and moved when finished, so that an interrupted build is never taken for one.
    with tempfile.TemporaryDirectory(dir=directory.parent) as aside:
        fresh = Path(aside) / "built"
        build = [sys.executable, "-m", "enclave_runtime.gramine", "build", "--out", str(fresh)]
        run = subprocess.run(build, env=_environment(), capture_output=True, text=True)
        if run.returncode:
            raise LaunchError(f"the enclave for Gramine could not be built: {run.stderr.strip()}")
        shutil.rmtree(directory, ignore_errors=True)
        try:
            fresh.rename(directory)
        except OSError:
            # Another process was faster, and what it built does as well.
            if not (directory / f"{APPLICATION}.manifest").exists():
                raise
