"""What a user of `shield` meets: options, state, sealed values, transformations, refusals."""

import dataclasses
import functools
import inspect
from collections.abc import Iterator
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
from tempo_jax.api import shielded as shielded_module
from tempo_jax.api.options import OptionFields, Options
from tempo_jax.errors import SealedValueError, SecrecyError, UnsupportedError
from tests.support.steps import (
    SIGNED_PERMUTATION,
    assert_close,
    offloaded_products,
    shield_all,
    uniform,
)

OPTIMIZER = tempo.cheap_update(optax.adamw(1e-2))
X, Y = uniform(1, 8, 6), jax.nn.one_hot(jnp.arange(8) % 4, 4)
BATCHES = [(uniform(10 + i, 8, 6), jnp.roll(Y, i, axis=0)) for i in range(3)]


def logits(params, x):
    return jax.nn.relu(x @ params["first"] + params["bias"]) @ params["second"]


def train_step(state, x, y):
    """One step of an MLP with AdamW; the loss is revealed."""
    params, optimizer = state

    def loss_of(params):
        return optax.softmax_cross_entropy(logits(params, x), y).mean()

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, optimizer = OPTIMIZER.update(gradients, optimizer, params)
    return (optax.apply_updates(params, updates), optimizer), tempo.reveal(loss)


def initial_state():
    params = {"first": uniform(2, 6, 8), "bias": uniform(3, 8), "second": uniform(4, 8, 4)}
    return params, OPTIMIZER.init(params)


@functools.cache
def plain_steps(count: int) -> tuple[Any, tuple[float, ...]]:
    """The state after some steps of plain JAX on `BATCHES`, and the losses."""
    if not count:
        return initial_state(), ()
    state, losses = plain_steps(count - 1)
    state, loss = jax.jit(train_step)(state, *BATCHES[(count - 1) % len(BATCHES)])
    return state, (*losses, float(loss))


@pytest.fixture(scope="module")
def train(enclave) -> Any:
    """The shielded step; tests share it, so that it is compiled once."""
    return shield_all(train_step, enclave=enclave)


@pytest.fixture
def state(enclave, train) -> Any:
    """The state after one step: its leaves lie where they will stay."""
    state, _ = train(enclave.seal(initial_state()), *BATCHES[0])
    return state


@pytest.fixture(scope="module")
def other_enclave() -> Iterator[tempo.Enclave]:
    """An enclave of another session."""
    with tempo.Enclave.launch() as running:
        yield running


def is_sealed(x: Any) -> bool:
    return isinstance(x, tempo.SealedArray)


def forms(tree: Any) -> list[str]:
    """The forms of a tree's leaves, all of which are sealed."""
    return [leaf.form for leaf in jax.tree.leaves(tree, is_leaf=is_sealed)]


# The decorator


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
        ({"enclave": None}, "enclave is a NoneType, expected what `Enclave.launch"),
        ({"public": ("z",)}, "public names 'z', but the arguments are x, y"),
        ({"public": (2,)}, "public names 2, but the arguments are x, y"),
        ({"public": -1}, "public names -1"),
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


# State


def test_training_equals_plain(enclave, train):
    state, losses = enclave.seal(initial_state()), []
    for batch in BATCHES:
        state, loss = train(state, *batch)
        assert isinstance(loss, jax.Array)
        losses.append(float(loss))
    expected, expected_losses = plain_steps(3)
    assert_close(enclave.open(state), expected)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)
    # Kernels and their moments stay on the devices, the rest in the enclave.
    assert sorted(forms(state)) == ["blinded"] * 6 + ["resident"] * 4


def test_plain_state_is_sealed_on_the_way_in(enclave, train):
    plain = initial_state()
    state, _ = train(plain, *BATCHES[0])
    assert_close(enclave.open(state), plain_steps(1)[0])
    assert_close(plain, initial_state())  # a plain argument is never donated


