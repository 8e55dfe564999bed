"""Calls from a compiled program into Python, whose arguments are there when the call begins.

`jax.pure_callback` hands its function JAX arrays that it has only begun to make: above about
100 KB, reading one waits for a thread of XLA's pool, while that pool's threads may all be inside
such functions (jax-ml/jax issues 24255 and 25861). What is called here gets views of XLA's own
buffers and waits for nothing. Untrusted. Serves JAX 0.10 to 0.12.

What a function returns is brought to the dtypes that the settings of XLA's own thread allow, which
knows of no `with jax.enable_x64(True)`: there results of 64 bits come as words of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import callback as jax_callback  # JAX 0.10-0.12: the lowering of callbacks.
from jax._src import config as jax_config  # JAX 0.10-0.12: what holds in threads that set nothing.
from jax.core import ShapedArray
from jax.extend import core as jex_core
from jax.interpreters import ad, batching, mlir

from tempo_jax.errors import UnsupportedError

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
    wide = [not jax_config.enable_x64.get_global() and _is_wide(r.dtype) for r in results]

    def function_in_words(*given: np.ndarray) -> list[np.ndarray]:
        returned = zip(function(*given), wide, strict=True)
        return [_words(value) if split else value for value, split in returned]

    types = tuple(
        ShapedArray((*r.shape, np.dtype(r.dtype).itemsize // 4), np.uint32)
        if split
        else ShapedArray(r.shape, r.dtype)
        for r, split in zip(results, wide, strict=True)
    )
    out = call_p.bind(
        *arguments, function=function_in_words if any(wide) else function, results=types
    )
    return [
        _from_words(value, r.dtype) if split else value
        for value, r, split in zip(out, results, wide, strict=True)
    ]


def _is_wide(dtype: Any) -> bool:
    dtype = np.dtype(dtype)
    return dtype.itemsize >= 8 and dtype.kind in "iufc" and dtype != np.complex64


def _words(value: np.ndarray) -> np.ndarray:
    """The words of 32 bits of each element, along a new last axis."""
    flat = np.ascontiguousarray(value).reshape(-1)  # which gives a scalar an axis
    return flat.view(np.uint32).reshape(*np.shape(value), flat.itemsize // 4)


def _from_words(words: jax.Array, dtype: Any) -> jax.Array:
    if np.dtype(dtype) == np.complex128:
        parts = words.reshape(*words.shape[:-1], 2, 2)
        real, imaginary = jnp.moveaxis(lax.bitcast_convert_type(parts, np.float64), -1, 0)
        return lax.complex(real, imaginary)
    return lax.bitcast_convert_type(words, dtype)


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


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedError(
        "vmap or grad reached a shielded function through a surrounding jit or loop, where only "
        "its visits to the enclave are left. Put the transformation inside: "
        "`tempo.shield(jax.vmap(f))`, `tempo.shield(jax.grad(f))`."
    )


ad.primitive_jvps[call_p] = _refuse
batching.primitive_batchers[call_p] = _refuse


# As for `pure_callback`, equal calls are lowered each on its own.
mlir.register_lowering(call_p, _lower, cacheable=False)
