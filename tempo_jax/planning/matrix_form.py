"""Rewrites a flat program so that every blinded operand is a variable of its own.

Placement blinds a variable once for all its uses. Where a scheme wants more, the program is traced
anew with marked copies (`blind_p`):

* keys per product: each family that goes out becomes products of matrices whose operands
  are copies of its own, so that no key is shared across families. The gradient G is blinded once
  for dX and once for dW: under a key of its own a product's axis takes scales of its own, and
  in G some examples count thousands of times as much as others. What stays inside is
  decided here, by the scheme's policy first and by cost second;
* two polarities with kept keys: the gradient of a device-resident weight must come out in
  the weight's own polarity, so its operands are blinded once more;
* verification: the enclave checks a product against operands that it sent, so none may be
  another product's result as the devices have it, and none may come back rounded to 16 bits.

Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from enclave_runtime.protocol.program import ArrayType
from tempo_jax.families.finder import FORWARD, TO_INPUT, TO_WEIGHT, Family, find_families
from tempo_jax.families.fusion import Fused, contracted, fuse, order
from tempo_jax.families.labels import find_backward, flow, last_products
from tempo_jax.families.matrices import Patches
from tempo_jax.jaxprs import equations, flatten, trace, types
from tempo_jax.jaxprs.primitives import blind_p, cheap_p
from tempo_jax.jaxprs.products import (
    KEPT,
    feeds_update,
    is_product,
    kept_products,
    near_products,
    products_above,
    work,
)
from tempo_jax.jaxprs.types import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from tempo_jax.planning.cost import CostModel
from tempo_jax.schemes import Scheme


class Growth(NamedTuple):
    """How much larger than the one at hand a program is imagined.

    Attributes:
      rows: times the rows of each product (the batch, or the length of its sequences).
      width: times the width of each layer.
    """

    rows: int = 1
    width: int = 1

    def sizes(self, rows: int, inner: int, columns: int) -> tuple[int, int, int]:
        """A product's rows, contracted length and columns."""
        return rows * self.rows, inner * self.width, columns * self.width

    @property
    def arithmetic(self) -> int:
        """Times the arithmetic of each product."""
        return self.rows * self.width**2


@dataclasses.dataclass(frozen=True)
class MatrixForm:
    """A program rewritten for a scheme with keys per product.

    Attributes:
      closed: the program.
      stays: for each of its products in order why it stays inside, or None if it goes out.
      decoys: for each of its products in order the decoys on its first operand's rows, where
        it goes out and is not the gradient of a weight, else 0.
    """

    closed: ClosedJaxpr
    stays: tuple[str | None, ...]
    decoys: tuple[int, ...]


def matrix_form(
    closed: ClosedJaxpr,
    scheme: Scheme,
    costs: CostModel | None,
    carried: Mapping[int, int],
) -> MatrixForm:
    """Finds families, decides which go out, and rewrites those as products of matrices.

    Args:
      closed: a flat program.
      scheme: the scheme.
      costs: the cost model; None sends every family that the policy lets out.
      carried: inputs that are leaves of the carried state.
    """
    closed = flatten.merge_equal(closed)
    jaxpr = closed.jaxpr
    data = data_variables(jaxpr, carried)
    families = find_families(jaxpr, data, products_above(jaxpr))
    fused, stays = _Policy(jaxpr, families, scheme, costs, data).decide(Growth())
    sequence = order(jaxpr, fused)
    assert sequence is not None, "fusing leaves an order"
    reasons: list[str | None] = []
    decoys: list[int] = []
    for number, product in sequence:
        if is_product(jaxpr.eqns[number]):
            reasons.append(None if product else stays.get(number, _NO_FAMILY))
            if product is None or number in product.equations(TO_WEIGHT):
                decoys.append(0)
            else:
                # Of G as well, whose rows have X's key only where a gradient of W ties them.
                decoys.append(scheme.decoys(product.sizes[0]))
    return MatrixForm(_rewrite(closed, sequence), tuple(reasons), tuple(decoys))


