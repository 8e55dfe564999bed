"""Tracing functions to jaxprs.

Untrusted and pure. Serves JAX 0.10 to 0.12.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
from jax._src import config as jax_config  # JAX 0.10-0.12: flags for one thread.
from jax.extend import core as jex_core

from tempo_jax.jaxprs.types import ClosedJaxpr


def trace(
    function: Callable[..., Any], avals: Sequence[Any], named: Mapping[str, Any] | None = None
) -> ClosedJaxpr:
    """Traces a function to a jaxpr of flat inputs.

    Args:
      function: what to trace; it returns flat arrays.
      avals: its positional arguments, or trees of such.
      named: its keyword arguments.
    """
    return cast(ClosedJaxpr, jax.make_jaxpr(function)(*avals, **(named or {})))


def without_locations() -> contextlib.AbstractContextManager[None]:
    """Leaves source files and lines out of what is lowered, so that equal programs are equal bytes.

    They would differ between machines, and would tell a reader where the code lies.
    """
    return jax_config.traceback_in_locations_limit(0)


def under_trace() -> bool:
    """Whether the caller is being traced by `jit`, `scan` or the like."""
    return jex_core.unsafe_am_i_under_a_jit_DO_NOT_USE()  # pyright: ignore[reportPrivateImportUsage]
