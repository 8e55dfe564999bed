"""Program descriptions: round trip, and every checked rule."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from enclave_runtime.protocol.descriptions import Convolution, DotGeneral
from enclave_runtime.protocol.program import (
    ALIGNMENT,
    MAX_RANK,
    MAX_VALUES,
    ArrayType,
    KeyClass,
    Layout,
    Program,
    ProgramError,
    aligned,
)
from tests.support.programs import as_it_crosses


def test_programs_have_every_part(program, product_program):  # else the changes would miss some
    assert {p.place for p in program.inputs} == {"enclave", "device", "public"}
    assert {p.place for p in program.outputs} == {"enclave", "device"}
    assert program.constants and program.classes
    assert any(s.uploads for s in program.segments) and any(s.dead for s in program.segments)
    assert {c.decoys > 0 for c in product_program.classes} == {False, True}
    assert {c.copies for c in product_program.classes} == {1, 2} and product_program.parameters
    uploads = [c for s in product_program.segments for c in s.uploads]
    assert len(uploads) == 2 and all(c.operands for c in uploads)


def test_verified_program_has_both_products(verified_program):
    uploads = [c for s in verified_program.segments for c in s.uploads]
    assert verified_program.verify and all(c.operands and c.source for c in uploads)
    assert {type(c.product) for c in uploads} == {DotGeneral, Convolution}


def test_decoding_inverts_encoding(any_program):
    assert Program.decode(as_it_crosses(any_program)) == any_program


def test_blinding_lengthens_axes_by_their_decoys(product_program):
    crossings = [c for s in product_program.segments for c in (*s.downloads, *s.uploads)]
    sizes = {(c.array.shape, c.blinded.shape) for c in crossings}
    assert sizes == {
        *(((130, 64), (192, 64)), ((64, 65), (64, 65)), ((130, 65), (192, 65))),
        *(((2, 128, 64), (2, 192, 64)), ((2, 64, 66), (2, 64, 66)), ((2, 128, 66), (2, 192, 66))),
    }


def test_encoded_form_is_frozen():  # what both ends write down; change them together
    array = ArrayType((2, 3), "float32")
    assert dataclasses.asdict(array) == {"shape": (2, 3), "dtype": "float32"}
    assert array.nbytes == 24 and aligned(array.nbytes) == ALIGNMENT and aligned(0) == 0
    layout = Layout((0, None), (1, 0))
    assert dataclasses.asdict(layout) == {"classes": (0, None), "parities": (1, 0)}
    assert layout.keyed and not Layout((None,), (0,)).keyed
    key_class = KeyClass(3)
    described = {"size": 3, "batch": False, "decoys": 0, "copies": 1}
    assert dataclasses.asdict(key_class) == described and KeyClass.decode(described) == key_class


def test_narrow_floats_are_known():
    for name, size in (("bfloat16", 2), ("float8_e4m3fn", 1), ("float16", 2), ("bool", 1)):
        array = ArrayType.decode({"shape": [3], "dtype": name})
        assert (array.dtype, array.nbytes) == (name, 3 * size)


# Each rule has a refusal


def change(*path: str | int, to: Any) -> Callable[[Any], None]:
    """A change of one place of the description."""

    def apply(fields: Any) -> None:
        for step in path[:-1]:
            fields = fields[step]
        fields[path[-1]] = to

    return apply


def drop(*path: str | int) -> Callable[[Any], None]:
    """A removal of one place of the description."""

    def apply(fields: Any) -> None:
        for step in path[:-1]:
            fields = fields[step]
        del fields[path[-1]]

    return apply


def _downloads(fields: Any) -> list[Any]:
    return next(s["downloads"] for s in fields["segments"] if s["downloads"])


def _overflow_arena(fields: Any) -> None:
    _downloads(fields)[0]["offset"] = fields["arena_bytes"]


def _misalign(fields: Any) -> None:
    _downloads(fields)[0]["offset"] += 1


def _send_unmade(fields: Any) -> None:
    _downloads(fields)[0]["value"] = MAX_VALUES - 1


def _swap_segments(fields: Any) -> None:
    fields["segments"].reverse()


def _kill_output(fields: Any) -> None:
    kept = [p["value"] for p in fields["outputs"] if p["place"] == "enclave"]
    fields["segments"][-1]["dead"] += kept


def _kill_early(fields: Any) -> None:
    fields["segments"][0]["dead"] += fields["segments"][-1]["inputs"]


def _class_of_a_port(fields: Any) -> Any:
    number = next(c for p in fields["inputs"] for c in p["layout"]["classes"] if c is not None)
    return fields["classes"][number]


def _resize_class(fields: Any) -> None:
    _class_of_a_port(fields)["size"] += 1


def _decoys_on_port(fields: Any) -> None:
    _class_of_a_port(fields)["decoys"] = 3


def _copies_on_port(fields: Any) -> None:
    _class_of_a_port(fields)["copies"] = 3


def _unknown_class(fields: Any) -> None:
    port = next(p for p in fields["inputs"] if any(c is not None for c in p["layout"]["classes"]))
    port["layout"]["classes"] = [len(fields["classes"])] * len(port["layout"]["classes"])


SEGMENT, INPUT, ARRAY = ("segments", 0), ("inputs", 0), ("inputs", 0, "array")
REFUSALS: list[tuple[str, Callable[[Any], None]]] = [
    # Kinds of things
    ("a scheme is not a name", change("scheme", to=3)),
    ("a scheme is not a name", drop("scheme")),
    ("classes is not a list", change("classes", to={})),
    ("a key class is not an object", change("classes", 0, to=[4, True])),
    ("a scheme's parameters are not an object", change("parameters", to=[])),
    ("a scheme's parameters are not an object", change("parameters", to=None)),
    ("a scheme's parameters are not an object", drop("parameters")),
    ("a key class's batch is not a flag", change("classes", 0, "batch", to=1)),
    ("a key class's batch is not a flag", drop("classes", 0, "batch")),
    ("decoys is out of range", change("classes", 0, "decoys", to=-1)),
    ("decoys is out of range", change("classes", 0, "decoys", to=1 << 16)),
    ("decoys is out of range", drop("classes", 0, "decoys")),
    ("copies is out of range", change("classes", 0, "copies", to=-1)),
    ("copies is out of range", change("classes", 0, "copies", to=1 << 31)),
    ("copies is out of range", change("classes", 0, "copies", to=True)),
    ("copies is out of range", drop("classes", 0, "copies")),
    ("size is out of range", change("classes", 0, "size", to=-1)),
    ("size is out of range", change("classes", 0, "size", to=1 << 31)),
    ("size is out of range", change("classes", 0, "size", to=True)),
    ("size is out of range", change("classes", 0, "size", to=4.0)),
    ("constants is not a list", drop("constants")),
    ("inputs is not a list", change("inputs", to=None)),
    ("outputs is not a list", change("outputs", to="")),
    ("segments is not a list", drop("segments")),
    ("arena_bytes is out of range", change("arena_bytes", to=1 << 48)),
    ("arena_bytes is out of range", drop("arena_bytes")),
    # Ports
    ("a port is not an object", change(*INPUT, to=[])),
    ("a port is at an unknown place", change(*INPUT, "place", to="host")),
    ("a port is at an unknown place", drop(*INPUT, "place")),
    ("a port is at an unknown place", change(*INPUT, "place", to=["device"])),
    ("a value is out of range", change(*INPUT, "value", to=-1)),
    ("a value is out of range", change(*INPUT, "value", to=MAX_VALUES)),
    ("a value is out of range", drop(*INPUT, "value")),
    ("place", change("outputs", 0, "place", to="public")),
    ("a port's key has decoys", _decoys_on_port),
    # Arrays
    ("an array type is not an object", drop(*ARRAY)),
    ("a shape is not a list", change(*ARRAY, "shape", to=3)),
    ("a rank is too large", change(*ARRAY, "shape", to=[1] * (MAX_RANK + 1))),
    ("a dimension is out of range", change(*ARRAY, "shape", to=[-1])),
    ("a dimension is out of range", change(*ARRAY, "shape", to=[1 << 40])),
    ("a dimension is out of range", change(*ARRAY, "shape", to=["3"])),
    ("an array is too large", change(*ARRAY, "shape", to=[1 << 20, 1 << 20])),
    ("dtype", change(*ARRAY, "dtype", to="float7")),
    ("dtype", change(*ARRAY, "dtype", to="object")),
    ("dtype", change(*ARRAY, "dtype", to="str")),
    ("dtype", change(*ARRAY, "dtype", to="datetime64[s]")),
    ("dtype", change(*ARRAY, "dtype", to="i4,f4")),
    ("dtype", change(*ARRAY, "dtype", to="V8")),
    ("dtype", change(*ARRAY, "dtype", to=">f4")),
    ("dtype", change(*ARRAY, "dtype", to=",")),
    ("dtype", change(*ARRAY, "dtype", to="(2,2)f4")),
    ("dtype", change(*ARRAY, "dtype", to="(-1,)f4")),
    ("dtype", change(*ARRAY, "dtype", to={})),
    ("dtype", change(*ARRAY, "dtype", to={"a": ["f4", 0]})),
    ("dtype", change(*ARRAY, "dtype", to=["f4"])),
    ("dtype", change(*ARRAY, "dtype", to=3)),
    ("dtype", drop(*ARRAY, "dtype")),
    # Layouts
    ("a layout is not an object", change(*INPUT, "layout", to=[])),
    ("classes is not a list", drop(*INPUT, "layout", "classes")),
    ("parities is not a list", drop(*INPUT, "layout", "parities")),
    ("a layout has the wrong rank", change(*INPUT, "layout", "classes", to=[None] * 9)),
    ("a layout has the wrong rank", change(*INPUT, "layout", "parities", to=[0] * 9)),
    ("a key class is out of range", _unknown_class),
    ("another size than its axis", _resize_class),
    ("another number of copies than its batch axis", _copies_on_port),
    # Segments
    ("a program has no segment", change("segments", to=[])),
    ("a segment is not an object", change(*SEGMENT, to=0)),
    ("name is not a hash", change(*SEGMENT, "executable", to="")),
    ("name is not a hash", change(*SEGMENT, "executable", to=["a"] * 64)),
    ("inputs is not a list", drop(*SEGMENT, "inputs")),
    ("inputs is out of range", change(*SEGMENT, "inputs", to=[-1])),
    ("outputs is out of range", change(*SEGMENT, "outputs", to=[MAX_VALUES])),
    ("dead is out of range", change(*SEGMENT, "dead", to=[1.0])),
    ("uploads is not a list", change(*SEGMENT, "uploads", to=None)),
    ("a crossing is not an object", change(*SEGMENT, "uploads", to=[3])),
    # Dependencies and places
    ("a crossing is not aligned", _misalign),
    ("a crossing lies outside the arena", _overflow_arena),
    ("a segment sends a value before it is made", _send_unmade),
    ("a segment reads a value before it is made", _swap_segments),
    ("a segment reads a value before it is made", _kill_early),
    ("an output is not made", _kill_output),
]


@pytest.mark.parametrize(("text", "alter"), REFUSALS)
def test_contradiction_is_refused(fields, text, alter):
    alter(fields)
    with pytest.raises(ProgramError, match=text):
        Program.decode(fields)


def _upload(fields: Any) -> Any:
    return next(c for s in fields["segments"] for c in s["uploads"])


def _sent(fields: Any) -> list[int]:
    return [c["value"] for s in fields["segments"] for c in s["downloads"]]


def on_upload(key: str, to: Any) -> Callable[[Any], None]:
    """A change of one entry of the first crossing that comes back."""
    return lambda fields: _upload(fields).update({key: to})


def _shorten(fields: Any) -> None:
    _upload(fields)["blinded"]["shape"][0] -= 1


def _blind_in_another_format(fields: Any) -> None:
    _upload(fields)["blinded"]["dtype"] = "float32"


def _more_decoys(fields: Any) -> None:
    for key_class in fields["classes"]:
        key_class["decoys"] += bool(key_class["decoys"])


def _other_copies(fields: Any) -> None:
    for key_class in fields["classes"]:
        key_class["copies"] += key_class["copies"] > 1


def _operand_not_sent(fields: Any) -> None:
    unsent = next(p["value"] for p in fields["inputs"] if p["value"] not in _sent(fields))
    _upload(fields)["operands"][1] = unsent


def _operand_never_made(fields: Any) -> None:
    _upload(fields)["operands"][0] = MAX_VALUES - 1


def _operand_is_the_product(fields: Any) -> None:
    _upload(fields)["operands"][0] = _upload(fields)["value"]


def _operand_sent_in_the_clear(fields: Any) -> None:
    crossing = next(
        c for s in fields["segments"] for c in s["downloads"] if len(c["layout"]["classes"]) == 2
    )
    crossing["layout"]["classes"] = [None, None]
    crossing["blinded"] = crossing["array"]


def _operands_sent_too_late(fields: Any) -> None:
    first, later = fields["segments"][0], fields["segments"][-1]
    later["downloads"] += first["downloads"]
    first["downloads"] = []


PRODUCT_REFUSALS: list[tuple[str, Callable[[Any], None]]] = [
    ("a crossing has the wrong blinded type", _shorten),
    ("a crossing has the wrong blinded type", _blind_in_another_format),
    ("a crossing has the wrong blinded type", _more_decoys),
    ("an array type is not an object", on_upload("blinded", None)),
    ("another number of copies than its batch axis", _other_copies),
    ("a pair has another length", on_upload("operands", [])),
    ("a pair has another length", on_upload("operands", [1, 2, 3])),
    ("a pair has another length", on_upload("operands", {"left": 0, "right": 1})),
    ("an operand is out of range", on_upload("operands", [0, -1])),
    ("an operand is out of range", on_upload("operands", [MAX_VALUES, 0])),
    ("an operand is out of range", on_upload("operands", [None, 0])),
    ("a product comes back before its operands are sent", _operand_not_sent),
    ("a product comes back before its operands are sent", _operand_never_made),
    ("a product comes back before its operands are sent", _operand_is_the_product),
    ("a product comes back before its operands are sent", _operand_sent_in_the_clear),
    ("a product comes back before its operands are sent", _operands_sent_too_late),
]


@pytest.mark.parametrize(("text", "alter"), PRODUCT_REFUSALS)
def test_contradiction_about_a_product_is_refused(product_fields, text, alter):
    alter(product_fields)
    with pytest.raises(ProgramError, match=text):
        Program.decode(product_fields)


def test_parity_out_of_range_is_refused(fields):
    layout = next(p["layout"] for p in fields["inputs"] if p["layout"]["parities"])
    layout["parities"][0] = 2
    with pytest.raises(ProgramError, match="a parity is out of range"):
        Program.decode(fields)


@pytest.mark.parametrize("whole", [None, [], "program", 3])
def test_program_that_is_not_an_object_is_refused(whole):
    with pytest.raises(ProgramError, match="not an object"):
        Program.decode(whole)