@pytest.mark.parametrize("settled", [False, True], ids=["encrypted", "on the devices"])
def test_donated_state_is_refused(enclave, train, state, settled):
    old = state if settled else enclave.seal(initial_state())
    new, _ = train(old, *BATCHES[1])
    with pytest.raises(SealedValueError, match="was donated to an earlier call"):
        train(old, *BATCHES[1])
    with pytest.raises(SealedValueError, match="donated to an earlier call"):
        enclave.open(old)
    for leaf in jax.tree.leaves(old, is_leaf=is_sealed):
        with pytest.raises(SealedValueError, match="donated to an earlier call"):
            enclave.open(leaf)
    assert_close(enclave.open(new)[1][0].count, jnp.int32(2 if settled else 1))


def test_arguments_other_than_the_state_are_not_donated(enclave, train, state):
    x, y = enclave.seal(BATCHES[1])
    state, _ = train(state, x, y)
    state, _ = train(state, x, y)
    assert_close(enclave.open((x, y)), BATCHES[1])


def test_a_pair_of_parameters_and_moments_is_carried_as_the_whole_result(enclave):
    tx = tempo.cheap_update(optax.sgd(0.1, momentum=0.9))

    def step(state, x):
        parameters, moments = state
        grads = jax.grad(lambda p: jnp.square(jnp.tanh(x @ p)).sum())(parameters)
        updates, moments = tx.update(grads, moments, parameters)
        return optax.apply_updates(parameters, updates), moments

    parameters = uniform(1, 6, 4)
    state = enclave.seal((parameters, tx.init(parameters)))
    train = shield_all(step, enclave=enclave)
    assert len(train.explain(state, uniform(2, 8, 6)).plan.placement.resident) == 2
    train(state, uniform(2, 8, 6))
    with pytest.raises(SealedValueError, match="was donated to an earlier call"):
        train(state, uniform(2, 8, 6))


def test_state_is_kept_without_donation(enclave):
    train = shield_all(train_step, enclave=enclave, donate=False)
    first, _ = train(enclave.seal(initial_state()), *BATCHES[0])
    for _ in range(2):
        second, _ = train(first, *BATCHES[1])
        assert_close(enclave.open(second), plain_steps(2)[0])
    assert_close(enclave.open(first), plain_steps(1)[0])


def test_state_is_not_carried_when_its_type_changes(enclave):
    shielded = tempo.shield(lambda state, x: (state + x, x), enclave=enclave)
    narrow, wide = enclave.seal(jnp.ones(6, jnp.float32)), X
    for _ in range(2):  # float32[6] became float64[8, 6], so it is not donated
        out, _ = shielded(narrow, wide)
        assert_close(enclave.open(out), 1 + X)
    same, _ = shielded(out, wide)
    assert_close(enclave.open(same), 1 + 2 * X)
    with pytest.raises(SealedValueError, match="donated"):
        shielded(out, wide)


def test_leaf_that_stands_twice_in_the_state(enclave):
    shielded = tempo.shield(lambda state: (state[0] + 1, state[1] * 2), enclave=enclave)
    sealed = enclave.seal(X)
    first, second = shielded((sealed, sealed))
    first, second = shielded((first, second))
    assert_close(enclave.open((first, second)), (X + 2, X * 4))


def test_new_shapes_make_a_new_plan_and_keep_the_state(enclave, train, state):
    small = jax.tree.map(lambda a: a[:4], BATCHES[1])
    expected, _ = jax.jit(train_step)(plain_steps(1)[0], *small)
    state, _ = train(state, *small)
    assert set(forms(state)) == {"blinded", "resident"}
    expected, _ = jax.jit(train_step)(expected, *BATCHES[2])
    state, _ = train(state, *BATCHES[2])
    assert_close(enclave.open(state), expected)


def test_structure_of_the_state_may_change(enclave, train, state):
    # The trained parameters lose their optimizer, gain a counter, and then get a fresh optimizer.
    def evaluate(state, x):
        params, count = state
        return (params, count + 1), tempo.reveal(logits(params, x).sum())

    expected = plain_steps(1)[0][0]
    evaluated, total = shield_all(evaluate, enclave=enclave)((state[0], 0), X)
    assert_close(total, logits(expected, X).sum())
    assert_close(enclave.open(evaluated), (expected, jnp.asarray(1)))
    restarted, _ = train((evaluated[0], enclave.seal(OPTIMIZER.init(expected))), *BATCHES[1])
    plain, _ = jax.jit(train_step)((expected, OPTIMIZER.init(expected)), *BATCHES[1])
    assert_close(enclave.open(restarted), plain)
    assert set(forms(restarted)) == {"blinded", "resident"}


