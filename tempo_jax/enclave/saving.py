"""Writing and restoring checkpoints, on the client's and the host's side.

The host carries sealed parts between storage and the enclave and names the leaves; it needs no
secret. The client keeps the key and the ledger and makes the orders that say what may be
restored. The methods of `Enclave` say what users may expect.
"""

from __future__ import annotations

import base64
import json
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import numpy as np
from jax.core import Tracer

from enclave_runtime.protocol import checkpoint
from enclave_runtime.protocol.checkpoint import ORDER_BYTES, Leaf, Seen, sealed_bytes
from enclave_runtime.protocol.memory import Arena, input_bytes
from enclave_runtime.protocol.program import ArrayType, aligned
from enclave_runtime.protocol.wire import Kind
from tempo_jax.enclave.parts import wholes
from tempo_jax.enclave.processes import Processes
from tempo_jax.errors import CheckpointError, UnsupportedError
from tempo_jax.sealing.array import (
    BLINDED,
    ENCRYPTED,
    PUBLISHED,
    RESIDENT,
    SealedArray,
    handle_array,
    handle_text,
    is_sealed,
)
from tempo_jax.sealing.leaves import leaves_of
from tempo_jax.sealing.ledger import CheckpointKey, CheckpointLedger


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

    @property
    def processes(self) -> Processes | None:
        """Those that share the enclave."""
        ...

    @property
    def follows(self) -> bool:
        """Whether another process's values count."""
        ...

    def arena(self, size: int) -> AbstractContextManager[tuple[str, Arena]]:
        """Shared memory for some requests."""
        ...

    def encrypt(self, content: bytes, purpose: str) -> bytes:
        """The client's bytes for the enclave."""
        ...

    def check_owned(self, sealed: SealedArray) -> SealedArray:
        """Refuses values of other sessions and values already donated."""
        ...


class CheckpointRequests:
    """The checkpoints of one session: the client's key and ledger, and one request at a time.

    Attributes:
      key: the client's; None before it gave one, and on the host's side.
      ledger: what the client has seen.
    """

    def __init__(self) -> None:
        """Starts without a key."""
        self.key: CheckpointKey | None = None
        self.ledger = CheckpointLedger()
        self._lock = threading.Lock()  # the enclave writes one at a time

    def use_key(self, line: Line, key: CheckpointKey, ledger: CheckpointLedger | None) -> None:
        """See `Enclave.use_checkpoint_key`."""
        for name, value, kind in (
            ("key", key, CheckpointKey),
            ("ledger", ledger, CheckpointLedger | None),
        ):
            if not isinstance(value, kind):
                raise CheckpointError(
                    f"use_checkpoint_key: {name} is a {type(value).__name__}, expected a `{kind}`"
                )
        ledger = CheckpointLedger() if ledger is None else ledger
        newest = ledger.newest.get(key.lineage)
        order = {**key.order(), "newest": None if newest is None else newest.encode()}
        content = line.encrypt(json.dumps(order).encode(), "checkpoint key")
        line.connection.request(Kind.CHECKPOINT_KEY, {}, content)
        self.key, self.ledger = key, ledger

    def write(self, line: Line, tree: Any) -> bytes:
        """See `Enclave.checkpoint`."""
        leaves = jax.tree.leaves(tree, is_leaf=is_sealed)
        for leaf in leaves:
            if is_sealed(leaf):
                line.check_owned(leaf)
                if isinstance(leaf.handle, Tracer):
                    raise UnsupportedError(
                        "enclave.checkpoint was called inside jit: there is no state yet. Call it "
                        "outside, on what the jitted function returned."
                    )
        with self._lock, wholes(line, "`enclave.checkpoint`", leaves) as whole:
            if line.follows:
                return b""
            data = _write(line, tree, whole)
            self._record(data)
        return data

    def order(
        self, line: Line, leaves: Sequence[Leaf], allow_rollback_to: int | Seen | None
    ) -> bytes:
        """The client's order to restore a checkpoint of these leaves, encrypted."""
        newest = self.ledger.newest.get(self._used_key().lineage)
        named = allow_rollback_to
        order = {
            "id": secrets.token_hex(ORDER_BYTES),
            "newest": None if newest is None else newest.encode(),
            "allow_rollback_to": named.encode() if isinstance(named, Seen) else named,
            "leaves": [leaf.encode() for leaf in leaves],
        }
        return line.encrypt(json.dumps(order).encode(), "restore")

    def restore(
        self,
        line: Line,
        data: bytes,
        like: Any,
        allow_rollback_to: int | Seen | None,
        order: bytes | None,
    ) -> Any:
        """See `Enclave.restore`; without an `order` this is the client and makes one."""
        if order is None:
            self._used_key()

        def ordered(leaves: Sequence[Leaf]) -> bytes:
            return self.order(line, leaves, allow_rollback_to) if order is None else order

        with self._lock:
            restored = _restore(line, data, ordered, like)
            self._record(data)
        return restored

    def _used_key(self) -> CheckpointKey:
        if self.key is None:
            raise CheckpointError(
                "enclave.restore: this client gave no checkpoint key; launch the enclave with "
                "`checkpoint_key=`, or call `use_checkpoint_key`"
            )
        return self.key

    def _record(self, data: bytes) -> None:
        if self.key is not None:
            self.ledger = self.ledger.recorded(self.key, data)


def _write(line: Line, tree: Any, whole: Callable[[SealedArray], np.ndarray]) -> bytes:
    """Has the enclave seal a tree of `SealedArray`s, of which `whole` gives the contents.

    Raises:
      CheckpointError: a leaf is not sealed, or the enclave has no key to seal to.
    """
    leaves, _, _ = leaves_of(tree)
    sealed = jax.tree.leaves(tree, is_leaf=is_sealed)
    for leaf, value in zip(leaves, sealed, strict=True):
        if not is_sealed(value) or value.form == PUBLISHED:
            raise CheckpointError(
                f"enclave.checkpoint: leaf {leaf.name} is {_described(value)} and not sealed. "
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
                content = whole(value)
                place = ArrayType(content.shape, content.dtype.name)
                np.copyto(arena.view(place, 0), content)
            line.connection.request(Kind.CHECKPOINT_LEAF, {**fields, "arena": name})
            place = ArrayType((sealed_bytes(leaf.array),), "uint8")
            parts.append(arena.view(place, 0).tobytes())
    return b"".join(parts)


def _described(value: Any) -> str:
    return "published" if is_sealed(value) else f"a {type(value).__name__}"


def _restore(line: Line, data: bytes, order: Callable[[list[Leaf]], bytes], like: Any) -> Any:
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
    except checkpoint.RefusedCheckpointError as error:
        raise CheckpointError(f"enclave.restore: {error}") from error
    begun = line.connection.request(Kind.RESTORE, {"head": head}, order(leaves))
    try:
        # After the enclave has found that these are the checkpoint's leaves.
        parts = checkpoint.split(data, leaves)
    except checkpoint.RefusedCheckpointError as error:
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
