"""Which equation of a program makes the first NaN.

Untrusted and pure. Serves JAX 0.10 to 0.12.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from tempo_jax.jaxprs.equations import bind, inlined_body, source
from tempo_jax.jaxprs.primitives import is_debugging
from tempo_jax.jaxprs.types import ClosedJaxpr, Jaxpr, Literal

NONE = -1


def any_nan(x: Any) -> Any:
    """Whether an array has a NaN, bool[]."""
    return jnp.any(jnp.isnan(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(False)


def first_nan(closed: ClosedJaxpr, arguments: Sequence[Any]) -> tuple[Any, list[str]]:
    """Evaluates a program and finds the first equation that makes a NaN of what has none.

    Calls are looked into; a loop or a `cond` counts as one equation.

    Args:
      closed: the program.
      arguments: its flat inputs.

    Returns:
      The equation's number, int32[], or `NONE`; and for each number what to call it.
    """
    search = _NaNSearch()
    pairs = [(x, any_nan(x)) for x in (*closed.consts, *arguments)]
    variables = (*closed.jaxpr.constvars, *closed.jaxpr.invars)
    search.evaluate(closed.jaxpr, dict(zip(variables, pairs, strict=True)), backward=False)
    return search.first, search.names


class _NaNSearch:
    """The first equation so far; values go in pairs with whether they have a NaN."""

    def __init__(self) -> None:
        self.first: Any = jnp.int32(NONE)
        self.names: list[str] = []

    def evaluate(
        self, jaxpr: Jaxpr, env: dict[Any, tuple[Any, Any]], backward: bool
    ) -> list[tuple[Any, Any]]:
        def read(v: Any) -> tuple[Any, Any]:
            return (v.val, any_nan(jnp.asarray(v.val))) if isinstance(v, Literal) else env[v]

        for eqn in jaxpr.eqns:
            if is_debugging(eqn):
                continue
            operands = [read(v) for v in eqn.invars]
            # The backward pass has the lines of the forward one.
            transposed = backward or "transpose(" in str(eqn.source_info.name_stack)
            body = inlined_body(eqn)
            if body is not None:
                consts = [(x, any_nan(x)) for x in body.consts]
                inner = dict(zip(body.jaxpr.constvars, consts, strict=True))
                inner.update(zip(body.jaxpr.invars, operands, strict=True))
                results = self.evaluate(body.jaxpr, inner, transposed)
            else:
                values = bind(eqn, [x for x, _ in operands])
                flags = [any_nan(x) for x in values]
                self._note(eqn, flags, [flag for _, flag in operands], transposed)
                results = list(zip(values, flags, strict=True))
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _note(self, eqn: Any, made: Sequence[Any], had: Sequence[Any], backward: bool) -> None:
        anywhere = [jnp.any(jnp.stack(flags)) if flags else False for flags in (made, had)]
        new = jnp.logical_and(anywhere[0], jnp.logical_not(anywhere[1]))
        number = jnp.int32(len(self.names))
        self.first = jnp.where(jnp.logical_and(self.first == NONE, new), number, self.first)
        where = ", in the backward pass" if backward else ""
        self.names.append(f"`{eqn.primitive.name}` at {source(eqn)}{where}")
