"""Single equations: reading, evaluating and locating them.

Untrusted and pure. Serves JAX 0.10 to 0.12.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax._src import source_info_util  # JAX 0.10-0.12: no public way to keep an equation's source.
from jax.extend.core import primitives as prims

from tempo_jax.jaxprs.primitives import is_check, is_debugging
from tempo_jax.jaxprs.types import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

# Calls whose body is inlined, with the parameter that holds it.
_INLINED = {
    prims.jit_p: "jaxpr",
    prims.closed_call_p: "call_jaxpr",
    prims.call_p: "call_jaxpr",
    prims.custom_jvp_call_p: "call_jaxpr",
    prims.custom_vjp_call_p: "call_jaxpr",
    prims.remat_p: "jaxpr",
}


def subjaxprs(eqn: JaxprEqn) -> Iterator[Any]:
    """The open jaxprs in an equation's parameters."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def inlined_body(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The program of an equation that is a mere call; None of any other."""
    param = _INLINED.get(eqn.primitive)
    if param is None:
        return None
    body = eqn.params[param]
    return body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants and how many are carried."""
    if "num_consts" in params:  # JAX 0.10
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = map(len, params["ft_in"].unpack())  # JAX 0.11-0.12
    return constants, carried


def equations(jaxpr: Any) -> Iterator[JaxprEqn]:
    """All equations of a jaxpr at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in subjaxprs(eqn):
            yield from equations(inner)


def repeated(jaxpr: Any, times: int = 1) -> Iterator[tuple[JaxprEqn, int]]:
    """The equations of a jaxpr that hold no others, at any depth, with how often a scan runs them.

    The iterations of a `while` are not known, and count once.
    """
    for eqn in jaxpr.eqns:
        bodies = list(subjaxprs(eqn))
        if not bodies:
            yield eqn, times
        for body in bodies:
            yield from repeated(body, times * eqn.params.get("length", 1))


def debugging(jaxpr: Any) -> list[JaxprEqn]:
    """The debugging callbacks of a jaxpr at any depth; `flatten` leaves them out."""
    return [eqn for eqn in equations(jaxpr) if is_debugging(eqn)]


def checks(jaxpr: Any) -> list[JaxprEqn]:
    """Where a failed check of Equinox raises, at any depth; `flatten` makes NaN of it."""
    return [eqn for eqn in equations(jaxpr) if is_check(eqn)]


def at_source_of(eqn: JaxprEqn) -> contextlib.AbstractContextManager[None]:
    """While this lasts, traced equations count as coming from where `eqn` comes from."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=stack)


# The scopes that `jax.checkpoint` itself puts around what is computed again, JAX 0.10-0.12.
_REMAT = ("checkpoint", "rematted_computation")


def scopes(eqn: JaxprEqn) -> tuple[str, ...]:
    """The names under which the user's program made an equation, outermost first.

    They are those of `jax.named_scope`, and so Flax's scopes of modules. A gradient has those of
    what it is the gradient of; empty where nothing is named.
    """
    names: list[str] = []
    part: list[str] = []
    for item in eqn.source_info.name_stack.stack:  # JAX 0.10-0.12: scopes and transformations.
        if isinstance(item, source_info_util.Scope):
            if item.name not in _REMAT:
                part.append(item.name)
        elif item.name == "jvp":
            # A gradient that is itself traced under the names of its product bears them twice.
            names, part = [*names, *part], []
    return tuple(part if part[: len(names)] == names else [*names, *part])


def bind(eqn: JaxprEqn, arguments: Sequence[Any], **changes: Any) -> list[Any]:
    """Evaluates one equation on `arguments`, with some parameters changed."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changes})
    with at_source_of(eqn), eqn.ctx.manager:
        result = eqn.primitive.bind(*arguments, **params)
    return list(result) if eqn.primitive.multiple_results else [result]


def source(eqn: JaxprEqn) -> str:
    """Where in the user's program an equation comes from, as `file:line (function)`."""
    return source_info_util.summarize(eqn.source_info)


def source_outside(eqns: Iterable[JaxprEqn], package: str) -> str:
    """Where the first equation comes from of which that is not known to be a library's own file.

    Args:
      eqns: an equation, and those in whose programs it stands, from the inside out.
      package: the library's name.
    """
    for eqn in eqns:
        for frame in source_info_util.user_frames(eqn.source_info.traceback):
            if package not in Path(frame.file_name).parts:
                return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"
    return "unknown"


def line(eqn: JaxprEqn) -> str:
    """Where an equation comes from as `file.py:line`, without the folders of this machine."""
    frame = source_info_util.user_frame(eqn.source_info.traceback)
    return "unknown" if frame is None else f"{Path(frame.file_name).name}:{frame.start_line}"


def forward_only(eqns: Iterable[JaxprEqn], outputs: Sequence[Any]) -> list[JaxprEqn]:
    """The equations that `outputs` depend on, in order."""
    needed = {v for v in outputs if isinstance(v, Var)}
    kept = []
    for eqn in reversed(list(eqns)):
        if any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed |= {v for v in eqn.invars if isinstance(v, Var)}
    return kept[::-1]


def evaluate(eqns: Iterable[JaxprEqn], env: dict[Any, Any], outputs: Sequence[Any]) -> list[Any]:
    """Evaluates flat equations on the values in `env` and returns `outputs`."""
    env = dict(env)

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    for eqn in eqns:
        env.update(zip(eqn.outvars, bind(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in outputs]
