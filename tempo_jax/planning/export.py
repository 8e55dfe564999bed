"""The segments' code: serialized StableHLO, equal segments exported once.

Untrusted; the client encrypts what comes of it to the enclave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export
import numpy as np

from tempo_jax.errors import UnsupportedError
from tempo_jax.jaxprs import equations, trace
from tempo_jax.jaxprs import types as jaxpr_types
from tempo_jax.jaxprs.types import Literal
from tempo_jax.planning.segments import Cut, TrustedSegment


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
            avals = [jaxpr_types.physical(v.aval) for v in segment.inputs]
            run = jax.jit(_function(segment), keep_unused=True)
            with trace.without_locations():
                module = jax.export.export(run, platforms=["cpu"])(*avals)
            if module.nr_devices != 1:
                raise UnsupportedError(
                    f"shield: the function spreads trusted work over {module.nr_devices} devices "
                    "(`shard_map`), but the enclave is one processor. Shield a function for one "
                    "device, and pass `mesh=` to `shield` to spread the blinded products."
                )
            exported[key] = bytes(module.serialize())
        yield exported[key]
