"""Frames of the control connection, shared by the host and the enclave.

A frame carries a small JSON object and, for compiled programs, one binary attachment. Tensors
cross through shared memory or, where a worker of the host shares none with the enclave, as *blocks*
that follow the frame of their segment. Everything a peer claims about a length is checked before
memory is allocated for it. No pickle.

The connection is authenticated when it opens (`prove`, `check_proof`): both ends
show that they know the session's connection key, without sending it.
"""

from __future__ import annotations

import enum
import json
import math
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, hmac

VERSION = 1
MAGIC = b"TMPO"
HEADER = struct.Struct(">4sHHQI")  # 20 bytes
JSON_LENGTH = struct.Struct(">I")
MAX_BODY = 1 << 30  # bytes; the largest frame provisions one compiled segment
MAX_JSON = 1 << 26  # bytes
NONCE_BYTES = 32
BLOCK_MAGIC = b"TMPB"
BLOCK = struct.Struct(">4sHHQIIQ")  # 32 bytes
_MOST_PARTS = 512  # of one system call; Linux takes 1,024
# All that a peer is told of a refusal whose reason is not its business.
REFUSAL = "refused; the enclave's own log has the reason"


class WireError(Exception):
    """A frame that does not follow the format, or a peer that failed to prove itself."""


class PeerLeftError(ConnectionError):
    """The peer closed the connection between two frames, as it may at any time."""


class Kind(enum.IntEnum):
    """What a frame asks for; a reply is `REPLY` or `ERROR`."""

    REPLY = 0
    ERROR = 1
    HELLO = 2
    PROOF = 3
    MAP = 4
    UNMAP = 5
    COMPILE = 6
    PROVISION = 7
    BEGIN = 8
    SETTLE = 9
    SEGMENT = 10
    COMMIT = 11
    ABORT = 12
    OPEN = 13
    FREE = 14
    STATISTICS = 15
    CALIBRATE = 16
    CHECKPOINT_KEY = 17
    CHECKPOINT = 18
    CHECKPOINT_LEAF = 19
    RESTORE = 20
    RESTORE_LEAF = 21
    OWN = 22
    FIND = 23
    RELEASE = 24
    JOIN = 25
    BEAT = 26
    PREPARE = 27


class Frame(NamedTuple):
    """One message; integers are big-endian.

      bytes  0-3  magic b"TMPO"          bytes  8-15  request number, echoed in the reply
      bytes  4-5  version, now 1         bytes 16-19  body length, at most `MAX_BODY`
      bytes  6-7  kind, see `Kind`       bytes 20-    body

    The body is a 4-byte length, that many bytes of JSON (one object), and the attachment.
    """

    kind: Kind
    request: int
    fields: dict[str, Any]
    attachment: bytes = b""

    def __repr__(self) -> str:
        # Sizes alone: the fields and the attachment of some kinds are secret.
        sizes = f"{len(self.fields)} fields, {len(self.attachment)} bytes"
        return f"Frame({self.kind.name}, {self.request}, {sizes})"

    def encode(self) -> bytes:
        """The frame as bytes.

        Raises:
          WireError: the frame is longer than `MAX_BODY`.
        """
        text = json.dumps(self.fields, separators=(",", ":"), allow_nan=False).encode()
        length = JSON_LENGTH.size + len(text) + len(self.attachment)
        if length > MAX_BODY or len(text) > MAX_JSON:
            raise WireError(f"a frame of {length} bytes exceeds the limit of {MAX_BODY} bytes")
        header = HEADER.pack(MAGIC, VERSION, self.kind, self.request, length)
        return b"".join((header, JSON_LENGTH.pack(len(text)), text, self.attachment))


