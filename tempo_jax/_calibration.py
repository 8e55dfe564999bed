"""The cost model of this machine: measured by the enclave once, and cached.

Untrusted in that a wrong figure makes a slow plan, never an insecure one. Called by `_shield`.
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

from tempo_jax._cache import cache_directory
from tempo_jax._cost import CostModel

_FORMAT = 2  # raise when what is measured changes its meaning


def machine_costs(measure: Callable[[], dict[str, Any]]) -> CostModel:
    """The cost model of this machine.

    Args:
      measure: has the enclave measure; called if this machine's figures are not in the cache
        (``$XDG_CACHE_HOME/tempo_jax``, by default ``~/.cache/tempo_jax``).
    """
    path = cache_directory() / f"costs-{_machine()}.json"
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
    return CostModel(**measured)


def _machine() -> str:
    """Names what the figures depend on: processor, its count, and JAX's version."""
    model = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        model = next((line for line in lines if line.startswith("model name")), "")
    parts = [str(_FORMAT), model, str(os.cpu_count()), jax.__version__]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
