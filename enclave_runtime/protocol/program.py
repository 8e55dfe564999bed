"""What a provisioned program is: its values, segments, key classes and crossings.

The host's planner writes these descriptions, the client encrypts them to the enclave,
and the enclave runs exactly what they say. They are plain data in JSON; the enclave
checks every index and size when it decodes one, so that later code may rely on them.

Words: a *value* is an array of the trusted part of the step, named by a number. A *key
class* is a set of axes that share one blinding key. A *crossing* is a value that leaves
or enters the enclave through shared memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

import ml_dtypes
import numpy as np

from enclave_runtime.protocol.descriptions import ProductDescription, decode_product
from enclave_runtime.protocol.fields import MAX_RANK as MAX_RANK
from enclave_runtime.protocol.fields import ProgramError as ProgramError
from enclave_runtime.protocol.fields import items as _items
from enclave_runtime.protocol.fields import natural as _natural
from enclave_runtime.protocol.fields import pair as _pair
from enclave_runtime.protocol.fields import require as _require
from enclave_runtime.protocol.updates import (
    MAX_UPDATES,
    AxisNumbers,
    Needs,
    Update,
    decode_projections,
    free_axes,
)

ALIGNMENT = 64  # bytes; XLA on the CPU reads aligned buffers without copying them
MAX_VALUES = 1 << 24
# By name, so that a description cannot smuggle in byte orders, structures or objects.
_DTYPES = frozenset(
    np.dtype(scalar).name
    for scalar in (
        *(np.bool_, np.int8, np.int16, np.int32, np.int64),
        *(np.uint8, np.uint16, np.uint32, np.uint64),
        *(np.float16, np.float32, np.float64, np.complex64, np.complex128),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e3m4, ml_dtypes.float8_e4m3),
        *(ml_dtypes.float8_e4m3b11fnuz, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz),
        *(ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e8m0fnu),
    )
)
ENCLAVE, DEVICE, PUBLIC = "enclave", "device", "public"
MAX_SOURCE = 1000  # characters


def aligned(size: int) -> int:
    """`size` rounded up to a multiple of `ALIGNMENT` bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * np.dtype(self.dtype).itemsize

    @classmethod
    def decode(cls, fields: Any) -> ArrayType:
        """Reads what `dataclasses.asdict` wrote."""
        _require(isinstance(fields, dict), "an array type is not an object")
        shape = _items(fields.get("shape"), "a shape")
        _require(len(shape) <= MAX_RANK, "a rank is too large")
        dtype = fields.get("dtype")
        _require(isinstance(dtype, str) and dtype in _DTYPES, "an unknown dtype")
        decoded = cls(tuple(_natural(n, 1 << 40, "a dimension") for n in shape), dtype)
        _require(decoded.nbytes < 1 << 42, "an array is too large")
        return decoded