def decode_header(header: bytes) -> tuple[Kind, int, int]:
    """Returns (kind, request number, body length in bytes) of a frame header.

    Raises:
      WireError: wrong length, magic, version or kind, or a body over `MAX_BODY`.
    """
    if len(header) != HEADER.size:
        raise WireError(f"a frame header has {HEADER.size} bytes, got {len(header)}")
    magic, version, kind, request, length = HEADER.unpack(header)
    if magic != MAGIC:
        raise WireError("the peer does not speak tempo_jax's protocol (wrong magic)")
    if version != VERSION:
        raise WireError(f"protocol version {version}, expected {VERSION}: update both sides")
    if kind not in Kind._value2member_map_:
        raise WireError(f"unknown frame kind {kind}")
    if not JSON_LENGTH.size <= length <= MAX_BODY:
        raise WireError(f"a body of {length} bytes, expected {JSON_LENGTH.size} to {MAX_BODY}")
    return Kind(kind), request, length


def _refuse_constant(text: str) -> None:
    # Python's reader takes NaN and infinities, which are not JSON (RFC 8259, 6).
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    # Python reads 1e999 as an infinity, which no frame could carry on.
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


def decode_body(kind: Kind, request: int, body: bytes) -> Frame:
    """Returns the frame with this body.

    Raises:
      WireError: the body is truncated or its JSON is not one object.
    """
    if len(body) < JSON_LENGTH.size:
        raise WireError("a frame body is shorter than its JSON length field")
    (length,) = JSON_LENGTH.unpack_from(body)
    end = JSON_LENGTH.size + length
    if length > MAX_JSON or end > len(body):
        raise WireError("a frame's JSON is longer than its body")
    try:
        text = str(body[JSON_LENGTH.size : end], "utf-8")
        fields = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise WireError("a frame's JSON does not parse") from error
    if not isinstance(fields, dict):
        raise WireError("a frame's JSON is not an object")
    return Frame(kind, request, fields, body[end:])


def _receive_exactly(
    connection: socket.socket,
    count: int,
    deadline: float | None,
    at_once: type[ConnectionError] = ConnectionError,
) -> bytes:
    """So many bytes; `at_once` is raised if the peer closes the connection before the first."""
    buffer = bytearray(count)
    view = memoryview(buffer)
    while count:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the peer took too long")
            connection.settimeout(left)
        received = connection.recv_into(view, count)
        if not received:
            error = at_once if count == len(buffer) else ConnectionError
            raise error("the peer closed the connection")
        view = view[received:]
        count -= received
    return bytes(buffer)


def send(connection: socket.socket, frame: Frame) -> None:
    """Sends one frame."""
    connection.sendall(frame.encode())


def receive(
    connection: socket.socket, max_body: int = MAX_BODY, deadline: float | None = None
) -> Frame:
    """Receives one frame.

    Args:
      connection: a connected stream socket.
      max_body: largest body to accept, in bytes; small until the peer is authenticated.
      deadline: when the frame has to be complete, as `time.monotonic` tells it, however slowly
        bytes trickle in; changes the socket's timeout.

    Raises:
      WireError: the frame breaks the format or exceeds `max_body`.
      PeerLeftError: the peer closed the connection before the frame.
      ConnectionError: the peer closed the connection within the frame.
      TimeoutError: the deadline, or the socket's own timeout, has passed.
    """
    header = _receive_exactly(connection, HEADER.size, deadline, PeerLeftError)
    kind, request, length = decode_header(header)
    if length > max_body:
        raise WireError(f"a body of {length} bytes, expected at most {max_body}")
    return decode_body(kind, request, _receive_exactly(connection, length, deadline))


class Label(NamedTuple):
    """What the blocks behind a frame belong to.

    Attributes:
      run: its number.
      segment: its index.
      worker: who brings them, or gets them.
    """

    run: int
    segment: int
    worker: int

    def header(self, position: int, array: np.ndarray) -> bytes:
        """The header of a block; integers are big-endian.

          bytes 0-3  magic b"TMPB"    bytes  8-15  run        bytes 20-23  worker
          bytes 4-5  version, now 1   bytes 16-19  segment    bytes 24-31  length of the content
          bytes 6-7  position among the blocks of its frame

        Both ends know all of it from the program, so what comes has to equal it, bit by bit.
        """
        return BLOCK.pack(BLOCK_MAGIC, VERSION, position, *self, array.nbytes)


