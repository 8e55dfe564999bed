"""The host's and client's part of writing and restoring a checkpoint.

Untrusted: it carries sealed parts between storage and the enclave and names the leaves. The
client's orders, which say what may be restored, are made in `_enclave`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import numpy as np

from enclave_runtime import checkpoint
from enclave_runtime.checkpoint import MAX_NAME, Leaf, sealed_bytes
from enclave_runtime.memory import Arena
from enclave_runtime.program import ArrayType, aligned
from enclave_runtime.wire import Kind
from tempo_jax._plan import array_type, input_bytes
from tempo_jax._sealed import (
    BLINDED,
    ENCRYPTED,
    RESIDENT,
    SealedArray,
    handle_array,
    handle_text,
    is_sealed,
)
from tempo_jax.errors import CheckpointError


class Line(Protocol):
    """What is needed of the enclave's client."""

    @property
    def connection(self) -> Any:
        """The line to the enclave."""
        ...

    @property
    def session(self) -> str:
        """The session's public name."""
        ...

    def arena(self, size: int) -> AbstractContextManager[tuple[str, Arena]]:
        """Shared memory for some requests."""
        ...


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


def write(line: Line, tree: Any) -> bytes:
    """Has the enclave seal a tree of `SealedArray`s.

    Raises:
      CheckpointError: a leaf is not sealed, or the enclave has no key to seal to.
    """
    leaves, _, _ = leaves_of(tree)
    sealed = jax.tree.leaves(tree, is_leaf=is_sealed)
    for leaf, value in zip(leaves, sealed, strict=True):
        if not is_sealed(value):
            raise CheckpointError(
                f"enclave.checkpoint: leaf {leaf.name} is a {type(value).__name__} and not sealed. "
                "Seal it with `enclave.seal`, or keep what is no secret beside the checkpoint"
            )
    begun = line.connection.request(Kind.CHECKPOINT, {"leaves": [leaf.encode() for leaf in leaves]})
    parts = [base64.b64decode(begun["head"])]
    for number, (leaf, value) in enumerate(zip(leaves, sealed, strict=True)):
        size = max(input_bytes(leaf.array), aligned(sealed_bytes(leaf.array)))
        fields = {"identifier": begun["identifier"], "leaf": number, "offset": 0}
        with line.arena(size) as (name, arena):
            if value.form != ENCRYPTED:
                fields["handle"] = handle_text(value.handle)
            if value.form in (ENCRYPTED, BLINDED):
                content = np.asarray(value.content)
                place = ArrayType(content.shape, content.dtype.name)
                np.copyto(arena.view(place, 0), content)
            line.connection.request(Kind.CHECKPOINT_LEAF, {**fields, "arena": name})
            place = ArrayType((sealed_bytes(leaf.array),), "uint8")
            parts.append(arena.view(place, 0).tobytes())
    return b"".join(parts)


def restore(line: Line, data: bytes, order: Callable[[list[Leaf]], bytes], like: Any) -> Any:
    """Has the enclave take a checkpoint's leaves.

    Args:
      line: to the enclave.
      data: the checkpoint.
      order: makes the client's order for these leaves, encrypted; see
        `enclave_runtime.lineage.Lineages.reader`.
      like: a pytree of the same structure, shapes and dtypes.

    Returns:
      The same pytree of resident `SealedArray`s.

    Raises:
      CheckpointError: see `Enclave.restore`.
    """
    leaves, structure, avals = leaves_of(like)
    try:
        head = base64.b64encode(checkpoint.head_of(data)).decode()
    except checkpoint.CheckpointError as error:
        raise CheckpointError(f"enclave.restore: {error}") from error
    begun = line.connection.request(Kind.RESTORE, {"head": head}, order(leaves))
    try:
        # After the enclave has found that these are the checkpoint's leaves.
        parts = checkpoint.split(data, leaves)
    except checkpoint.CheckpointError as error:
        raise CheckpointError(f"enclave.restore: {error}") from error
    handles: list[str] = []
    for number, part in enumerate(parts):
        fields = {"identifier": begun["identifier"], "leaf": number, "offset": 0}
        with line.arena(part.size) as (name, arena):
            np.copyto(arena.view(ArrayType(part.shape, "uint8"), 0), part)
            reply = line.connection.request(Kind.RESTORE_LEAF, {**fields, "arena": name})
            handles = reply.get("handles", handles)
    restored = [
        SealedArray((handle_array(h),), RESIDENT, aval.shape, aval.dtype, weak, line.session)
        for h, aval, weak in zip(handles, avals, begun["weak"], strict=True)
    ]
    return jax.tree.unflatten(structure, restored)
