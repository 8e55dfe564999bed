"""What a shielded function does where `vmap`, `grad` or `eval_shape` reaches it from outside.

Untrusted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from enclave_runtime.protocol.program import DEVICE
from tempo_jax.errors import UnsupportedError
from tempo_jax.jaxprs import opaque
from tempo_jax.jaxprs import types as jaxpr_types
from tempo_jax.jaxprs.transforms import Vmapped, is_differentiated, unknown
from tempo_jax.planning.plan import Plan
from tempo_jax.sealing.array import BLINDED, RESIDENT, SealedArray


def refuse_differentiation(name: str, leaves: Sequence[Any]) -> None:
    """Refuses arguments that `grad`, `jvp` or the like follows.

    Raises:
      UnsupportedError: there is one.
    """
    if any(map(is_differentiated, jax.tree.leaves(leaves))):
        raise UnsupportedError(
            f"shield: `{name}` is differentiated from outside, where its values are sealed. Put "
            "grad, value_and_grad or jvp inside: `tempo.shield(jax.grad(f))`, or shield the whole "
            "training step."
        )


def batched(function: Callable[..., Any], vmapped: Vmapped, structure: Any) -> Callable[..., Any]:
    """``jax.vmap(function)``, over what a `vmap` around the shielded function maps.

    Args:
      function: what is shielded.
      vmapped: the `vmap` around it.
      structure: of the positional and named arguments.
    """

    @functools.wraps(function)
    def over_batch(*args: Any, **kwargs: Any) -> Any:
        def one(leaves: list[Any]) -> Any:
            args, kwargs = jax.tree.unflatten(structure, leaves)
            return function(*args, **kwargs)

        return vmapped.batch(one)(jax.tree.leaves((args, kwargs)))

    return over_batch


def refuse_sealed(name: str, sealed: Sequence[int]) -> None:
    """Refuses a batched plan with sealed outputs: a handle has no batch axis to map.

    Raises:
      UnsupportedError: there is one.
    """
    if sealed:
        raise UnsupportedError(
            f"shield: `{name}` returns sealed values under vmap, which could not tell them from "
            "one another. Put vmap inside, `tempo.shield(jax.vmap(f))`, which runs the same plan, "
            "or reveal what it returns."
        )


def unknown_outputs(plan: Plan, types: Sequence[Any], session: str, error: Exception) -> list[Any]:
    """The flat outputs of a call under `jax.eval_shape`: types and forms, and no values.

    Args:
      plan: the function's.
      types: abstract values of the flat outputs.
      session: the enclave's.
      error: what a program is told that needs the values after all.
    """
    outputs: list[Any] = [None] * len(types)
    for position in plan.revealed[: len(plan.revealed) - bool(plan.checks)]:
        struct = jaxpr_types.physical(types[position])
        value = unknown(struct.shape, struct.dtype, error)
        outputs[position] = jaxpr_types.from_physical(value, types[position])
    for position, port in zip(plan.sealed, plan.program.outputs, strict=True):
        aval = types[position]
        children = (opaque.opaque(unknown((opaque.WORDS,), np.uint32, error)),)
        if port.place == DEVICE:
            content = unknown(port.array.shape, np.dtype(port.array.dtype), error)
            children = (content, *children)
        form = BLINDED if port.place == DEVICE else RESIDENT
        outputs[position] = SealedArray(
            children, form, aval.shape, aval.dtype, aval.weak_type, session
        )
    return outputs