def blocks_bytes(arrays: Iterable[Any]) -> int:
    """How many bytes arrays take as blocks, headers included; each has its `nbytes`."""
    return sum(BLOCK.size + array.nbytes for array in arrays)


def _content(array: np.ndarray) -> memoryview:
    """A C-contiguous array's own bytes."""
    return array.reshape(-1).view(np.uint8).data


def send_blocks(connection: socket.socket, label: Label, arrays: Sequence[np.ndarray]) -> None:
    """Sends C-contiguous arrays as blocks, straight from their memory.

    The system's own sizing of socket buffers is left on: it follows what the link takes, and a
    buffer of a chosen size would be cut to `net.core.wmem_max`, which is smaller.
    """
    parts: list[Any] = []
    for position, array in enumerate(arrays):
        parts += (label.header(position, array), _content(array))
    first = 0
    while first < len(parts):
        sent = connection.sendmsg(parts[first : first + _MOST_PARTS])
        while first < len(parts) and sent >= len(parts[first]):
            sent -= len(parts[first])
            first += 1
        if sent:
            parts[first] = memoryview(parts[first])[sent:]


def receive_block(
    connection: socket.socket,
    label: Label,
    position: int,
    array: np.ndarray,
    each: Callable[[np.ndarray], object] | None = None,
    part_bytes: int = 1 << 30,
) -> None:
    """Receives one block into a C-contiguous array's own memory.

    Args:
      connection: a connected stream socket.
      label: what the block belongs to.
      position: among the blocks of its frame.
      array: what the content fills.
      each: called with each part of the array's bytes when it has come; one part if it is empty.
      part_bytes: length of a part, but for the last.

    Raises:
      WireError: it is another block than the one that is next, or was cut off.
    """
    header = bytearray(BLOCK.size)
    _receive_into(connection, memoryview(header))
    if header != label.header(position, array):
        raise WireError(
            f"expected block {position} of worker {label.worker} in segment {label.segment} of run "
            f"{label.run}, with {array.nbytes} bytes, and another one came"
        )
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, max(array.nbytes, 1), part_bytes):
        part = flat[start : start + part_bytes]
        _receive_into(connection, part.data)
        if each is not None:
            each(part)


def _receive_into(connection: socket.socket, view: memoryview) -> None:
    received = size = len(view)
    while view and received:
        received = connection.recv_into(view)
        view = view[received:]
    if view:
        raise WireError(f"a block was cut off: {len(view)} of {size} bytes are missing")


def _mac(key: bytes, role: str, challenge: bytes, nonce: bytes) -> hmac.HMAC:
    if not len(challenge) == len(nonce) == NONCE_BYTES:
        raise WireError(f"a challenge or nonce does not have {NONCE_BYTES} bytes")
    mac = hmac.HMAC(key, hashes.SHA256())
    mac.update(role.encode() + b"|" + challenge + nonce)
    return mac


def prove(key: bytes, role: str, challenge: bytes, own_nonce: bytes) -> bytes:
    """HMAC-SHA256 over role, challenge and own nonce: shows knowledge of `key` (RFC 2104).

    Raises:
      WireError: challenge or nonce is not `NONCE_BYTES` long.
    """
    return _mac(key, role, challenge, own_nonce).finalize()


def check_proof(key: bytes, role: str, challenge: bytes, nonce: bytes, proof: bytes) -> None:
    """Checks what `prove` made, in constant time.

    Raises:
      WireError: the proof is not the one this key gives.
    """
    try:
        _mac(key, role, challenge, nonce).verify(proof)
    except InvalidSignature as error:
        raise WireError("the peer does not know the session key") from error
