"""The requests of a session: the fields of each kind of frame, read before anything is done.

Whatever a peer wrote becomes one of these dataclasses or is refused, so that who answers a
request finds every field there, of its type and within its bounds. What a field means in the
session (whether a handle names something, a run is open) is for who answers to see. Trusts
nothing; holds no secret.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from enclave_runtime.protocol.checkpoint import Leaf, decode_leaves
from enclave_runtime.protocol.wire import Frame, Kind

MAX_ARENA_BYTES = 1 << 48
MAX_RUN_WORKERS = 4096


class RequestError(Exception):
    """A request that is malformed, or that the session refuses; its text goes to the peer."""


# Readers of one field each. They say in words what they expected.


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise RequestError(f"is not {what}")


def _integer(value: Any) -> int:
    _expect(type(value) is int, "a whole number")
    return value


def _text(value: Any) -> str:
    _expect(isinstance(value, str), "a text")
    return value


def _bytes(value: Any) -> bytes:
    try:
        return base64.b64decode(_text(value), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("is not bytes in base64") from error


def _between(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        _expect(type(value) is int and low <= value <= high, f"between {low} and {high}")
        return value

    return read


def _list_of(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read_list(value: Any) -> tuple[Any, ...]:
        _expect(isinstance(value, list), "a list")
        return tuple(read(item) for item in value)

    return read_list


def _by_position(value: Any) -> dict[int, int]:
    """An object of offsets; JSON has the positions as texts."""
    _expect(isinstance(value, dict), "an object")
    for key in value:
        # One spelling for a number, so that no position comes twice.
        _expect(key.isascii() and key.isdecimal() and len(key) <= 9, "keyed by positions")
        _expect(key == str(int(key)), "keyed by positions")
    return {int(key): _integer(offset) for key, offset in value.items()}


class HeldInput(typing.NamedTuple):
    """An input that the enclave holds, or whose keys it holds."""

    handle: str


class WrittenInput(typing.NamedTuple):
    """An input in shared memory: ciphertext, or plaintext where the program's port is public."""

    offset: int


class PublishedInput(typing.NamedTuple):
    """An input in shared memory that the client published."""

    offset: int


def _input(value: Any) -> HeldInput | WrittenInput | PublishedInput:
    _expect(isinstance(value, dict) and len(value) == 1, "an object with a handle or an offset")
    if "handle" in value:
        return HeldInput(_text(value["handle"]))
    if "published" in value:
        return PublishedInput(_integer(value["published"]))
    _expect("offset" in value, "an object with a handle or an offset")
    return WrittenInput(_integer(value["offset"]))


def _leaves(value: Any) -> tuple[Leaf, ...]:
    return tuple(decode_leaves(value))


Integer = Annotated[int, _integer]
Integers = Annotated[tuple[int, ...], _list_of(_integer)]
Text = Annotated[str, _text]
Texts = Annotated[tuple[str, ...], _list_of(_text)]
Offsets = Annotated[dict[int, int], _by_position]


# The requests


@dataclasses.dataclass(frozen=True)
class EmptyRequest:
    """One that says all by its kind and its attachment."""


@dataclasses.dataclass(frozen=True)
class MapRequest:
    """Map a file of shared memory of `size` bytes."""

    name: Text
    size: Annotated[int, _between(1, MAX_ARENA_BYTES)]


@dataclasses.dataclass(frozen=True)
class UnmapRequest:
    """Unmap it; one that is not mapped does nothing."""

    name: Text


@dataclasses.dataclass(frozen=True)
class ProvisionRequest:
    """Take a program, which is the attachment, and its constants.

    Attributes:
      arena: the shared memory where the constants lie, at `offsets`.
      offsets: in bytes, one for each constant.
      program_bytes: in place of the two, from a client on another machine: where in the
        attachment the program ends and the constants begin.
    """

    arena: Text | None = None
    offsets: Integers = ()
    program_bytes: Integer | None = None


