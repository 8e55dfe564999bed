"""Calls from a compiled program into Python, whose arguments are there when the call begins.

`jax.pure_callback` hands its function JAX arrays that it has only begun to make: above about
100 KB, reading one waits for a thread of XLA's pool, while that pool's threads may all be inside
such functions (jax-ml/jax issues 24255 and 25861). What is called here gets views of XLA's own
buffers and waits for nothing. Untrusted. Serves JAX 0.10 to 0.12.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import callback as jax_callback  # JAX 0.10-0.12: the lowering of callbacks.
from jax.core import ShapedArray
from jax.extend import core as jex_core
from jax.interpreters import mlir

Function = Callable[..., Sequence[np.ndarray]]

call_p = jex_core.Primitive("tempo_call")
call_p.multiple_results = True


def call(
    function: Function, results: Sequence[jax.ShapeDtypeStruct], *arguments: Any
) -> list[jax.Array]:
    """Calls a Python function when the program around it runs.

    Like a `jax.pure_callback` it may be dropped or repeated, and must not raise unless the program
    may fail.

    Args:
      function: takes read-only NumPy arrays that are valid while it runs, and returns NumPy arrays,
        which are copied before it may be called again.
      results: shapes and dtypes of what it returns.
      *arguments: JAX arrays; under `jax.shard_map` each device's own part.
    """
    types = tuple(ShapedArray(r.shape, r.dtype) for r in results)
    return call_p.bind(*arguments, function=function, results=types)


@call_p.def_abstract_eval
def _(*_: Any, function: Function, results: tuple[ShapedArray, ...]) -> tuple[ShapedArray, ...]:
    return results


def _lower(ctx: Any, *operands: Any, function: Function, results: tuple[ShapedArray, ...]) -> Any:
    out, _, _ = jax_callback.emit_python_callback(
        ctx,
        lambda *arrays: tuple(function(*arrays)),
        None,
        list(operands),
        ctx.avals_in,
        ctx.avals_out,
        has_side_effect=False,
        returns_token=False,
        sharding=jax_callback._callback_op_sharding(
            ctx.module_context.axis_context, None, ctx.avals_out
        ),
    )
    return out


# As for `pure_callback`, equal calls are lowered each on its own.
mlir.register_lowering(call_p, _lower, cacheable=False)
