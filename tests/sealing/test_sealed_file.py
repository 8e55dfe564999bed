"""Files of sealed values: round trips, and every malformed file refused."""

import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tempo_jax as tempo
from tempo_jax.errors import SealedValueError
from tempo_jax.sealing import file as file_module
from tempo_jax.sealing.file import HEADER, MAGIC, MAX_HEADER
from tests.support.steps import assert_close, shield_all, uniform

LIKE = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32), "b": [jax.ShapeDtypeStruct((), jnp.int32)]}


def values() -> Any:
    return {"a": jnp.arange(6.0, dtype=jnp.float32).reshape(2, 3), "b": [jnp.int32(7)]}


@pytest.fixture
def file(enclave, tmp_path) -> Path:
    """A file with two encrypted values."""
    path = tmp_path / "values.sealed"
    tempo.save_sealed(path, enclave.seal(values()))
    return path


def test_encrypted_values_come_back(enclave, file):
    loaded = tempo.load_sealed(file, LIKE)
    assert_close(enclave.open(loaded), values())
    assert_close(enclave.open(tempo.load_sealed(file, enclave.seal(values()))), values())
    assert sorted(p.name for p in file.parent.iterdir()) == ["values.sealed"]


@pytest.mark.parametrize("value", [jax.random.key(3), 0.5, np.zeros((3, 0)), jnp.bfloat16(1.5)])
def test_any_value_comes_back_as_it_was(enclave, tmp_path, value):
    sealed = enclave.seal(value)
    tempo.save_sealed(tmp_path / "x", sealed)
    loaded = tempo.load_sealed(tmp_path / "x", jax.eval_shape(lambda: value))
    assert (loaded.shape, loaded.dtype, loaded.weak_type, loaded.form) == (
        sealed.shape,
        sealed.dtype,
        sealed.weak_type,
        "encrypted",
    )
    assert enclave.open(loaded).dtype == jnp.asarray(value).dtype


def step(state, x):
    optimizer = tempo.cheap_update(optax.sgd(0.1))
    gradient = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(state["w"])
    updates, _ = optimizer.update(gradient, optimizer.init(state["w"]))
    return {"w": optax.apply_updates(state["w"], updates), "n": state["n"] + 1}


def test_resident_and_blinded_values_come_back(enclave, tmp_path):
    plain, x = {"w": uniform(1, 3, 3), "n": jnp.int32(0)}, uniform(2, 4, 3)
    shielded = shield_all(step, enclave=enclave)
    state = shielded(plain, x)
    assert (state["w"].form, state["n"].form) == ("blinded", "resident")
    tempo.save_sealed(tmp_path / "state", state)
    del state
    enclave.statistics()  # frees what was dropped, and would free what the file names
    loaded = tempo.load_sealed(tmp_path / "state", jax.eval_shape(lambda: plain))
    expected = jax.jit(step)(plain, x)
    assert_close(enclave.open(loaded), expected)
    # It goes on where it was, and is then donated like any other copy.
    again = shielded(loaded, x)
    assert_close(enclave.open(again), jax.jit(step)(expected, x))
    stale = tempo.load_sealed(tmp_path / "state", jax.eval_shape(lambda: plain))
    with pytest.raises(SealedValueError, match="not in this enclave: it was donated"):
        enclave.open(stale)


def test_value_in_the_clear_is_not_written(enclave, tmp_path):
    tree = {"secret": enclave.seal(jnp.ones(2)), "plain": jnp.ones(2)}
    with pytest.raises(SealedValueError, match=r"`\['plain'\]` is not sealed"):
        tempo.save_sealed(tmp_path / "x", tree)
    assert list(tmp_path.iterdir()) == []


def test_values_of_no_session_are_not_written(tmp_path):
    with pytest.raises(SealedValueError, match="belong to 0 sessions"):
        tempo.save_sealed(tmp_path / "x", {})


def test_failed_write_leaves_the_old_file(enclave, file, monkeypatch):
    old = file.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_module.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        tempo.save_sealed(file, enclave.seal(values()))
    assert file.read_bytes() == old and len(list(file.parent.iterdir())) == 1


# Refusals


def header_of(content: bytes) -> Any:
    (length,) = struct.unpack_from(">I", content, 8)
    return json.loads(content[HEADER.size : HEADER.size + length]), content[HEADER.size + length :]


def with_header(header: Any, contents: bytes) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return HEADER.pack(MAGIC, 2, 0, len(encoded)) + encoded + contents


