"""Schemes by name, and any change of a program: refused, or another valid program."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from enclave_runtime.protocol.program import (
    Program,
    ProgramError,
)
from enclave_runtime.protocol.wire import Kind
from enclave_runtime.schemes import SCHEMES, make_scheme
from tempo_jax.errors import EnclaveError
from tempo_jax.schemes import Mixing, Orthogonal, SignedPermutation, Tempo
from tests.support.programs import as_it_crosses


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


MIXING = {"condition": 4.0, "decoy_rows": 32, "traded": 8, "mask_energy": 9.0, "wire": None}
SCHEME_REFUSALS: list[tuple[str, Any, str]] = [
    (
        "",
        {},
        "the scheme is not one of mixing, orthogonal, secret_shares, signed_permutation, tempo",
    ),
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
    *(("mixing", MIXING | {"wire": x}, "out of range") for x in ("", "float32", True, [], {})),
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


@settings(max_examples=300)
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
