"""Cutting into segments: few round trips, little kept between them, nothing read too early."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import tempo_jax as tempo
from tempo_jax.jaxprs.products import is_product
from tempo_jax.jaxprs.types import array_type
from tempo_jax.planning import segments as segments_module
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.export import export_segments
from tempo_jax.planning.plan import Plan
from tests.support.interpreter import Flat, interpret, is_variable, plan
from tests.support.steps import assert_close, training, uniform

ROWS, WIDTHS = 32, (12, 40, 56, 72, 8)


def dense_net(activation: Any, widths: tuple[int, ...] = WIDTHS) -> tuple[Any, Any, Any]:
    """A training step of a net with as many activations as inner layers."""

    def loss(parameters: Any, rest: Any, x: jax.Array) -> Any:
        *inner, last = parameters
        for w in inner:
            x = activation(x @ w)
        return jnp.mean(x @ last) ** 2, (rest, x)

    layers = enumerate(zip(widths, widths[1:], strict=False))
    parameters = [uniform(i, n, m) / n**0.5 for i, (n, m) in layers]
    case = training(loss, parameters, [uniform(9, ROWS, widths[0])], optax.sgd(0.1))
    return case.step, case.state, case.batches[0]


def attention(p: Any, x: jax.Array) -> jax.Array:
    """One head over one sequence."""
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    return jax.nn.softmax(q @ k.T) @ v @ p["out"]


@pytest.fixture
def small_values_go_ahead(monkeypatch):
    monkeypatch.setattr(CostModel, "may_go_ahead", lambda *_: True)


ATTENTION = {name: uniform(i, 12, 12) for i, name in enumerate(["q", "k", "v", "out"])}


def held_bytes(plan: Plan) -> list[int]:
    """Bytes that lie in the enclave between one segment and the next, inputs aside."""
    held = []
    segments = plan.cut.segments
    for index in range(1, len(segments)):
        earlier = {v for s in segments[:index] for v in (*s.uploads, *s.outputs)}
        later = {v for s in segments[index:] for v in s.inputs}
        held.append(sum(array_type(v.aval).nbytes for v in earlier & later))
    return held


def assert_well_formed(plan: Plan) -> None:
    """Every value is there when it is read, crosses once, and is made where its level says."""
    levels, host = plan.cut.levels, {e.eqn.outvars[0]: e for e in plan.cut.host}
    known = {v for eqn in plan.cut.constants for v in eqn.outvars}
    inside = {*plan.jaxpr.constvars, *plan.jaxpr.invars}
    inside -= {plan.jaxpr.invars[i] for i in plan.placement.resident}
    sent: set[Any] = set()
    uploaded: set[Any] = set()
    waited = {i for i, s in enumerate(plan.cut.segments) if not (s.ahead or s.beside)}
    made: dict[Any, int] = {}
    fetched: dict[Any, int] = {}
    for index, segment in enumerate(plan.cut.segments):
        assert not uploaded & set(segment.uploads)
        uploaded |= set(segment.uploads)
        assert all(levels[v] <= index for v in segment.uploads)
        inside |= set(segment.uploads)
        assert inside >= set(segment.inputs)
        inside |= set(segment.outputs)
        assert inside >= set(segment.downloads)
        assert segment.ahead == bool(index and segment.downloads and not segment.uploads)
        assert not sent & set(segment.downloads)
        sent |= set(segment.downloads)
        awaited = (i for i in range(index, len(plan.cut.segments)) if i in waited)
        fetched.update(dict.fromkeys(segment.downloads, next(awaited, index)))
        for eqn in segment.eqns:
            again = [v for v in eqn.outvars if v in made]
            light = segments_module.LIGHT | segments_module.HEAVY
            assert not again or eqn.primitive in light, "only cheap equations run twice"
            made.update((v, index) for v in eqn.outvars if v not in made)
    for variable, equation in host.items():
        for v in filter(is_variable, equation.eqn.invars):
            if v in host:
                assert levels[variable] >= levels[v]
            elif v in made and (equation.sent or v not in known):
                assert levels[variable] > made[v]
            if v in fetched and (equation.sent or v not in known):
                assert levels[variable] > fetched[v]


@pytest.mark.parametrize("activation", [jax.nn.gelu, jax.nn.silu, jnp.tanh, jax.nn.relu])
def test_one_tensor_is_kept_for_each_activation(activation):
    flat = plan(*dense_net(activation), stateful=True)
    activations = 8 * ROWS * sum(WIDTHS[1:-1])
    assert max(held_bytes(flat.plan)) <= activations


def test_gelu_keeps_more_without_recomputing(monkeypatch):
    least = max(held_bytes(plan(*dense_net(jax.nn.gelu), stateful=True).plan))
    monkeypatch.setattr(segments_module, "LIGHT", set())
    monkeypatch.setattr(segments_module, "HEAVY", set())
    most = max(held_bytes(plan(*dense_net(jax.nn.gelu), stateful=True).plan))
    assert most >= 2 * least


@pytest.mark.parametrize("recomputed", [True, False])
def test_results_do_not_depend_on_what_is_recomputed(monkeypatch, recomputed):
    if not recomputed:
        monkeypatch.setattr(segments_module, "LIGHT", set())
        monkeypatch.setattr(segments_module, "HEAVY", set())
    step, state, batch = dense_net(jax.nn.gelu)
    flat = plan(step, state, batch, stateful=True)
    assert_close(interpret(flat), jax.jit(step)(state, batch))


def test_one_round_trip_for_each_level():
    # The input, each activation, the loss, and each activation's derivative.
    step, state, batch = dense_net(jax.nn.gelu)
    layers = len(WIDTHS) - 1
    assert len(plan(step, state, batch, stateful=True).plan.cut.segments) == 2 * layers


def test_products_of_one_level_go_out_together(small_values_go_ahead):
    flat = plan(attention, ATTENTION, uniform(5, 16, 12))
    first, out, *rest = flat.plan.cut.segments
    # q, k and v need x and their weights; the scores are computed from what is there already, and
    # their weighted sum is multiplied by a weight that may come later.
    assert len(first.downloads) == 1 + 3
    assert out.ahead and len(out.downloads) == 1
    assert [len(s.uploads) for s in rest] == [1]
    levels = [flat.plan.cut.levels[e.eqn.outvars[0]] for e in flat.plan.cut.host]
    products = [e for e in flat.plan.cut.host if is_product(e.eqn)]
    assert len(products) == 6 and max(levels) == 3


def test_a_linear_function_needs_one_visit():
    flat = plan(lambda x, w, v: x @ w @ v, *(uniform(i, 8, 8) for i in range(3)))
    assert len(flat.plan.cut.segments) == 1
    assert_close(interpret(flat), flat.leaves[0] @ flat.leaves[1] @ flat.leaves[2])


def test_equal_layers_are_exported_once(small_values_go_ahead):
    def forward(parameters: list[jax.Array], x: jax.Array) -> jax.Array:
        for w in parameters:
            x = jnp.tanh(x @ w)
        return x

    flat = plan(forward, [uniform(i, 12, 12) for i in range(6)], uniform(7, 16, 12))
    blobs = list(export_segments(flat.plan.cut))
    # The first segment only sends, and so do those that send a weight ahead; the others are one
    # activation each.
    assert len(blobs) == 7 + 5 and len(set(blobs)) == 2


def test_a_weight_is_sent_while_devices_compute_the_layer_before(small_values_go_ahead):
    def forward(parameters: list[jax.Array], x: jax.Array) -> jax.Array:
        for w in parameters:
            x = jnp.tanh(x @ w.T)
        return x

    parameters, x = [uniform(i, 12, 12) for i in range(4)], uniform(7, 16, 12)
    flat = plan(forward, parameters, x)
    cut, weights = flat.plan.cut, flat.plan.jaxpr.invars[:4]
    first, *rest, last = cut.segments
    assert len(first.downloads) == 2 and not first.ahead
    ahead, awaited = rest[0::2], rest[1::2]
    assert [s.ahead for s in ahead] == [True] * 3 and not any(s.ahead for s in awaited)
    assert [len(s.downloads) for s in awaited] == [1, 1, 1] and not last.downloads
    # Each turns its weight round itself: nothing more is kept inside than before.
    assert [s.inputs for s in ahead] == [(w,) for w in weights[1:]]
    levels = [cut.levels[e.eqn.outvars[0]] for e in cut.host if is_product(e.eqn)]
    assert levels == [2, 4, 6, 7]
    assert_close(interpret(flat), forward(parameters, x))


def test_what_the_next_product_needs_is_not_sent_ahead(small_values_go_ahead):
    def forward(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w) @ v + jnp.tanh(x @ v) @ w

    flat = plan(forward, uniform(1, 16, 12), uniform(2, 12, 12), uniform(3, 12, 12))
    assert not any(s.ahead for s in flat.plan.cut.segments)


def unusual_outputs(x: jax.Array, w: jax.Array) -> Any:
    y = x @ w
    return x, y, y, tempo.reveal(y), jnp.tanh(y), tempo.reveal(jnp.tanh(y) @ w.T), w.T, 3.0


def values_of_several_levels(x: jax.Array, w: jax.Array) -> jax.Array:
    first = jnp.exp(x)
    second = jnp.exp(first @ w)
    return (first + second @ w.T) @ w + second


PLANS = {
    "dense net": lambda: plan(*dense_net(jax.nn.gelu), stateful=True),
    "attention": lambda: plan(attention, ATTENTION, uniform(5, 16, 12)),
    "gradient of attention": lambda: plan(
        jax.grad(lambda p, x: jnp.sum(attention(p, x) ** 2)), ATTENTION, uniform(5, 16, 12)
    ),
    "outputs": lambda: plan(unusual_outputs, uniform(1, 8, 12), uniform(2, 12, 8)),
    "levels": lambda: plan(values_of_several_levels, uniform(1, 8, 12), uniform(2, 12, 12)),
    "constants": lambda: plan(lambda x: jnp.ones((8, 8)) @ x @ jnp.eye(12), uniform(1, 8, 12)),
}


@pytest.mark.parametrize("name", PLANS)
def test_segments_read_only_what_exists(name, small_values_go_ahead):
    flat: Flat = PLANS[name]()
    assert_well_formed(flat.plan)
    interpret(flat)
