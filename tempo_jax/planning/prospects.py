"""How much of a program would leave the enclave if it were larger.

Whether sending a product out pays depends on its rows and its width. Each is imagined larger here,
and where neither suffices both together, without tracing the program again. Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from tempo_jax.families.finder import FORWARD, TO_INPUT, TO_WEIGHT, Family, find_families
from tempo_jax.jaxprs.products import is_product, products_above, work
from tempo_jax.jaxprs.types import Jaxpr
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.matrix_form import Growth, data_variables, work_outside
from tempo_jax.planning.plan import Plan, flatten_calls

ENOUGH = 0.5  # share of the arithmetic outside from which a larger program is worth naming
_RESULTS = {FORWARD: "g", TO_INPUT: "x", TO_WEIGHT: "w"}
_ROWS = tuple(Growth(rows=2**n) for n in range(1, 8))
_WIDTHS = tuple(Growth(width=2**n) for n in range(1, 6))
# The least arithmetic first.
_BOTH = sorted(
    (Growth(tall.rows, wide.width) for tall in _ROWS for wide in _WIDTHS),
    key=lambda growth: growth.arithmetic,
)


@dataclasses.dataclass(frozen=True)
class Prospect:
    """A size from which most of the arithmetic would leave.

    Attributes:
      size: rows, or width, of the product with the most arithmetic.
      now: what it is in the program at hand.
      share: of the arithmetic that would leave then.
    """

    size: int
    now: int
    share: float


@dataclasses.dataclass(frozen=True)
class Prospects:
    """What would change that little leaves.

    Attributes:
      rows: how many rows would, or None if no number up to 128 times as many does.
      width: how wide layers would, or None if no width up to 32 times as wide does.
      both: where neither does, so many rows of so wide layers, those with the least arithmetic;
        else None, and also if no such two do.
    """

    rows: Prospect | None
    width: Prospect | None
    both: tuple[Prospect, Prospect] | None = None


def prospects(plan: Plan, costs: CostModel) -> Prospects:
    """What would have to be larger for most of a program's arithmetic to leave the enclave.

    Args:
      plan: of the program at hand.
      costs: the enclave's speeds.
    """
    request = plan.request
    closed = flatten_calls(request).closed
    jaxpr = closed.jaxpr
    data = data_variables(jaxpr, request.carried)
    families = find_families(jaxpr, data, products_above(jaxpr))
    total = sum(work(eqn) for eqn in jaxpr.eqns if is_product(eqn))
    if not families or not total:
        return Prospects(None, None)
    largest = max(families, key=lambda f: _work(jaxpr, f))
    rows, inner, _ = largest.sizes

    def first(growths: Sequence[Growth]) -> tuple[Growth, float] | None:
        if request.scheme.keys_per_product:
            outside = work_outside(closed, request.scheme, costs, request.carried, growths)
        else:
            outside = [_leaving(jaxpr, families, plan, costs, growth) for growth in growths]
        shares = zip(growths, (n / total for n in outside), strict=True)
        return next(((g, share) for g, share in shares if share >= ENOUGH), None)

    def taller(found: tuple[Growth, float]) -> Prospect:
        return Prospect(rows * found[0].rows, rows, min(found[1], 1.0))

    def wider(found: tuple[Growth, float]) -> Prospect:
        return Prospect(inner * found[0].width, inner, min(found[1], 1.0))

    tall, wide = first(_ROWS), first(_WIDTHS)
    both = None if tall or wide else first(_BOTH)
    return Prospects(
        tall and taller(tall), wide and wider(wide), both and (taller(both), wider(both))
    )


def _work(jaxpr: Jaxpr, family: Family) -> int:
    return sum(work(jaxpr.eqns[n]) for n in family.members)


def _leaving(
    jaxpr: Jaxpr, families: Sequence[Family], plan: Plan, costs: CostModel, growth: Growth
) -> int:
    """Floating-point operations that would leave under a scheme that blinds a value once."""
    leaving = (_members_leaving(jaxpr, family, plan, costs, growth) for family in families)
    return sum(work(jaxpr.eqns[number]) for numbers in leaving for number in numbers)


def _members_leaving(
    jaxpr: Jaxpr, family: Family, plan: Plan, costs: CostModel, growth: Growth
) -> Collection[int]:
    """The equations of a family that would leave.

    Each operand serves a product and a gradient, if there is one that leaves as well; no weight is
    taken to lie on the devices, which would only spare more.
    """
    rows, inner, columns = growth.sizes(*family.sizes)
    sizes = {"x": rows * inner, "w": inner * columns, "g": rows * columns}

    def pays(number: int, kind: tuple[str, str], sent: Collection[tuple[str, str]]) -> bool:
        eqn, result = jaxpr.eqns[number], _RESULTS[kind]
        itemsize = eqn.outvars[0].aval.dtype.itemsize
        outside = costs.latency
        for name in (*kind, result):
            uses = 1 if name == result else sum(name in other for other in sent)
            count = sizes[name] * family.copies
            outside += costs.tensor(count, itemsize, plan.request.scheme) / uses
        return costs.worthwhile(costs.inside(eqn) * growth.arithmetic, outside)

    before = None
    sent = {number: (member.left, member.right) for number, member in family.members.items()}
    while sent != before:  # one that stays no longer shares the price of its operands
        before = sent
        sent = {n: kind for n, kind in before.items() if pays(n, kind, before.values())}
    return sent
