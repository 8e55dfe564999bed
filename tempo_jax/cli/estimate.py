"""``tempo-jax estimate``: what a step would take on a machine, from shapes alone.

For whoever asks whether shielding gains anything before writing a line for it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tempo_jax.api.estimate import Estimate, Machine
from tempo_jax.api.shield import shield
from tempo_jax.api.shielded import Shielded
from tempo_jax.enclave.enclave import Enclave
from tempo_jax.errors import TempoError, UnsupportedError

_TYPES = {
    "f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64", "i8": "int8",
    "i32": "int32", "i64": "int64", "u8": "uint8", "u32": "uint32", "bool": "bool_",
}  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,\s]*)\]")
_NAMED = re.compile(r"[\w.]+:[\w.]+")


def estimate(target: str, shapes: Sequence[str], machine: Machine) -> Estimate:
    """Estimates a function.

    Args:
      target: `module:function`, plain or shielded.
      shapes: one for each positional argument; see `parsed`.
      machine: where it would run.

    Raises:
      UnsupportedError: there is no such function, or a shape cannot be read.
    """
    function = _named(target)
    arguments = [parsed(text) for text in shapes]
    try:
        if isinstance(function, Shielded):
            return function.estimate(*arguments, machine=machine)
        with Enclave.launch() as enclave:
            return shield(function, enclave=enclave).estimate(*arguments, machine=machine)
    except TypeError as error:
        raise UnsupportedError(
            f"estimate: {target} does not take arguments of these shapes: {error}"
        ) from error


def parsed(text: str) -> Any:
    """An argument's shapes.

    Args:
      text: an array such as `f32[2048,784]`, a JSON list or object of such for a tree, or
        `module:function`, whose result, called without arguments, has the shapes.

    Raises:
      UnsupportedError: it is none of these.
    """
    if text.lstrip()[:1] in ("[", "{"):
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise UnsupportedError(f"estimate: {text!r} is no JSON: {error}") from error
        return jax.tree.map(_array, tree)
    if _NAMED.fullmatch(text):
        return jax.eval_shape(_named(text))
    return _array(text)


def _array(text: Any) -> jax.ShapeDtypeStruct:
    found = _ARRAY.fullmatch(text.strip()) if isinstance(text, str) else None
    name = _TYPES.get(found[1], found[1]) if found else ""
    if found is None or name not in _TYPES.values():
        raise UnsupportedError(
            f"estimate: {text!r} is no array, expected a type and its shape such as f32[2048,784] "
            f"(types: {', '.join(_TYPES)})"
        )
    shape = tuple(int(n) for n in found[2].split(",") if n.strip())
    return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(getattr(jnp, name)))


def _named(text: str) -> Any:
    """What `module:name` names, looked for from the current folder on."""
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except TempoError:
        raise
    except (ImportError, AttributeError, ValueError) as error:
        raise UnsupportedError(
            f"estimate: {text!r} names nothing: {error}. Expected `module:function`, importable "
            "from the current folder"
        ) from error
    if not callable(found):
        raise UnsupportedError(f"estimate: {text!r} is no function")
    return found
