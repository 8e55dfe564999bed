"""What planning is asked: each field of a request decides what it says, and nothing else does."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import tempo_jax as tempo
from enclave_runtime.protocol.program import DEVICE, ENCLAVE, PUBLIC
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.plan import make_plan, offloaded
from tempo_jax.planning.request import Request
from tempo_jax.schemes import Mixing
from tests.support.steps import SIGNED_PERMUTATION, uniform

W, X = uniform(1, 5, 4), uniform(2, 8, 5)
OPTIMIZER = tempo.cheap_update(optax.sgd(0.1))


def step(w: jax.Array, x: jax.Array) -> Any:
    """A step whose weight may stay on the devices; the loss is sealed."""
    loss, gradient = jax.value_and_grad(lambda w: jnp.sum(jnp.exp(x @ w)))(w)
    changes, _ = OPTIMIZER.update(gradient, OPTIMIZER.init(w), w)
    return optax.apply_updates(w, changes), loss


@pytest.fixture(scope="module")
def request_of_a_step() -> Request:
    closed: Any = jax.make_jaxpr(step)(W, X)
    return Request(
        closed=closed,
        carried={0: 0},
        public=frozenset(),
        on_devices=frozenset(),
        scheme=SIGNED_PERMUTATION,
        costs=None,
        offload=True,
        workers=1,
    )


def places(request: Request) -> list[str]:
    return [port.place for port in make_plan(request).program.inputs]


def test_request_does_not_change(request_of_a_step):
    assert not request_of_a_step.verify
    with pytest.raises(dataclasses.FrozenInstanceError):
        request_of_a_step.verify = True


def test_equal_requests_give_equal_plans(request_of_a_step):
    again = dataclasses.replace(request_of_a_step)
    assert make_plan(request_of_a_step).program == make_plan(again).program


def test_carried_leaf_with_a_cheap_update_stays_on_the_devices(request_of_a_step):
    assert places(request_of_a_step) == [DEVICE, ENCLAVE]
    assert places(dataclasses.replace(request_of_a_step, carried={})) == [ENCLAVE, ENCLAVE]


def test_leaf_on_the_devices_stays_there_without_being_carried(request_of_a_step):
    lying = dataclasses.replace(request_of_a_step, carried={}, on_devices=frozenset([0]))
    assert places(lying) == [DEVICE, ENCLAVE]


def test_public_input_is_said_to_be(request_of_a_step):
    public = dataclasses.replace(request_of_a_step, public=frozenset([1]))
    assert places(public) == [DEVICE, PUBLIC]


def test_products_go_out_by_cost_or_all_or_none(request_of_a_step):
    everything, nothing, worthwhile = (
        offloaded(make_plan(dataclasses.replace(request_of_a_step, **changes)))
        for changes in ({}, {"offload": False}, {"costs": CostModel()})
    )
    assert len(everything) == 2 and not nothing
    assert not worthwhile  # they are far too small


def test_scheme_and_checks_stand_in_the_program(request_of_a_step):
    for scheme in (SIGNED_PERMUTATION, Mixing()):
        program = make_plan(dataclasses.replace(request_of_a_step, scheme=scheme)).program
        assert (program.scheme, program.parameters) == (scheme.name, scheme.parameters)
        assert not program.verify
    assert make_plan(dataclasses.replace(request_of_a_step, verify=True)).program.verify


def test_classes_are_split_over_workers_only(request_of_a_step):
    assert not make_plan(request_of_a_step).sharded
    assert make_plan(dataclasses.replace(request_of_a_step, workers=4)).sharded
