"""Which checkpoints the enclave writes and which it lets be restored.

A *lineage* is the row of checkpoints under one secret, numbered from 1 on. The secret is the
client's, handed over encrypted, so that a later enclave can restore what this one wrote; or it
follows from the client's and the enclave's identity (SGX: MRENCLAVE and the processor) together,
and then only the same enclave on the same machine can. The identity alone is nobody's secret: the
host may start the same enclave again, as its own owner, and have it derive the same key.

An enclave that died remembers nothing, and storage belongs to the host: which checkpoint is the
newest, only the client can know. It says so with the secret and with every restore, and the enclave
refuses older ones. A client that forgot says "none", and then the host may choose among all
checkpoints of the lineage. Every order to restore serves once, so that the host cannot use one
again later, of a rollback above all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from enclave_runtime.crypto.encryption import SECRET_BYTES, derive_key
from enclave_runtime.protocol.checkpoint import (
    MAX_RUN,
    ORDER_BYTES,
    CheckpointReader,
    CheckpointWriter,
    Leaf,
    Recipient,
    RefusedCheckpointError,
    Seen,
    decode_leaves,
    lineage_name,
    mismatch,
)

# 16 bytes that Gramine derives with EGETKEY; only this MRENCLAVE on this processor gets them.
IDENTITY_KEY = "/dev/attestation/keys/_sgx_mrenclave"
IDENTITY_KEY_BYTES = 16
MAX_SPENT = 1 << 16  # orders that a session remembers, a few MB


@dataclasses.dataclass
class _Lineage:
    """One secret and what is known of its checkpoints."""

    secret: bytes
    recipient: Recipient
    newest: Seen | None = None  # that the client told of
    last: int = 0  # the highest number told of, restored or given away here

    def __repr__(self) -> str:
        return "_Lineage(<secret>)"

    def learn(self, seen: Seen | None) -> None:
        """Takes note of what the client has seen; older news change nothing."""
        if seen is not None and (self.newest is None or seen.number > self.newest.number):
            self.newest = seen
            self.last = max(self.last, seen.number)


class Lineages:
    """The lineages that the client provisioned; the last one is in use."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Lineage] = {}
        self._current: _Lineage | None = None
        self._spent: set[bytes] = set()  # identifiers of orders to restore

    def provision(self, order: Any) -> None:
        """Takes a secret into use.

        Args:
          order: the client's: `recipient`, `secret` in hex, for an enclave's identity also the
            `run`'s name, and `newest`.

        Raises:
          RefusedCheckpointError: malformed, or this enclave has no identity to derive a secret
            from.
        """
        if not isinstance(order, dict):
            raise RefusedCheckpointError("an order for a checkpoint key is not an object")
        if order.get("recipient") not in (Recipient.CLIENT, Recipient.ENCLAVE):
            raise RefusedCheckpointError("a checkpoint key is the client's or the enclave's")
        recipient, secret = Recipient(order["recipient"]), _client_secret(order.get("secret"))
        if recipient is Recipient.ENCLAVE:
            secret = _identity_secret(secret, order.get("run"))
        seen = _decode_seen(order.get("newest"))
        lineage = self._known.setdefault(lineage_name(secret), _Lineage(secret, recipient))
        lineage.learn(seen)
        self._current = lineage

    def _in_use(self) -> _Lineage:
        if self._current is None:
            raise RefusedCheckpointError(
                "the client provisioned no checkpoint key: launch the enclave with "
                "`checkpoint_key=`, or call `use_checkpoint_key`"
            )
        return self._current

    def writer(self, leaves: Sequence[Leaf]) -> CheckpointWriter:
        """Begins the next checkpoint; its number is spent even if it is never finished."""
        lineage = self._in_use()
        lineage.last += 1
        return CheckpointWriter(lineage.secret, lineage.recipient, lineage.last, leaves)

    def reader(self, head: bytes, order: Any) -> CheckpointReader:
        """Begins to restore a checkpoint, if the client lets it.

        Args:
          head: of the checkpoint.
          order: the client's: its `id`, which serves once, the `leaves` it expects, the `newest`
            checkpoint it has seen, and `allow_rollback_to`, an older one that it asks for by
            number, or by number and identifier.

        Raises:
          RefusedCheckpointError: another key, altered, older than allowed, or another tree; or an
            order that was used before.
        """
        lineage = self._in_use()
        if not isinstance(order, dict):
            raise RefusedCheckpointError("an order to restore is not an object")
        name = self._unspent(order.get("id"))
        lineage.learn(_decode_seen(order.get("newest")))
        reader = CheckpointReader(lineage.secret, head)
        if (named := order.get("allow_rollback_to")) is not None:
            _check_named(reader, named)
        else:
            _check_newest(reader, lineage.newest)
        if (text := mismatch(reader.leaves, decode_leaves(order.get("leaves")))) is not None:
            raise RefusedCheckpointError(text)
        self._spent.add(name)
        lineage.last = max(lineage.last, reader.header.number)
        return reader

    def _unspent(self, identifier: Any) -> bytes:
        """The identifier of an order that may still be used."""
        name = _from_hex(identifier)
        if len(name) != ORDER_BYTES:
            raise RefusedCheckpointError(f"an order to restore has an id of {ORDER_BYTES} bytes")
        if name in self._spent:
            raise RefusedCheckpointError(
                "this order to restore was used before, and each serves once: the client makes "
                "another with `enclave.restore_order`"
            )
        # Forgetting one would let it serve again, and only the client can make orders.
        if len(self._spent) >= MAX_SPENT:
            raise RefusedCheckpointError(f"an enclave restores {MAX_SPENT} times: start another")
        return name


