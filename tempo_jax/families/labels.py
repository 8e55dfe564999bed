"""Which products would show the labels: the classifier, and what depends on it alone.

A product is hidden by what comes after it: the gradient that comes back to it has passed through a
weight that the host does not know. Nothing does that for the last product with a trained weight,
whose gradient is the logits' less the labels, nor for what is computed from the logits without a
further one: a noise matrix, a confusion matrix, distances to fixed codes. Whether a product comes
after another is told by numbers that can be differentiated: an ``argmax`` or a comparison hands
nothing on.

Where no gradient passes, as in an evaluation or a teacher's network, frozen weights count as
trained ones. Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from tempo_jax.families.finder import TO_INPUT, TO_WEIGHT, Family
from tempo_jax.families.matrices import Form, GroupedAxes
from tempo_jax.jaxprs.products import is_product, near_products
from tempo_jax.jaxprs.types import Jaxpr, JaxprEqn, Var

LAST = "it is the last product before the loss, whose result would show the labels"
UNTRAINED = "no product with a trained weight follows it, and its result may show the labels"

_OTHER = {"x": "w", "w": "x"}


# Gradients that found no family


@dataclasses.dataclass(frozen=True)
class Backward:
    """Products that look like gradients of others, by their first equation.

    Attributes:
      all: all of them.
      per_example: those that are a weight's gradient for each example, as under ``vmap(grad)``.
    """

    all: frozenset[int]
    per_example: frozenset[int]


def find_backward(families: Sequence[Family], above: Mapping[Var, int]) -> Backward:
    """Finds the products that no family took, though they are gradients of another's product.

    Such a product shares an operand with the other, of which it contracts what that leaves
    free (or runs over it as a batch, for the gradients of single examples), and its other
    operand depends on that product's result.

    Args:
      families: in program order.
      above: for each variable the products on which it depends, as a bit set over equations.
    """
    found: set[int] = set()
    per_example: set[int] = set()
    earlier: dict[Var, list[tuple[int, str, Form]]] = {}
    for family in families:
        for name, other in _OTHER.items():
            variable, form = family.operands[name]
            bits = above.get(family.operands[other].variable, 0)
            for number, its_name, its_form in earlier.get(variable, ()):
                if not bits >> number & 1:
                    continue
                if not (isinstance(form, GroupedAxes) and isinstance(its_form, GroupedAxes)):
                    continue
                free, contracted = _free(its_form, its_name), _contracted(form, name)
                if contracted == free:
                    found.add(family.primary)
                elif free and contracted | set(form.batch) == free | set(its_form.batch):
                    found.add(family.primary)
                    per_example.add(family.primary)
        for name in _OTHER:
            variable, form = family.operands[name]
            earlier.setdefault(variable, []).append((family.primary, name, form))
    return Backward(frozenset(found), frozenset(per_example))


def _contracted(form: GroupedAxes, name: str) -> frozenset[int]:
    """Axes of an operand that a forward product sums over."""
    return frozenset(form.second if name == "x" else form.first)


def _free(form: GroupedAxes, name: str) -> frozenset[int]:
    """Axes of an operand that a forward product leaves free."""
    return frozenset(form.first if name == "x" else form.second)


# What reaches a value as a number


@dataclasses.dataclass(frozen=True)
class Flow:
    """What each variable depends on as a number: not as a condition, and not as a position.

    Attributes:
      products: the products through which a gradient could pass, as a bit set over equations.
      sources: the inputs and constants, as a bit set over both.
      given: variables that depend on an input or a constant in any way.
    """

    products: Mapping[Var, int]
    sources: Mapping[Var, int]
    given: frozenset[Var]

    def is_coded(self, v: Var) -> bool:
        """Whether a value comes from inputs by comparisons and positions alone, as one-hot labels.

        Integers that are converted to floats, as pixels are, are numbers.
        """
        return v in self.given and not self.sources.get(v, 0)


def flow(jaxpr: Jaxpr) -> Flow:
    """Follows numbers through a flat program."""
    products: dict[Var, int] = {}
    sources = {v: 1 << i for i, v in enumerate((*jaxpr.invars, *jaxpr.constvars))}
    given = set(sources)
    for number, eqn in enumerate(jaxpr.eqns):
        carriers = [v for v in _carriers(eqn) if isinstance(v, Var)]
        if any(isinstance(v, Var) and v in given for v in eqn.invars):
            given |= set(eqn.outvars)
        through = start = 0
        for v in carriers:
            through |= products.get(v, 0)
            start |= sources.get(v, 0)
        if is_product(eqn):
            through |= 1 << number
        from_floats = any(_is_float(v) for v in carriers)
        for v in eqn.outvars:
            if _is_float(v):
                products[v] = through
            found_position = (
                from_floats
                and jnp.issubdtype(v.aval.dtype, jnp.integer)
                and eqn.primitive is not prims.convert_element_type_p
            )
            if v.aval.dtype != jnp.bool_ and not found_position:
                sources[v] = start
    return Flow(products, sources, frozenset(given))


_TAKES = {prims.gather_p, prims.dynamic_slice_p}
_PUTS = {
    *(prims.scatter_p, prims.scatter_add_p, prims.scatter_mul_p),
    *(prims.scatter_min_p, prims.scatter_max_p),
}


def _carriers(eqn: JaxprEqn) -> list[object]:
    """The operands whose numbers an equation hands on, without positions and conditions."""
    if eqn.primitive in _TAKES:
        return eqn.invars[:1]
    if eqn.primitive is prims.dynamic_update_slice_p:
        return eqn.invars[:2]
    if eqn.primitive in _PUTS:
        return [eqn.invars[0], eqn.invars[2]]
    return eqn.invars[1:] if eqn.primitive is prims.select_n_p else eqn.invars


def _is_float(v: Var) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.floating)


# The classifier


def last_products(
    jaxpr: Jaxpr,
    families: Sequence[Family],
    backward: frozenset[int],
    above: Mapping[Var, int],
    data: frozenset[Var],
) -> dict[int, str]:
    """The classifier and the products that depend on it alone, each with the reason.

    Args:
      jaxpr: a flat program.
      families: its families in program order, without those of an optimizer.
      backward: those of them that are gradients of others, by their first equation.
      above: for each variable the products on which it depends, as a bit set over equations.
      data: variables that depend on something other than the carried state.

    Returns:
      By the first equation of each. A product that stands alone, in a function that has no
      other and takes no gradient, is none.
    """
    forward = [f for f in families if f.primary not in backward]
    return _Search(jaxpr, forward, above, data).find()


class _Search:
    def __init__(
        self,
        jaxpr: Jaxpr,
        forward: Sequence[Family],
        above: Mapping[Var, int],
        data: frozenset[Var],
    ):
        self.eqns = jaxpr.eqns
        self.forward = forward
        self.above = above
        self.flow = flow(jaxpr)
        self.near = near_products(jaxpr)
        self.everything = (1 << len(jaxpr.invars) + len(jaxpr.constvars)) - 1
        self.trained = self._trained(data)

    def find(self) -> dict[int, str]:
        last: dict[int, str] = {}
        bits = 0
        for family in self.forward:
            why = self._why_last(family)
            if why is None and self._depends_on_it_alone(family, bits):
                why = UNTRAINED
            if why is not None:
                last[family.primary] = why
                bits |= 1 << family.primary
        return last

    def _operands(self, family: Family) -> Iterator[tuple[Var, Var]]:
        """Each of the two operands with the other."""
        for name, other in _OTHER.items():
            yield family.operands[name].variable, family.operands[other].variable

    def _trained(self, data: frozenset[Var]) -> int:
        """Inputs and constants that hold weights whose gradients are computed, as a bit set.

        None, unless weights can be told from an input by which a frozen network is
        differentiated: that has a product of its own and follows no other.
        """
        sources, by_input = 0, 0
        told = False
        for family in self.forward:
            for name, gradient in (("w", TO_WEIGHT), ("x", TO_INPUT)):
                v = family.operands[name].variable
                if family.number(gradient) is None or (self.above.get(v, 0) and v in data):
                    continue
                sources |= self.flow.sources.get(v, 0)
                before = self._products(family.operands[_OTHER[name]].variable)
                told |= name == "w" or v not in data or bool(before & by_input)
                by_input |= 1 << family.primary
        return sources if told else 0

    def _products(self, v: Var) -> int:
        return self.flow.products.get(v, 0)

    def _weights(self, family: Family) -> int:
        """The inputs and constants that count as weights for what follows a product."""
        reads = 0
        for v, _ in self._operands(family):
            reads |= self.flow.sources.get(v, 0)
        passes = "g" in family.operands or bool(reads & self.trained)
        return self.trained if self.trained and passes else self.everything

    def _why_last(self, family: Family) -> str | None:
        number = family.primary
        out = self.eqns[number].outvars[0]
        g = family.operands.get("g")
        if g is not None and self.above.get(g.variable, 0) & ~self.above[out] == 0:
            return LAST
        weights = self._weights(family)
        others = [pair for f in self.forward if f is not family for pair in self._operands(f)]
        following = [other for v, other in others if self._products(v) >> number & 1]
        for other in following:
            own = not self._products(other) >> number & 1
            if own and self.flow.sources.get(other, 0) & weights:
                return None
        read = any(self._read_by(eqn) >> number & 1 for eqn in self.eqns if is_product(eqn))
        alone = not read and self._read_by(self.eqns[number]) == 0
        if g is None and alone:
            return None
        return UNTRAINED if following else LAST

    def _depends_on_it_alone(self, family: Family, last: int) -> bool:
        """Whether a product takes a last one's result and no weight."""
        weights = self._weights(family)
        pairs = list(self._operands(family))
        takes = [v for v, _ in pairs if self.near.get(v, 0) & last]
        own = [v for v, _ in pairs if v not in takes and self.flow.sources.get(v, 0) & weights]
        return bool(takes) and not own

    def _read_by(self, eqn: JaxprEqn) -> int:
        """Products on which an equation's operands depend."""
        bits = 0
        for v in eqn.invars:
            if isinstance(v, Var):
                bits |= self.above.get(v, 0)
        return bits