def test_failed_change_of_structure_loses_nothing(enclave, train, state):
    params, optimizer = state
    without_bias = {name: params[name] for name in ("first", "second")}
    with pytest.raises((KeyError, ValueError)):
        train((without_bias, optimizer), *BATCHES[1])
    assert_close(enclave.open(train(state, *BATCHES[1])[0]), plain_steps(2)[0])


@pytest.mark.parametrize(
    ("x", "y", "error"),
    [(uniform(1, 8, 5), Y, TypeError), (X, uniform(1, 7, 4), (TypeError, ValueError))],
    ids=["inner size", "batch size"],
)
def test_wrong_shape_is_the_error_of_plain_jax(enclave, train, state, x, y, error):
    with pytest.raises(error) as plain:
        jax.jit(train_step)(plain_steps(1)[0], x, y)
    with pytest.raises(error) as shielded:
        train(state, x, y)
    assert str(shielded.value).splitlines()[0] == str(plain.value).splitlines()[0]
    assert_close(enclave.open(train(state, *BATCHES[1])[0]), plain_steps(2)[0])


def test_other_dtypes_work_and_keep_the_state(enclave, train, state):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), BATCHES[1])
    expected, _ = jax.jit(train_step)(plain_steps(1)[0], *half)
    state, _ = train(state, *half)
    assert_close(enclave.open(state), expected)


# Functions that share parameters


def test_trained_parameters_stay_on_the_devices(enclave, train, state, monkeypatch):
    predict = shield_all(lambda params, x: tempo.reveal(logits(params, x)), enclave=enclave)
    params = state[0]
    report = predict.explain(params, X)
    assert set(report.resident) == {"params['first']", "params['second']"}
    assert_close(predict(params, X), logits(plain_steps(1)[0][0], X))
    assert [params[name].form for name in ("first", "second")] == ["blinded"] * 2
    plans: list[Any] = []
    make_plan = shielded_module.make_plan
    monkeypatch.setattr(shielded_module, "make_plan", lambda r: plans.append(r) or make_plan(r))
    for count in (2, 3):
        state, _ = train(state, *BATCHES[count - 1])
        assert_close(predict(state[0], X), logits(plain_steps(count)[0][0], X))
    assert set(predict.explain(state[0], X).resident) == set(report.resident)
    assert not plans


@pytest.mark.parametrize("scheme", [SIGNED_PERMUTATION, None], ids=["same scheme", "another"])
def test_parameters_on_the_devices_meet_a_function_that_wants_them_inside(
    enclave, train, state, scheme
):
    inside = tempo.shield(
        lambda params: tempo.reveal(jnp.exp(params["first"]).sum()), enclave=enclave, scheme=scheme
    )
    assert_close(inside(state[0]), jnp.exp(plain_steps(1)[0][0]["first"]).sum())
    state, _ = train(state, *BATCHES[1])
    assert_close(enclave.open(state), plain_steps(2)[0])


def test_parameters_blinded_apart_are_blinded_again(enclave, train, state):
    # The two kernels were drawn in different runs, so their keys agree on no class.
    other, _ = train(enclave.seal(initial_state()), *BATCHES[0])
    mixed = {**state[0], "second": other[0]["second"]}
    after, _ = train((mixed, state[1]), *BATCHES[1])
    assert_close(enclave.open(after), plain_steps(2)[0])