def work_outside(
    closed: ClosedJaxpr,
    scheme: Scheme,
    costs: CostModel,
    carried: Mapping[int, int],
    growths: Iterable[Growth],
) -> list[int]:
    """Floating-point operations of the products that would go out if the program were larger.

    Args:
      closed: a flat program.
      scheme: a scheme with keys per product.
      costs: the cost model.
      carried: inputs that are leaves of the carried state.
      growths: how much larger it is imagined.

    Returns:
      For each of them the operations, as many as the program at hand has.
    """
    jaxpr = flatten.merge_equal(closed).jaxpr
    data = data_variables(jaxpr, carried)
    families = find_families(jaxpr, data, products_above(jaxpr))
    policy = _Policy(jaxpr, families, scheme, costs, data)
    return [
        sum(work(jaxpr.eqns[n]) for fused in policy.decide(growth)[0] for n in fused.numbers)
        for growth in growths
    ]


_NO_FAMILY = "it has no form as a product of matrices (a grouped convolution, or a constant)"


def _descendants(jaxpr: Jaxpr, primitive: Any) -> frozenset[Var]:
    """Variables that depend on an equation of this primitive."""
    found: set[Var] = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive is primitive or any(isinstance(v, Var) and v in found for v in eqn.invars):
            found |= set(eqn.outvars)
    return frozenset(found)


def data_variables(jaxpr: Jaxpr, carried: Mapping[int, int]) -> frozenset[Var]:
    """Variables that depend on something other than the carried state."""
    data = {v for i, v in enumerate(jaxpr.invars) if i not in carried} | set(jaxpr.constvars)
    for eqn in jaxpr.eqns:
        if any(isinstance(v, Var) and v in data for v in eqn.invars):
            data |= set(eqn.outvars)
    return frozenset(data)


