"""Families: a product and the two products of its gradient, which share keys and nothing else.

A scheme with keys per product blinds matrices. For ``Y = X W`` with ``dX = G Wᵀ`` and ``dW = Xᵀ G``
this module finds the three equations in a flat program and says how each operand is read as a
matrix (Form), so that X and W are each blinded once and used twice, and G once for each of its
products. Attention's products of activations are families as well, with a key for each index of
their batch. A convolution becomes a product of matrices: sent as it is, all positions of its window
would share two keys, which one public checkpoint gives away. There are several such products
(`families.convolutions`), and which is the cheapest is not decided here. Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax.extend.core import primitives as prims

from tempo_jax.families.convolutions import (
    MAX_TAPS,
    ConvolutionForms,
    Window,
    reference_gradients,
)
from tempo_jax.families.matrices import Form, GroupedAxes
from tempo_jax.jaxprs.primitives import conv_p, dot_general_p
from tempo_jax.jaxprs.products import is_product
from tempo_jax.jaxprs.types import Jaxpr, JaxprEqn, Var


class MatrixOperand(NamedTuple):
    """A variable read as a matrix."""

    variable: Var
    form: Form


@dataclasses.dataclass(frozen=True)
class Member:
    """One equation of a family, as a product of matrices.

    Attributes:
      left: name of its left operand in the family: "x" or "g".
      right: of its right operand: "w" or "g".
      out: how the equation's result is read as a matrix.
    """

    left: str
    right: str
    out: Form


FORWARD, TO_INPUT, TO_WEIGHT = ("x", "w"), ("g", "w"), ("x", "g")
# Axes of the left and of the right matrix that are contracted, counted from the end.
CONTRACTED = {FORWARD: (-1, -2), TO_INPUT: (-1, -1), TO_WEIGHT: (-2, -2)}


@dataclasses.dataclass(frozen=True)
class Family:
    """A product, forward and backward.

    Attributes:
      members: every equation's form, by its number; the forward equation is the first.
      operands: "x" (rows × contracted), "w" (contracted × columns) and, if there is a backward
        product, "g" (rows × columns).
      others: the same equations as products of other matrices.
    """

    members: dict[int, Member]
    operands: dict[str, MatrixOperand]
    others: tuple[Family, ...] = ()

    @property
    def primary(self) -> int:
        """Number of the forward equation."""
        return next(iter(self.members))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, contracted length and columns."""
        x, w = self.operands["x"].form, self.operands["w"].form
        return x.rows, x.columns, w.columns

    @property
    def copies(self) -> int:
        """Independent products in the batch, at least 1."""
        return max(self.operands["x"].form.copies, 1)

    def number(self, kind: tuple[str, str]) -> int | None:
        """Number of the equation that multiplies these operands, if there is one."""
        return next((n for n, m in self.members.items() if (m.left, m.right) == kind), None)


def find_families(jaxpr: Jaxpr, data: frozenset[Var], above: Mapping[Var, int]) -> list[Family]:
    """Finds every product's family.

    Args:
      jaxpr: a flat program.
      data: variables that depend on something other than the carried state; tells activations
        from weights where a product is written with its weight first.
      above: for each variable the products on which it depends, as a bit set over equations.

    Returns:
      Families in program order; a product belongs to one at most. Grouped convolutions
      and products of literals belong to none.
    """
    return _Finder(jaxpr, data, above).find()


class _ProductSide(NamedTuple):
    """One operand of a `dot_general`."""

    variable: Var
    batch: tuple[int, ...]
    contracted: tuple[int, ...]
    free: tuple[int, ...]


class _Use(NamedTuple):
    """A place where a variable is an operand of a `dot_general`."""

    number: int
    side: int


