"""Tracing functions to jaxprs.

Untrusted and pure. Serves JAX 0.10 to 0.12.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax._src import api_util as jax_api_util  # JAX 0.10-0.12: what `debug_nans` raises.
from jax._src import config as jax_config  # JAX 0.10-0.12: flags for one thread.
from jax._src import sharding_impls as jax_sharding  # JAX 0.10-0.12: the mesh of `set_mesh`.
from jax.extend import core as jex_core

from tempo_jax.jaxprs.types import ClosedJaxpr

# The devices of the mesh of `jax.set_mesh`: a setting in JAX 0.10, an object of its own later.
_of_devices = getattr(jax_sharding, "device_context", None) or cast(Any, jax_config).device_context


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


def settings_key() -> Any:
    """What of JAX's settings changes the meaning of a program that is traced now; hashable."""
    return jax_config.trace_context()


@contextlib.contextmanager
def without_mesh() -> Iterator[None]:
    """While this lasts, no mesh of `jax.set_mesh` is around what is traced or compiled."""
    devices = _of_devices.swap_local(jax.sharding.Mesh(np.empty((), object), ()))
    try:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            yield
    finally:
        _of_devices.set_local(devices)


def mesh_around() -> int:
    """How many devices the mesh of `jax.set_mesh` has that the caller is under; 0 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 0 if mesh.empty else mesh.size


def local_settings() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """This thread's own settings (`with jax.enable_x64(True)`, …), for a thread that works for it.

    Returns:
      What makes a context in which they hold.
    """
    own = [(state, state.get_local()) for state in jax_config.config_states.values()]
    own = [(state, value) for state, value in own if value is not jax_config.config_ext.unset]

    @contextlib.contextmanager
    def held() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for state, value in own:
                stack.enter_context(state(value))
            yield

    return held


def without_internals(error: BaseException) -> BaseException:
    """An error as `jit` would raise it.

    Under `jax.debug_nans` a compiled program raises an internal error, which `jit` itself catches.
    """
    if not isinstance(error, jax_api_util.InternalFloatingPointError):
        return error
    return FloatingPointError(
        f"invalid value ({error.ty}) in what the host sees of a shielded function: what it "
        "reveals, or what lies blinded on the devices"
    )


def under_trace() -> bool:
    """Whether the caller is being traced by `jit`, `scan` or the like."""
    return jex_core.unsafe_am_i_under_a_jit_DO_NOT_USE()  # pyright: ignore[reportPrivateImportUsage]
