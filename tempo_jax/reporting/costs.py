"""What a plan costs the enclave: by layer, by visit, and in all.

Estimates from shapes and the enclave's measured speeds; nothing is run. Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jax.extend.core import primitives as prims

from tempo_jax.jaxprs import equations, primitives
from tempo_jax.jaxprs.products import is_product, variables, work
from tempo_jax.jaxprs.types import Jaxpr, JaxprEqn, Literal, Var, array_type, nbytes
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.plan import CHECKING, Plan, offloaded
from tempo_jax.planning.walk import Side

MARKERS = frozenset(
    {primitives.reveal_p, primitives.cheap_p, primitives.blind_p, primitives.keep_p}
)
# Another view of the same elements: XLA moves nothing for them, or fuses what it moves.
_VIEWS = MARKERS | {
    prims.broadcast_in_dim_p,
    prims.copy_p,
    prims.iota_p,
    prims.reshape_p,
    prims.squeeze_p,
    prims.stop_gradient_p,
}
# What a weight passes through on its way from an argument to its products.
_SAME_WEIGHT = _VIEWS | {
    prims.concatenate_p,
    prims.convert_element_type_p,
    prims.dynamic_slice_p,
    prims.gather_p,
    prims.rev_p,
    prims.slice_p,
    prims.transpose_p,
}
OTHERS = "everything else (norms, losses, the optimizer, …)"


@dataclasses.dataclass(frozen=True)
class Layer:
    """The products of one layer, forward and backward, and what they cost.

    Attributes:
      name: under the user's own scopes (`jax.named_scope`, a Flax module's); without any, the
        weight's name among the arguments, or else the line of the program.
      products: how many there are.
      outside: how many of them the devices compute.
      work: floating-point operations of all.
      work_outside: of those that the devices compute.
      bytes_down: to the devices in one call.
      bytes_up: back in one call.
      inside_seconds: that the enclave computes.
      blinding_seconds: that it blinds, moves, unblinds and checks.
      reasons: why products stay inside, each once.
    """

    name: str
    products: int = 0
    outside: int = 0
    work: int = 0
    work_outside: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    inside_seconds: float = 0.0
    blinding_seconds: float = 0.0
    reasons: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Visit:
    """One visit to the enclave, and what the devices compute before the next.

    Attributes:
      inside_seconds: that the enclave computes.
      blinding_seconds: that it blinds, moves, unblinds and checks.
      bytes_up: that it is brought.
      bytes_down: that it sends.
      products: layer and floating-point operations of what the devices compute from then on,
        until the next visit.
    """

    inside_seconds: float
    blinding_seconds: float
    bytes_up: int
    bytes_down: int
    products: tuple[tuple[str, int], ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of the products, each once."""
        return tuple(dict.fromkeys(name for name, _ in self.products))


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a plan costs.

    Attributes:
      layers: in the order of the program; the last is all that belongs to no product.
      visits: in order.
      all_inside_seconds: that the enclave would compute if nothing left it.
    """

    layers: tuple[Layer, ...]
    visits: tuple[Visit, ...]
    all_inside_seconds: float

    @property
    def inside_seconds(self) -> float:
        """Seconds of a call that the enclave computes."""
        return sum(v.inside_seconds for v in self.visits)

    @property
    def blinding_seconds(self) -> float:
        """Seconds of a call that the enclave blinds, moves, unblinds and checks."""
        return sum(v.blinding_seconds for v in self.visits)

    @property
    def largest_gain(self) -> float:
        """Time of a call all inside over its time under the plan, if devices took no time."""
        return self.all_inside_seconds / max(self.inside_seconds + self.blinding_seconds, 1e-12)


def costs_of(plan: Plan, model: CostModel, arguments: Sequence[str]) -> Costs:
    """Estimates what a plan costs.

    Args:
      plan: the plan.
      model: the enclave's speeds.
      arguments: a name for each flat argument.
    """
    if plan.request.verify:
        model = dataclasses.replace(model, checking=CHECKING)
    return _Estimate(plan, model, arguments).costs()


def seconds_inside(eqn: JaxprEqn, model: CostModel) -> float:
    """Seconds that the enclave takes for an equation, loops with all their repetitions.

    A product takes its arithmetic; anything else the reading and writing of its result. A
    `while` counts once, as nobody knows how often it runs.
    """
    if is_product(eqn):
        return model.inside(eqn)
    bodies = [_sum(body, model) for body in equations.subjaxprs(eqn)]
    if bodies:
        if eqn.primitive is prims.cond_p:
            return max(bodies)
        return sum(bodies) * eqn.params.get("length", 1)
    if eqn.primitive in _VIEWS:
        return 0.0
    size = sum(nbytes(v) for v in eqn.outvars)
    return model.rearranging(size, 1)


def _sum(jaxpr: Jaxpr, model: CostModel) -> float:
    return sum(seconds_inside(eqn, model) for eqn in jaxpr.eqns)


class _Estimate:
    def __init__(self, plan: Plan, model: CostModel, arguments: Sequence[str]):
        self.plan = plan
        self.model = model
        self.eqns = plan.jaxpr.eqns
        self.outside = {number for number, _ in offloaded(plan)}
        self.names = layer_names(plan.jaxpr, arguments, frozenset(plan.request.carried))
        self.layers = {name: Layer(name) for name in self.names.values()}
        self.layers[OTHERS] = Layer(OTHERS)
        self.owners = self._owners()

    def costs(self) -> Costs:
        self._add_products()
        visits = self._visits()
        layers = [layer for layer in self.layers.values() if layer.name != OTHERS]
        everything = sum(seconds_inside(eqn, self.model) for eqn in self.eqns)
        return Costs((*layers, self.layers[OTHERS]), visits, everything)

    def _add(self, name: str, **amounts: Any) -> None:
        layer = self.layers[name]
        more = {field: getattr(layer, field) + amount for field, amount in amounts.items()}
        self.layers[name] = dataclasses.replace(layer, **more)

    def _owners(self) -> dict[Var, str]:
        """For each value that crosses, the layer for whose products it does."""
        owners: dict[Var, str] = {}
        host = [(e.number, e.eqn) for e in self.plan.cut.host]
        for number, eqn in host:  # what comes back belongs to the product that made it
            if number in self.outside:
                owners[eqn.outvars[0]] = self.names[number]
            else:
                made = [owners[v] for v in variables(eqn) if v in owners]
                owners.update(dict.fromkeys(eqn.outvars, made[0]) if made else {})
        for number, eqn in reversed(host):  # what goes out, to the first product that takes it
            name = self.names.get(number) or owners.get(eqn.outvars[0])
            if name is not None:
                sent = [v for v in variables(eqn) if number not in self.outside or v not in owners]
                owners.update(dict.fromkeys(sent, name))
        return owners

    def _add_products(self) -> None:
        sides = self.plan.placement.sides
        for number, eqn in enumerate(self.eqns):
            if not is_product(eqn) or sides[number] is Side.ANYONE:
                continue
            name, flops = self.names[number], work(eqn)
            self._add(name, products=1, work=flops)
            if number in self.outside:
                self._add(name, outside=1, work_outside=flops)
                continue
            why = self.plan.placement.kept_inside.get(number)
            if why is not None and why not in self.layers[name].reasons:
                self._add(name, reasons=(why,))

    def _visits(self) -> tuple[Visit, ...]:
        plan, model = self.plan, self.model
        numbers = {eqn.outvars[0]: n for n, eqn in enumerate(self.eqns) if is_product(eqn)}
        extra, computed = self._beside_crossings(), self._computed_outside()
        visits = []
        for index, segment in enumerate(plan.cut.segments):
            inside = 0.0
            for eqn in segment.eqns:
                seconds = seconds_inside(eqn, model)
                inside += seconds
                number = numbers.get(eqn.outvars[0])
                self._add(OTHERS if number is None else self.names[number], inside_seconds=seconds)
            blinding = 0.0
            for field, values in (("bytes_up", segment.uploads), ("bytes_down", segment.downloads)):
                for v in values:
                    seconds, name = self._crossing(v), self.owners.get(v, OTHERS)
                    self._add(name, blinding_seconds=seconds, **{field: plan.blinded(v).nbytes})
                    blinding += seconds
            products = computed.get(index, [])
            for number in products:
                self._add(self.names[number], blinding_seconds=extra[number])
                blinding += extra[number]
            visits.append(
                Visit(
                    inside,
                    blinding,
                    sum(plan.blinded(v).nbytes for v in segment.uploads),
                    sum(plan.blinded(v).nbytes for v in segment.downloads),
                    tuple((self.names[n], work(self.eqns[n])) for n in products),
                )
            )
        return tuple(visits)

    def _computed_outside(self) -> dict[int, list[int]]:
        """For each visit the products that the devices compute after it."""
        awaited = [i for i, s in enumerate(self.plan.cut.segments) if not (s.beside or s.ahead)]
        after: dict[int, list[int]] = {}
        for number in sorted(self.outside):
            level = self.plan.cut.levels[self.eqns[number].outvars[0]]
            visit = max((i for i in awaited if i < level), default=0)
            after.setdefault(visit, []).append(number)
        return after

    def _crossing(self, v: Var) -> float:
        held, layout = self.plan.blinded(v), self.plan.layout(v)
        if not layout.keyed:
            return held.nbytes * self.model.nanoseconds_per_byte * 1e-9
        count = layout.blinded(array_type(v.aval), self.plan.program.classes).size
        return self.model.tensor(count, held.nbytes / max(count, 1), self.plan.request.scheme)

    def _beside_crossings(self) -> dict[int, float]:
        """For each product that goes out what it costs beside the crossing of its operands."""
        scheme, model = self.plan.request.scheme, self.model
        extra = {
            number: model.latency + (model.check_of(self.eqns[number]) if model.checking else 0.0)
            for number in self.outside
        }
        drawn: set[int] = set()
        for number in sorted(self.outside):
            for v in variables(self.eqns[number]):
                for c in self.plan.layout(v).classes:
                    if c is not None and c not in drawn:
                        drawn.add(c)
                        key = self.plan.program.classes[c]
                        extra[number] += model.keys((key.size + key.decoys) * key.copies, scheme)
        if scheme.keys_per_product:
            for numbers in self._families():
                forward = self.eqns[numbers[0]]
                x, w = (v.aval for v in forward.invars)
                results = sum(forward.invars[1] in self.eqns[n].invars for n in numbers)
                flops = scheme.arithmetic(
                    x.shape[-2], x.shape[-1], w.shape[-1], results, len(numbers) - results
                )
                copies = x.shape[0] if len(x.shape) == 3 else 1
                extra[numbers[0]] += flops * copies / model.dot_flops
        return extra

    def _families(self) -> list[list[int]]:
        """Products that share an operand under keys of their own: one and its gradients."""
        of_operand: dict[Any, list[int]] = {}
        families: list[list[int]] = []
        for number in sorted(self.outside):
            operands = variables(self.eqns[number])
            family = next((of_operand[v] for v in operands if v in of_operand), None)
            if family is None:
                families.append(family := [])
            family.append(number)
            of_operand.update(dict.fromkeys(operands, family))
        return families


# Names


def layer_names(jaxpr: Jaxpr, arguments: Sequence[str], carried: frozenset[int]) -> dict[int, str]:
    """A name for each product's layer, by equation; see `Layer.name`.

    Args:
      jaxpr: a flat program.
      arguments: a name for each of its inputs.
      carried: inputs that are leaves of a carried state, and so weights; if none is, any input
        may be one.
    """
    roots = _roots(jaxpr)
    leaves = {v: arguments[i] for i, v in enumerate(jaxpr.invars) if not carried or i in carried}
    products = {n: eqn for n, eqn in enumerate(jaxpr.eqns) if is_product(eqn)}
    names: dict[int, str] = {}
    shared: dict[Var, set[str]] = {}  # layers whose products take a value
    unnamed = []
    for number, eqn in products.items():
        scoped = equations.scopes(eqn)
        if scoped:
            names[number] = "/".join(scoped)
            continue
        operands = [_root(v, roots) for v in eqn.invars]
        # The second operand is the weight where both are arguments, as in ``x @ w``.
        weights = [i for i in (1, 0) if operands[i] and all(v in leaves for v in operands[i])]
        if not weights or any(v in shared for v in operands[weights[0]]):
            unnamed.append(number)
            continue
        names[number] = " + ".join(dict.fromkeys(leaves[v] for v in operands[weights[0]]))
        for v in operands[1 - weights[0]]:
            shared.setdefault(v, set()).add(names[number])
    for number in unnamed:
        eqn = products[number]
        # A weight's gradient shares one operand with the product, one with the other gradient.
        found = [set().union(*(shared.get(v, set()) for v in _root(x, roots))) for x in eqn.invars]
        both = found[0] & found[1] or found[0] | found[1]
        names[number] = min(both) if len(both) == 1 else equations.line(eqn)
    return names


def _roots(jaxpr: Jaxpr) -> Mapping[Var, tuple[Var, ...]]:
    """For each value that is another one in another layout, which ones it is made of."""
    roots: dict[Var, tuple[Var, ...]] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive in _SAME_WEIGHT:
            made_of = dict.fromkeys(r for v in _floating(eqn) for r in _root(v, roots))
            roots.update(dict.fromkeys(eqn.outvars, tuple(made_of)))
    return roots


def _floating(eqn: JaxprEqn) -> Iterator[Var]:
    """An equation's operands but those that say where to look."""
    moving = (prims.dynamic_slice_p, prims.gather_p)
    yield from variables(eqn)[: 1 if eqn.primitive in moving else None]


def _root(v: Var | Literal, roots: Mapping[Var, tuple[Var, ...]]) -> tuple[Var, ...]:
    return () if isinstance(v, Literal) else roots.get(v, (v,))


def counted(jaxpr: Jaxpr, sides: Iterable[Side]) -> list[JaxprEqn]:
    """The equations that the enclave computes, without marks, which are no work."""
    return [
        eqn
        for eqn, side in zip(jaxpr.eqns, sides, strict=True)
        if side is Side.ENCLAVE and eqn.primitive not in MARKERS
    ]