@dataclasses.dataclass(frozen=True)
class BeginRequest:
    """Start a run.

    Attributes:
      program: its number.
      arena: the shared memory of the run.
      workers: how many bring their parts of each segment.
      inputs: one for each of the program's.
      blind_at: for each input the offset in bytes where it is laid if it has to be blinded.
      devices: where the workers are processes of memory of their own, how many devices each has;
        each of them has to `JOIN`.
      sharded: then the key classes whose axes are split over the devices.
      name: which the host gives the run, to abort it by before it has heard its number.
    """

    program: Integer
    arena: Text
    workers: Annotated[int, _between(1, MAX_RUN_WORKERS)]
    inputs: Annotated[tuple[HeldInput | WrittenInput | PublishedInput, ...], _list_of(_input)]
    blind_at: Integers
    devices: Integers = ()
    sharded: Integers = ()
    name: Text | None = None


@dataclasses.dataclass(frozen=True)
class JoinRequest:
    """Take part in a run, as one of the host's processes; answered when all have joined.

    Attributes:
      run: its number.
      worker: which of its workers this is.
      arena: the shared memory of this worker's parts; None if it shares none, and they travel as
        blocks behind its requests for segments and their replies.
    """

    run: Integer
    worker: Integer
    arena: Text | None = None


@dataclasses.dataclass(frozen=True)
class BeatRequest:
    """A sign of life of one of the host's processes, who hears how long the others gave none.

    Attributes:
      group: names the processes that belong together.
      process: which of them this is.
      leaves: whether it is the last.
      run: the last in which it took part.
      segment: of that run, to which it came last, from 1 on.
    """

    group: Text
    process: Annotated[int, _between(0, MAX_RUN_WORKERS - 1)]
    leaves: Annotated[int, _between(0, 1)] = 0
    run: Integer = 0
    segment: Integer = 0


@dataclasses.dataclass(frozen=True)
class SettleRequest:
    """Take inputs that lie on the devices, by position; both offsets are in bytes.

    Attributes:
      run: its number.
      offsets: where each lies.
      blind_at: where it is laid if it has to be blinded again.
    """

    run: Integer
    offsets: Offsets
    blind_at: Offsets


@dataclasses.dataclass(frozen=True)
class SegmentRequest:
    """Run a segment, whose uploads this worker has brought, or brings behind the request.

    Attributes:
      run: its number.
      segment: its index.
      worker: who asks.
      timed: whether the segment's times are asked for.
      carried: bytes of the blocks behind the request, with their headers.
    """

    run: Integer
    segment: Integer
    worker: Integer
    timed: Annotated[int, _between(0, 1)] = 0
    carried: Annotated[int, _between(0, MAX_ARENA_BYTES)] = 0


@dataclasses.dataclass(frozen=True)
class CommitRequest:
    """End a run and keep its outputs.

    Attributes:
      run: its number.
      donate: inputs to free, by position.
      worker: who asks. Where the workers are processes, all have to, and the first gets handles.
    """

    run: Integer
    donate: Integers
    worker: Integer = 0


@dataclasses.dataclass(frozen=True)
class AbortRequest:
    """End a run and keep nothing; one that has ended does nothing.

    Attributes:
      run: its number, where the host has heard it.
      name: else the name that came with `BEGIN`; one that has not begun yet will not.
    """

    run: Integer | None = None
    name: Text | None = None


@dataclasses.dataclass(frozen=True)
class OpenRequest:
    """Encrypt a value to the client.

    Attributes:
      handle: names it.
      arena: the shared memory that takes it, and has its content if it lies on the devices;
        None from a client on another machine, where both travel as attachments.
      offset: where in it, in bytes.
    """

    handle: Text
    arena: Text | None = None
    offset: Integer = 0


@dataclasses.dataclass(frozen=True)
class FreeRequest:
    """Forget handles; one that names nothing does nothing."""

    handles: Texts


@dataclasses.dataclass(frozen=True)
class CheckpointRequest:
    """Begin a checkpoint of these leaves."""

    leaves: Annotated[tuple[Leaf, ...], _leaves]


