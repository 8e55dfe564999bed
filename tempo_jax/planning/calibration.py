"""The cost model of enclaves on this machine: measured by one of each kind, and cached.

Untrusted in that a wrong figure makes a slow plan, never an insecure one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from tempo_jax.cache import cache_directory
from tempo_jax.planning.cost import CostModel
from tempo_jax.schemes import SchemeCost

_FORMAT = 3  # raise when what is measured changes its meaning


def machine_costs(kind: str, measure: Callable[[], dict[str, Any]]) -> CostModel:
    """The cost model of an enclave on this machine.

    Args:
      kind: of enclave; the same code is slower under Gramine.
      measure: has the enclave measure; called if its figures are not in the cache
        (``$XDG_CACHE_HOME/tempo_jax``, by default ``~/.cache/tempo_jax``).
    """
    path = cache_directory() / f"costs-{_machine(kind)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return cost_model(json.loads(path.read_text()))
    measured = measure()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: another process may be reading.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(measured, file)
        os.replace(file.name, path)
    return cost_model(measured)


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
    process, and so the enclave that it launches, may use, and JAX's version.
    """
    model = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        model = next((line for line in lines if line.startswith("model name")), "")
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    parts = [str(_FORMAT), kind, model, cores, jax.__version__]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