def test_shielded_function_called_in_another(enclave):
    inner = tempo.shield(lambda x, w: (jnp.tanh(x @ w), tempo.reveal(w.sum())), enclave=enclave)

    @functools.partial(shield_all, enclave=enclave)
    def outer(x, w):
        hidden, total = inner(x, w)
        return inner(hidden, w.T)[0], total

    w = uniform(5, 6, 6)
    out, total = outer(X, w)
    assert is_sealed(out) and isinstance(total, jax.Array)
    assert_close((enclave.open(out), total), (jnp.tanh(jnp.tanh(X @ w) @ w.T), w.sum()))
    assert offloaded_products(outer, X, w) == 2


# Inside the user's own transformations


def test_step_in_jit_equals_plain(enclave, train, state):
    @jax.jit
    def two_steps(state, first, second):
        state, loss = train(state, *first)
        return *train(state, *second), loss

    new, loss, earlier = two_steps(state, enclave.seal(BATCHES[1]), enclave.seal(BATCHES[2]))
    expected, (_, *losses) = plain_steps(3)
    assert isinstance(loss, jax.Array)
    np.testing.assert_allclose([earlier, loss], losses, rtol=1e-10)
    assert forms(new) == forms(state)
    assert_close(enclave.open(new), expected)
    # The state was donated there as well, and its successor is an ordinary state.
    with pytest.raises(SealedValueError, match="donated"):
        enclave.open(state)
    train(new, *BATCHES[0])


def test_steps_in_scan_equal_plain(enclave, train, state):
    batches = [enclave.seal(BATCHES[i]) for i in (1, 2)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *batches)

    @jax.jit
    def epoch(state, batches):
        return lax.scan(lambda state, batch: train(state, *batch), state, batches)

    state, losses = epoch(state, stacked)
    expected, (_, *expected_losses) = plain_steps(3)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)
    assert_close(enclave.open(state), expected)
    assert enclave.statistics()["runs"] == 0


def test_handles_of_a_scan_are_freed(enclave, train, state):
    batch = enclave.seal(BATCHES[1])

    @jax.jit
    def steps(state, batch):
        return lax.scan(lambda state, _: train(state, *batch), state, None, length=3)

    before = enclave.statistics()["handles"]
    state, _ = steps(state, batch)
    assert enclave.statistics()["handles"] == before
    del state
    assert enclave.statistics()["handles"] == before - 10


def test_donated_state_in_jit_is_refused(enclave, train, state):
    step = jax.jit(train)
    batch = enclave.seal(BATCHES[1])
    new, _ = step(state, *batch)
    with pytest.raises(Exception, match="donated to an earlier call"):
        jax.block_until_ready(step(state, *batch))
    assert enclave.statistics()["runs"] == 0
    new, _ = step(new, *enclave.seal(BATCHES[2]))
    assert int(enclave.open(new)[1][0].count) == 3


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.jit(f)(X),
        lambda f: jax.grad(lambda x: f(x).sum())(X),
        lambda f: jax.vmap(f)(X),
        lambda f: lax.scan(lambda c, x: (c, f(x)), 0, X),
    ],
    ids=["jit", "grad", "vmap", "scan"],
)
def test_plain_tracer_in_a_secret_place_is_refused(enclave, transform):
    shielded = tempo.shield(lambda x: tempo.reveal(x * 2), enclave=enclave)
    with pytest.raises(SecrecyError) as caught:
        transform(shielded)
    text = str(caught.value)
    assert "already the host's" in text and "Seal it" in text and "`public=`" in text


def test_plain_array_captured_by_jit_is_refused(enclave):
    shielded = tempo.shield(lambda x, y: tempo.reveal(x + y), enclave=enclave)
    with pytest.raises(SecrecyError, match="a surrounding jit.*Seal it"):
        jax.jit(lambda x: shielded(x, X))(enclave.seal(X))


def test_public_tracer_is_taken(enclave):
    shielded = tempo.shield(
        lambda x, scale: tempo.reveal(x * scale), enclave=enclave, public="scale", donate=False
    )
    sealed = enclave.seal(X)
    _, out = lax.scan(lambda c, s: (c, shielded(sealed, s)), 0, jnp.arange(3.0))
    assert_close(out, X * jnp.arange(3.0)[:, None, None])
    assert enclave.statistics()["runs"] == 0  # committed, though nothing sealed is used


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
    rows, width = 2048, 440

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
