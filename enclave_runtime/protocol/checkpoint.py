"""The sealed checkpoint: training state as bytes that any storage may hold.

Storage and host are untrusted: they can lose a checkpoint, keep old ones, and alter, cut or
mix them, but learn no more than its number, lineage and sizes. All but the loss is noticed;
that an *old* checkpoint is offered as the newest is noticed only by a client that
remembers, see `lineage`. The enclave writes and reads checkpoints; a client reads those that
were sealed to its key. No pickle, and every length is checked before memory is taken for it.

Values are sealed in the clear form they have inside the enclave, never as blinded arrays with
their keys: whoever restores them blinds them again, under fresh keys.

A checkpoint is a head and its leaves, one after the other; integers are big-endian:

    bytes  0-7   magic b"TEMPOCKP"
    bytes  8-9   version, now 2
    bytes 10-11  whose secret sealed it, see `Recipient`
    bytes 12-15  length m of the sealed manifest, at most `MAX_MANIFEST`
    bytes 16-23  number, one more than that of the lineage's checkpoint before
    bytes 24-39  lineage: the public name of the secret, see `lineage_name`
    bytes 40-71  identifier, drawn at random for each checkpoint
    bytes 72-    m bytes: the manifest, JSON in UTF-8, sealed as one part
    then         for each leaf of the manifest its tag (56 bytes, see `tags.TagRecord`) as one
                 part, and its bytes in parts of `CHUNK`, the last one shorter; each part is 16
                 bytes longer sealed. The bytes of an empty leaf are one part.

A *part* is AES-256-GCM under HKDF-SHA256(secret, identifier): a key that serves this one
checkpoint. Its nonce is the part's number, counted from 0 at the manifest; its associated data
are the 72 bytes of the header, its leaf's position and its own in the leaf, where a tag comes
before all others. So a part fits
nowhere else, and the manifest, which is authenticated first, says how long everything is.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 and the other narrow floats with NumPy)
import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from enclave_runtime.crypto.encryption import derive_key
from enclave_runtime.protocol.program import ArrayType, ProgramError
from enclave_runtime.protocol.tags import RECORD, TagRecord

VERSION = 2
MAGIC = b"TEMPOCKP"
HEADER = struct.Struct(">8sHHIQ16s32s")  # 72 bytes
PLACE = struct.Struct(">QQ")  # a leaf's position and a part's in it
CHUNK = 1 << 20  # bytes; AES-GCM is fastest at about this size
TAG_BYTES = 16
LINEAGE_BYTES = 16
IDENTIFIER_BYTES = 32
ORDER_BYTES = 16  # what names an order to restore
MAX_MANIFEST = 1 << 24  # bytes
MAX_LEAVES = 1 << 18
MAX_NAME = 4096  # characters
MAX_NUMBER = 1 << 62
MAX_RUN = 256  # characters
_MANIFEST_PLACE = (1 << 64) - 1
_TAG_PART = (1 << 64) - 1
_TAG_BYTES = RECORD.size + TAG_BYTES

# One text for whatever is wrong with authenticated bytes: it tells the untrusted side nothing.
ALTERED = (
    "the checkpoint failed its authentication: it was altered or cut, or put together from "
    "several checkpoints"
)


class RefusedCheckpointError(Exception):
    """A checkpoint that is refused; the text goes to the peer."""


class Recipient(enum.IntEnum):
    """Whose secret a checkpoint is sealed under: the client's, or it and the enclave's together."""

    CLIENT = 1
    ENCLAVE = 2


class Leaf(NamedTuple):
    """What the manifest says of a leaf.

    Attributes:
      name: its path in the pytree.
      array: shape and dtype of its bytes.
      dtype: the name of its JAX dtype, which differs from `array`'s for typed random keys.
      weak: whether its JAX type is weak.
    """

    name: str
    array: ArrayType
    dtype: str
    weak: bool

    def encode(self) -> dict[str, Any]:
        """The leaf as JSON's types."""
        return {
            "name": self.name,
            "array": {"shape": list(self.array.shape), "dtype": self.array.dtype},
            "dtype": self.dtype,
            "weak": self.weak,
        }

    @classmethod
    def decode(cls, fields: Any) -> Leaf:
        """Inverse of `encode`.

        Raises:
          RefusedCheckpointError: a field is missing, of another type or out of bounds.
        """
        if not isinstance(fields, dict):
            raise RefusedCheckpointError("a checkpoint's leaf is not an object")
        name, dtype, weak = (fields.get(key) for key in ("name", "dtype", "weak"))
        if not (isinstance(name, str) and isinstance(dtype, str) and isinstance(weak, bool)):
            raise RefusedCheckpointError("a checkpoint's leaf has a field of the wrong type")
        if len(name) > MAX_NAME or len(dtype) > MAX_NAME:
            raise RefusedCheckpointError("a checkpoint's leaf has too long a name")
        try:
            array = ArrayType.decode(fields.get("array"))
        except ProgramError as error:
            raise RefusedCheckpointError(f"a checkpoint's leaf: {error}") from error
        return cls(name, array, dtype, weak)

    def __str__(self) -> str:
        return f"{self.name[:80]} {self.dtype[:20]}{list(self.array.shape)}"


