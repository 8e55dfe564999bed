"""Which control flow is dissolved, and what `explain` says of the rest."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.extend.core import primitives as prims

import tempo_jax as tempo
from tempo_jax.jaxprs.equations import source
from tempo_jax.jaxprs.products import is_product
from tempo_jax.jaxprs.trace import trace
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.plan import Plan, make_plan, offloaded
from tempo_jax.planning.request import Request
from tests.support.steps import SIGNED_PERMUTATION

LARGE, SMALL = 2048, 128


def planned(function: Any, *avals: Any, costs: CostModel | None = None, **options: Any) -> Plan:
    request = Request(
        closed=trace(lambda *xs: jax.tree.leaves(function(*xs)), avals),
        public=frozenset(),
        on_devices=frozenset(),
        scheme=SIGNED_PERMUTATION,
        costs=costs,
        offload=True,
        workers=1,
        **{"carried": {}, **options},
    )
    return make_plan(request)


def arguments(size: int) -> list[jax.ShapeDtypeStruct]:
    matrix = jax.ShapeDtypeStruct((size, size), jnp.float32)
    return [matrix, matrix, jax.ShapeDtypeStruct((), jnp.int32)]


def switch_of(count: int) -> Any:
    """Each of `count` branches multiplies; one more does not."""
    branches = [lambda x, w, n=n: (n + 1) * x @ w for n in range(count)]
    return lambda x, w, i: lax.switch(i, [*branches, lambda x, w: x + w], x, w)


@pytest.mark.parametrize(
    ("size", "branches", "out"), [(LARGE, 1, 1), (LARGE, 2, 2), (LARGE, 40, 0), (SMALL, 1, 0)]
)
def test_branches_are_computed_where_that_is_less_work_inside(size, branches, out):
    plan = planned(switch_of(branches), *arguments(size), costs=CostModel())
    assert len(offloaded(plan)) == out
    if out:
        assert not plan.notes
        return
    (note,) = plan.notes
    assert f"`cond` at {__file__}" in note and f"with {branches} products in its body" in note
    # Small products are not worth a word: they would stay inside wherever they stood.
    assert ("of all of them" in note) == (size == LARGE)


def test_all_branches_go_out_where_costs_do_not_count():
    plan = planned(switch_of(3), *arguments(SMALL))
    assert len(offloaded(plan)) == 3 and not plan.notes


def loop(x, w, n):
    return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1]


@pytest.mark.parametrize("count", [0, 3])
def test_a_while_sends_out_as_many_iterations_as_it_is_told(count):
    plan = planned(loop, *arguments(SMALL), unroll_while=count)
    assert len(offloaded(plan)) == count
    (note,) = plan.notes
    assert "`while` at" in note and "with 1 products in its body" in note
    expected = f"after the first {count} (`unroll_while={count}`)" if count else "is secret"
    assert expected in note
    assert ("which reveals whether to go on" in note) == (not count)


def test_a_while_without_work_is_left_whole():
    def halve(x, w, n):
        y = lax.while_loop(lambda c: jnp.abs(c).max() > n, lambda c: c / 2, x)
        return y @ w

    plan = planned(halve, *arguments(SMALL), unroll_while=4)
    assert [e.primitive.name for e in plan.jaxpr.eqns].count("while") == 1
    assert len(plan.jaxpr.eqns) < 5 and not plan.notes


def test_a_known_branch_is_inlined():
    plan = planned(lambda x, w, i: lax.cond(True, lambda: x @ w, lambda: x + i), *arguments(SMALL))
    (product,) = (e for e in plan.jaxpr.eqns if is_product(e))
    assert plan.jaxpr.outvars == product.outvars


def test_a_long_scan_says_how_long_it_is():
    def f(x, w, i):
        return lax.fori_loop(0, 100, lambda _, y: y @ w, x)

    (note,) = planned(f, *arguments(SMALL)).notes
    assert "`scan` at" in note and "it has 100 steps" in note
    assert "in a loop outside" in note


def test_a_reveal_in_a_branch_is_named():
    def f(x, w, i):
        return lax.cond(i > 0, lambda: tempo.reveal(x @ w), lambda: x)

    plan = planned(f, *arguments(SMALL))
    assert not plan.revealed
    assert any("`reveal` inside `cond`" in note for note in plan.notes)


@pytest.mark.parametrize("dissolved", [switch_of(2), loop], ids=["switch", "while"])
def test_what_comes_of_control_flow_stands_where_it_stood(dissolved):
    plan = planned(dissolved, *arguments(SMALL), unroll_while=2)
    added = [e for e in plan.jaxpr.eqns if e.primitive is prims.select_n_p]
    assert added and all(source(e).startswith(__file__) for e in added)


def test_a_gradient_that_a_condition_selects_says_so():
    optimizer = tempo.cheap_update(optax.sgd(0.1))

    def f(w, x, i):
        def loss(w):
            return jnp.square(lax.cond(i > 0, lambda: x @ w, lambda: x)).mean()

        return optax.apply_updates(w, optimizer.update(jax.grad(loss)(w), optimizer.init(w))[0])

    plan = planned(f, *arguments(SMALL), carried={0: 0})
    assert not plan.placement.resident
    (why,) = plan.placement.reasons.values()
    assert f"the condition that selects it is inside the enclave, at {__file__}" in why