class _Policy:
    """Why families stay inside."""

    def __init__(
        self,
        jaxpr: Jaxpr,
        families: Sequence[Family],
        scheme: Scheme,
        costs: CostModel | None,
        data: frozenset[Var],
    ):
        self.jaxpr = jaxpr
        self.families = families
        self.scheme = scheme
        self.costs = costs
        self.above = products_above(jaxpr)
        backward = find_backward(families, self.above)
        self.per_example = backward.per_example
        gradients = {f.number(TO_WEIGHT) for f in families} | self.per_example
        self.gradients = sum(1 << n for n in gradients if n is not None)
        self.marked = _descendants(jaxpr, cheap_p)
        self.forward = [f for f in families if not self._is_optimizers(f)]
        self.total = sum(self._work(f) for f in self.forward)
        self.last = last_products(jaxpr, self.forward, backward.all, self.above, data)
        self.near = near_products(jaxpr)
        self.flow = flow(jaxpr)
        self.kept = kept_products(jaxpr)

    def _bits(self, eqn: JaxprEqn) -> int:
        bits = 0
        for v in eqn.invars:
            if not isinstance(v, Literal):
                bits |= self.above.get(v, 0)
        return bits

    def decide(self, growth: Growth) -> tuple[list[Fused], dict[int, str]]:
        """What goes out, and the reason for each equation of the families that stay inside."""
        stays: dict[int, str] = {}
        allowed = []
        for family in self.families:
            why = self._of_its_place(family)
            if why is None:
                allowed.append(family)
            else:
                stays.update(dict.fromkeys(family.members, why))
        out = []
        for fused in fuse(self.jaxpr, allowed, self.above):
            # Patches say whether a convolution mixes enough, and so does any other form of it.
            why = self._too_thin(fused, growth)
            if why is None:
                fused = self._cheapest(fused, growth)
            if why is None and self.costs is not None:
                inside = sum(self.costs.inside(self.jaxpr.eqns[n]) for n in fused.numbers)
                inside *= growth.arithmetic
                outside = self._outside(fused, self.costs, growth)
                if not self.costs.worthwhile(inside, outside):
                    why = self.costs.too_cheap(inside, outside)
            if why is None:
                out.append(fused)
            else:
                stays.update(dict.fromkeys(fused.numbers, why))
        return out, stays

    def _is_optimizers(self, family: Family) -> bool:
        eqn = self.jaxpr.eqns[family.primary]
        marked = any(isinstance(v, Var) and v in self.marked for v in eqn.invars)
        return marked or bool(self._bits(eqn) & self.gradients)

    def _of_its_place(self, family: Family) -> str | None:
        """Why a family stays inside for what it is in the program."""
        if self._is_optimizers(family):
            return "it belongs to the optimizer: it depends on a weight's gradient"
        if not self.kept.isdisjoint(family.members):
            return KEPT
        if family.primary in self.last:
            return self.last[family.primary]
        operands = [v for v in self.jaxpr.eqns[family.primary].invars if isinstance(v, Var)]
        if any(self.near.get(v, 0) >> n & 1 for v in operands for n in self.last):
            return "an operand comes from the last product before the loss, and may show the labels"
        if not self.scheme.covers_activations and all(self.above.get(v, 0) for v in operands):
            return "both operands are activations, whose spectra the scheme does not hide"
        if any(map(self.flow.is_coded, operands)):
            return "an operand is made of comparisons alone, as one-hot labels are"
        share = self.scheme.first_layer_share
        if self._is_first(family) and self._work(family) < share * self.total:
            return f"the first layer stays inside below {share:.0%} of the arithmetic"
        return None

    def _work(self, family: Family) -> int:
        return sum(work(self.jaxpr.eqns[n]) for n in family.members)

    def _too_thin(self, fused: Fused, growth: Growth) -> str | None:
        rows, contracted, columns = growth.sizes(*fused.sizes)
        least_rows, least_side = self.scheme.least_rows, self.scheme.least_side
        if fused.primary in self.per_example and contracted < least_side:
            return (
                f"it is a weight's gradient for each example, which sums over {contracted} rows, "
                f"and fewer than {least_side} mix too little to hide"
            )
        if rows < least_rows:
            return f"{rows} rows, and fewer than {least_rows} mix too little to hide"
        if min(contracted, columns) < least_side:
            side = min(contracted, columns)
            return f"a side of {side}, and fewer than {least_side} mix too little to hide"
        return None

    def _is_first(self, family: Family) -> bool:
        return not self._bits(self.jaxpr.eqns[family.primary])

    def _cheapest(self, fused: Fused, growth: Growth) -> Fused:
        """The products of matrices that convolutions are sent as."""
        costs = self.costs or CostModel()
        others = [other for other in fused.others if not self._too_thin(other, growth)]
        return min((fused, *others), key=lambda other: self._outside(other, costs, growth))

    def _outside(self, fused: Fused, costs: CostModel, growth: Growth) -> float:
        """Seconds that the enclave works for what goes out."""
        rows, inner, columns = growth.sizes(*fused.sizes)
        copies = fused.copies
        padded = rows + self.scheme.decoys(rows)
        lengths = {"x": padded * inner, "w": inner * columns, "g": padded * columns}
        seconds = costs.latency * len(fused.kinds)
        axes = padded + inner + columns
        sent = list(fused.parts[0].operands)
        if TO_INPUT in fused.kinds and TO_WEIGHT in fused.kinds:
            axes += padded + columns
            sent.append("g")
        seconds += costs.keys(axes * copies, self.scheme)
        for name in sent:
            operand = fused.operand(name)[0]
            dtype = operand.variable.aval.dtype
            crosses = self.scheme.representation(ArrayType((), dtype.name), product=False).nbytes
            seconds += costs.tensor(lengths[name] * copies, crosses, self.scheme)
            if isinstance(operand.form, Patches):
                seconds += costs.rearranging(lengths[name], dtype.itemsize)
        for kind in fused.kinds:
            name = {FORWARD: "g", TO_INPUT: "x", TO_WEIGHT: "w"}[kind]
            number = fused.equations(kind)[0]
            itemsize = max(self.jaxpr.eqns[number].outvars[0].aval.dtype.itemsize, 4)
            seconds += costs.tensor(lengths[name] * copies, itemsize, self.scheme)
            terms = {FORWARD: inner, TO_INPUT: columns, TO_WEIGHT: padded}[kind]
            width = {FORWARD: columns, TO_INPUT: inner, TO_WEIGHT: columns}[kind]
            seconds += copies * costs.check(terms, width, sum(lengths.values()), lengths[name])
            if isinstance(fused.parts[0].members[number].out, Patches):
                seconds += costs.rearranging(lengths[name], itemsize)
        gradients = sum(kind == TO_WEIGHT for kind in fused.kinds)
        results = len(fused.kinds) - gradients
        flops = self.scheme.arithmetic(rows, inner, columns, results, gradients)
        return seconds + flops * copies / costs.dot_flops