@dataclasses.dataclass(frozen=True)
class LeafRequest:
    """Take the next leaf of a checkpoint that is being restored.

    Attributes:
      identifier: of the checkpoint, in hex.
      leaf: its position.
      arena: the shared memory that has its content, or takes it.
      offset: where in it, in bytes.
    """

    identifier: Text
    leaf: Integer
    arena: Text
    offset: Integer


@dataclasses.dataclass(frozen=True)
class CheckpointLeafRequest(LeafRequest):
    """Write the next leaf of a checkpoint.

    Attributes:
      handle: names the value; without one it is the client's ciphertext.
    """

    handle: Text | None = None


@dataclasses.dataclass(frozen=True)
class RestoreRequest:
    """Begin to restore the checkpoint with this head; the client's order is the attachment."""

    head: Annotated[bytes, _bytes]


@dataclasses.dataclass(frozen=True)
class FindRequest:
    """The number of the program with this digest, in hex."""

    digest: Text


@dataclasses.dataclass(frozen=True)
class ReleaseRequest:
    """Free programs; one that is gone already does nothing."""

    programs: Integers


@dataclasses.dataclass(frozen=True)
class PrepareRequest:
    """Load a scheme's kernels in the background: a program that takes them is being planned."""

    scheme: Text


REQUESTS: Mapping[Kind, type[Any]] = {
    Kind.MAP: MapRequest,
    Kind.UNMAP: UnmapRequest,
    Kind.COMPILE: EmptyRequest,
    Kind.PROVISION: ProvisionRequest,
    Kind.BEGIN: BeginRequest,
    Kind.JOIN: JoinRequest,
    Kind.BEAT: BeatRequest,
    Kind.SETTLE: SettleRequest,
    Kind.SEGMENT: SegmentRequest,
    Kind.COMMIT: CommitRequest,
    Kind.ABORT: AbortRequest,
    Kind.OPEN: OpenRequest,
    Kind.FREE: FreeRequest,
    Kind.STATISTICS: EmptyRequest,
    Kind.CALIBRATE: EmptyRequest,
    Kind.CHECKPOINT_KEY: EmptyRequest,
    Kind.CHECKPOINT: CheckpointRequest,
    Kind.CHECKPOINT_LEAF: CheckpointLeafRequest,
    Kind.RESTORE: RestoreRequest,
    Kind.RESTORE_LEAF: LeafRequest,
    Kind.FIND: FindRequest,
    Kind.RELEASE: ReleaseRequest,
    Kind.PREPARE: PrepareRequest,
}


@functools.cache
def _readers(request: type[Any]) -> dict[str, tuple[Callable[[Any], Any], bool]]:
    """For each field of a request its reader, and whether it may be missing."""
    hints = typing.get_type_hints(request, include_extras=True)
    readers = {}
    for field in dataclasses.fields(request):
        hint = hints[field.name]
        # An optional field's reader is that of what it has when it is there.
        annotated = next((a for a in typing.get_args(hint) if hasattr(a, "__metadata__")), hint)
        optional = field.default is not dataclasses.MISSING
        readers[field.name] = (annotated.__metadata__[0], optional)
    return readers


def decode(frame: Frame) -> Any:
    """Reads a frame's fields as the request of its kind.

    Raises:
      RequestError: the kind is no request, or a field is missing, unknown, of another type or out
        of bounds.
      RefusedCheckpointError: the leaves of a checkpoint are malformed.
    """
    request = REQUESTS.get(frame.kind)
    if request is None:
        raise RequestError(f"a frame of kind {frame.kind.name} is not a request")
    readers, values = _readers(request), {}
    malformed = f"a malformed {frame.kind.name} request"
    if not frame.fields.keys() <= readers.keys():
        raise RequestError(f"{malformed}: its fields are {', '.join(readers) or 'none'}")
    for name, (read, optional) in readers.items():
        if name in frame.fields:
            try:
                values[name] = read(frame.fields[name])
            except RequestError as error:
                raise RequestError(f"{malformed}: `{name}` {error}") from None
        elif not optional:
            raise RequestError(f"{malformed}: it has no `{name}`")
    return request(**values)
