"""The cost model of enclaves on this machine: measured by one of each kind, and cached.

It is measured anew when what it depends on changes, and when runs disagree with it. Untrusted in
that a wrong figure makes a slow plan, never an insecure one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tempo_jax.cache import cache_directory
from tempo_jax.errors import CostFileError
from tempo_jax.planning.cost import CostModel
from tempo_jax.schemes import SchemeCost

_FORMAT = 4  # raise when what is measured changes its meaning
SHIPPED = "TEMPO_JAX_COSTS"  # the variable that names a file of figures
DISAGREES = 1.5  # times that runs, or another measurement, are off either way
KINDS = ("process", "gramine-direct", "gramine-sgx")


def machine_costs(kind: str, measure: Callable[[], dict[str, Any]]) -> CostModel:
    """The cost model of an enclave on this machine.

    Args:
      kind: of enclave; the same code is slower under Gramine.
      measure: has the enclave measure; called if its figures are not in the cache
        (``$XDG_CACHE_HOME/tempo_jax``, by default ``~/.cache/tempo_jax``), or are stale there.

    Raises:
      CostFileError: ``$TEMPO_JAX_COSTS`` names no file of figures.
    """
    shipped = shipped_costs()
    if shipped is not None:
        return shipped
    path, old = _cached(kind), None
    with contextlib.suppress(OSError, ValueError, TypeError):
        old = _read(path)
        if not old.stale:
            return old
    measured = {**measure(), "measured_at": int(time.time())}
    if old is not None:
        measured["confirmed"] = _alike(old, cost_model(measured))
    with contextlib.suppress(OSError):
        _write(path, measured)
    return cost_model(measured)


def doubt(kind: str, used: CostModel) -> str:
    """Has the next enclave of a kind measure anew, since runs disagree with the figures.

    If that comes out alike, it is not the figures that are off but what is estimated from them, and
    they are not doubted again.

    Args:
      kind: of enclave.
      used: the figures, which another process may have replaced by now.

    Returns:
      What becomes of them, as a sentence.
    """
    if os.environ.get(SHIPPED):
        return f"Those are of the file that ${SHIPPED} names, which stays as it is."
    path = _cached(kind)
    try:
        model = _read(path)
        if model.measured_at == used.measured_at and not model.confirmed:
            _write(path, {**dataclasses.asdict(model), "stale": True})
            return f"They are measured anew when the next enclave is launched ({path})."
    except (OSError, ValueError, TypeError):
        return "They are in no cache."
    if model.confirmed:
        return "Two measurements agree on them, so that it is the estimate that is off."
    return "They have been measured anew since."


def shipped_costs() -> CostModel | None:
    """The figures in the file that ``$TEMPO_JAX_COSTS`` names, or None where it names none.

    A copy of what `cached_costs` finds, kept with a project, gives the same plans on any machine.

    Raises:
      CostFileError: the file cannot be read, or has other content.
    """
    path = os.environ.get(SHIPPED)
    if not path:
        return None
    try:
        return _read(Path(path))
    except (OSError, ValueError, TypeError) as error:
        raise CostFileError(
            f"${SHIPPED} names {path}, which has no figures of this version ({error}). Copy one "
            f"of the files that `tempo-jax doctor` names, or unset the variable to have the "
            "enclave measured."
        ) from error


def cached_costs() -> dict[Path, CostModel]:
    """The figures that were measured for this machine and version, of each kind of enclave."""
    found = {}
    for kind in KINDS:
        path = _cached(kind)
        with contextlib.suppress(OSError, ValueError, TypeError):
            found[path] = _read(path)
    return found


def described(model: CostModel) -> str:
    """The rates and their age, in a line."""
    rates = [f"{model.dot_flops / 1e9:.0f} GFLOP/s inside"]
    rates += [f"{cost.blinding:.1f} ns an element by {n}" for n, cost in model.schemes.items()]
    rates.append(f"{model.nanoseconds_per_byte:.2f} ns to move a byte")
    age = "of unknown age"
    if model.measured_at:
        days = int(max(time.time() - model.measured_at, 0) / 86400)
        age = f"measured {days} days ago" if days else "measured today"
    if model.stale:
        age += ", to be measured anew by the next launch, since runs disagreed"
    return f"{', '.join(rates)}; {age}"


def _cached(kind: str) -> Path:
    return cache_directory() / f"costs-{_machine(kind)}.json"


def _write(path: Path, measured: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: another process may be reading.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(measured, file)
    os.replace(file.name, path)


def _alike(one: CostModel, other: CostModel) -> bool:
    """Whether no rate of two measurements differs by `DISAGREES` times."""

    def rates(model: CostModel) -> list[float]:
        each = [cost.blinding for _, cost in sorted(model.schemes.items())]
        return [model.dot_flops, model.convolution_flops, model.nanoseconds_per_byte, *each]

    pairs = zip(rates(one), rates(other), strict=True)
    return all(max(a, b) <= DISAGREES * min(a, b) for a, b in pairs)


def _read(path: Path) -> CostModel:
    """The figures in a file; see `cost_model`."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return cost_model(content)


def cost_model(measured: dict[str, Any]) -> CostModel:
    """The cost model of what an enclave measured.

    Raises:
      ValueError: the figures are of another version.
    """
    names = {f.name for f in dataclasses.fields(CostModel)}
    if not set(measured) <= names:
        raise ValueError("figures of another version")
    schemes = {name: SchemeCost(**cost) for name, cost in measured.get("schemes", {}).items()}
    return CostModel(**{**measured, "schemes": schemes})


def _machine(kind: str) -> str:
    """Names what the figures depend on.

    That is the enclave's kind, the processor, how many there are and how many of them this
    process, and so the enclave that it launches, may use, and the versions of JAX and this
    library.
    """
    from tempo_jax import __version__  # It imports this module.

    model = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        model = next((line for line in lines if line.startswith("model name")), "")
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    parts = [str(_FORMAT), kind, model, cores, jax.__version__, __version__]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
