"""Program descriptions: round trip, every checked rule, and arbitrary changes to their JSON."""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings

import tempo_jax as tempo
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
from enclave_runtime.protocol.wire import Kind
from enclave_runtime.schemes import SCHEMES, make_scheme
from tempo_jax.errors import EnclaveError
from tempo_jax.schemes import Mixing, Orthogonal, SignedPermutation, Tempo
from tests.support.interpreter import plan
from tests.support.steps import shield_all, uniform

HASH = "0123456789abcdef" * 4


def _train_step(state: Any, x: jax.Array, y: jax.Array) -> Any:
    params, momentum = state
    optimizer = tempo.cheap_update(optax.sgd(0.1, momentum=0.9))

    def loss(params: Any) -> jax.Array:
        hidden = jnp.tanh(x @ params["first"] + params["bias"])
        return jnp.mean((hidden @ params["second"] - y) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    updates, momentum = optimizer.update(gradients, momentum, params)
    return (optax.apply_updates(params, updates), momentum), tempo.reveal(value)


@pytest.fixture(scope="module")
def program(enclave) -> Program:
    """A real plan's program, with every kind of port and crossing."""
    constant = uniform(9, 3, 2)
    params = {"first": uniform(1, 5, 4), "bias": uniform(2, 4), "second": uniform(3, 4, 2)}
    state = params, optax.sgd(0.1, momentum=0.9).init(params)
    shielded = shield_all(
        lambda state, x, y: _train_step(state, x, y + constant), enclave=enclave, public=("y",)
    )
    planned = shielded.explain(state, uniform(4, 3, 5), uniform(5, 3, 2)).plan
    return with_executables(planned.program)


def _products(x: jax.Array, w: jax.Array, y: jax.Array, v: jax.Array) -> Any:
    return jnp.tanh(x @ w), jnp.tanh(y @ v)


@pytest.fixture(scope="module")
def product_program() -> Program:
    """A program with keys per product, one of them for a batch of matrices."""
    shapes = (130, 64), (64, 65), (2, 128, 64), (2, 64, 66)
    operands = (uniform(i, *shape) for i, shape in enumerate(shapes))
    scheme = Mixing(decoy_rows=32, mask_energy=0.0)
    return with_executables(plan(_products, *operands, scheme=scheme).plan.program)


@pytest.fixture(scope="module")
def verified_program() -> Program:
    """A program whose products are checked, a convolution among them."""

    def products(x: jax.Array, w: jax.Array, image: jax.Array, kernel: jax.Array) -> Any:
        convolved = jax.lax.conv_general_dilated(image, kernel, (2, 1), "SAME")
        return jnp.tanh(x @ w), jnp.tanh(convolved)

    shapes = (6, 5), (5, 4), (3, 4, 6, 6), (5, 4, 3, 3)
    operands = (uniform(i, *shape) for i, shape in enumerate(shapes))
    return with_executables(plan(products, *operands, verify=True).plan.program)


@pytest.fixture(scope="module", params=["program", "product_program", "verified_program"])
def any_program(request) -> Program:
    """One of them."""
    return request.getfixturevalue(request.param)


def with_executables(program: Program) -> Program:
    """The same program with a name for each executable."""
    segments = tuple(dataclasses.replace(s, executable=HASH) for s in program.segments)
    return dataclasses.replace(program, segments=segments)


def as_it_crosses(program: Program) -> Any:
    """Parsed JSON, for a test to change."""
    return json.loads(json.dumps(program.encode()))


@pytest.fixture
def fields(program) -> Any:
    """The first program's description."""
    return as_it_crosses(program)


@pytest.fixture
def product_fields(product_program) -> Any:
    """The second program's description."""
    return as_it_crosses(product_program)


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


# Schemes


@pytest.mark.parametrize(
    "scheme",
    [
        *(
            Mixing(),
            Mixing(condition=1, decoy_rows=32, mask_energy=0),
            Orthogonal(),
            Orthogonal(budget=7),
        ),
        *(SignedPermutation(), Tempo(), Tempo(coefficients="integers")),
    ],
    ids=str,
)
def test_scheme_is_found_by_name_and_parameters(scheme):
    parameters = json.loads(json.dumps(scheme.parameters))
    assert make_scheme(scheme.name, parameters) == scheme
    assert SCHEMES[scheme.name] is type(scheme)


MIXING = {"condition": 4.0, "decoy_rows": 32, "traded": 8, "mask_energy": 9.0}
SCHEME_REFUSALS: list[tuple[str, Any, str]] = [
    ("", {}, "the scheme is not one of mixing, orthogonal, signed_permutation, tempo"),
    ("contract", {}, "the scheme is not one of"),
    ("SignedPermutation", {}, "the scheme is not one of"),
    ("signed_permutation", {"budget": 1}, "signed_permutation takes the parameters"),
    ("orthogonal", {}, "orthogonal takes the parameters budget"),
    ("orthogonal", {"budget": 1, "name": "tempo"}, "orthogonal takes the parameters budget"),
    ("mixing", {"condition": 4.0}, "mixing takes the parameters condition, decoy_rows"),
    *(("orthogonal", {"budget": x}, "out of range") for x in (0, -1, 1.0, True, None, "1", [])),
    *(
        ("mixing", MIXING | {"condition": x}, "out of range")
        for x in (0.5, 1e7, float("nan"), None, "4", [4.0])
    ),
    *(("mixing", MIXING | {"decoy_rows": x}, "out of range") for x in (-1, 4097, 32.0, None, [])),
    *(
        ("mixing", MIXING | {"mask_energy": x}, "out of range")
        for x in (-1.0, 1e5, float("nan"), True, None, "9", [])
    ),
    *(("tempo", {"coefficients": x}, "out of range") for x in ("", "reals", None, [], {})),
]


@pytest.mark.parametrize(("name", "parameters", "text"), SCHEME_REFUSALS, ids=repr)
def test_unknown_scheme_or_parameter_is_refused(enclave, fields, name, parameters, text):
    with pytest.raises(ProgramError, match=text):
        make_scheme(name, parameters)
    fields.update(scheme=name, parameters=parameters)
    described = {"program": fields, "rules": None}
    attachment = enclave.encrypt(json.dumps(described).encode(), "provision")
    with pytest.raises(EnclaveError, match=text):
        enclave.connection.request(Kind.PROVISION, {"arena": "", "offsets": []}, attachment)


# Any change


def places(fields: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON tree."""
    items = fields.items() if isinstance(fields, dict) else enumerate(fields)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 6)
    | st.sampled_from([64, 1 << 20, 1 << 31, 1 << 40, 1 << 63, 1 << 100])
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["enclave", "device", "public", "float32", "int8", "i4,i8", "V4", "a" * 64])
)
REPLACEMENTS = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(max_examples=500)
@given(data=st.data())
def test_any_change_is_refused_or_gives_a_valid_program(any_program, data):
    changed = as_it_crosses(any_program)
    for _ in range(data.draw(st.integers(1, 3), "changes")):
        path = data.draw(st.sampled_from(list(places(changed))), "path")
        action = data.draw(st.sampled_from(["replace", "replace", "drop", "repeat"]), "action")
        parent = changed
        for step in path[:-1]:
            parent = parent[step]
        if action == "replace":
            parent[path[-1]] = data.draw(REPLACEMENTS, "value")
        elif action == "drop":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        if not changed:
            break
    try:
        decoded = Program.decode(changed)
    except ProgramError:
        return
    # Compared as text, because a scheme's parameter may have become NaN.
    assert json.dumps(Program.decode(as_it_crosses(decoded)).encode()) == json.dumps(
        decoded.encode()
    )
    hash((decoded.classes, decoded.constants, decoded.inputs, decoded.outputs, decoded.segments))


@given(data=st.recursive(VALUES, lambda s: st.lists(s) | st.dictionaries(st.text(), s)))
def test_anything_else_is_refused(data):
    with pytest.raises(ProgramError):
        Program.decode(data)
