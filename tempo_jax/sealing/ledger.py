"""What a client keeps of its checkpoints: the key, and a memory of the newest one.

`Enclave.checkpoint` turns a sealed state into bytes that any storage may hold, and
`Enclave.restore` turns them back, also in a later enclave:

    key = tempo.CheckpointKey.generate()  # keep key.to_bytes() where the host cannot read it
    with tempo.Enclave.launch(checkpoint_key=key, checkpoint_ledger=ledger) as enclave:
        data = enclave.checkpoint(state)
        tempo.checkpoints.write("state.ckpt", data)
        tempo.checkpoints.write("ledger.json", enclave.ledger.to_json().encode())

**Old checkpoints.** Storage belongs to the host, which can offer an old checkpoint as the newest;
an enclave that has just started cannot tell. The client can: the ledger knows the newest
checkpoint it has seen, and an older one is refused unless the client asks for it by number.
Without a ledger that outlives the enclave, kept where the host cannot write, **rollback is
not noticed**. A ledger holds no secrets. Write it after the checkpoint: a crash between the two
then costs nothing, while a ledger that knows of a checkpoint that was never stored makes the
client ask for the one before by name.

This module is the client's and runs where its plaintext may be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from enclave_runtime.crypto.encryption import SECRET_BYTES, derive_key
from enclave_runtime.protocol import checkpoint
from enclave_runtime.protocol.checkpoint import Header, Recipient, Seen
from tempo_jax.errors import CheckpointError
from tempo_jax.jaxprs import types
from tempo_jax.sealing.leaves import leaves_of

LEDGER_VERSION = 1
MAX_LEDGER = 1 << 24  # characters


@dataclasses.dataclass(frozen=True, eq=False, repr=False, slots=True)
class CheckpointKey:
    """What checkpoints are sealed to: a secret of the client, or it and an enclave's identity.

    Each training run should have a key of its own, since checkpoints are numbered, and the newest
    one remembered, for each key. Deliberately not a pytree, so that it cannot become an operand.

    Example:
      >>> import tempo_jax as tempo
      >>> key = tempo.CheckpointKey.generate()
      >>> again = tempo.CheckpointKey.from_bytes(key.to_bytes())
      >>> key, again.lineage == key.lineage
      (CheckpointKey(<secret>), True)
    """

    _secret: bytes
    _run: str | None  # none for a key that is the client's alone

    @classmethod
    def generate(cls) -> CheckpointKey:
        """A fresh secret from the operating system, 256 bits."""
        return cls(os.urandom(SECRET_BYTES), None)

    @classmethod
    def from_bytes(cls, secret: bytes) -> CheckpointKey:
        """The key that `to_bytes` wrote.

        Raises:
          CheckpointError: not 32 bytes.
        """
        _check_secret("from_bytes", secret)
        return cls(secret, None)

    @classmethod
    def enclave_identity(cls, run: str, secret: bytes) -> CheckpointKey:
        """Seals to the client and the enclave together: it takes both to restore.

        Only the same MRENCLAVE on the same processor can, and only for a client that gives it the
        same secret. An update of the enclave's code or another machine makes such checkpoints
        unreadable, to the client too. Needs SGX.

        Args:
          run: a name for the training run; not secret.
          secret: 32 random bytes that the client keeps, such as `generate().to_bytes()`. Without
            it the host could start the same enclave again, as its owner, and open everything.

        Raises:
          CheckpointError: a name that is empty or too long, or not 32 bytes.
        """
        if not isinstance(run, str) or not 0 < len(run) <= checkpoint.MAX_RUN:
            raise CheckpointError(
                f"CheckpointKey.enclave_identity: a run's name has 1 to {checkpoint.MAX_RUN} "
                "characters"
            )
        _check_secret("enclave_identity", secret)
        return cls(secret, run)

    def to_bytes(self) -> bytes:
        """The secret, 32 bytes, for the client to keep.

        Raises:
          CheckpointError: the key is an enclave's as well.
        """
        if self._run is not None:
            raise CheckpointError(
                "the key of an enclave's identity never leaves the enclave; keep the `secret` that "
                "`enclave_identity` was given"
            )
        return self._secret

    @property
    def lineage(self) -> str:
        """The public name under which a ledger remembers this key's checkpoints."""
        if self._run is None:
            return checkpoint.lineage_name(self._secret).hex()
        # The enclave's own name for it takes the enclave's secret; this one is the client's.
        return derive_key(self._secret, f"ledger run {self._run}", checkpoint.LINEAGE_BYTES).hex()

    def order(self) -> dict[str, Any]:
        """What the enclave is told, encrypted: who can restore, the secret, and the run's name."""
        if self._run is None:
            return {"recipient": Recipient.CLIENT, "secret": self._secret.hex()}
        return {"recipient": Recipient.ENCLAVE, "secret": self._secret.hex(), "run": self._run}

    def authenticated(self, data: bytes) -> Seen:
        """Which checkpoint this is.

        A client's key authenticates the answer; of one sealed to an enclave's identity only that
        enclave could, so there it is what the header claims.

        Raises:
          CheckpointError: not a checkpoint, or altered, or of another key.
        """
        try:
            head = checkpoint.head_of(data)
            if self._run is None:
                header = checkpoint.CheckpointReader(self._secret, head).header
            else:
                header = Header.decode(head)
        except checkpoint.RefusedCheckpointError as error:
            raise CheckpointError(str(error)) from error
        return Seen(header.number, header.identifier)

    def __repr__(self) -> str:
        of_run = "" if self._run is None else f", run={self._run!r}"
        return f"CheckpointKey(<secret>{of_run})"

    def __reduce__(self) -> Any:
        raise CheckpointError("a CheckpointKey is not pickled; keep what `to_bytes` gives")