class _Finder:
    def __init__(self, jaxpr: Jaxpr, data: frozenset[Var], above: Mapping[Var, int]):
        self.eqns = jaxpr.eqns
        self.data = data
        self.above = above
        self.made_by = {v: eqn for eqn in self.eqns for v in eqn.outvars}
        self.sides: dict[int, tuple[_ProductSide, _ProductSide]] = {}
        self.uses: dict[Var, list[_Use]] = {}
        self.convolutions: dict[Var, list[int]] = {}
        for number, eqn in enumerate(self.eqns):
            if not is_product(eqn) or not all(isinstance(v, Var) for v in eqn.invars):
                continue
            if eqn.primitive is dot_general_p:
                first, second = _sides(eqn)
                self.sides[number] = self._untransposed(first), self._untransposed(second)
                for side, operand in enumerate(self.sides[number]):
                    self.uses.setdefault(operand.variable, []).append(_Use(number, side))
            elif eqn.primitive is conv_p:
                for v in set(eqn.invars):
                    self.convolutions.setdefault(v, []).append(number)
        self.taken: set[int] = set()

    def find(self) -> list[Family]:
        families = []
        for number, eqn in enumerate(self.eqns):
            if number in self.taken:
                continue
            family = None
            if number in self.sides:
                family = self._dot_family(number)
            elif eqn.primitive is conv_p and is_product(eqn):
                family = self._convolution_family(number)
            if family is not None:
                self.taken |= set(family.members)
                families.append(family)
        return families

    # Matrix products

    def _untransposed(self, side: _ProductSide) -> _ProductSide:
        """The same operand named by the variable of which it is a transpose."""
        while (maker := self.made_by.get(side.variable)) is not None:
            if maker.primitive is not prims.transpose_p or not isinstance(maker.invars[0], Var):
                break
            axes = maker.params["permutation"]
            groups = (tuple(axes[i] for i in group) for group in side[1:])
            side = _ProductSide(maker.invars[0], *groups)
        return side

    def _dot_family(self, number: int) -> Family:
        x, w = self.sides[number]
        both = x.variable in self.data and w.variable in self.data
        swapped = x.variable not in self.data and w.variable in self.data
        if both and x.batch and _length(w, w.free) > _length(x, x.free):
            # Two activations, as in attention: the longer side has rows enough for decoys.
            swapped = True
        if swapped:
            x, w = w, x
        backward = self._backward(number, x, w)
        x_form = GroupedAxes(_shape(x), x.batch, x.free, x.contracted)
        w_form = GroupedAxes(_shape(w), w.batch, w.contracted, w.free)
        operands = {"x": MatrixOperand(x.variable, x_form), "w": MatrixOperand(w.variable, w_form)}
        members = {number: Member(*FORWARD, self._out(number, x_form, w_form, swapped))}
        to_x, to_w = backward
        if to_w is not None or to_x is not None:
            # Rows, columns and batch of G in the order of the axes that they meet.
            rows = columns = batch = ()
            if to_w is not None:
                mine, other = self._oriented(to_w)
                rows = _matched(x.free, mine.contracted, other.contracted)
                batch = _matched(x.batch, mine.batch, other.batch)
                columns = other.free
            if to_x is not None:
                mine, other = self._oriented(to_x)
                columns = _matched(w.free, mine.contracted, other.contracted)
                if to_w is None:
                    rows, batch = other.free, _matched(w.batch, mine.batch, other.batch)
            use = to_w or to_x
            assert use is not None
            g = self._oriented(use)[1]
            g_form = GroupedAxes(_shape(g), batch, rows, columns)
            operands["g"] = MatrixOperand(g.variable, g_form)
            if to_x is not None:
                swapped = to_x.side == 0  # W stands first
                flipped = GroupedAxes(w_form.shape, w_form.batch, w_form.second, w_form.first)
                out = self._out(to_x.number, g_form, flipped, swapped)
                members[to_x.number] = Member(*TO_INPUT, out)
            if to_w is not None:
                swapped = to_w.side == 1  # X stands second
                flipped = GroupedAxes(x_form.shape, x_form.batch, x_form.second, x_form.first)
                out = self._out(to_w.number, flipped, g_form, swapped)
                members[to_w.number] = Member(*TO_WEIGHT, out)
        return Family(members, operands)

    def _oriented(self, use: _Use) -> tuple[_ProductSide, _ProductSide]:
        """The operand at a use, and the other operand."""
        sides = self.sides[use.number]
        return sides[use.side], sides[1 - use.side]

    def _backward(
        self, number: int, x: _ProductSide, w: _ProductSide
    ) -> tuple[_Use | None, _Use | None]:
        """Uses of W in dX and of X in dW, as far as there are any."""
        to_x = self._gradients(number, w)
        to_w = self._gradients(number, x)
        for a, b in itertools.product(to_x, to_w):
            g, h = self._oriented(a)[1], self._oriented(b)[1]
            same = g.variable is h.variable and set(g.batch) == set(h.batch)
            same = same and set(g.free) == set(h.contracted) and set(g.contracted) == set(h.free)
            order = _matched(x.batch, *_batches(self._oriented(b)))
            others = _matched(w.batch, *_batches(self._oriented(a)))
            if same and a.number != b.number and order == others:
                return a, b
        rows = _length(x, x.free)
        columns = _length(w, w.free)
        lone_w = [b for b in to_w if self._fits(b, columns)]
        lone_x = [a for a in to_x if self._fits(a, rows)]
        return (None, self._own(number, lone_w)) if lone_w else (self._own(number, lone_x), None)

    def _fits(self, use: _Use, length: int) -> bool:
        g = self._oriented(use)[1]
        return _length(g, g.free) == length

    def _own(self, number: int, uses: Sequence[_Use]) -> _Use | None:
        """The use with a G of product `number`, where only one of X and W is differentiated.

        Of those that depend on the product's result, the one that depends on least besides.
        """
        counts = {}
        for use in uses:
            bits = self.above.get(self._oriented(use)[1].variable, 0)
            if bits >> number & 1:
                counts[use] = bits.bit_count()
        return min(counts, key=counts.__getitem__) if counts else None

    def _gradients(self, number: int, side: _ProductSide) -> list[_Use]:
        """Later products that contract what product `number` leaves free of an operand."""
        found = []
        for use in self.uses[side.variable]:
            mine = self.sides[use.number][use.side]
            later = use.number > number and use.number not in self.taken
            whole = set(mine.contracted) == set(side.free) and set(mine.batch) == set(side.batch)
            if later and whole and side.free:
                found.append(use)
        return found

    def _out(
        self, number: int, left: GroupedAxes, right: GroupedAxes, swapped: bool
    ) -> GroupedAxes:
        """How an equation's result is read as (rows of `left`, columns of `right`)."""
        lhs, rhs = self.sides[number]
        mine, other = (rhs, lhs) if swapped else (lhs, rhs)
        count = len(lhs.batch)
        starts = (count, count + len(lhs.free))
        first, second = starts[::-1] if swapped else starts
        return GroupedAxes(
            tuple(self.eqns[number].outvars[0].aval.shape),
            tuple(mine.batch.index(i) for i in left.batch),
            tuple(first + mine.free.index(i) for i in left.first),
            tuple(second + other.free.index(i) for i in right.second),
        )

    # Convolutions

    def _convolution_family(self, number: int) -> Family | None:
        eqn = self.eqns[number]
        params = eqn.params
        if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
            return None
        if not all(isinstance(v, Var) for v in eqn.invars):
            return None
        x, w = eqn.invars
        shape = tuple(eqn.outvars[0].aval.shape)
        window = Window(eqn)
        if window.taps > MAX_TAPS or 0 in x.aval.shape or 0 in w.aval.shape or 0 in shape:
            return None
        gradients = self._convolution_gradients(number)
        first, *others = (
            _convolution(number, x, w, window.forms(shifted), gradients)
            for shifted in window.choices()
        )
        return dataclasses.replace(first, others=tuple(others))

    def _convolution_gradients(
        self, number: int
    ) -> tuple[tuple[int, Var] | None, tuple[int, Var] | None]:
        """Numbers of dX's and dW's equations with their G, found by what JAX would trace."""
        eqn = self.eqns[number]
        x, w = eqn.invars
        to_x, to_w = reference_gradients(eqn)
        found: list[tuple[int, Var] | None] = [None, None]
        # dW first: its operand X names this convolution, and G then names dX among W's uses.
        for place, reference, known in ((1, to_w, x), (0, to_x, w)):
            if reference is None:
                continue
            position, reversed_axes, params, shape = reference
            for later in range(number + 1, len(self.eqns)):
                other = self.eqns[later]
                if other.primitive is not conv_p or later in self.taken:
                    continue
                if tuple(other.outvars[0].aval.shape) != shape or other.params != params:
                    continue
                operand, g = other.invars[position], other.invars[1 - position]
                if reversed_axes is not None:
                    maker = self.made_by.get(operand)
                    if maker is None or maker.primitive is not prims.rev_p:
                        continue
                    if tuple(maker.params["dimensions"]) != reversed_axes:
                        continue
                    operand = maker.invars[0]
                if operand is not known or not isinstance(g, Var):
                    continue
                settled = found[1]
                if settled is not None and settled[1] is not g:
                    continue
                found[place] = (later, g)
                break
        return found[0], found[1]


