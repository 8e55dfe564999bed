"""One walk: who evaluates what, and why, given what earlier walks demoted."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import tempo_jax as tempo
from tempo_jax.jaxprs.products import is_product
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.plan import flatten_calls
from tempo_jax.planning.request import Request
from tempo_jax.planning.walk import Demotions, Facts, Question, Side, Walk
from tempo_jax.schemes import Mixing, Scheme
from tests.support.steps import SIGNED_PERMUTATION, uniform

X, W, V = uniform(1, 6, 5), uniform(2, 5, 4), uniform(3, 4, 3)
ANYONE, ENCLAVE, HOST = Side.ANYONE, Side.ENCLAVE, Side.HOST


def walked(
    function: Any,
    *arguments: Any,
    scheme: Scheme = SIGNED_PERMUTATION,
    costs: CostModel | None = None,
    offload: bool = True,
    verify: bool = False,
    carried: Mapping[int, int] | None = None,
    banned: Mapping[int, str] | None = None,
    resident: frozenset[int] = frozenset(),
) -> Walk:
    """A walk through a function of arrays, all of whose products may go out."""
    closed: Any = jax.make_jaxpr(function)(*arguments)
    request = Request(
        *(closed, carried or {}, frozenset(), frozenset(), scheme, costs, offload), workers=1
    )
    jaxpr = flatten_calls(request).closed.jaxpr
    stays = [None for eqn in jaxpr.eqns if is_product(eqn)]
    facts = Facts(
        Question(jaxpr, request.carried, frozenset(), scheme, costs, offload, stays, verify)
    )
    return Walk(facts, Demotions(banned or {}, frozenset(), resident, {}))


def sides(walk: Walk) -> dict[str, list[Side]]:
    """Who evaluates equations, by their primitives."""
    out: dict[str, list[Side]] = {}
    for eqn, side in zip(walk.facts.eqns, walk.sides, strict=True):
        out.setdefault(eqn.primitive.name, []).append(side)
    return out


def test_products_go_out_and_the_rest_stays():
    walk = walked(lambda x, w, v: jnp.exp(x @ w) @ v, X, W, V)
    assert sides(walk) == {"dot_general": [HOST, HOST], "exp": [ENCLAVE]}
    assert walk.sent == {0, 2} and not walk.kept_inside and not walk.too_dear
    (made,) = (eqn.outvars[0] for eqn in walk.facts.eqns if eqn.primitive.name == "exp")
    assert "exp" in walk.refused[made] and "test_walk.py" in walk.refused[made]


def test_what_commutes_with_the_blinding_is_left_to_the_host():
    def function(x, w, v):
        return (-(x @ w)) @ v

    walk = walked(function, X, W, V)
    assert sides(walk) == {"dot_general": [HOST, HOST], "neg": [HOST]}
    # Its result is blinded under keys that it has already, and meets V under them.
    first, _, last = walk.facts.eqns
    assert walk.axes[last.invars[0]] == walk.axes[first.outvars[0]]
    for other in (
        walked(function, X, W, V, scheme=Mixing()),
        walked(function, X, W, V, verify=True),
    ):
        assert sides(other)["neg"] == [ENCLAVE]


def test_what_depends_on_literals_alone_is_anyones():
    walk = walked(lambda x, w: x @ w + jnp.full((6, 4), 2.0), X, W)
    assert sides(walk)["broadcast_in_dim"] == [ANYONE]


def test_revealed_value_is_the_enclaves():
    walk = walked(lambda x, w: tempo.reveal(x @ w), X, W)
    product, reveal = walk.facts.eqns
    assert walk.sides == [HOST, ENCLAVE]
    assert walk.refused[reveal.outvars[0]].startswith("it is revealed, at ")


def test_products_stay_for_the_reason_given():
    banned = walked(lambda x, w: x @ w, X, W, banned={0: "an earlier walk said so"})
    assert banned.sides == [ENCLAVE] and banned.kept_inside == {0: "an earlier walk said so"}
    nowhere = walked(lambda x, w: x @ w, X, W, offload=False)
    assert nowhere.sides == [ENCLAVE] and nowhere.kept_inside == {0: "placement is the enclave"}
    cheap = walked(lambda x, w: x @ w, X, W, costs=CostModel())
    assert cheap.sides == [ENCLAVE]
    assert cheap.kept_inside == cheap.too_dear and "inside takes about" in cheap.too_dear[0]


def test_every_use_of_an_operand_shares_what_it_costs():
    def seconds(function: Any, banned: Mapping[int, str]) -> float:
        walk = walked(function, X, W, W, costs=CostModel(), banned=banned)
        return walk._outside(walk.facts.eqns[1], CostModel())

    shared = seconds(lambda x, w, v: (x @ w, x @ v), {})
    alone = seconds(lambda x, w, v: (x @ w, x @ v), {0: "stays"})
    assert alone - shared == pytest.approx(
        CostModel().crossing(jax.ShapeDtypeStruct(X.shape, X.dtype), SIGNED_PERMUTATION) / 2
    )


def test_resident_leaf_is_updated_where_it_lies():
    optimizer = tempo.cheap_update(optax.sgd(0.1))

    def step(w, x):
        gradient = jax.grad(lambda w: jnp.sum(jnp.exp(x @ w)))(w)
        changes, _ = optimizer.update(gradient, optimizer.init(w), w)
        return optax.apply_updates(w, changes)

    walk = walked(step, W, X, carried={0: 0}, resident=frozenset([0]))
    w, (new,) = walk.facts.inputs[0], walk.facts.outputs
    assert w in walk.host and walk.leaves[w] == frozenset([0])
    assert new in walk.host and new in walk.facts.cheap
    assert all(v in walk.host for v in walk.facts.to_update if v in walk.axes and v is not w)
    demoted = walked(step, W, X, carried={0: 0})
    assert demoted.facts.inputs[0] not in demoted.host


def test_facts_do_not_depend_on_what_was_demoted():
    question = walked(lambda x, w: jnp.exp(x @ w), X, W).question
    facts = Facts(question)
    first = Walk(facts, Demotions({}, frozenset(), frozenset(), {}))
    Walk(facts, Demotions({0: "stays"}, frozenset(), frozenset(), {}))
    again = Walk(facts, Demotions({}, frozenset(), frozenset(), {}))
    assert first.sides == again.sides == [HOST, ENCLAVE]
    assert facts.order == {eqn.outvars[0]: n for n, eqn in enumerate(facts.eqns)}
