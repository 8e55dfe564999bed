"""The segments' code: serialized StableHLO, equal segments exported once.

Untrusted; the client encrypts what comes of it to the enclave.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.export
import numpy as np

from tempo_jax.errors import UnsupportedError
from tempo_jax.jaxprs import equations, trace
from tempo_jax.jaxprs import types as jaxpr_types
from tempo_jax.jaxprs.types import JaxprEqn, Literal, Var
from tempo_jax.planning.segments import Cut, TrustedSegment

# JAX's own LAPACK kernels that its export refuses because later versions of JAX may lack them:
# pivoted QR, products with Q, and singular values by QR. An enclave whose JAX lacks them fails when
# it compiles. Every other custom call is refused: it names code that only this process has.
_LAPACK = tuple(
    jax.export.DisabledSafetyCheck.custom_call(f"lapack_{routine}_ffi")
    for routine in (
        *("sgeqp3", "dgeqp3", "cgeqp3", "zgeqp3"),
        *("sormqr", "dormqr", "cunmqr", "zunmqr"),
        *("sgesvd", "dgesvd", "cgesvd", "zgesvd"),
    )
)

# What jax.export raises on a custom call or on a callback into Python.
_NOT_EXPORTED = (ValueError, NotImplementedError)


def _function(segment: TrustedSegment) -> Callable[..., list[Any]]:
    def run(*arguments: Any) -> list[Any]:
        env = {
            v: jaxpr_types.from_physical(x, v.aval)
            for v, x in zip(segment.inputs, arguments, strict=True)
        }
        outputs = equations.evaluate(segment.eqns, env, segment.outputs)
        return [jaxpr_types.to_physical(x) for x in outputs]

    return run


def _structure(segment: TrustedSegment) -> Any:
    """Equal for segments that compute the same function; unequal ones may share none."""
    names: dict[Any, int] = {v: i for i, v in enumerate(segment.inputs)}

    def name(v: Any) -> Any:
        if isinstance(v, Literal):
            value = np.asarray(v.val)
            return ("literal", value.dtype, value.shape, value.tobytes(), v.aval.weak_type)
        return names.setdefault(v, len(names))

    eqns = tuple(
        (
            eqn.primitive,
            tuple(sorted(eqn.params.items())),
            tuple(name(v) for v in eqn.invars),
            tuple((name(v), v.aval.shape, v.aval.dtype) for v in eqn.outvars),
        )
        for eqn in segment.eqns
    )
    types = tuple((v.aval.shape, v.aval.dtype) for v in segment.inputs)
    return types, eqns, tuple(name(v) for v in segment.outputs)


def _export(segment: TrustedSegment) -> jax.export.Exported:
    avals = [jaxpr_types.physical(v.aval) for v in segment.inputs]
    run = jax.jit(_function(segment), keep_unused=True)
    with trace.without_locations(), trace.without_mesh():
        return jax.export.export(run, platforms=["cpu"], disabled_checks=_LAPACK)(*avals)


def _refuse_equation(segment: TrustedSegment, eqns: Iterable[JaxprEqn]) -> None:
    """Raises for the innermost equation that cannot be exported by itself, if there is one."""
    for eqn in eqns:
        inputs = tuple(dict.fromkeys(v for v in eqn.invars if isinstance(v, Var)))
        alone = dataclasses.replace(segment, eqns=(eqn,), inputs=inputs, outputs=tuple(eqn.outvars))
        try:
            _export(alone)
        except _NOT_EXPORTED as error:
            for inner in equations.subjaxprs(eqn):
                _refuse_equation(segment, inner.eqns)
            targets = sorted(set(re.findall(r"custom_call @([\w.$]+)", str(error))))
            what = (
                "custom calls (" + ", ".join(f"`{t}`" for t in targets) + ")"
                if targets
                else "what is no compiled program, such as a callback into Python"
            )
            raise UnsupportedError(
                f"shield: `{eqn.primitive.name}` at {equations.source(eqn)} is lowered to {what}, "
                "and the enclave runs only what XLA compiles and JAX's own kernels. Write it with "
                "other operations of JAX, pass its result as an argument, or return its operand "
                "through `tempo.reveal` and compute it outside."
            ) from error


def export_segments(parts: Cut) -> Iterator[bytes]:
    """Serialized StableHLO of each segment, in order; equal segments are exported once."""
    exported: dict[Any, bytes] = {}
    for segment in parts.segments:
        try:
            key = _structure(segment)
            hash(key)
        except TypeError:
            key = object()  # a parameter that cannot be compared: no other segment is equal
        if key not in exported:
            try:
                module = _export(segment)
            except _NOT_EXPORTED:
                _refuse_equation(segment, segment.eqns)
                raise
            if module.nr_devices != 1:
                raise UnsupportedError(
                    f"shield: the function spreads trusted work over {module.nr_devices} devices "
                    "(`shard_map`), but the enclave is one processor. Shield a function for one "
                    "device, and pass `mesh=` to `shield` to spread the blinded products."
                )
            exported[key] = bytes(module.serialize())
        yield exported[key]
