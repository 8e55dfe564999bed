"""How a checkpoint names and describes a pytree's leaves, on the client's and the host's side.

Untrusted: it sees names, shapes and dtypes.
"""

from __future__ import annotations

from typing import Any

import jax

from enclave_runtime.protocol.checkpoint import MAX_NAME, Leaf
from tempo_jax.errors import CheckpointError
from tempo_jax.jaxprs.types import array_type
from tempo_jax.sealing.array import is_sealed


def leaves_of(tree: Any) -> tuple[list[Leaf], Any, list[Any]]:
    """The leaves of a pytree as a manifest names them, its structure, and its leaves' types.

    Raises:
      CheckpointError: a leaf is no array, nor describes one.
    """
    named, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_sealed)
    leaves, avals = [], []
    for path, leaf in named:
        name = jax.tree_util.keystr(path)
        if len(name) > MAX_NAME:
            raise CheckpointError(
                f"a leaf's path in the pytree has {len(name)} characters, expected at most "
                f"{MAX_NAME}"
            )
        aval = _aval(name, leaf)
        leaves.append(Leaf(name, array_type(aval), aval.dtype.name, bool(aval.weak_type)))
        avals.append(aval)
    return leaves, structure, avals


def _aval(name: str, leaf: Any) -> Any:
    if is_sealed(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    try:
        return jax.typeof(leaf)
    except TypeError as error:
        raise CheckpointError(
            f"leaf {name} of type {type(leaf).__name__} is not an array, a number or a "
            "`jax.ShapeDtypeStruct`"
        ) from error
