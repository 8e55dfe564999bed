"""What rules about blinded operands work with: operands, their context, and refusal.

Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tempo_jax.equivariance.classes import ONE, Axes, Axis, Keying


class NotEquivariantError(Exception):
    """An equation does not commute with the blinding; the text says why."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand of an equation on the host.

    Attributes:
      axes: its axes; all without a node for values that are constant along them.
      zero: whether it is known to be zero, which fits any parity and any class.
      blinded: whether it is a blinded value, as opposed to a scalar or a constant.
    """

    axes: Axes
    zero: bool = False
    blinded: bool = True


@dataclasses.dataclass(frozen=True)
class Context:
    """What a rule may use.

    Attributes:
      keying: classes and demands so far.
      equation: the equation's number.
      update: whether the rules for updates apply.
      loose: whether a selection between a signed value and a constant is let pass, its
        parity left open.
    """

    keying: Keying
    equation: int
    update: bool
    loose: bool = False

    def need_elementwise(self, what: str, operands: Sequence[Operand]) -> None:
        """Refuses an elementwise function where the group mixes or scales what it is applied to."""
        self.need_update(what)
        if not self.keying.group.elementwise and self.any_keyed(operands):
            raise NotEquivariantError(f"{what} does not commute with {self.keying.group.value}")

    def any_keyed(self, operands: Sequence[Operand]) -> bool:
        """Whether any axis of the operands carries a key, as far as is known."""
        return any(self.keying.keyed(a.node) for o in operands for a in o.axes)

    def need_update(self, what: str) -> None:
        """Refuses a nonlinear rule outside an update."""
        if not self.update:
            raise NotEquivariantError(f"{what} is not linear")

    def need_signs_alone(self, axis: Axis, what: str) -> None:
        """Refuses what only vanishing parities could let pass, where parities are polarities."""
        if not self.keying.group.orthogonal and self.keying.keyed(axis.node):
            raise NotEquivariantError(f"{what} does not commute with {self.keying.group.value}")

    def need_square(self, axes: Sequence[Axis], what: str) -> None:
        """Refuses to multiply values along a keyed axis, unless as the terms of an inner product.

        Under orthogonal keys the products of two linear values are no value's blinding, but
        their sum along the axis is invariant; parity 0 keeps them for that sum.
        """
        group = self.keying.group
        if group.elementwise or not any(self.keying.keyed(a.node) for a in axes):
            return
        if not group.orthogonal:
            raise NotEquivariantError(f"{what} does not commute with {group.value}")
        for axis in axes:
            self.need_parity(axis, ONE, f"{what} of a square, which only a sum may use")

    def need_parity(self, axis: Axis, parity: int, reason: str) -> None:
        """Demands that an axis has this parity."""
        self.keying.demand(axis.parity ^ parity, axis.node, self.equation, reason)

    def match(self, axes: Sequence[Axis], reason: str) -> Axis:
        """One axis for values that are combined element by element."""
        nodes = [a for a in axes if a.node is not None]
        if not nodes:
            return axes[0]
        first = nodes[0]
        for other in nodes[1:]:
            assert first.node is not None and other.node is not None
            if self.keying.same(first.node, other.node):
                # Unkeyed now is unkeyed for good, so joining loses nothing.
                self.keying.join(first.node, other.node)
            elif self.update:
                self.keying.join(first.node, other.node)
            else:
                raise NotEquivariantError(f"{reason} combines values under different keys")
        return first