def _check_secret(where: str, secret: Any) -> None:
    if not isinstance(secret, bytes) or len(secret) != SECRET_BYTES:
        raise CheckpointError(
            f"CheckpointKey.{where}: expected {SECRET_BYTES} bytes, as `to_bytes` gives them"
        )


@dataclasses.dataclass(frozen=True)
class CheckpointLedger:
    """The newest checkpoint that the client has seen of each key.

    Attributes:
      newest: by the key's `lineage`.

    Example:
      >>> import tempo_jax as tempo
      >>> ledger = tempo.CheckpointLedger()
      >>> tempo.CheckpointLedger.from_json(ledger.to_json()) == ledger
      True
    """

    newest: Mapping[str, Seen] = dataclasses.field(default_factory=dict)

    def recorded(self, key: CheckpointKey, data: bytes) -> CheckpointLedger:
        """A ledger that has also seen this checkpoint; an older one changes nothing.

        Raises:
          CheckpointError: not a checkpoint under this key.
        """
        return self.with_seen(key, key.authenticated(data))

    def with_seen(self, key: CheckpointKey, seen: Seen) -> CheckpointLedger:
        """As `recorded`, for a checkpoint that was already authenticated."""
        known = self.newest.get(key.lineage)
        if known is not None and seen.number <= known.number:
            return self
        return CheckpointLedger({**self.newest, key.lineage: seen})

    def number(self, key: CheckpointKey) -> int:
        """The newest number seen under a key, 0 for none."""
        known = self.newest.get(key.lineage)
        return 0 if known is None else known.number

    def to_json(self) -> str:
        """The ledger as text, for the client to keep; it holds no secrets."""
        newest = {lineage: seen.encode() for lineage, seen in self.newest.items()}
        return json.dumps({"version": LEDGER_VERSION, "newest": newest}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> CheckpointLedger:
        """Inverse of `to_json`.

        Raises:
          CheckpointError: not a ledger. Do not go on with an empty one: it would accept
            any checkpoint.
        """
        try:
            fields = json.loads(text) if len(text) <= MAX_LEDGER else None
            if not isinstance(fields, dict) or fields.get("version") != LEDGER_VERSION:
                raise ValueError("no version")
            return cls({str(k): Seen.decode(v) for k, v in fields["newest"].items()})
        except (
            *(AttributeError, KeyError, RecursionError, ValueError),
            checkpoint.RefusedCheckpointError,
        ) as error:
            raise CheckpointError(
                "CheckpointLedger.from_json: not a ledger that `to_json` wrote. Restore it from a "
                "backup; an empty ledger would accept old checkpoints"
            ) from error


def open_checkpoint(data: bytes, key: CheckpointKey, like: Any) -> Any:
    """Decrypts a checkpoint on the client's own machine, without any enclave.

    Compare ``key.authenticated(data).number`` with the ledger's to know how new it is.

    Args:
      data: a whole checkpoint.
      key: the client's key.
      like: a pytree of arrays, sealed arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      The same pytree with the checkpoint's values, in the clear.

    Raises:
      CheckpointError: altered, under another key, or another tree.
    """
    secret = key.to_bytes()
    leaves, structure, avals = leaves_of(like)
    try:
        reader, values = checkpoint.read_checkpoint(secret, data)
    except checkpoint.RefusedCheckpointError as error:
        raise CheckpointError(str(error)) from error
    if (text := checkpoint.mismatch(reader.leaves, leaves)) is not None:
        raise CheckpointError(text)
    plain = [
        types.with_weak_type(types.from_physical(jnp.asarray(value), aval), leaf.weak)
        for value, aval, leaf in zip(values, avals, reader.leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, plain)


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that a crash at any point leaves the old content or the new one, whole.

    The bytes go to a file beside it, ``<name>.partial``, onto the disk, and then under the name.
    One process at a time may write a file.

    Raises:
      OSError: the disk is full or failing; what was there before is untouched.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(aside, flags, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    # The name is on the disk only once its folder is (fsync(2)).
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