def refused(file: Path, content: bytes, text: str, like: Any = LIKE) -> None:
    file.write_bytes(content)
    with pytest.raises(SealedValueError, match=text):
        tempo.load_sealed(file, like)


def test_file_layout_is_frozen(file):  # bump the version before changing it
    content = file.read_bytes()
    header, contents = header_of(content)
    assert content[:8] == b"TMPS\0\2\0\0"
    assert set(header) == {"session", "leaves"}
    assert header["leaves"][0] == {
        **{"path": "['a']", "form": "encrypted", "shape": [2, 3], "dtype": "float32"},
        **{"weak_type": False, "handle": ""},
    }
    assert len(contents) == 6 * 4 + 76 + 4 + 76


@pytest.mark.parametrize("size", [0, 1, 11, 12, 40, -1, -33])
def test_truncated_file_is_refused(file, size):
    content = file.read_bytes()
    text = "too short|longer than it may be|malformed|ends within"
    refused(file, content[:size], text)


def test_start_that_is_wrong_is_refused(file):
    content = file.read_bytes()
    refused(file, b"PK\3\4" + content[4:], "not a file of sealed values")
    refused(file, content[:6] + b"\0\1" + content[8:], "not a file of sealed values")
    refused(file, content[:4] + b"\0\1" + content[6:], "has version 1, expected 2")
    for length in (MAX_HEADER + 1, 0xFFFFFFFF, len(content) + 1):
        start = HEADER.pack(MAGIC, 2, 0, length)
        refused(file, start + content[12:], "longer than it may be")
    refused(file, content + b"\0", "more bytes follow")


@pytest.mark.parametrize(
    "header", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"session": 1, "leaves": []}']
)
def test_malformed_header_is_refused(file, header):
    refused(file, with_header(header, b""), "header of .* is malformed")


CHANGES = [
    ("path", "['c']", "`like` is not what was saved"),
    ("shape", [3, 2], "`like` is not what was saved"),
    ("shape", [1 << 40], "`like` is not what was saved"),
    ("shape", None, "`like` is not what was saved"),
    ("dtype", "float64", "`like` is not what was saved"),
    ("dtype", ["float32"], "`like` is not what was saved"),
    ("form", "plain", "description of .* is malformed"),
    ("form", [], "description of .* is malformed"),
    ("form", "resident", "description of .* is malformed"),
    ("weak_type", 0, "description of .* is malformed"),
    ("handle", "00" * 16, "description of .* is malformed"),
    ("handle", None, "description of .* is malformed"),
    ("extra", 1, "description of .* is malformed"),
]


@pytest.mark.parametrize(("key", "value", "text"), CHANGES, ids=lambda x: repr(x)[:24])
def test_description_that_does_not_fit_is_refused(file, key, value, text):
    header, contents = header_of(file.read_bytes())
    header["leaves"][0][key] = value
    refused(file, with_header(header, contents), text)


@pytest.mark.parametrize("handle", ["", "00" * 15, "00" * 17, "zz" * 16, 3, None])
def test_malformed_handle_is_refused(file, handle):
    header, contents = header_of(file.read_bytes())
    header["leaves"][0].update(form="resident", handle=handle)
    refused(file, with_header(header, contents[52:]), "description of .* is malformed")


def test_other_structure_is_refused(file):
    content = file.read_bytes()
    refused(file, content, "holds 2 values, expected 1", {"a": LIKE["a"]})
    refused(file, content, "is not what was saved", {"a": LIKE["a"], "c": LIKE["b"]})
    # Big claims cost nothing: sizes come from `like` and the file's own length.
    refused(file, content, "is not what was saved", {**LIKE, "a": _huge()})


def _huge() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)


def test_altered_content_is_refused_when_it_is_opened(enclave, file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(SealedValueError, match="failed its authentication"):
        enclave.open(tempo.load_sealed(file, LIKE))


@given(data=st.data())
def test_any_file_is_read_or_refused(tmp_path_factory, data):
    leaf = {"path": "['a']", "form": "encrypted", "shape": [2, 3], "dtype": "float32"}
    leaves = [{**leaf, "weak_type": False, "handle": ""}]
    honest = with_header({"session": "00" * 16, "leaves": leaves}, bytes(52))
    position = data.draw(st.integers(0, len(honest) - 1))
    content = bytearray(honest)
    content[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(honest)))
    path = tmp_path_factory.getbasetemp() / "any.sealed"
    path.write_bytes(bytes(content[:cut]))
    try:
        loaded = tempo.load_sealed(path, {"a": LIKE["a"]})
    except SealedValueError:
        return
    assert loaded["a"].shape == (2, 3)