class Header(NamedTuple):
    """The first 72 bytes; see the module."""

    recipient: Recipient
    manifest_bytes: int
    number: int
    lineage: bytes
    identifier: bytes

    def encode(self) -> bytes:
        """The header as bytes."""
        return HEADER.pack(MAGIC, VERSION, *self)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Header:
        """Reads the start of a checkpoint; nothing in it is authenticated yet.

        Raises:
          RefusedCheckpointError: too short, another format or version, or out of bounds.
        """
        if len(data) < HEADER.size:
            raise RefusedCheckpointError(
                f"a checkpoint begins with {HEADER.size} bytes of header, got {len(data)}"
            )
        magic, version, recipient, length, number, lineage, identifier = HEADER.unpack_from(data)
        if magic != MAGIC:
            raise RefusedCheckpointError("not a checkpoint of tempo_jax (wrong magic)")
        if version != VERSION:
            raise RefusedCheckpointError(f"checkpoint version {version}, expected {VERSION}")
        known = recipient in Recipient._value2member_map_
        if not known or not TAG_BYTES <= length <= MAX_MANIFEST or number > MAX_NUMBER:
            raise RefusedCheckpointError("a checkpoint's header is out of bounds")
        return cls(Recipient(recipient), length, number, lineage, identifier)


@dataclasses.dataclass(frozen=True)
class Seen:
    """A checkpoint that the client has seen.

    Attributes:
      number: its number.
      identifier: which of those with this number, should there be several.
    """

    number: int
    identifier: bytes

    def encode(self) -> dict[str, Any]:
        """The two as JSON's types."""
        return {"number": self.number, "identifier": self.identifier.hex()}

    @classmethod
    def decode(cls, fields: Any) -> Seen:
        """Inverse of `encode`.

        Raises:
          RefusedCheckpointError: malformed.
        """
        try:
            number, identifier = fields["number"], bytes.fromhex(fields["identifier"])
        except (KeyError, TypeError, ValueError) as error:
            raise RefusedCheckpointError("a record of a checkpoint is malformed") from error
        fits = type(number) is int and 0 < number < MAX_NUMBER
        if not fits or len(identifier) != IDENTIFIER_BYTES:
            raise RefusedCheckpointError("a record of a checkpoint is out of bounds")
        return cls(number, identifier)


def decode_leaves(leaves: Any) -> list[Leaf]:
    """Reads a list of `Leaf.encode`'s results.

    Raises:
      RefusedCheckpointError: malformed, or too many.
    """
    if not isinstance(leaves, list) or len(leaves) > MAX_LEAVES:
        raise RefusedCheckpointError("a checkpoint's leaves are not a list, or too many")
    return [Leaf.decode(leaf) for leaf in leaves]


