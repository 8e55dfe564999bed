"""The timeline of `tempo.profile`: what it holds, and that it adds up."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import tempo_jax as tempo
from tempo_jax.errors import UnsupportedError
from tests.support.steps import shield_all

X = jnp.ones((128, 64))


@jax.named_scope("model")
def function(x):
    with jax.named_scope("first"):
        y = jnp.tanh(x @ x.T)
    with jax.named_scope("second"):
        return jnp.tanh(y @ y)


def events(path):
    """Complete events by the name of their row, and the rows' names."""
    trace = json.loads(path.read_text())
    assert trace["displayTimeUnit"] == "ms"
    rows = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    found = {name: [] for name in rows.values()}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["ts"] >= 0
            found[rows[event["tid"]]].append(event)
    return found


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.json"


def test_rows_say_who_does_what_by_layer(enclave, path):
    shielded = shield_all(function, enclave=enclave)
    expected = enclave.open(shielded(X))
    with tempo.profile(path):
        for _ in range(2):
            out = shielded(X)
    np.testing.assert_array_equal(enclave.open(out), expected)
    found = events(path)
    assert set(found) == {"calls", "enclave", "transfer", "device 0"}
    assert [e["name"] for e in found["calls"]] == ["call 0", "call 1"]
    names = [e["name"] for e in found["enclave"]]
    for name in ("begin", "blind for model/first", "unblind for model/second", "compute", "commit"):
        assert names.count(name) == 2
    device = [e["name"] for e in found["device 0"] if "waiting" not in e["name"]]
    assert device == ["model/first", "model/second"] * 2
    assert {e["name"] for e in found["transfer"]} == {"up", "down"}
    assert len(found["transfer"]) == 2 * 2 * shielded.explain(X).round_trips


def test_parts_lie_one_after_the_other_within_their_call(enclave, path):
    shielded = shield_all(function, enclave=enclave)
    with tempo.profile(path):
        shielded(X)
    found = events(path)
    (call,) = found.pop("calls")
    for row, inside in found.items():
        inside.sort(key=lambda e: e["ts"])
        for first, second in zip(inside, inside[1:], strict=False):
            assert first["ts"] + first["dur"] <= second["ts"] + 1, row  # a microsecond of rounding
        assert inside[0]["ts"] >= call["ts"] - 1
        assert inside[-1]["ts"] + inside[-1]["dur"] <= call["ts"] + call["dur"] + 1


def test_every_device_of_a_mesh_has_a_row(enclave, path):
    mesh = Mesh(np.array(jax.devices()[:2]), ("w",))
    shielded = shield_all(function, enclave=enclave, mesh=mesh)
    with tempo.profile(path):
        shielded(X)
    found = events(path)
    for row in ("device 0", "device 1"):
        assert "model/second" in [e["name"] for e in found[row]]
    # The enclave ran each segment once, for both.
    blinded = [e for e in found["enclave"] if e["name"] == "blind for model/first"]
    assert len(blinded) == 1


def test_calls_inside_a_users_jit_are_recorded(enclave, path):
    shielded = shield_all(function, enclave=enclave)
    sealed = enclave.seal(X)
    compiled = jax.jit(lambda x: shielded(x))
    with tempo.profile(path):
        jax.block_until_ready(compiled(sealed))
    assert [e["name"] for e in events(path)["calls"]] == ["call 0"]


def test_written_whatever_happens_and_over_afterwards(enclave, path):
    shielded = shield_all(function, enclave=enclave)
    with pytest.raises(ZeroDivisionError), tempo.profile(path):
        shielded(X)
        raise ZeroDivisionError
    before = path.read_bytes()
    assert len(events(path)["calls"]) == 1
    shielded(X)
    assert path.read_bytes() == before


def test_one_at_a_time_is_refused_otherwise(path, tmp_path):
    with tempo.profile(path):
        with pytest.raises(UnsupportedError, match="recording already"):
            with tempo.profile(tmp_path / "second.json"):
                pass
    assert not (tmp_path / "second.json").exists()
    assert events(path) == {"calls": [], "enclave": [], "transfer": []}


def test_without_a_recording_the_enclave_is_not_asked_for_times(enclave, monkeypatch):
    asked = []
    original = type(enclave._connection).request

    def request(self, kind, fields, *arguments, **options):
        asked.append(fields)
        return original(self, kind, fields, *arguments, **options)

    monkeypatch.setattr(type(enclave._connection), "request", request)
    shield_all(function, enclave=enclave)(X)
    assert asked and not any("timed" in fields for fields in asked)
