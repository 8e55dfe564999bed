"""State that is carried: kept, donated, shared between functions, and inside jit and scan."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import tempo_jax as tempo
from tempo_jax.api import shielded as shielded_module
from tempo_jax.errors import SealedValueError, SecrecyError
from tests.support.classifier import (
    BATCHES,
    OPTIMIZER,
    X,
    Y,
    forms,
    initial_state,
    is_sealed,
    logits,
    plain_steps,
    train_step,
)
from tests.support.faults import runs_ended
from tests.support.steps import (
    SIGNED_PERMUTATION,
    assert_close,
    offloaded_products,
    shield_all,
    uniform,
)


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
    assert runs_ended(enclave)
    new, _ = step(new, *enclave.seal(BATCHES[2]))
    assert int(enclave.open(new)[1][0].count) == 3


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.jit(f)(X),
        lambda f: jax.jit(jax.vmap(f))(X),
        lambda f: lax.scan(lambda c, x: (c, f(x)), 0, X),
    ],
    ids=["jit", "vmap in jit", "scan"],
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
