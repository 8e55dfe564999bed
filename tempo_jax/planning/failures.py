"""Run-time checks that become a result: which check of a program failed first.

A compiled program cannot raise, so a check of Equinox (`error_if`) calls back into Python where it
fails. Here what it finds is threaded through the program, as `jax.experimental.checkify` does, so
that whoever learns the result can raise. Untrusted and pure. Serves JAX 0.10 to 0.12.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as prims

from tempo_jax.jaxprs.equations import (
    at_source_of,
    bind,
    equations,
    forward_only,
    inlined_body,
    scan_counts,
    source_outside,
    subjaxprs,
)
from tempo_jax.jaxprs.flatten import failed
from tempo_jax.jaxprs.primitives import is_written_in_jax, raises, reveal_p
from tempo_jax.jaxprs.trace import trace
from tempo_jax.jaxprs.types import ClosedJaxpr, JaxprEqn, Literal, avals_of

Found = Any  # int32[2]: the number of the first check that failed, from 1, and its message's.


@dataclasses.dataclass(frozen=True)
class RunTimeCheck:
    """A check in a program.

    Attributes:
      fails: raises with a message's number, an int32 scalar; the messages are the program's.
      where: its line.
    """

    fails: Callable[[np.ndarray], Any]
    where: str

    def message(self, number: int) -> str:
        """The text of its message of this number, without what Equinox says about `jit`."""
        try:
            self.fails(np.asarray(number, np.int32))
        except Exception as error:
            return str(error).split("\n\n\n")[0].strip()
        return ""


def _nothing() -> Found:
    """What is found before any check."""
    return jnp.zeros(2, jnp.int32)


def revealing(closed: ClosedJaxpr) -> tuple[ClosedJaxpr, tuple[RunTimeCheck, ...]]:
    """A program that reveals what its checks find.

    Args:
      closed: the program, without mutable references.

    Returns:
      The program, with one output more, int32[2], if it has any check; and its checks.
    """
    finder = _CheckFinder()

    def run(*arguments: Any) -> list[Any]:
        results, found = finder.evaluate(closed, arguments, _nothing())
        return [*results, reveal_p.bind(found)]

    traced = trace(run, avals_of(closed))
    return (traced if finder.checks else closed), tuple(finder.checks)


class _CheckFinder:
    """Evaluates a program with what its checks find beside its results.

    Attributes:
      checks: that it came upon; number 1 is the first.
    """

    def __init__(self) -> None:
        self.checks: list[RunTimeCheck] = []
        self._around: list[JaxprEqn] = []  # in whose programs the next equation stands

    def evaluate(
        self, body: ClosedJaxpr, arguments: Sequence[Any], found: Found
    ) -> tuple[list[Any], Found]:
        """Evaluates a program on tracers.

        Args:
          body: the program.
          arguments: its flat inputs.
          found: what was found before.

        Returns:
          Its results, and what is found after it.
        """
        jaxpr = body.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, body.consts, strict=True))
        env.update(zip(jaxpr.invars, arguments, strict=True))

        def read(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else env[v]

        for eqn in forward_only(jaxpr.eqns, jaxpr.outvars):
            results, found = self._equation(eqn, [read(v) for v in eqn.invars], found)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars], found

    def _equation(
        self, eqn: JaxprEqn, arguments: list[Any], found: Found
    ) -> tuple[list[Any], Found]:
        if raises(eqn):
            return failed(eqn), self._failed(eqn, arguments, found)
        if not _may_check(eqn):
            return bind(eqn, arguments), found
        self._around.append(eqn)
        with at_source_of(eqn):
            results = self._entered(eqn, arguments, found)
        self._around.pop()
        return results

    def _entered(
        self, eqn: JaxprEqn, arguments: list[Any], found: Found
    ) -> tuple[list[Any], Found]:
        body = inlined_body(eqn)
        if is_written_in_jax(eqn.primitive):
            typed = [jax.typeof(x) for x in arguments]
            body = trace(functools.partial(eqn.primitive.impl, **eqn.params), typed)
        if body is not None:
            return self.evaluate(body, arguments, found)
        if eqn.primitive is prims.cond_p:
            return self._cond(eqn, arguments, found)
        if eqn.primitive is prims.scan_p:
            return self._scan(eqn, arguments, found)
        if eqn.primitive is prims.while_p:
            return self._while(eqn, arguments, found)
        return bind(eqn, arguments), found

    def _failed(self, eqn: JaxprEqn, arguments: list[Any], found: Found) -> Found:
        if len(arguments) != 1:  # Equinox' second callback, for devices that ignore the first
            return found
        (message,) = arguments
        where = source_outside([eqn, *reversed(self._around)], "equinox")
        self.checks.append(RunTimeCheck(eqn.params["callback"].callback_func, where))
        here = jnp.stack([jnp.int32(len(self.checks)), jnp.max(message).astype(jnp.int32)])
        return _first(found, here)

    def _cond(self, eqn: JaxprEqn, arguments: list[Any], found: Found) -> tuple[list[Any], Found]:
        def taken(body: ClosedJaxpr) -> ClosedJaxpr:
            def run(*operands: Any) -> list[Any]:
                results, inside = self.evaluate(body, operands, _nothing())
                return [*results, inside]

            return trace(run, [jax.typeof(x) for x in arguments[1:]])

        branches = tuple(map(taken, eqn.params["branches"]))
        *results, inside = bind(eqn, arguments, branches=branches)
        return results, _first(found, inside)

    def _scan(self, eqn: JaxprEqn, arguments: list[Any], found: Found) -> tuple[list[Any], Found]:
        params = eqn.params
        constants, carried = scan_counts(params)
        fixed = arguments[:constants]

        def body(carry: Any, slices: Any) -> Any:
            values, found = carry
            results, found = self.evaluate(params["jaxpr"], [*fixed, *values, *slices], found)
            return (results[:carried], found), results[carried:]

        (carry, found), stacked = lax.scan(
            body,
            (arguments[constants : constants + carried], found),
            arguments[constants + carried :],
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *stacked], found

    def _while(self, eqn: JaxprEqn, arguments: list[Any], found: Found) -> tuple[list[Any], Found]:
        params = eqn.params
        asks, fixed = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]

        def asked(values: Any, found: Found) -> Any:
            (more,), found = self.evaluate(
                params["cond_jaxpr"], [*arguments[:asks], *values], found
            )
            return values, found, jnp.asarray(more)

        def body(carry: Any) -> Any:
            values, found, _ = carry
            constants = arguments[asks:fixed]
            return asked(*self.evaluate(params["body_jaxpr"], [*constants, *values], found))

        start = asked(arguments[fixed:], found)
        values, found, _ = lax.while_loop(lambda carry: carry[2], body, start)
        return values, found


def _first(found: Found, later: Found) -> Found:
    return jnp.where(found[0] == 0, later, found)


def _may_check(eqn: JaxprEqn) -> bool:
    inside = (e for body in subjaxprs(eqn) for e in equations(body))
    return any(raises(e) or is_written_in_jax(e.primitive) for e in (eqn, *inside))