@dataclasses.dataclass(frozen=True)
class KeyClass:
    """A set of axes that share one key.

    Attributes:
      size: length of the axes.
      batch: whether a product runs over the axes as a batch; such a key is a permutation alone.
      decoys: entries that blinding appends along the axes.
      copies: independent keys, one for each index of a leading batch axis.
    """

    size: int
    batch: bool = False
    decoys: int = 0
    copies: int = 1

    @classmethod
    def decode(cls, fields: Any) -> KeyClass:
        """Reads a key class."""
        _require(isinstance(fields, dict), "a key class is not an object")
        _require(type(fields.get("batch")) is bool, "a key class's batch is not a flag")
        return cls(
            _natural(fields.get("size"), 1 << 31, "size"),
            fields["batch"],
            _natural(fields.get("decoys"), 1 << 16, "decoys"),
            _natural(fields.get("copies"), 1 << 31, "copies"),
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a value is blinded.

    Attributes:
      classes: for each axis its key class, or None where the axis carries no key.
      parities: for each axis the power of the key, modulo 2. For signs: 1 where they apply
        (a gradient), 0 where they do not (its square). For a group with two polarities: 1
        for the key itself, 0 for its inverse transpose.
    """

    classes: tuple[int | None, ...]
    parities: tuple[int, ...]

    @property
    def keyed(self) -> bool:
        """Whether any axis carries a key."""
        return any(c is not None for c in self.classes)

    def blinded(self, array: ArrayType, classes: tuple[KeyClass, ...]) -> ArrayType:
        """The type of a value once it is blinded: longer where decoys are appended."""
        sizes = (
            n if c is None else n + classes[c].decoys
            for n, c in zip(array.shape, self.classes, strict=True)
        )
        return ArrayType(tuple(sizes), array.dtype)

    @classmethod
    def clear(cls, rank: int) -> Layout:
        """The layout of a value on which no axis carries a key."""
        return cls((None,) * rank, (0,) * rank)

    @classmethod
    def decode(cls, fields: Any, array: ArrayType, classes: tuple[KeyClass, ...]) -> Layout:
        """Reads a layout and checks it against its array and the program's classes."""
        _require(isinstance(fields, dict), "a layout is not an object")
        ids, parities = (_items(fields.get(name), name) for name in ("classes", "parities"))
        _require(len(ids) == len(parities) == len(array.shape), "a layout has the wrong rank")
        for axis, (number, size) in enumerate(zip(ids, array.shape, strict=True)):
            if number is not None:
                found = classes[_natural(number, len(classes), "a key class")]
                _require(found.size == size, "a key class has another size than its axis")
                copies = found.copies == 1 or (axis > 0 and found.copies == array.shape[0] > 0)
                _require(copies, "a key class has another number of copies than its batch axis")
        return cls(tuple(ids), tuple(_natural(w, 2, "a parity") for w in parities))


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A value that passes between enclave and host at one place of a run's arena.

    Attributes:
      value: the value's number.
      array: its shape and dtype, in the clear.
      blinded: its shape and dtype in the arena; for shares int8, with axes before its own; for
        operands that cross in fewer bits bfloat16.
      layout: how it is blinded; without any keyed axis it passes in the clear (revealed
        outputs, scalars of a device-side update).
      offset: bytes from the start of the arena, a multiple of `ALIGNMENT`.
      operands: numbers of the two downloaded values whose product an upload is, where the
        scheme has keys for each product or products are checked.
      product: which product of them it is, where it is checked.
      source: the equation and its line as the client knows them, for an error's text alone.
    """

    value: int
    array: ArrayType
    blinded: ArrayType
    layout: Layout
    offset: int
    operands: tuple[int, int] | None = None
    product: ProductDescription | None = None
    source: str = ""

    @classmethod
    def decode(cls, fields: Any, classes: tuple[KeyClass, ...]) -> Crossing:
        """Reads a crossing."""
        _require(isinstance(fields, dict), "a crossing is not an object")
        array = ArrayType.decode(fields.get("array"))
        layout = Layout.decode(fields.get("layout"), array, classes)
        blinded = ArrayType.decode(fields.get("blinded"))
        expected = layout.blinded(array, classes)
        _require(
            blinded == expected or (layout.keyed and _represents(blinded, expected)),
            "a crossing has the wrong blinded type",
        )
        operands = fields.get("operands")
        if operands is not None:
            left, right = (_natural(v, MAX_VALUES, "an operand") for v in _pair(operands))
            operands = (left, right)
        product = fields.get("product")
        source = fields.get("source")
        _require(isinstance(source, str) and len(source) <= MAX_SOURCE, "a source is too long")
        return cls(
            _natural(fields.get("value"), MAX_VALUES, "a value"),
            array,
            blinded,
            layout,
            _natural(fields.get("offset"), 1 << 48, "an offset"),
            operands,
            None if product is None else decode_product(product),
            source,
        )


def _represents(blinded: ArrayType, plain: ArrayType) -> bool:
    """Whether a type may be a value's in shares and residues or in fewer bits.

    The scheme says which, see `enclave_runtime.schemes.checks`.
    """
    lead = blinded.rank - plain.rank
    if blinded.dtype == "int8":
        return lead > 1 and blinded.shape[lead:] == plain.shape
    return blinded == ArrayType(plain.shape, "bfloat16") and plain.dtype == "float32"


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of trusted equations that executes between two visits of the host.

    Attributes:
      executable: name (SHA-256 of its bytes, hex) of the serialized StableHLO.
      inputs: numbers of the values it takes, in order.
      outputs: numbers of the values it gives, in order.
      uploads: values that come from the host before it runs.
      downloads: values that go to the host after it ran.
      dead: values no later segment reads.
    """

    executable: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    uploads: tuple[Crossing, ...]
    downloads: tuple[Crossing, ...]
    dead: tuple[int, ...]

    @classmethod
    def decode(cls, fields: Any, classes: tuple[KeyClass, ...]) -> Segment:
        """Reads a segment."""
        _require(isinstance(fields, dict), "a segment is not an object")
        name = fields.get("executable")
        _require(isinstance(name, str) and len(name) == 64, "an executable's name is not a hash")

        def numbers(key: str) -> tuple[int, ...]:
            return tuple(_natural(v, MAX_VALUES, key) for v in _items(fields.get(key), key))

        def crossings(key: str) -> tuple[Crossing, ...]:
            return tuple(Crossing.decode(c, classes) for c in _items(fields.get(key), key))

        return cls(
            name,
            numbers("inputs"),
            numbers("outputs"),
            crossings("uploads"),
            crossings("downloads"),
            numbers("dead"),
        )


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or a sealed output of the program.

    Attributes:
      value: the value's number; for `DEVICE` ports it names the leaf in `Program.updates`.
      array: shape and dtype.
      place: `ENCLAVE` (kept inside), `DEVICE` (blinded, on the devices), or `PUBLIC`
        (an input the host knows).
      layout: how a `DEVICE` port is blinded.
      projections: of a `DEVICE` port of a program that verifies, what its checksum combines.
    """

    value: int
    array: ArrayType
    place: str
    layout: Layout
    projections: tuple[AxisNumbers, ...] = ()

    @classmethod
    def decode(cls, fields: Any, classes: tuple[KeyClass, ...]) -> Port:
        """Reads a port."""
        _require(isinstance(fields, dict), "a port is not an object")
        array = ArrayType.decode(fields.get("array"))
        place = fields.get("place")
        _require(place in (ENCLAVE, DEVICE, PUBLIC), "a port is at an unknown place")
        layout = Layout.decode(fields.get("layout"), array, classes)
        _require(layout.blinded(array, classes) == array, "a port's key has decoys")
        number = _natural(fields.get("value"), MAX_VALUES, "a value")
        projections = decode_projections(fields.get("projections"), len(array.shape))
        return cls(number, array, place, layout, projections)


@dataclasses.dataclass(frozen=True)
class Program:
    """One shielded function for one signature, as the enclave runs it.

    Attributes:
      scheme: name of the blinding scheme in `enclave_runtime.schemes`.
      parameters: the scheme's.
      classes: the key classes.
      constants: ports of the closed-over arrays, provisioned with the program.
      inputs: one port for each flat argument.
      outputs: one port for each sealed flat output.
      segments: in order.
      arena_bytes: shared memory that one run needs.
      verify: whether everything that the host brings is a product that is checked.
      updates: where that is so, what the host does to `DEVICE` leaves.
    """

    scheme: str
    parameters: dict[str, Any]
    classes: tuple[KeyClass, ...]
    constants: tuple[Port, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    segments: tuple[Segment, ...]
    arena_bytes: int
    verify: bool = False
    updates: tuple[Update, ...] = ()

    def encode(self) -> dict[str, Any]:
        """The program as JSON fields."""
        return dataclasses.asdict(self)

    def multiplied(self, crossing: Crossing) -> ArrayType:
        """A crossing's type as products take or give it, however it lies in the arena."""
        return crossing.layout.blinded(crossing.array, self.classes)

    @property
    def ahead(self) -> tuple[int, ...]:
        """Segments that send without having been brought anything, behind the first: in order.

        The host has them run while its devices compute, and fetches their downloads with those of
        the next segment that brings something.
        """
        return tuple(
            index
            for index, segment in enumerate(self.segments)
            if index and segment.downloads and not segment.uploads
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the description as canonical JSON, in hex: what a client agrees to.

        It covers the code of every segment, by hash, and of closed-over arrays their types alone.
        Where in its files a side keeps the function does not count.
        """
        fields = self.encode()
        for segment in fields["segments"]:
            for crossing in (*segment["uploads"], *segment["downloads"]):
                del crossing["source"]
        for update in fields["updates"]:
            del update["source"]
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def decode(cls, fields: Any) -> Program:
        """Reads and checks a program.

        Raises:
          ProgramError: an index, a size or a dependency does not fit.
        """
        _require(isinstance(fields, dict), "a program is not an object")
        scheme = fields.get("scheme")
        _require(isinstance(scheme, str), "a scheme is not a name")
        parameters = fields.get("parameters")
        _require(isinstance(parameters, dict), "a scheme's parameters are not an object")
        _require(type(fields.get("verify")) is bool, "verify is not a flag")
        keyed = tuple(KeyClass.decode(c) for c in _items(fields.get("classes"), "classes"))

        def ports(key: str) -> tuple[Port, ...]:
            return tuple(Port.decode(p, keyed) for p in _items(fields.get(key), key))

        program = cls(
            scheme,
            parameters,
            keyed,
            ports("constants"),
            ports("inputs"),
            ports("outputs"),
            tuple(Segment.decode(s, keyed) for s in _items(fields.get("segments"), "segments")),
            _natural(fields.get("arena_bytes"), 1 << 48, "arena_bytes"),
            fields["verify"],
            tuple(
                Update.decode(u, MAX_VALUES, MAX_SOURCE)
                for u in _items(fields.get("updates"), "updates")
            ),
        )
        program._check()
        return program

    def _check(self) -> None:
        """Every value is there when it is read, and every crossing lies in the arena."""
        live = {p.value for p in self.constants}
        live |= {p.value for p in self.inputs if p.place != DEVICE}
        _require(bool(self.segments), "a program has no segment")
        sent = {p.value for p in self.inputs if p.place == DEVICE} | {u.value for u in self.updates}
        for segment in self.segments:
            for crossing in (*segment.uploads, *segment.downloads):
                _require(crossing.offset % ALIGNMENT == 0, "a crossing is not aligned")
                end = crossing.offset + crossing.blinded.nbytes
                _require(end <= self.arena_bytes, "a crossing lies outside the arena")
            for crossing in segment.uploads:
                known = crossing.operands is None or sent.issuperset(crossing.operands)
                _require(known, "a product comes back before its operands are sent")
            sent |= {c.value for c in segment.downloads if c.layout.keyed}
            live |= {c.value for c in segment.uploads}
            _require(live.issuperset(segment.inputs), "a segment reads a value before it is made")
            live |= set(segment.outputs)
            _require(
                live.issuperset(c.value for c in segment.downloads),
                "a segment sends a value before it is made",
            )
            live -= set(segment.dead)
        kept = {p.value for p in self.outputs if p.place == ENCLAVE}
        _require(
            all(p.place != PUBLIC for p in self.outputs), "a sealed output is at a public place"
        )
        _require(
            all(p.place == ENCLAVE for p in self.constants),
            "a constant is at a place outside the enclave",
        )
        _require(live.issuperset(kept), "an output is not made")
        if self.verify:
            self._check_verifiable()
        else:
            bare = not self.updates and not any(
                p.projections for p in (*self.inputs, *self.outputs)
            )
            _require(bare, "a program follows leaves and does not verify")

    def _check_verifiable(self) -> None:
        """Everything that the host brings is a product of what it was sent or what is followed."""
        followed = self._check_updates()
        for crossing in (c for s in self.segments for c in s.uploads):
            known = crossing.operands is not None and crossing.product is not None
            _require(known, "an upload is not a product that can be checked")
            assert crossing.operands is not None
            leaves = [v for v in crossing.operands if v in followed]
            _require(len(leaves) < 2, "a product of two values that lie on the devices")
            wide = np.dtype(crossing.array.dtype) in (np.float32, np.float64)
            _require(wide, "a checked product comes back in a format with too few digits")
            # Without a key it would pass in the clear, and be taken as it is.
            _require(crossing.layout.keyed, "a checked product carries no key")
        self.needs()

    def _check_updates(self) -> set[int]:
        """What the host does to leaves can be followed; returns all that is."""
        _require(len(self.updates) <= MAX_UPDATES, "a program has too many updates")
        downloads = [c for s in self.segments for c in s.downloads]
        sent = {c.value for c in downloads if c.layout.keyed}
        scalars = {c.value for c in downloads if not c.layout.keyed and not c.array.shape}
        shapes: dict[int, AxisNumbers] = {}
        ports = [p for p in (*self.inputs, *self.outputs) if p.place == DEVICE]
        for port in ports:
            wide = port.array.dtype in ("float32", "float64")
            _require(wide, "a leaf on the devices has too few digits")
            _require(bool(port.projections), "a value stays where nothing checks it")
        for port in (p for p in self.inputs if p.place == DEVICE):
            _require(port.value not in shapes, "two leaves have one number")
            shapes[port.value] = port.array.shape
        _require(sent.isdisjoint(shapes), "a leaf has the number of what is sent")
        for update in self.updates:
            _require(update.value not in sent, "an update makes what is sent")
            update.check(shapes, sent, scalars)
            shapes[update.value] = update.shape
        for port in (p for p in self.outputs if p.place == DEVICE):
            _require(shapes.get(port.value) == port.array.shape, "a leaf is not followed")
        return set(shapes)

    def needs(self) -> Needs:
        """The projections of all that is followed; for programs that verify.

        Raises:
          ProgramError: one cannot be had, or an input does not bring what is needed.
        """
        downloads = (c for s in self.segments for c in s.downloads)
        ranks = {c.value: len(c.blinded.shape) for c in downloads}
        known = {p.value: len(p.array.shape) for p in self.inputs if p.place == DEVICE}
        known |= {u.value: len(u.shape) for u in self.updates}
        needs = Needs(self.updates, ranks)
        for port in (p for p in self.outputs if p.place == DEVICE):
            for axes in port.projections:
                needs.want(port.value, axes)
        for crossing in (c for s in self.segments for c in s.uploads):
            assert crossing.operands is not None and crossing.product is not None
            for which, value in enumerate(crossing.operands):
                if value in known:
                    left, right = ((known | ranks)[v] for v in crossing.operands)
                    _, axes = free_axes(crossing.product, (left, right), which)
                    inside = bool(axes) and max(axes) < known[value]
                    _require(inside, "a product leaves no axis of a leaf")
                    needs.want(value, axes)
        for port in (p for p in self.inputs if p.place == DEVICE):
            wanted = needs.of.get(port.value, {})
            _require(set(wanted) <= set(port.projections), "a leaf lacks a projection")
        return needs
