"""What the host does to leaves that stay on the devices, as far as a checksum follows it.

An *update* is one linear equation on the host: a product of two values that the enclave sent, a
sum, a multiple by a number that the enclave knows, a change of layout. A *projection* of an
array is a tuple of its axes: those that a checksum combines with random signs, see `checksum`.
Projections travel backwards through updates: who wants a result projected along some axes wants
its operands projected along the axes that become them. Descriptions alone, without secret state;
the planner makes them, `program` checks them, `checksum` carries them out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from enclave_runtime.protocol.descriptions import Convolution, ProductDescription, decode_product
from enclave_runtime.protocol.fields import MAX_RANK, ProgramError, items, natural, require

PRODUCT, ADD, SUB, NEG, SCALE, DIVIDE = "product", "add", "sub", "neg", "scale", "divide"
TRANSPOSE, REVERSE, CONVERT = "transpose", "reverse", "convert"
_OPERANDS = {
    **dict.fromkeys((PRODUCT, ADD, SUB), 2),
    **dict.fromkeys((NEG, TRANSPOSE, REVERSE, CONVERT), 1),
}
MAX_UPDATES = 1 << 16
MAX_PROJECTIONS = 8

AxisNumbers = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Update:
    """One linear equation of the host.

    Attributes:
      value: number of the result.
      kind: which equation.
      operands: numbers of its operands. A multiple has one and, where the number is not
        `factor`, the scalar that the enclave sends in the clear.
      shape: of the result.
      dtype: of the result.
      product: which product it is, if it is one.
      axes: the permutation of a transposition, or the axes that are reversed.
      factor: a number known beforehand.
      source: the equation and its line as the client knows them, for an error's text alone.
    """

    value: Any
    kind: str
    operands: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: str
    product: ProductDescription | None = None
    axes: AxisNumbers = ()
    factor: float | None = None
    source: str = ""

    @property
    def followed(self) -> tuple[Any, ...]:
        """Operands that are leaves or made of them, as opposed to what the enclave sent."""
        if self.kind == PRODUCT:
            return ()
        return self.operands[:1] if self.kind in (SCALE, DIVIDE) else self.operands

    @classmethod
    def decode(cls, fields: Any, max_value: int, max_source: int) -> Update:
        """Reads what `dataclasses.asdict` wrote; what depends on others is for `check`."""
        require(isinstance(fields, dict), "an update is not an object")
        kind, operands = fields.get("kind"), items(fields.get("operands"), "operands")
        scaled = kind in (SCALE, DIVIDE)
        known = isinstance(kind, str) and (scaled or kind in _OPERANDS)
        require(known, "an update is of an unknown kind")
        factor = fields.get("factor")
        if factor is not None:
            require(scaled and type(factor) is float, "an update's factor is not a number")
            require(math.isfinite(factor), "an update's factor is not finite")
        count = 1 + (factor is None) if scaled else _OPERANDS[kind]
        require(len(operands) == count, "an update has another number of operands")
        product, source = fields.get("product"), fields.get("source")
        require((product is None) == (kind != PRODUCT), "an update and its product do not agree")
        require(isinstance(source, str) and len(source) <= max_source, "a source is too long")
        require(fields.get("dtype") in ("float32", "float64"), "an update has too few digits")
        shape, axes = (items(fields.get(name), name) for name in ("shape", "axes"))
        require(max(len(shape), len(axes)) <= MAX_RANK, "a rank is too large")
        return cls(
            natural(fields.get("value"), max_value, "a value"),
            kind,
            tuple(natural(v, max_value, "an operand") for v in operands),
            tuple(natural(n, 1 << 40, "a dimension") for n in shape),
            fields["dtype"],
            None if product is None else decode_product(product),
            tuple(natural(a, MAX_RANK, "an axis") for a in axes),
            factor,
            source,
        )

    def check(
        self, shapes: Mapping[int, AxisNumbers], sent: Iterable[int], scalars: Iterable[int]
    ) -> None:
        """Raises `ProgramError` unless its operands are known and fit.

        Args:
          shapes: of what is followed so far.
          sent: values that the enclave sends blinded.
          scalars: values that it sends in the clear and that are numbers.
        """
        require(self.value not in shapes, "an update makes what is there")
        if self.kind == PRODUCT:
            require(set(self.operands) <= set(sent), "an update multiplies what was not sent")
            return  # that it fits its operands is for `following.check_program`
        known = all(v in shapes for v in self.followed)
        require(known, "an update reads what cannot be followed")
        if self.kind in (SCALE, DIVIDE):
            sent_factor = self.factor is not None or self.operands[1] in set(scalars)
            require(sent_factor, "an update multiplies by what the enclave does not send")
            require(self.kind == SCALE or self.factor != 0, "an update divides by zero")
        shape = shapes[self.operands[0]]
        rank = len(shape)
        if self.kind == TRANSPOSE:
            require(sorted(self.axes) == list(range(rank)), "an update's axes are not an order")
            shape = tuple(shape[a] for a in self.axes)
        elif self.kind == REVERSE:
            inside = len(set(self.axes)) == len(self.axes) and all(a < rank for a in self.axes)
            require(inside, "an update reverses axes that are not there")
        fits = shape == self.shape and all(
            shapes[v] == shapes[self.operands[0]] for v in self.followed
        )
        require(fits, "an update does not have its operands' shape")


def decode_projections(fields: Any, rank: int) -> tuple[AxisNumbers, ...]:
    """Reads the projections of an array with so many axes."""
    listed = items(fields, "projections")
    require(len(listed) <= MAX_PROJECTIONS, "a port has too many projections")
    decoded = tuple(
        tuple(natural(a, max(rank, 1), "an axis") for a in items(axes, "axes")) for axes in listed
    )
    for axes in decoded:
        require(0 < len(axes) <= rank, "a projection has no axis")
        require(len(set(axes)) == len(axes), "a projection names an axis twice")
    require(len(set(decoded)) == len(decoded), "a port has a projection twice")
    return decoded


# Projections through products


def free_axes(
    product: ProductDescription, ranks: tuple[int, int], which: int
) -> tuple[AxisNumbers, AxisNumbers]:
    """Axes of a product's result that one operand alone brings, and that operand's.

    Args:
      product: the product.
      ranks: of its operands.
      which: 0 for the left operand, 1 for the right.

    Raises:
      ProgramError: the product is grouped.
    """
    if isinstance(product, Convolution):
        require(product.groups == 1, "a grouped convolution cannot be followed")
        return (product.out[which],), ((product.lhs, product.rhs)[which][0],)
    free = [
        [i for i in range(rank) if i not in {*contract, *batch}]
        for rank, contract, batch in zip(ranks, product.contract, product.batch, strict=True)
    ]
    start = len(product.batch[0]) + which * len(free[0])
    return tuple(range(start, start + len(free[which]))), tuple(free[which])


def owner(
    product: ProductDescription, ranks: tuple[int, int], axes: AxisNumbers
) -> tuple[int, AxisNumbers]:
    """Which operand of a product brings all of these axes of its result, and as which of its own.

    Raises:
      ProgramError: none does.
    """
    for which in (0, 1):
        outer, inner = free_axes(product, ranks, which)
        if axes and set(axes) <= set(outer):
            return which, tuple(inner[outer.index(a)] for a in axes)
    raise ProgramError("a projection crosses a product's operands")


def before(update: Update, axes: AxisNumbers) -> AxisNumbers:
    """The operands' projection that gives the result's; for all but products.

    Raises:
      ProgramError: there is none.
    """
    if update.kind == TRANSPOSE:
        return tuple(update.axes[a] for a in axes)
    if update.kind == REVERSE:
        require(not set(update.axes) & set(axes), "a projection is reversed")
    return axes


class Needs:
    """The projections that every followed value needs, and which of them share their signs."""

    def __init__(self, updates: Sequence[Update], ranks: Mapping[Any, int]):
        """Starts without any.

        Args:
          updates: in order.
          ranks: numbers of axes of what the enclave sends, for the operands of products.
        """
        self._made = {u.value: u for u in updates}
        self._order = {u.value: n for n, u in enumerate(updates)}
        self._ranks = ranks
        self.of: dict[Any, dict[AxisNumbers, None]] = {}
        self._parents: dict[tuple[Any, AxisNumbers], tuple[Any, AxisNumbers]] = {}

    def want(self, value: Any, axes: AxisNumbers) -> None:
        """A followed value is needed in this projection.

        Raises:
          ProgramError: it cannot be had.
        """
        pending = [(value, axes)]
        while pending:
            value, axes = pending.pop()
            known = self.of.setdefault(value, {})
            if axes in known:
                continue
            known[axes] = None
            update = self._made.get(value)
            if update is None:
                continue
            if update.product is not None:
                left, right = (self._ranks[v] for v in update.operands)
                owner(update.product, (left, right), axes)
                continue
            for operand in update.followed:
                earlier = (operand, before(update, axes))
                self._parents[self.group(*earlier)] = self.group(value, axes)
                pending.append(earlier)

    def group(self, value: Any, axes: AxisNumbers) -> tuple[Any, AxisNumbers]:
        """The representative of all projections that share this one's signs."""
        node = (value, axes)
        while self._parents.get(node, node) != node:
            node = self._parents[node]
        return node