def _convolution(
    number: int,
    x: Var,
    w: Var,
    forms: ConvolutionForms,
    gradients: tuple[tuple[int, Var] | None, tuple[int, Var] | None],
) -> Family:
    """A convolution's family with these forms, and with dX's and dW's equations and their G."""
    operands = {"x": MatrixOperand(x, forms.x), "w": MatrixOperand(w, forms.w)}
    members = {number: Member(*FORWARD, forms.out)}
    to_x, to_w = gradients
    chosen = to_w if to_w is not None else to_x
    if chosen is not None:
        g = chosen[1]
        operands["g"] = MatrixOperand(g, forms.out)
        if to_x is not None and to_x[1] is g:
            members[to_x[0]] = Member(*TO_INPUT, forms.x)
        if to_w is not None:
            members[to_w[0]] = Member(*TO_WEIGHT, forms.w)
    return Family(members, operands)


# Axes of `dot_general`


def _sides(eqn: JaxprEqn) -> tuple[_ProductSide, _ProductSide]:
    contracted, batch = eqn.params["dimension_numbers"]
    sides = []
    for v, c, b in zip(eqn.invars, contracted, batch, strict=True):
        free = tuple(i for i in range(len(v.aval.shape)) if i not in {*c, *b})
        sides.append(_ProductSide(v, tuple(b), tuple(c), free))
    return sides[0], sides[1]


def _shape(side: _ProductSide) -> tuple[int, ...]:
    return tuple(side.variable.aval.shape)


def _length(side: _ProductSide, axes: Sequence[int]) -> int:
    return math.prod(side.variable.aval.shape[i] for i in axes)


def _batches(pair: tuple[_ProductSide, _ProductSide]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return pair[0].batch, pair[1].batch


def _matched(wanted: Sequence[int], mine: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """The axes of `other` that are paired with `wanted`, a reordering of `mine`."""
    pairs = dict(zip(mine, other, strict=True))
    return tuple(pairs[i] for i in wanted)
