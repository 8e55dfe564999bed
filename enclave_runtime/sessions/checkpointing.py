"""The session's requests for checkpoints: take a key into use, write, restore.

A checkpoint is written and restored leaf by leaf through shared memory, so that it may be much
larger than that. Writing asks for no secret: while the client is away, the host may have as
many checkpoints as it likes and can open none. (Whoever asks says which value is which leaf, and
may name it wrongly. Its tag is in the checkpoint as well, and a restored value goes where the tag
lets it.) Taking a key into use and restoring need the client, whose orders come encrypted. Each
order brings back one copy: what is restored was used by no run yet, and counts anew.
Trusts the client's orders alone.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from enclave_runtime.protocol.checkpoint import (
    CheckpointReader,
    CheckpointWriter,
    RefusedCheckpointError,
    sealed_bytes,
)
from enclave_runtime.protocol.memory import Arena
from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.protocol.requests import (
    CheckpointLeafRequest,
    CheckpointRequest,
    EmptyRequest,
    LeafRequest,
    RestoreRequest,
)
from enclave_runtime.sessions.admission import Origin, Tag
from enclave_runtime.sessions.lineage import Lineages, Seen
from enclave_runtime.sessions.store import Resident, Store
from enclave_runtime.sessions.value_reader import ValueReader

Fields = dict[str, Any]


class Checkpointing:
    """One session's checkpoints. At most one is being written and one being restored."""

    def __init__(
        self,
        store: Store,
        arena: Callable[[str], Arena],
        values: ValueReader,
    ):
        """Takes the session's store and its ways to read a request.

        Args:
          store: gets restored values.
          arena: the shared memory of a name.
          values: reads sealed values, and what else the client encrypted.
        """
        self._store = store
        self._arena = arena
        self._values = values
        self._lineages = Lineages()
        # One that was given up makes room for the next.
        self._writer: CheckpointWriter | None = None
        self._reader: CheckpointReader | None = None
        self._restored: list[Resident] = []
        self._origins: dict[bytes, Origin] = {}
        self._lock = threading.Lock()

    def provision(self, _: EmptyRequest, attachment: bytes) -> Fields:
        """Takes the client's checkpoint key into use."""
        with self._lock:
            self._lineages.provision(json.loads(self._values.decrypt(attachment, "checkpoint key")))
        return {}

    def begin(self, asked: CheckpointRequest, _: bytes) -> Fields:
        """Begins a checkpoint of `leaves`; the reply has its head."""
        with self._lock:
            writer = self._writer = self._lineages.writer(asked.leaves)
        seen = Seen(writer.header.number, writer.header.identifier)
        return {"head": base64.b64encode(writer.head).decode(), **seen.encode()}

    def write(self, asked: CheckpointLeafRequest, _: bytes) -> Fields:
        """Writes the next leaf, sealed, at `offset`, over what the host may have put there."""
        with self._lock:
            writer = self._writer
            if writer is None or asked.identifier != writer.header.identifier.hex():
                raise RefusedCheckpointError("no such checkpoint is being written")
            if asked.leaf != writer.written or writer.written == len(writer.leaves):
                raise RefusedCheckpointError(
                    "a checkpoint's leaves are written in order, each once"
                )
            array = writer.leaves[writer.written].array
            arena = self._arena(asked.arena)
            record, value = self._values.value(arena, asked.offset, asked.handle, array)
            place = ArrayType((sealed_bytes(array),), "uint8")
            writer.seal(value, record, arena.view(place, asked.offset))
        return {}

    def begin_restoring(self, asked: RestoreRequest, attachment: bytes) -> Fields:
        """Begins to restore the checkpoint with this `head`, if the client's order lets it."""
        order = json.loads(self._values.decrypt(attachment, "restore"))
        with self._lock:
            self._reader, self._restored, self._origins = None, [], {}
            reader = self._reader = self._lineages.reader(asked.head, order)
        seen = Seen(reader.header.number, reader.header.identifier)
        return {"weak": [leaf.weak for leaf in reader.leaves], **seen.encode()}

    def read(self, asked: LeafRequest, _: bytes) -> Fields:
        """Takes the next leaf from `offset`; the last one's reply has the handles of all.

        Nothing is kept until the whole checkpoint has proved authentic.
        """
        with self._lock:
            reader = self._reader
            if reader is None or asked.identifier != reader.header.identifier.hex():
                raise RefusedCheckpointError("no such checkpoint is being restored")
            if asked.leaf != reader.read or reader.read == len(reader.leaves):
                raise RefusedCheckpointError(
                    "a checkpoint's leaves are restored in order, each once"
                )
            array = reader.leaves[reader.read].array
            place = ArrayType((sealed_bytes(array),), "uint8")
            try:
                # A private copy: the host may change shared memory while it is being opened.
                own = self._arena(asked.arena).view(place, asked.offset).copy()
                record, value = reader.open(own)
            except RefusedCheckpointError:
                self._reader, self._restored = None, []
                raise
            # Leaves that belonged together do so again.
            origin = self._origins.setdefault(record.origin, Origin.new())
            tag = Tag(record.place, origin, record.generation)
            self._restored.append(Resident(array, jnp.asarray(value), tag))
            if reader.read < len(reader.leaves):
                return {}
            restored, self._reader, self._restored = self._restored, None, []
        return {"handles": [self._store.put(entry) for entry in restored]}
