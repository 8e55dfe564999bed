"""The enclave as the user meets it: launch, seal, open.

In development client and host share this process, and with it the session's keys; the
path of every byte is the same as it would be between machines. Untrusted, but for the two
methods that encrypt and decrypt for the client. Called by users and by `_shield`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from enclave_runtime import encryption
from enclave_runtime.checkpoint import Leaf
from enclave_runtime.memory import Arena
from enclave_runtime.program import ArrayType, Port, Program, aligned
from enclave_runtime.wire import Kind
from tempo_jax import _checkpointing, _jaxpr
from tempo_jax._calibration import machine_costs
from tempo_jax._connection import Connection
from tempo_jax._cost import CostModel
from tempo_jax._plan import array_type, input_bytes
from tempo_jax._sealed import (
    BLINDED,
    ENCRYPTED,
    SealedArray,
    handle_text,
    is_sealed,
    owners,
)
from tempo_jax.checkpoints import CheckpointKey, CheckpointLedger
from tempo_jax.errors import CheckpointError, SealedValueError, UnsupportedError


class Enclave:
    """A running enclave process and the client's session with it.

    A context manager: leaving it ends the process. Make one with `Enclave.launch`.
    """

    def __init__(self, connection: Connection):
        """Wraps a connection; users call `launch`."""
        self._connection = connection
        self._owned: collections.Counter[str] = collections.Counter()
        self._counted: dict[int, weakref.finalize[..., Any]] = {}
        self._released: collections.deque[tuple[int, str]] = collections.deque()
        self._dropped: list[str] = []
        self._lock = threading.RLock()
        self._checkpoint_key: CheckpointKey | None = None
        self._ledger = CheckpointLedger()
        self._checkpointing = threading.Lock()  # the enclave writes one at a time
        owners[connection.session] = self

    @classmethod
    def launch(
        cls,
        *,
        checkpoint_key: CheckpointKey | None = None,
        checkpoint_ledger: CheckpointLedger | None = None,
    ) -> Enclave:
        """Starts ``python -m enclave_runtime`` as a child and opens a session with it.

        The child is trusted because this process started it and handed it the session's
        secret through a pipe. It ends when this process does.

        Args:
          checkpoint_key: see `use_checkpoint_key`.
          checkpoint_ledger: likewise.

        Returns:
          The enclave, ready for use.

        Raises:
          EnclaveDiedError: the process did not come up.
        """
        launched = cls(Connection())
        try:
            if checkpoint_key is not None:
                launched.use_checkpoint_key(checkpoint_key, checkpoint_ledger)
        except BaseException:
            launched.close()
            raise
        return launched

    def __enter__(self) -> Enclave:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._connection.closed else f"process {self._connection.process.pid}"
        return f"Enclave({state})"

    def close(self) -> None:
        """Ends the enclave; everything sealed in it is gone."""
        self._connection.close()

    @property
    def session(self) -> str:
        """Public name of the session, to which sealed values are bound."""
        return self._connection.session

    @property
    def connection(self) -> Connection:
        """The line to the process."""
        return self._connection

    @functools.cached_property
    def costs(self) -> CostModel:
        """What the enclave's work costs on this machine, measured once and cached on disk."""
        return machine_costs(lambda: self._connection.request(Kind.CALIBRATE, {}))

    def statistics(self) -> dict[str, Any]:
        """What the enclave reports of itself.

        Returns:
          `handles`, `runs`, `programs` and `blindings` (counts), `peak_memory_bytes`,
          `busy_seconds` (inside segments, since launch) and `process` (its id).
        """
        self.free_dropped()
        return self._connection.request(Kind.STATISTICS, {})

    # The client's side: plaintext in, plaintext out

    def seal(self, tree: Any) -> Any:
        """Encrypts every array of a pytree to the enclave.

        Args:
          tree: any pytree of arrays and Python numbers; sealed leaves stay as they are.

        Returns:
          The same pytree, its leaves `SealedArray`.

        Raises:
          UnsupportedError: a leaf is not an array or a number.
        """
        return jax.tree.map(self._seal_leaf, tree, is_leaf=is_sealed)

    def _seal_leaf(self, leaf: Any) -> SealedArray:
        if is_sealed(leaf):
            return self.check_owned(leaf)
        try:
            aval = jax.typeof(leaf)
            if isinstance(leaf, Tracer):
                raise UnsupportedError(
                    "enclave.seal was called inside jit: the value is already the host's. Seal it "
                    "before, outside jit."
                )
            plain = np.asarray(_jaxpr.to_physical(jnp.asarray(leaf)))
        except TypeError as error:
            raise UnsupportedError(
                f"enclave.seal: a leaf of type {type(leaf).__name__} is not an array or a number. "
                "Keep such objects out of the pytree, for example as static fields."
            ) from error
        encrypted = encryption.encrypt_array(self._connection.keys.to_enclave, plain, self.session)
        return SealedArray(
            (jnp.asarray(encrypted),),
            ENCRYPTED,
            aval.shape,
            aval.dtype,
            aval.weak_type,
            self.session,
        )

    def open(self, tree: Any) -> Any:
        """Decrypts every sealed leaf of a pytree for the client.

        Args:
          tree: any pytree; leaves that are not sealed stay as they are.

        Returns:
          The same pytree with a `jax.Array` in place of every `SealedArray`.

        Raises:
          SealedValueError: a leaf was donated, altered, or belongs to another enclave.
        """
        self.free_dropped()
        return jax.tree.map(
            lambda x: self._open_leaf(x) if is_sealed(x) else x, tree, is_leaf=is_sealed
        )

    def _open_leaf(self, sealed: SealedArray) -> jax.Array:
        self.check_owned(sealed)
        array = array_type(sealed)
        keys = self._connection.keys
        if sealed.form == ENCRYPTED:
            plain = self._decrypt(keys.to_enclave, np.asarray(sealed.content), array)
        else:
            with self.arena(input_bytes(array)) as (name, arena):
                if sealed.form == BLINDED:
                    np.copyto(arena.view(array, 0), np.asarray(sealed.content))
                self._connection.request(
                    Kind.OPEN, {"handle": handle_text(sealed.handle), "arena": name, "offset": 0}
                )
                size = array.nbytes + encryption.OVERHEAD_BYTES
                encrypted = arena.view(ArrayType((size,), "uint8"), 0).copy()
            plain = self._decrypt(keys.to_client, encrypted, array)
        return _jaxpr.from_physical(jnp.asarray(plain), sealed)

    def _decrypt(self, key: bytes, encrypted: np.ndarray, array: ArrayType) -> np.ndarray:
        try:
            return encryption.decrypt_array(
                key, encrypted, self.session, array.shape, np.dtype(array.dtype)
            )
        except encryption.DecryptionError as error:
            raise SealedValueError(
                f"a sealed {array.dtype}{list(array.shape)} failed its authentication: it was "
                "altered, or its shape, dtype or session is not the one it was sealed with"
            ) from error

    # Checkpoints

    def use_checkpoint_key(
        self, key: CheckpointKey, ledger: CheckpointLedger | None = None
    ) -> None:
        """Gives the enclave the key for the checkpoints that follow, in place of an earlier one.

        Args:
          key: the client's, the same for all of a training run.
          ledger: what the client has seen; without one, old checkpoints pass for the newest.

        Raises:
          CheckpointError: the key is the enclave's identity, and it has none outside SGX.
        """
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
        content = self._encrypted(json.dumps(order).encode(), "checkpoint key")
        self._connection.request(Kind.CHECKPOINT_KEY, {}, content)
        self._checkpoint_key, self._ledger = key, ledger

    @property
    def ledger(self) -> CheckpointLedger:
        """What the client has seen by now; keep it with the newest checkpoint."""
        return self._ledger

    def checkpoint(self, tree: Any) -> bytes:
        """Seals a state to the checkpoint key, as bytes that any storage may hold.

        Leaves that lie blinded on the devices are in it as well. The state stays usable. The
        ledger has seen the checkpoint from now on.

        Args:
          tree: any pytree of `SealedArray`s.

        Returns:
          The checkpoint; `checkpoints.write` puts it into a file safely.

        Raises:
          CheckpointError: no key was given, or a leaf is not sealed.
          SealedValueError: a leaf was donated or belongs to another enclave.

        Example:
          >>> import tempo_jax as tempo
          >>> key = tempo.CheckpointKey.generate()
          >>> with tempo.Enclave.launch(checkpoint_key=key) as enclave:
          ...     data = enclave.checkpoint(enclave.seal({"step": 3}))
          ...     ledger = enclave.ledger
          >>> with tempo.Enclave.launch(checkpoint_key=key, checkpoint_ledger=ledger) as enclave:
          ...     state = enclave.restore(data, like={"step": 0})
          ...     int(enclave.open(state)["step"])
          3
        """
        self.free_dropped()
        for leaf in jax.tree.leaves(tree, is_leaf=is_sealed):
            if is_sealed(leaf):
                self.check_owned(leaf)
                if isinstance(leaf.handle, Tracer):
                    raise UnsupportedError(
                        "enclave.checkpoint was called inside jit: there is no state yet. Call it "
                        "outside, on what the jitted function returned."
                    )
        with self._checkpointing:
            data = _checkpointing.write(self, tree)
            if self._checkpoint_key is not None:
                self._ledger = self._ledger.recorded(self._checkpoint_key, data)
        return data

    def restore(self, data: bytes, like: Any, *, allow_rollback_to: int | None = None) -> Any:
        """Brings a checkpoint's state into this enclave, where it gets fresh blinding keys.

        Args:
          data: what `checkpoint` returned, in this enclave or an earlier one.
          like: a pytree of the same structure, shapes and dtypes: the state as first made, a
            sealed one, or `jax.eval_shape`'s result.
          allow_rollback_to: the number of a checkpoint that is older than the newest that the
            client has seen, to go back to it on purpose.

        Returns:
          The pytree with `SealedArray`s.

        Raises:
          CheckpointError: altered or cut; under another key; older than the client has seen; not
            like `like`.
        """
        if not isinstance(data, bytes):
            raise CheckpointError(
                f"enclave.restore: data is a {type(data).__name__}, expected bytes (for an array "
                "of uint8, `np.asarray(array).tobytes()`)"
            )
        key = self._checkpoint_key
        if key is None:
            raise CheckpointError(
                "enclave.restore: this client gave no checkpoint key; launch the enclave with "
                "`checkpoint_key=`, or call `use_checkpoint_key`"
            )
        newest = self._ledger.newest.get(key.lineage)
        order = {
            "newest": None if newest is None else newest.encode(),
            "allow_rollback_to": allow_rollback_to,
        }

        def encrypted(leaves: Sequence[Leaf]) -> bytes:
            order["leaves"] = [leaf.encode() for leaf in leaves]
            return self._encrypted(json.dumps(order).encode(), "restore")

        with self._checkpointing:
            restored = _checkpointing.restore(self, data, encrypted, like)
            self._ledger = self._ledger.recorded(key, data)
        return restored

    def check_owned(self, sealed: SealedArray) -> SealedArray:
        """Refuses values of other sessions and values already donated.

        Raises:
          SealedValueError: with the reason.
        """
        if sealed.session != self.session:
            raise SealedValueError(
                f"{sealed!r} belongs to another session or enclave; open it there and seal it here"
            )
        if any(isinstance(c, jax.Array) and c.is_deleted() for c in _concrete(sealed)):
            raise SealedValueError(
                f"{sealed!r} was donated to an earlier call, which replaced it by the new state it "
                "returned. Use that one, or pass `donate=False` to `shield`."
            )
        return sealed

    # Handles

    def adopt(self, handle: Any) -> None:
        """Counts an array that holds a handle; when the last one is dropped, frees the handle."""
        key = id(handle)
        if self._is_counted(key):
            return
        # Reading it may wait for a program whose callbacks need the lock, so it comes first.
        text = handle_text(handle)
        with self._lock:
            self._count_released()
            if not self._is_counted(key):
                self._owned[text] += 1
                self._counted[key] = weakref.finalize(handle, self._released.append, (key, text))

    def _is_counted(self, key: int) -> bool:
        # The number of an array that is gone may name another one by now.
        finalizer = self._counted.get(key)
        return finalizer is not None and finalizer.alive

    def _count_released(self) -> None:
        """Takes note of arrays that are gone.

        A finalizer runs at any point of any thread, so it takes no lock and only appends.
        """
        while self._released:
            key, text = self._released.popleft()
            if not self._is_counted(key):
                self._counted.pop(key, None)
            self._owned[text] -= 1
            if self._owned[text] <= 0:
                del self._owned[text]
                self._dropped.append(text)

    def donate(self, leaves: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Gives up sealed values that a committed run replaced by `outputs`."""
        kept = {id(x.content) for x in outputs if is_sealed(x)}
        for leaf in leaves:
            if not is_sealed(leaf):
                continue
            if leaf.form != ENCRYPTED:
                text = handle_text(leaf.handle)
                with self._lock:
                    self._dropped.append(text)
            # A leaf that the step passes through may come back as the very same array.
            if isinstance(leaf.content, jax.Array) and id(leaf.content) not in kept:
                leaf.content.delete()

    def free_dropped(self) -> None:
        """Tells the enclave which handles nobody holds any more."""
        with self._lock:
            self._count_released()
            dropped, self._dropped = self._dropped, []
        if dropped and not self._connection.closed:
            self._connection.request(Kind.FREE, {"handles": dropped})

    # Programs and runs, for `_shield`

    @contextlib.contextmanager
    def arena(self, size: int) -> Iterator[tuple[str, Arena]]:
        """Shared memory for one request or run."""
        reserved = self._connection.reserve(aligned(max(size, 1)))
        try:
            yield reserved
        except BaseException:
            self._connection.discard(reserved)
            raise
        self._connection.give_back(reserved)

    def _encrypted(self, content: bytes, purpose: str) -> bytes:
        context = f"{purpose}|{self.session}".encode()
        return encryption.encrypt_bytes(self._connection.keys.to_enclave, content, context)

    def compile(self, blob: bytes) -> str:
        """Provisions a segment's code and starts compiling it; returns its name."""
        reply = self._connection.request(Kind.COMPILE, {}, self._encrypted(blob, "compile"))
        return reply["executable"]

    def provision(self, program: Program, constants: Sequence[Any]) -> int:
        """Provisions a program and its closed-over arrays; returns its number."""
        sizes = [input_bytes(port.array) for port in program.constants]
        content = self._encrypted(json.dumps(program.encode()).encode(), "provision")
        with self.arena(sum(sizes)) as (name, arena):
            offsets = [sum(sizes[:i]) for i in range(len(sizes))]
            for port, offset, value in zip(program.constants, offsets, constants, strict=True):
                plain = np.asarray(_jaxpr.to_physical(value))
                self._write_encrypted(arena, port, offset, plain)
            reply = self._connection.request(
                Kind.PROVISION, {"arena": name, "offsets": offsets}, content
            )
        return reply["program"]

    def _write_encrypted(self, arena: Arena, port: Port, offset: int, plain: np.ndarray) -> None:
        encrypted = encryption.encrypt_array(self._connection.keys.to_enclave, plain, self.session)
        assert (plain.shape, plain.dtype.name) == (port.array.shape, port.array.dtype)
        np.copyto(arena.view(ArrayType(encrypted.shape, "uint8"), offset), encrypted)


def _concrete(sealed: SealedArray) -> list[Any]:
    children = (sealed.content, sealed.handle)
    return [c for c in children if not isinstance(c, Tracer)]
