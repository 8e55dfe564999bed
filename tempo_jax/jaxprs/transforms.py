"""Transformations that reach a shielded function from outside: `vmap`, `grad`, `eval_shape`.

Untrusted and pure. Serves JAX 0.10 to 0.12.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import jax
from jax._src import core as jax_core  # JAX 0.10-0.12: the trace that is current.
from jax._src.interpreters import ad, batching  # JAX 0.10-0.12: the tracers of grad and vmap.
from jax.core import ShapedArray
from jax.extend import core as jex_core
from jax.interpreters import mlir

_EVAL_SHAPE = inspect.unwrap(jax.eval_shape).__code__


def is_differentiated(x: Any) -> bool:
    """Whether a value is one that `grad`, `jvp` or the like follows."""
    return isinstance(x, (ad.JVPTracer, ad.LinearizeTracer))


@dataclasses.dataclass(frozen=True)
class Vmapped:
    """The innermost `vmap` around a call, and what it maps of the call's arguments.

    Attributes:
      trace: JAX's own record of it.
      values: the flat arguments as they are outside of it.
      axes: along which axis of each it maps, or None.
    """

    trace: Any
    values: Sequence[Any]
    axes: tuple[int | None, ...]

    @property
    def key(self) -> Any:
        """What has to agree for two calls to be the same function."""
        return self.axes, self.trace.axis_data.size, self._name

    @property
    def _name(self) -> Any:
        name = self.trace.axis_data.name
        return None if name is jax_core.no_axis_name else name

    def batch(self, function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """A function of flat arguments, mapped likewise; its results have the batch first."""
        axes, size, name = self.axes, self.trace.axis_data.size, self._name

        def batched(leaves: list[Any]) -> Any:
            def one(*mapped: Any) -> Any:
                rest = iter(mapped)
                return function(
                    [x if a is None else next(rest) for x, a in zip(leaves, axes, strict=True)]
                )

            mapped = [x for x, a in zip(leaves, axes, strict=True) if a is not None]
            along = tuple(a for a in axes if a is not None)
            return jax.vmap(one, in_axes=along, axis_size=size, axis_name=name)(*mapped)

        return batched

    def outside(self) -> AbstractContextManager[Any]:
        """While this lasts, the code runs as if it stood around the `vmap`."""
        return jax_core.set_current_trace(self.trace.parent_trace)

    def inside(self, x: Any) -> Any:
        """A result that has the batch first, as the `vmap` takes it."""
        return batching.BatchTracer(self.trace, x, 0)


def innermost_vmap(leaves: Sequence[Any]) -> Vmapped | None:
    """The `vmap` that is current, if it maps any of these values."""
    current = jax_core.trace_ctx.trace
    if not isinstance(current, batching.BatchTrace):
        return None
    found = [
        current.to_batch_info(x) if isinstance(x, batching.BatchTracer) else (x, None)
        for x in leaves
    ]
    axes = tuple(axis if isinstance(axis, int) else None for _, axis in found)
    return Vmapped(current, [x for x, _ in found], axes) if set(axes) - {None} else None


def under_eval_shape() -> bool:
    """Whether `jax.eval_shape` asks, so that nothing will run."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _EVAL_SHAPE:
        frame = frame.f_back
    return frame is not None


# A value of which only the type is known. JAX may keep what `eval_shape` traced and compile it
# later: it is then that the error is raised.
unknown_p = jex_core.Primitive("tempo_unknown")
unknown_p.def_abstract_eval(lambda *, aval, error: aval)


def unknown(shape: Sequence[int], dtype: Any, error: Exception) -> jax.Array:
    """An array that has no value; a program that needs one raises `error` when it is compiled."""
    return unknown_p.bind(aval=ShapedArray(tuple(shape), dtype), error=error)


def _raise(*_: Any, aval: Any, error: Exception) -> NoReturn:
    raise error


mlir.register_lowering(unknown_p, _raise)
