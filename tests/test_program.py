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
from enclave_runtime.program import (
    ALIGNMENT,
    MAX_RANK,
    MAX_VALUES,
    ArrayType,
    Layout,
    Program,
    ProgramError,
    aligned,
)
from tests.steps import uniform

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
    shielded = tempo.shield(
        lambda state, x, y: _train_step(state, x, y + constant),
        enclave=enclave,
        offload="all",
        public=("y",),
    )
    plan = shielded.explain(state, uniform(4, 3, 5), uniform(5, 3, 2)).plan
    segments = tuple(dataclasses.replace(s, executable=HASH) for s in plan.program.segments)
    return dataclasses.replace(plan.program, segments=segments)


@pytest.fixture
def fields(program) -> Any:
    """The program as it crosses: parsed JSON, for a test to change."""
    return json.loads(json.dumps(program.encode()))


def test_program_has_every_part(program):  # else the mutations below would miss some
    assert {p.place for p in program.inputs} == {"enclave", "device", "public"}
    assert {p.place for p in program.outputs} == {"enclave", "device"}
    assert program.constants and program.classes
    assert any(s.uploads for s in program.segments) and any(s.dead for s in program.segments)


def test_decoding_inverts_encoding(program, fields):
    assert Program.decode(fields) == program


def test_encoded_form_is_frozen():  # what both ends write down; change them together
    array = ArrayType((2, 3), "float32")
    assert dataclasses.asdict(array) == {"shape": (2, 3), "dtype": "float32"}
    assert array.nbytes == 24 and aligned(array.nbytes) == ALIGNMENT and aligned(0) == 0
    layout = Layout((0, None), (1, 0))
    assert dataclasses.asdict(layout) == {"classes": (0, None), "weights": (1, 0)}
    assert layout.keyed and not Layout((None,), (0,)).keyed


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


def _resize_class(fields: Any) -> None:
    number = next(c for p in fields["inputs"] for c in p["layout"]["classes"] if c is not None)
    fields["classes"][number]["size"] += 1


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
    ("signs are not a flag", change("classes", 0, "signed", to=1)),
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
    ("weights is not a list", drop(*INPUT, "layout", "weights")),
    ("a layout has the wrong rank", change(*INPUT, "layout", "classes", to=[None] * 9)),
    ("a layout has the wrong rank", change(*INPUT, "layout", "weights", to=[0] * 9)),
    ("a key class is out of range", _unknown_class),
    ("another size than its axis", _resize_class),
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


def test_weight_out_of_range_is_refused(fields):
    layout = next(p["layout"] for p in fields["inputs"] if p["layout"]["weights"])
    layout["weights"][0] = 2
    with pytest.raises(ProgramError, match="a weight is out of range"):
        Program.decode(fields)


@pytest.mark.parametrize("whole", [None, [], "program", 3])
def test_program_that_is_not_an_object_is_refused(whole):
    with pytest.raises(ProgramError, match="not an object"):
        Program.decode(whole)


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
def test_any_change_is_refused_or_gives_a_valid_program(program, data):
    changed = json.loads(json.dumps(program.encode()))
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
    assert Program.decode(json.loads(json.dumps(decoded.encode()))) == decoded
    hash(decoded)


@given(data=st.recursive(VALUES, lambda s: st.lists(s) | st.dictionaries(st.text(), s)))
def test_anything_else_is_refused(data):
    with pytest.raises(ProgramError):
        Program.decode(data)
