"""A scheme is one file: it is known nowhere else, and one that the library never saw trains."""

import ast
import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tempo_jax as tempo
from enclave_runtime.execution import timing
from enclave_runtime.schemes import SCHEMES, Mixing, Scheme, SchemeCost, register
from tempo_jax.planning.calibration import cost_model
from tempo_jax.planning.cost import CostModel
from tempo_jax.transport import launch
from tests.support.rotation import Rotation
from tests.support.steps import assert_trains_alike, training, uniform
from tests.test_architecture import modules_of

# Where a scheme is named besides its own module: in the registry, and as the default of `shield`.
NAMED = {
    "enclave_runtime.schemes.registry": {scheme.__name__ for scheme in SCHEMES.values()},
    "tempo_jax.api.options": {"Mixing"},
}


@pytest.fixture
def enclave_with_rotation(monkeypatch):
    """An enclave that knows one scheme more."""
    monkeypatch.setattr(launch, "ENCLAVE_MODULE", "tests.support.rotation")
    with tempo.Enclave.launch() as enclave:
        yield enclave


def perceptron():
    def loss(p, rest, batch):
        x, y = batch
        z = jnp.tanh(x @ p["first"] + p["bias"]) @ p["second"]
        return jnp.mean((z - y) ** 2), (rest, z)

    p = {"first": uniform(1, 5, 4), "bias": uniform(2, 4), "second": uniform(3, 4, 3)}
    batches = [(uniform(seed, 6, 5), uniform(seed + 1, 6, 3)) for seed in (4, 6)]
    return training(loss, p, batches, optax.adamw(1e-2))


def test_scheme_of_one_file_trains_end_to_end(enclave_with_rotation):
    scheme, case = Rotation(least=1), perceptron()
    shielded = tempo.shield(case.step, enclave=enclave_with_rotation, scheme=scheme, offload="all")
    with tempo.testing.host_view() as view:
        assert_trains_alike(shielded, enclave_with_rotation, case)
    report = shielded.explain(case.state, case.batches[0])
    assert report.resident and Rotation.host_learns in str(report)
    # The weight that training started from lay on the devices, rotated.
    seen = [array for _, array in view.leaves]
    weight = np.asarray(case.state["params"]["first"])
    turns = [np.roll(weight, (i, j), (0, 1)) for i in range(1, 5) for j in range(1, 4)]
    assert any(np.array_equal(array, turn) for array in seen for turn in turns)
    assert not any(np.array_equal(array, weight) for array in seen)


def test_enclave_without_a_scheme_refuses_it(enclave):
    case = perceptron()
    shielded = tempo.shield(case.step, enclave=enclave, scheme=Rotation(), offload="all")
    with pytest.raises(tempo.errors.TempoError, match="the scheme is not one of mixing"):
        shielded(case.state, case.batches[0])


def test_two_schemes_cannot_share_a_name():
    with pytest.raises(ValueError, match="of the name 'mixing' already"):
        register(dataclasses.make_dataclass("Other", [], bases=(Mixing,), frozen=True))


def test_measured_costs_are_those_of_every_scheme(monkeypatch):
    def a_second_each(works):
        for work in works.values():
            work()
        return dict.fromkeys(works, 1.0)

    monkeypatch.setitem(SCHEMES, Rotation.name, Rotation)
    monkeypatch.setattr(timing, "_least_seconds", a_second_each)
    measured = timing.measure()
    assert set(measured["schemes"]) == set(SCHEMES)
    cost = cost_model(measured).cost_of(Rotation())
    assert cost == SchemeCost(overhead=1.0, blinding=0.0, drawing=1e9 / 4096)
    assert CostModel().cost_of(Rotation()) == Rotation.reference


@pytest.mark.parametrize("package", ["tempo_jax", "enclave_runtime"])
def test_nothing_else_knows_one_scheme_from_another(package):
    classes = {scheme.__name__ for scheme in SCHEMES.values()} - {"Tempo"}
    texts = set(SCHEMES) - {"tempo"}  # which is the library's name as well
    for module, path in modules_of(package).items():
        if module.removeprefix("enclave_runtime.schemes.") in SCHEMES:
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = {node.name for node in nodes if isinstance(node, ast.alias)}
        named |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert named & classes <= NAMED.get(module, set()), module
        constants = {node.value for node in nodes if isinstance(node, ast.Constant)}
        assert not constants & texts, module


def test_every_scheme_describes_itself():
    for name, scheme in SCHEMES.items():
        assert issubclass(scheme, Scheme) and scheme.__module__.rpartition(".")[2] == name
        assert isinstance(scheme.reference, SchemeCost) and scheme.host_learns


def test_the_least_of_times_in_turn_counts(monkeypatch):
    clock, done = [0.0], []
    lasts = {"a": iter([1, 5, 3, 9, 8, 9, 9]), "b": iter([1, 9, 9, 9, 9, 9, 2])}

    def work(name):
        clock[0] += next(lasts[name])
        done.append(name)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    least = timing._least_seconds({name: functools.partial(work, name) for name in "ab"})
    assert least == {"a": 3, "b": 2}, "the first of each compiles, and does not count"
    assert done == list("ab" * 7)