def _rewrite(closed: ClosedJaxpr, sequence: Sequence[tuple[int, Fused | None]]) -> ClosedJaxpr:
    """Traces a program anew, in this order, with fused products as products of matrices."""
    jaxpr = closed.jaxpr

    def run(*arguments: Any) -> list[Any]:
        env = _environment(closed, arguments)
        blinded: dict[tuple[int, str, tuple[str, str] | None], Any] = {}

        def matrix(fused: Fused, name: str, kind: tuple[str, str]) -> Any:
            use = (fused.primary, name, kind if name == "g" else None)
            if use not in blinded:
                blinded[use] = blind_p.bind(fused.matrix(name, env.__getitem__))
            return blinded[use]

        for number, fused in sequence:
            eqn = jaxpr.eqns[number]
            if fused is None:
                results = equations.bind(eqn, [_read(v, env) for v in eqn.invars])
                env.update(zip(eqn.outvars, results, strict=True))
                continue
            kind = next(k for k in fused.kinds if number in fused.equations(k))
            with equations.at_source_of(eqn):
                left, right = (matrix(fused, name, kind) for name in kind)
                batch = (0,) if left.ndim == 3 else ()
                dtype = eqn.outvars[0].aval.dtype
                # A result still holds its decoys, which 16 bits would round away with it; and parts
                # of it may have to be added up.
                wide = jnp.float32 if dtype.itemsize == 2 else dtype
                product = lax.dot_general(
                    left,
                    right,
                    (contracted(kind, left.ndim), (batch, batch)),
                    precision=eqn.params["precision"],
                    preferred_element_type=wide,
                )
                for n, result in fused.results(kind, product).items():
                    env[jaxpr.eqns[n].outvars[0]] = result.astype(dtype)
        return [_read(v, env) for v in jaxpr.outvars]

    return trace.trace(run, types.avals_of(closed))


def split_polarities(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Blinds the operands of gradients that feed a marked update once more.

    Under kept keys with two polarities, ``X̂`` fits the forward product and ``Ĝ`` the
    gradient of the input; the gradient of the weight comes out in the weight's polarity only
    from copies with the opposite ones.
    """
    gradients = feeds_update(closed.jaxpr.eqns)

    def run(*arguments: Any) -> list[Any]:
        env = _environment(closed, arguments)
        copies: dict[Any, Any] = {}
        for eqn in closed.jaxpr.eqns:
            operands = [_read(v, env) for v in eqn.invars]
            if is_product(eqn) and eqn.outvars[0] in gradients:
                with equations.at_source_of(eqn):
                    for i, v in enumerate(eqn.invars):
                        if isinstance(v, Var):
                            if v not in copies:
                                copies[v] = blind_p.bind(env[v])
                            operands[i] = copies[v]
            env.update(zip(eqn.outvars, equations.bind(eqn, operands), strict=True))
        return [_read(v, env) for v in closed.jaxpr.outvars]

    return trace.trace(run, types.avals_of(closed))


def verifiable(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Makes every product one whose result can be checked, in the same order.

    Its operands pass through the enclave, its result has at least 32 bits, and the devices are
    asked for all of them: by default some multiply float32 with fewer.
    """

    def run(*arguments: Any) -> list[Any]:
        env = _environment(closed, arguments)
        copies: dict[Any, Any] = {}
        from_devices: set[Any] = set()
        for eqn in closed.jaxpr.eqns:
            operands = [_read(v, env) for v in eqn.invars]
            if not is_product(eqn):
                env.update(zip(eqn.outvars, equations.bind(eqn, operands), strict=True))
                continue
            out = eqn.outvars[0]
            dtype = out.aval.dtype
            wide = jnp.promote_types(dtype, jnp.float32)
            changes: dict[str, Any] = {"preferred_element_type": wide}
            if all(v.aval.dtype.itemsize > 2 for v in eqn.invars):
                changes["precision"] = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
            with equations.at_source_of(eqn):
                for i, v in enumerate(eqn.invars):
                    if isinstance(v, Var) and v in from_devices:
                        if v not in copies:
                            copies[v] = blind_p.bind(env[v])
                        operands[i] = copies[v]
                (product,) = equations.bind(eqn, operands, **changes)
                env[out] = product.astype(dtype)
            if wide == dtype:
                from_devices.add(out)
        return [_read(v, env) for v in closed.jaxpr.outvars]

    return trace.trace(run, types.avals_of(closed))


def _read(v: Any, env: Mapping[Any, Any]) -> Any:
    return v.val if isinstance(v, Literal) else env[v]


def _environment(closed: ClosedJaxpr, arguments: Sequence[Any]) -> dict[Any, Any]:
    """What the variables of constants and inputs stand for."""
    env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, arguments, strict=True))
    return env