def mismatch(held: Sequence[Leaf], wanted: Sequence[Leaf]) -> str | None:
    """Says how the leaves of a checkpoint differ from those asked for, if they do."""
    for position, (leaf, other) in enumerate(zip(held, wanted, strict=False)):
        # The checkpoint says whether a type is weak; who asks need not know.
        if leaf._replace(weak=other.weak) != other:
            return (
                f"the checkpoint holds another tree than `like`: leaf {position} is {leaf}, "
                f"expected {other}"
            )
    if len(held) != len(wanted):
        return (
            f"the checkpoint holds another tree than `like`: {len(held)} leaves, "
            f"expected {len(wanted)}"
        )
    return None


def lineage_name(secret: bytes) -> bytes:
    """The public name of all checkpoints under one secret, 16 bytes."""
    return derive_key(secret, "checkpoint lineage", LINEAGE_BYTES)


def head_of(data: bytes | memoryview) -> bytes:
    """A checkpoint's header and sealed manifest.

    Raises:
      RefusedCheckpointError: not a checkpoint, or cut.
    """
    length = HEADER.size + Header.decode(data).manifest_bytes
    if len(data) < length:
        raise RefusedCheckpointError(ALTERED)
    return bytes(data[:length])


def _parts(array: ArrayType) -> int:
    return max(1, -(-array.nbytes // CHUNK))


def sealed_bytes(array: ArrayType) -> int:
    """How long a leaf is in a checkpoint."""
    return _TAG_BYTES + array.nbytes + TAG_BYTES * _parts(array)


class _Cipher:
    """Seals or opens one checkpoint's parts in order, so that no nonce serves twice."""

    def __init__(self, secret: bytes, header: Header):
        self._header = header.encode()
        self._key = AESGCM(derive_key(secret, f"checkpoint {header.identifier.hex()}"))
        self._next = 0

    def __repr__(self) -> str:
        return "_Cipher(<secret>)"

    def _use(self, leaf: int, part: int) -> tuple[bytes, bytes]:
        nonce = self._next.to_bytes(12, "big")
        self._next += 1
        return nonce, self._header + PLACE.pack(leaf, part)

    def seal(self, plain: bytes | memoryview, leaf: int, part: int) -> bytes:
        nonce, context = self._use(leaf, part)
        return self._key.encrypt(nonce, plain, context)

    def open(self, sealed: bytes | memoryview, leaf: int, part: int) -> bytes:
        nonce, context = self._use(leaf, part)
        try:
            return self._key.decrypt(nonce, sealed, context)
        except (InvalidTag, ValueError) as error:
            raise RefusedCheckpointError(ALTERED) from error


class CheckpointWriter:
    """Writes one checkpoint: the head at once, then leaf by leaf in order.

    Attributes:
      header: its header.
      leaves: what it holds.
      head: header and sealed manifest.
      written: leaves sealed so far.
    """

    def __init__(self, secret: bytes, recipient: Recipient, number: int, leaves: Sequence[Leaf]):
        """Seals the manifest.

        Raises:
          RefusedCheckpointError: too many leaves, or a manifest that is too long.
        """
        manifest = json.dumps({"leaves": [leaf.encode() for leaf in leaves]}).encode()
        length = len(manifest) + TAG_BYTES
        if len(leaves) > MAX_LEAVES or length > MAX_MANIFEST:
            raise RefusedCheckpointError(
                f"a checkpoint of {len(leaves)} leaves with {len(manifest)} bytes of names and "
                f"shapes, expected at most {MAX_LEAVES} and {MAX_MANIFEST - TAG_BYTES}"
            )
        identifier = os.urandom(IDENTIFIER_BYTES)
        self.header = Header(recipient, length, number, lineage_name(secret), identifier)
        self.leaves = tuple(leaves)
        self.written = 0
        self._cipher = _Cipher(secret, self.header)
        self.head = self.header.encode() + self._cipher.seal(manifest, _MANIFEST_PLACE, 0)

    def seal(self, value: np.ndarray, tag: TagRecord, out: np.ndarray) -> None:
        """Writes the next leaf and its tag to `out`, uint8[sealed_bytes]."""
        array = self.leaves[self.written].array
        assert (value.shape, value.dtype.name) == (array.shape, array.dtype)
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        content = np.ascontiguousarray(native).reshape(-1).view(np.uint8).data
        record = self._cipher.seal(tag.encode(), self.written, _TAG_PART)
        out[:_TAG_BYTES] = np.frombuffer(record, np.uint8)
        start = _TAG_BYTES
        for part in range(_parts(array)):
            plain = content[part * CHUNK : (part + 1) * CHUNK]
            sealed = self._cipher.seal(plain, self.written, part)
            out[start : start + len(sealed)] = np.frombuffer(sealed, np.uint8)
            start += len(sealed)
        self.written += 1


class CheckpointReader:
    """Reads one checkpoint: its head at once, then leaf by leaf in order.

    Attributes:
      header: its header, authenticated.
      leaves: what it holds.
      read: leaves opened so far.
    """

    def __init__(self, secret: bytes, head: bytes):
        """Opens the manifest.

        Raises:
          RefusedCheckpointError: sealed under another secret, altered, or malformed.
        """
        self.header = Header.decode(head)
        if self.header.lineage != lineage_name(secret):
            raise RefusedCheckpointError("the checkpoint was sealed under another key")
        if len(head) != HEADER.size + self.header.manifest_bytes:
            raise RefusedCheckpointError(ALTERED)
        self._cipher = _Cipher(secret, self.header)
        manifest = self._cipher.open(memoryview(head)[HEADER.size :], _MANIFEST_PLACE, 0)
        self.leaves = _decode_manifest(manifest)
        self.read = 0

    def open(self, sealed: np.ndarray) -> tuple[TagRecord, np.ndarray]:
        """The next leaf and its tag from uint8[sealed_bytes], to which nobody else may write.

        Raises:
          RefusedCheckpointError: altered, of another length, or not the next leaf.
        """
        if self.read == len(self.leaves):
            raise RefusedCheckpointError(ALTERED)
        array = self.leaves[self.read].array
        if sealed.shape != (sealed_bytes(array),) or sealed.dtype != np.uint8:
            raise RefusedCheckpointError(ALTERED)
        content = np.ascontiguousarray(sealed).data
        tag = TagRecord.decode(self._cipher.open(content[:_TAG_BYTES], self.read, _TAG_PART))
        plain = np.empty(array.nbytes, np.uint8)
        for part in range(_parts(array)):
            start = _TAG_BYTES + part * (CHUNK + TAG_BYTES)
            opened = self._cipher.open(content[start : start + CHUNK + TAG_BYTES], self.read, part)
            plain[part * CHUNK : part * CHUNK + len(opened)] = np.frombuffer(opened, np.uint8)
        self.read += 1
        return tag, plain.view(np.dtype(array.dtype)).reshape(array.shape)


def _decode_manifest(manifest: bytes) -> tuple[Leaf, ...]:
    try:
        fields = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise RefusedCheckpointError("a checkpoint's manifest does not parse") from error
    if not isinstance(fields, dict):
        raise RefusedCheckpointError("a checkpoint's manifest is not an object")
    return tuple(decode_leaves(fields.get("leaves")))


def split(data: bytes | memoryview, leaves: Sequence[Leaf]) -> list[np.ndarray]:
    """The sealed leaves of a whole checkpoint with this manifest, as views of it.

    Raises:
      RefusedCheckpointError: it is longer or shorter than that.
    """
    start = HEADER.size + Header.decode(data).manifest_bytes
    sizes = [sealed_bytes(leaf.array) for leaf in leaves]
    if len(data) != start + sum(sizes):
        raise RefusedCheckpointError(ALTERED)
    views = []
    for size in sizes:
        views.append(np.frombuffer(data, np.uint8, size, start))
        start += size
    return views


def read_checkpoint(secret: bytes, data: bytes) -> tuple[CheckpointReader, list[np.ndarray]]:
    """Opens a whole checkpoint with the secret it was sealed under.

    Returns:
      The reader, with header and manifest, and the value of each leaf.

    Raises:
      RefusedCheckpointError: see `CheckpointReader`.
    """
    reader = CheckpointReader(secret, head_of(data))
    return reader, [reader.open(sealed)[1] for sealed in split(data, reader.leaves)]
