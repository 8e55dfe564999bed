"""Shielded training equals plain training over optimizers, whose moments stay on the devices.

All in float64; products are offloaded however small they are (`shield_all`), over several steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from jax import lax

import tempo_jax as tempo
from tests.support.models import BATCH, CLASSES, FEATURES, images, plain_model
from tests.support.steps import (
    TOLERANCE,
    Training,
    assert_trains_alike,
    is_matrix,
    leaf_names,
    offloaded_products,
    shield_all,
    uniform,
)


def small_conv_net(tx: Any) -> Training:
    """One convolution and two dense layers, large enough that Adafactor factors them."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        h = lax.conv_general_dilated(
            x, p["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jax.nn.gelu(h + p["b1"]).mean((1, 2))
        return jnp.tanh(h @ p["w1"] + p["b2"]) @ p["w2"]

    shapes = {
        "conv": (3, 3, 8, 10),
        "b1": (10,),
        "w1": (10, 12),
        "b2": (12,),
        "w2": (12, CLASSES),
    }
    return plain_model(apply, shapes, images(8), tx)


def is_wide(parameters: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, parameters)


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.05, 2, 10)
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01),
    "lion": optax.lion(0.01),
    "rmsprop": optax.rmsprop(0.01, centered=True, momentum=0.9),
    "adagrad": optax.adagrad(0.1),
    "adafactor": optax.adafactor(0.05, min_dim_size_to_factor=8, momentum=0.9),
    "muon": optax.contrib.muon(0.05),
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01)),
    "masked": optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), is_wide), optax.sgd(0.1, momentum=0.9)
    ),
    "schedule": optax.adamw(SCHEDULE),
    "multi_steps": optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.01), 3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(enclave, name):
    case = small_conv_net(OPTIMIZERS[name])
    shielded = shield_all(case.step, enclave=enclave)
    assert_trains_alike(shielded, enclave, case)
    # Every kernel and every moment of one stays on the devices.
    resident = set(shielded.explain(case.state, case.batches[0]).resident)
    assert leaf_names("state", case.state, is_matrix) <= resident


def exponentials() -> optax.GradientTransformation:
    """An update that does not commute with signs: the exponential of the gradient."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda g: -0.01 * jnp.exp(g), updates))


def test_unsuitable_optimizer_falls_back_leaf_by_leaf(enclave):
    labels = {"conv": "usual", "b1": "usual", "w1": "odd", "b2": "usual", "w2": "usual"}
    tx = optax.partition({"usual": optax.adam(0.01), "odd": exponentials()}, labels)
    case = small_conv_net(tx)
    shielded = shield_all(case.step, enclave=enclave)
    report = shielded.explain(case.state, case.batches[0])
    weight = "state['params']['w1']"
    assert leaf_names("state", case.state, is_matrix) - {weight} <= set(report.resident)
    assert "exp" in report.fallbacks[weight]
    assert_trains_alike(shielded, enclave, case)


def test_update_that_is_not_marked_stays_inside(enclave):
    tx = optax.adam(0.01)

    def step(state: Any, batch: Any) -> Any:
        w, optimizer = state
        value, grads = jax.value_and_grad(lambda w: jnp.sum(jnp.tanh(batch @ w) ** 2))(w)
        updates, optimizer = tx.update(grads, optimizer, w)
        return (optax.apply_updates(w, updates), optimizer), tempo.reveal(value)

    w = uniform(1, FEATURES, 10)
    case = Training(step, (w, tx.init(w)), [uniform(2, BATCH, FEATURES)])
    shielded = shield_all(step, enclave=enclave)
    report = shielded.explain(case.state, case.batches[0])
    assert not report.resident and not report.fallbacks
    assert offloaded_products(shielded, case.state, case.batches[0]) >= 2
    assert_trains_alike(shielded, enclave, case, TOLERANCE)


def test_two_optimizers_of_one_model(enclave):
    """Weights under two updates, one of which reads the other's parameters (an average)."""
    tx = tempo.cheap_update(optax.sgd(0.1))
    average = tempo.cheap_update(optax.ema(0.9))

    def step(state: Any, batch: Any) -> Any:
        w, optimizer, shadow = state
        value, grads = jax.value_and_grad(lambda w: jnp.sum(jnp.tanh(batch @ w) ** 2))(w)
        updates, optimizer = tx.update(grads, optimizer, w)
        w = optax.apply_updates(w, updates)
        _, shadow = average.update(w, shadow)
        return (w, optimizer, shadow), tempo.reveal(value)

    w = uniform(1, FEATURES, 10)
    state = (w, tx.init(w), average.init(w))
    case = Training(step, state, [uniform(2, BATCH, FEATURES)])
    shielded = shield_all(step, enclave=enclave)
    assert leaf_names("state", state, is_matrix) <= set(
        shielded.explain(state, case.batches[0]).resident
    )
    assert_trains_alike(shielded, enclave, case)
