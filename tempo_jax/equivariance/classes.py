"""Key classes: which axes of which blinded values must share one key.

Every axis of every blinded value is a node; a linear operation forces equalities between nodes, and
union-find gives the classes. Two layers never come to share a class through a nonlinearity, because
only equations that run on blinded values force anything, and activations run in the enclave.

Beside its class an axis has a *parity*: the power, modulo 2, at which the key acts on it. For
signed permutations it says how often the element's sign divides the value (1 for a gradient, 0 for
its square), for orthogonal keys whether the value is linear (1) or a square that waits to be summed
(0), and for a group with two polarities whether the key acts (1) or its inverse transpose (0). What
is not yet known is solved for: a parity is a linear form over GF(2), an int whose bit 0 is the
constant 1 and whose other bits stand for unknowns. Equations demand that forms vanish;
`Keying.solve` finds the first demand that cannot be met.

Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tempo_jax.schemes import Group

ONE = 1  # the constant parity


class Axis(NamedTuple):
    """One axis of a value on the host.

    Attributes:
      node: its node, or None where the value is constant along the axis.
      parity: a linear form over GF(2).
    """

    node: int | None
    parity: int


Axes = tuple[Axis, ...]


class Demand(NamedTuple):
    """A parity that must vanish, if parities turn out to matter on the axis's class.

    Attributes:
      parity: a linear form over GF(2).
      node: the axis's.
      reason: what it means if it cannot vanish.
      equation: the equation that demands it, if it is one's.
      leaf: the leaf of the state that does, by its input's position, if it is one's.
    """

    parity: int
    node: int
    reason: str
    equation: int | None = None
    leaf: int | None = None


@dataclasses.dataclass
class _Class:
    size: int
    keyed: bool = True
    batch: bool = False


class Keying:
    """Nodes, their classes, and demands on parities, for one placement.

    Attributes:
      group: what the keys form.
    """

    def __init__(self, group: Group = Group.SIGNED_PERMUTATION) -> None:
        self.group = group
        self._parent: list[int] = []
        self._classes: dict[int, _Class] = {}
        self._unknowns = 0
        self._unsettled: dict[int, int] = {}  # bit of a parity → equation that left it open
        self._demands: list[Demand] = []

    @property
    def _by_element(self) -> bool:
        return self.group is Group.ADDITIVE

    # Nodes

    def node(self, size: int) -> int:
        """A new node; axes of size 0 and 1 have nothing to permute and carry no key.

        Under shares every axis counts as keyed, since elements are hidden and not their order.
        """
        number = len(self._parent)
        self._parent.append(number)
        self._classes[number] = _Class(size, keyed=size > 1 or self._by_element)
        return number

    def fresh(self, shape: Sequence[int]) -> Axes:
        """Axes of a value that the enclave blinds, in whichever polarity its use demands."""
        if not self.group.orthogonal:
            return self._unknown(shape)
        return tuple(Axis(self.node(n), ONE) for n in shape)

    def leaf(self, shape: Sequence[int]) -> Axes:
        """Axes of a leaf of the state, whose parities may still be unknown."""
        if self.group is Group.ORTHOGONAL:
            return self.fresh(shape)
        return self._unknown(shape)

    def _unknown(self, shape: Sequence[int]) -> Axes:
        axes = []
        for n in shape:
            self._unknowns += 1
            axes.append(Axis(self.node(n), 1 << self._unknowns))
        return tuple(axes)

    def find(self, node: int) -> int:
        """The representative of a node's class."""
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def join(self, a: int, b: int) -> None:
        """Puts two nodes into one class."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        low, high = min(a, b), max(a, b)
        kept, gone = self._classes[low], self._classes.pop(high)
        assert kept.size == gone.size, "axes of different sizes cannot share a key"
        self._parent[high] = low
        kept.keyed &= gone.keyed
        kept.batch |= gone.batch

    def strip_key(self, node: int) -> None:
        """This class carries no key at all."""
        if not self._by_element:
            self._classes[self.find(node)].keyed = False

    def mark_batch(self, node: int) -> None:
        """A product runs over this class as a batch, so it carries a permutation alone."""
        self._classes[self.find(node)].batch = True

    def keyed(self, node: int | None) -> bool:
        """Whether a node's class carries a key, as far as is known."""
        return node is not None and self._classes[self.find(node)].keyed

    def batch(self, node: int) -> bool:
        """Whether a node's class carries a permutation alone, as far as is known."""
        return self._classes[self.find(node)].batch

    def has_parity(self, node: int | None) -> bool:
        """Whether parities matter on a node's class, as far as is known."""
        return node is not None and self.keyed(node) and not self.batch(node)

    def same(self, a: int | None, b: int | None) -> bool:
        """Whether two axes are blinded alike: one class, or neither carries a key."""
        if a is None or b is None:
            return not self.keyed(a) and not self.keyed(b)
        return self.find(a) == self.find(b) or not (self.keyed(a) or self.keyed(b))

    def size(self, node: int) -> int:
        """Length of the axes of a node's class."""
        return self._classes[self.find(node)].size

    # Parities

    def demand(self, parity: int, node: int | None, equation: int, reason: str) -> None:
        """Demands that `parity` vanishes on this axis, for an equation's sake."""
        if node is not None and parity:
            self._demands.append(Demand(parity, node, reason, equation=equation))

    def demand_of_leaf(self, parity: int, node: int, leaf: int, reason: str) -> None:
        """Demands that `parity` vanishes on an axis of a leaf of the state."""
        if parity:
            self._demands.append(Demand(parity, node, reason, leaf=leaf))

    def unsettled(self, equation: int) -> int:
        """A parity that differs from one run to the next, so that no demand can settle it.

        It may only vanish, in an even function or a product with itself.
        """
        self._unknowns += 1
        self._unsettled[self._unknowns] = equation
        return 1 << self._unknowns

    def left_open(self, parity: int, pivots: Mapping[int, int]) -> int | None:
        """The equation that left a parity open, if any did."""
        form = reduce_form(parity, pivots)
        return next((e for bit, e in self._unsettled.items() if form >> bit & 1), None)

    def solve(self) -> tuple[dict[int, int], tuple[Demand, ...]]:
        """Solves the demands in order by elimination over GF(2).

        Demands on different classes have no unknown in common.

        Returns:
          A row of the reduced system for each pivot bit, and for each class the first demand that
          contradicts those before it, if any.
        """
        pivots: dict[int, int] = {}
        contradictions: dict[int, Demand] = {}
        for demand in self._demands:
            root = self.find(demand.node)
            if not self.has_parity(demand.node) or root in contradictions:
                continue
            form = reduce_form(demand.parity, pivots)
            culprit = self.left_open(form, pivots)
            if culprit is not None:
                contradictions[root] = demand._replace(equation=culprit, leaf=None)
            elif form == ONE:
                contradictions[root] = demand
            elif form:
                pivots[form.bit_length() - 1] = form
        return pivots, tuple(contradictions.values())


def reduce_form(form: int, pivots: Mapping[int, int]) -> int:
    """The form with every pivot's unknown eliminated."""
    rest = form & ~ONE
    while rest:
        bit = rest.bit_length() - 1
        form ^= pivots.get(bit, 0)
        rest = form & ((1 << bit) - 2)  # what lies below, without the constant
    return form


def resolve_parity(form: int, pivots: Mapping[int, int]) -> int:
    """The parity, 0 or 1; unknowns that nothing determines count as 1."""
    return reduce_form(form, pivots).bit_count() % 2
