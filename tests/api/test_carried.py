"""Which arguments carry state: one or several, the first or later ones."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import tempo_jax as tempo
from tempo_jax.errors import SealedValueError
from tests.support.steps import assert_close, shield_all, uniform

TX = tempo.cheap_update(optax.adam(1e-2))
X = uniform(1, 8, 6)


def initial() -> Any:
    params = {"w": uniform(2, 6, 4), "b": uniform(3, 4)}
    return params, TX.init(params)


def several(params, moments, x):
    loss, gradients = jax.value_and_grad(
        lambda p: jnp.square(jnp.tanh(x @ p["w"]) + p["b"]).mean()
    )(params)
    updates, moments = TX.update(gradients, moments, params)
    return optax.apply_updates(params, updates), moments, tempo.reveal(loss)


def later(x, state):
    params, moments, loss = several(state[0], state[1], x)
    return (params, moments), loss


def test_state_that_is_several_arguments(enclave):
    train, plain = shield_all(several, enclave=enclave), initial()
    params, moments = enclave.seal(initial())
    first = params
    assert len(train.explain(params, moments, X).resident) == 3
    for _ in range(3):
        params, moments, loss = train(params, moments, X)
        *plain, expected = jax.jit(several)(plain[0], plain[1], X)
        assert_close(loss, expected)
    assert params["w"].form == "blinded"
    assert_close(enclave.open((params, moments)), tuple(plain))
    with pytest.raises(SealedValueError, match="donated"):
        train(first, moments, X)


def test_state_that_is_not_the_first_argument(enclave):
    train, state = shield_all(later, enclave=enclave), enclave.seal(initial())
    x, first = enclave.seal(X), state
    for _ in range(2):
        state, _ = train(x, state)
    expected = initial()
    for _ in range(2):
        expected, _ = later(X, expected)
    assert_close(enclave.open(state), expected)
    with pytest.raises(SealedValueError, match="donated"):
        train(x, first)


def test_gradients_and_outputs_that_look_like_arguments_carry_nothing(enclave):
    gradients = tempo.shield(
        lambda p, x: (tempo.reveal(x.sum()), jax.tree.map(jnp.sin, p), x), enclave=enclave
    )
    params, x = enclave.seal((initial()[0], X))
    for _ in range(2):
        gradients(params, x)


def test_attributes_of_the_function_do_not_stand_over_ours(enclave):
    def double(x):
        return tempo.reveal(2 * x)

    double._signature = double._program = None  # pyright: ignore[reportFunctionMemberAccess]
    assert_close(tempo.shield(double, enclave=enclave)(X), 2 * X)


def test_settings_that_change_meaning_make_programs_of_their_own(enclave):
    calls = []
    function = tempo.shield(lambda x: calls.append(None) or tempo.reveal(x @ x.T), enclave=enclave)
    for precision in (None, "highest", None, "highest"):
        with jax.default_matmul_precision(precision):
            function(X)
    assert len(calls) == 2
