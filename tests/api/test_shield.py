"""What a user of `shield` meets: options, public and secret values, refusals, the report."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.core import Tracer
from jax.experimental import io_callback

import tempo_jax as tempo
from tempo_jax.api import options as options_module
from tempo_jax.api.options import OptionFields, Options
from tempo_jax.errors import SealedValueError, UnsupportedError
from tests.support.classifier import (
    BATCHES,
    X,
    Y,
    forms,
    initial_state,
    is_sealed,
    plain_steps,
    train_step,
)
from tests.support.steps import (
    SIGNED_PERMUTATION,
    assert_close,
    offloaded_products,
    shield_all,
)


def test_decorator_with_arguments(enclave):
    @tempo.shield(enclave=enclave, donate=False)
    def scale(x, factor=2.0):
        """Multiplies."""
        return x * factor

    @functools.partial(tempo.shield, enclave=enclave, donate=False)
    def scale_again(x, factor=2.0):
        return x * factor

    assert isinstance(scale, tempo.Shielded) and isinstance(scale_again, tempo.Shielded)
    assert (getattr(scale, "__name__", None), scale.__doc__) == ("scale", "Multiplies.")
    assert str(inspect.signature(scale)) == "(x, factor=2.0)"
    for shielded in (scale, scale_again):
        assert_close(enclave.open(shielded(X)), 2 * X)
    assert_close(enclave.open(scale(X, 3.0)), 3 * X)
    assert_close(enclave.open(scale(X, factor=4.0)), 4 * X)
    assert_close(enclave.open(scale(factor=5.0, x=X)), 5 * X)


def test_method(enclave):
    @functools.partial(jax.tree_util.register_dataclass, data_fields=["factor"], meta_fields=[])
    class Model:
        def __init__(self, factor):
            self.factor = factor

        @functools.partial(tempo.shield, enclave=enclave)
        def __call__(self, x):
            return x * self.factor

    assert_close(enclave.open(Model(jnp.float64(3.0))(X)), 3 * X)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"placement": "host"}, "placement is 'host', expected one of auto, enclave"),
        ({"offload": "none"}, "offload is 'none', expected one of auto, all"),
        ({"scheme": "signed_permutation"}, "scheme is a str, expected an object"),
        ({"scheme": tempo.schemes.Mixing}, r"scheme is the class `Mixing`; call it: `Mixing\(\)`"),
        ({"enclave": None}, "enclave is a NoneType, expected what `Enclave.launch"),
        ({"mesh": 2}, r"mesh is a int, expected a mesh of devices with one axis, such as"),
        ({"verify": "yes"}, "verify is 'yes', expected one of True, False"),
        ({"donate": None}, "donate is None, expected one of True, False"),
        ({"axis": 1}, "there is no axis, expected some of enclave, scheme"),
        ({"public": ("z",)}, "public names 'z', but the arguments are x, y"),
        ({"public": (2,)}, "public names 2, but the arguments are x, y"),
        ({"public": -1}, "public names -1"),
        ({"unroll_while": 65}, "unroll_while is 65, expected an integer from 0 to 64"),
        ({"unroll_while": True}, "unroll_while is True"),
        (
            {"mesh": jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))},
            r"mesh has the axes \('a', 'b'\), expected exactly one",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unknown_option_is_refused(enclave, options, text):
    with pytest.raises(UnsupportedError, match=text):
        tempo.shield(lambda x, y: x, **{"enclave": enclave, **options})


def test_missing_enclave_is_refused():
    missing: Any = {}
    with pytest.raises(UnsupportedError, match=r"`enclave=` is missing, expected what `Enclave.la"):
        tempo.shield(lambda x: x, **missing)


def test_mesh_that_the_enclave_cannot_serve_is_refused(enclave, monkeypatch):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("a",))
    tempo.shield(lambda x: x, enclave=enclave, mesh=mesh)
    monkeypatch.setattr(options_module, "MAX_WORKERS", 3)
    with pytest.raises(UnsupportedError, match="mesh has 4 devices, expected at most 3"):
        tempo.shield(lambda x: x, enclave=enclave, mesh=mesh)


# Public and secret


@pytest.mark.parametrize("public", [("y",), "y", (1,), 1, ["y", 1]], ids=repr)
def test_public_argument(enclave, public):
    shielded = tempo.shield(lambda x, y: x + y, enclave=enclave, public=public, donate=False)

    def places(*args, **kwargs):
        report = shielded.explain(*args, **kwargs)
        return dict(
            zip(report.arguments, (p.place for p in report.plan.program.inputs), strict=True)
        )

    for arguments in (places(X, X), places(X, y=X), places(y=X, x=X)):
        assert arguments == {"x": "enclave", "y": "public"}
    # A value that is already sealed stays secret.
    assert places(X, enclave.seal(X)) == {"x": "enclave", "y": "enclave"}


def test_public_values_are_right(enclave):
    def dropout(x, training, key, rate):
        mask = jax.random.bernoulli(key, rate, x.shape)
        return jnp.where(training, x * mask, x) @ x.T

    shielded = tempo.shield(dropout, enclave=enclave, public=("training", "key", "rate"))
    for training, seed, rate in ((True, 1, 0.3), (True, 2, 0.6), (False, 1, 0.3)):
        arguments = (X, training, jax.random.key(seed), rate)
        assert_close(enclave.open(shielded(*arguments)), dropout(*arguments))


def test_outputs_are_sealed_unless_revealed(enclave):
    def function(x):
        shown = tempo.reveal({"sum": x.sum(), "rows": x[:2]})
        return {
            "kept": x * 2,
            "of a revealed value": shown["sum"] + 1,
            "shown": shown,
            "input": x,
            "shown input": tempo.reveal(x),
            "constant": 3,
            "shown constant": tempo.reveal(4),
        }

    out = tempo.shield(function, enclave=enclave)(X)
    expected = function(X)
    for name, leaf in out.items():
        shown = name.startswith("shown")
        kinds = {is_sealed(x) for x in jax.tree.leaves(leaf, is_leaf=is_sealed)}
        assert kinds == {not shown}, name
        if shown:
            assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(leaf))
    assert_close(enclave.open(out), jax.tree.map(jnp.asarray, expected))


def test_reveal_outside_shield_is_the_identity():
    tree = {"a": X, "b": [jnp.int8(3), 2.0]}
    assert_close(tempo.reveal(tree), jax.tree.map(jnp.asarray, tree))
    assert_close(jax.jit(tempo.reveal)(X), X)
    assert_close(jax.vmap(tempo.reveal)(X), X)
    assert_close(jax.grad(lambda x: tempo.reveal(x**2).sum())(X), 2 * X)


def test_revealed_output_carries_no_state(enclave):
    # An argument that only happens to look like what is revealed must not be donated.
    shielded = tempo.shield(lambda x: tempo.reveal(x * 2), enclave=enclave)
    sealed = enclave.seal(X)
    assert_close(shielded(sealed), 2 * X)
    assert_close(shielded(sealed), 2 * X)


# What cannot be shielded


def test_value_of_another_enclave_is_refused(enclave, other_enclave):
    foreign = other_enclave.seal(X)
    shielded = tempo.shield(lambda x: x * 2, enclave=enclave)
    match = "belongs to another session or enclave; open it there and seal it here"
    for use in (shielded, enclave.open, enclave.seal, shielded.__call__, jax.jit(shielded)):
        with pytest.raises(SealedValueError, match=match):
            use(foreign)
    doubled = shielded(other_enclave.open(foreign))
    with pytest.raises(SealedValueError, match=match):
        other_enclave.open(doubled)
    assert_close(enclave.open(doubled), 2 * X)


@pytest.mark.parametrize(
    "argument", ["text", b"bytes", object(), len], ids=lambda a: type(a).__name__
)
def test_argument_that_is_no_array_is_refused(enclave, argument):
    shielded = tempo.shield(lambda x, option: x, enclave=enclave)
    with pytest.raises(UnsupportedError, match="neither an array nor a number.*static"):
        shielded(X, option=argument)


@pytest.mark.parametrize(
    "callback",
    [
        lambda x: jax.pure_callback(np.sin, x, x),
        lambda x: io_callback(np.sin, x, x),
        lambda x: jax.jit(lambda y: lax.cond(True, lambda: io_callback(np.sin, y, y), lambda: y))(
            x
        ),
    ],
    ids=["pure_callback", "io_callback", "within control flow"],
)
def test_callback_is_refused(enclave, callback):
    shielded = tempo.shield(lambda x: callback(x @ x.T), enclave=enclave)
    with pytest.raises(UnsupportedError, match=r"_callback` at .*test_shield.*calls back into"):
        shielded(X)


def test_debugging_prints_nothing(enclave, capfd):
    def function(x):
        y = x @ x.T
        jax.debug.print("secret {}", y.sum())
        return jnp.tanh(y)

    shielded = shield_all(function, enclave=enclave)
    assert_close(enclave.open(shielded(X)), jnp.tanh(X @ X.T))
    (note,) = shielded.explain(X).plan.notes
    assert "debugging callback" in note and "test_shield.py" in note
    assert f"note: {note}" in str(shielded.explain(X))
    jax.effects_barrier()
    assert "secret" not in "".join(capfd.readouterr())


# Placement and the report


def test_placement_in_the_enclave(enclave):
    shielded = shield_all(train_step, enclave=enclave, placement="enclave")
    state, losses = enclave.seal(initial_state()), []
    for batch in BATCHES[:2]:
        state, loss = shielded(state, *batch)
        losses.append(float(loss))
    assert_close(enclave.open(state), plain_steps(2)[0])
    np.testing.assert_allclose(losses, plain_steps(2)[1], rtol=1e-10)
    assert set(forms(state)) == {"resident"}
    report = shielded.explain(state, *BATCHES[0])
    assert offloaded_products(shielded, state, *BATCHES[0]) == 0 and not report.resident
    assert report.round_trips == 1 and report.bytes_up == 0
    assert report.bytes_down == 8  # the loss


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (SIGNED_PERMUTATION, "computing it inside takes"),
        (None, "8 rows, and fewer than 128 mix too little to hide"),
    ],
    ids=["signed permutations", "default"],
)
def test_small_products_stay_inside_by_default(enclave, scheme, reason):
    shielded = tempo.shield(train_step, enclave=enclave, scheme=scheme)
    report = shielded.explain(initial_state(), X, Y)
    assert report.round_trips == 1 and f"stays inside: {reason}" in str(report)


def test_report_has_its_sections(enclave, train):
    text = str(train.explain(initial_state(), X, Y))
    for part in (
        "train_step under signed_permutation\n  the host learns every blinded matrix",
        "on the devices: 5 products, 100% of the arithmetic",
        "dot_general float64[8:k",
        "in the enclave: ",
        "device-resident leaves, updated where they lie: 6",
        "state[0]['first']: float64[6:k",
        "state[1][0].nu['second']: float64[8:k",
        "marked cheap, but updated in the enclave:\n  state[0]['bias']",
        "each call: 4 round trips",
        "in the clear: 1 revealed outputs, 2 scalars of the device-side update",
    ):
        assert part in text


def test_report_equals_the_measured_traffic(enclave):
    train = shield_all(train_step, enclave=enclave)
    state = enclave.seal(initial_state())
    report = train.explain(state, X, Y)
    assert report.bytes_up > 0 and report.bytes_down > 0 and report.round_trips == 4
    for runs in (1, 2, 3):
        state, _ = train(state, X, Y)
        traffic = train.traffic(state, X, Y)
        assert traffic.runs == runs
        assert traffic.up == runs * report.bytes_up
        assert traffic.down == runs * report.bytes_down
        assert traffic.round_trips == runs * report.round_trips


def test_report_runs_nothing(enclave):
    calls = []

    def function(x):
        calls.append(x)
        return x @ x.T

    before = enclave.statistics()
    report = tempo.shield(function, enclave=enclave).explain(X)
    assert len(calls) == 1 and isinstance(calls[0], Tracer)
    assert repr(report.plan) and enclave.statistics()["programs"] == before["programs"]


def test_a_product_that_stays_makes_those_that_shared_its_operand_dearer(enclave):
    # Half an operand is cheap enough to send for dW alone, but nobody shares it any more.
    rows, width = 2048, 412

    def loss(weights, x):
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return jnp.mean(x**2)

    tx = tempo.cheap_update(optax.sgd(0.1))

    def step(weights, x):
        updates, _ = tx.update(jax.grad(loss)(weights, x), tx.init(weights), weights)
        return optax.apply_updates(weights, updates)

    weights = [jnp.ones((width, width), jnp.float32)] * 3
    shielded = tempo.shield(step, enclave=enclave, scheme=tempo.schemes.Orthogonal())
    report = shielded.explain(weights, jnp.ones((rows, width), jnp.float32))
    assert report.offloaded_work[0] == 0


# Types


def test_options_are_written_down_once():
    fields = {field.name for field in dataclasses.fields(Options)}
    assert fields == set(OptionFields.__annotations__)
    assert fields == set(inspect.signature(tempo.shield).parameters) - {"function"}


def test_errors_while_tracing_name_the_users_function_and_arguments(enclave):
    def look_up(params, b):
        if b["id"] > 0:
            return params
        return 2 * params

    for arguments, keywords in (((1.0, {"id": 2}), {}), ((1.0,), {"b": {"id": 2}})):
        with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
            tempo.shield(look_up, enclave=enclave)(*arguments, **keywords)
        text = str(caught.value)
        assert "look_up" in text and "b['id']" in text
        assert "flat_function" not in text and "physical" not in text