def _check_named(reader: CheckpointReader, named: Any) -> None:
    number = reader.header.number
    if isinstance(named, dict):
        fits = Seen.decode(named) == Seen(number, reader.header.identifier)
    else:
        fits = type(named) is int and named == number
    if not fits:
        raise RefusedCheckpointError(
            f"this is checkpoint {number}, and `allow_rollback_to` names another"
        )


def _check_newest(reader: CheckpointReader, newest: Seen | None) -> None:
    number = reader.header.number
    if newest is None or number > newest.number:
        return
    if number < newest.number:
        raise RefusedCheckpointError(
            f"checkpoint {number} is older than checkpoint {newest.number}, which the client has "
            f"seen. Restore the newest one, or ask for this one with `allow_rollback_to={number}`"
        )
    if reader.header.identifier != newest.identifier:
        raise RefusedCheckpointError(
            f"there are several checkpoints {number}, from enclaves that ran side by side, and "
            f"this is not the one that the client has seen; `allow_rollback_to={number}` takes it"
        )


def _decode_seen(fields: Any) -> Seen | None:
    return None if fields is None else Seen.decode(fields)


def _from_hex(text: Any) -> bytes:
    """The bytes, none if it is no such text."""
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError):
        return b""


def _client_secret(text: Any) -> bytes:
    secret = _from_hex(text)
    if len(secret) != SECRET_BYTES:
        raise RefusedCheckpointError(f"a checkpoint key has {SECRET_BYTES} bytes")
    return secret


def _identity_secret(secret: bytes, run: Any) -> bytes:
    """The secret of a run that takes both to know: the client's and this enclave's own."""
    if not isinstance(run, str) or not 0 < len(run) <= MAX_RUN:
        raise RefusedCheckpointError(f"a run's name has 1 to {MAX_RUN} characters")
    try:
        with open(IDENTITY_KEY, "rb") as file:
            key = file.read(IDENTITY_KEY_BYTES + 1)
    except OSError as error:
        raise RefusedCheckpointError(
            "this enclave has no identity to seal to, which takes SGX under Gramine; seal to a "
            "client's key, `CheckpointKey.generate()`"
        ) from error
    if len(key) != IDENTITY_KEY_BYTES:
        raise RefusedCheckpointError(f"an enclave's identity key has {IDENTITY_KEY_BYTES} bytes")
    # Both have a fixed length, so no two pairs give the same bytes.
    return derive_key(key + secret, f"checkpoint run {run}")
