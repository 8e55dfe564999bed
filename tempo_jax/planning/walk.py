"""One walk through a program: who evaluates each equation, given what earlier walks demoted.

A walk is optimistic. It offloads every product that may go out and leaves to the host what commutes
with the blinding; whether the whole holds together is for `planning.placement` to judge, which
walks again with more demoted if it does not. Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from jax.extend.core import primitives as prims

from tempo_jax.equivariance.classes import Axes, Demand, Keying
from tempo_jax.equivariance.operands import Context, NotEquivariantError, Operand
from tempo_jax.equivariance.product_rules import PRODUCTS
from tempo_jax.equivariance.rules import commute, is_zero
from tempo_jax.jaxprs.equations import source
from tempo_jax.jaxprs.primitives import cheap_p, reveal_p
from tempo_jax.jaxprs.products import description, feeds_update, is_product, variables
from tempo_jax.jaxprs.types import Jaxpr, JaxprEqn, Literal, Var, array_type
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.following import followable, unfollowed_product
from tempo_jax.schemes import Scheme

# The reason of what was refused because something before it was.
FOLLOWS = "another operand is inside the enclave"
_NOT_FOLLOWED = "verify=True follows linear updates on the devices alone"


def _refusal(scheme: Scheme, eqn: JaxprEqn) -> str | None:
    """Why the scheme's devices cannot compute a product, if they cannot."""
    lhs, rhs = (array_type(v.aval) for v in eqn.invars)
    terms, _ = description(eqn).sizes(lhs.shape, rhs.shape)
    return scheme.refuses(lhs, rhs, array_type(eqn.outvars[0].aval), terms)


class Side(enum.Enum):
    """Who evaluates an equation."""

    ANYONE = "anyone"  # it depends on literals only
    ENCLAVE = "enclave"
    HOST = "host"


@dataclasses.dataclass(frozen=True)
class Question:
    """What placement is asked.

    Attributes:
      jaxpr: flat program.
      carried: for each input that is a leaf of the carried state, its output's position.
      on_devices: inputs that already lie blinded on the devices.
      scheme: the blinding scheme.
      costs: the cost model; None offloads every product that can be.
      offload: whether products are offloaded at all.
      stays: for each product in order why it stays inside whatever it costs, else None; under
        keys per product the cost is decided as well.
      verify: whether the enclave checks what comes back, so that the host may do nothing but
        products, and updates of leaves that a checksum can follow.
      barred: inputs that may not stay on the devices, with the reason.
    """

    jaxpr: Jaxpr
    carried: Mapping[int, int]
    on_devices: frozenset[int]
    scheme: Scheme
    costs: CostModel | None
    offload: bool
    stays: Sequence[str | None]
    verify: bool = False
    barred: Mapping[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Demotions:
    """What earlier walks found not to work out.

    Attributes:
      banned: equations that are the enclave's, with the reason.
      loose: selections that are let pass with the signs of their result left open.
      resident: leaves that may still lie on the devices, by input position.
      reasons: why other candidates may not.
    """

    banned: Mapping[int, str]
    loose: frozenset[int]
    resident: frozenset[int]
    reasons: Mapping[int, str]


class Facts:
    """What is true of a program in every walk.

    Attributes:
      question: what is asked.
      eqns: the program's equations.
      inputs: its inputs.
      outputs: its outputs.
      order: the number of the equation that makes a value.
      cheap: values that descend from a marked update.
      to_update: values that reach a marked update through unary equations alone.
    """

    def __init__(self, question: Question):
        """Reads the program once."""
        self.question = question
        self.eqns = question.jaxpr.eqns
        self.inputs = question.jaxpr.invars
        self.outputs = question.jaxpr.outvars
        self.order = {v: n for n, eqn in enumerate(self.eqns) for v in eqn.outvars}
        self.to_update = feeds_update(self.eqns)
        self.cheap: set[Var] = set()
        for eqn in self.eqns:
            if eqn.primitive is cheap_p or any(v in self.cheap for v in variables(eqn)):
                self.cheap |= set(eqn.outvars)


class Walk:
    """One walk, and what it found.

    Attributes:
      facts: of the program.
      demotions: what it started from.
      keying: classes of axes, and demands on their parities.
      sides: who evaluates each equation.
      axes: of every value that exists on the host.
      host: values that the host computes or holds, as opposed to those it is sent.
      leaves: for values made of resident leaves alone, which these are.
      sent: products with an operand that the enclave blinds for them.
      kept_inside: why a product stays in the enclave, by equation.
      too_dear: products that cost more outside than inside, with the reason.
      refused: why the host was refused the equation that makes a value.
    """

    def __init__(self, facts: Facts, demotions: Demotions):
        """Walks."""
        self.facts = facts
        self.question = facts.question
        self.demotions = demotions
        self.keying = Keying(self.question.scheme.group)
        self.sides: list[Side] = []
        self.axes: dict[Var, Axes] = {}
        self.host: set[Var] = set()
        self.leaves: dict[Var, frozenset[int]] = {}
        self.sent: set[int] = set()
        self.kept_inside: dict[int, str] = {}
        self.too_dear: dict[int, str] = {}
        self.refused: dict[Var, str] = {}
        self._anyone: dict[Var, Axes | None] = {}
        self._zero: set[Var] = set()
        self._followed: set[Var] = set()  # what a checksum can follow
        self._uses = self._product_uses()
        for index in sorted(demotions.resident):
            variable = facts.inputs[index]
            self.axes[variable] = self.keying.leaf(variable.aval.shape)
            self.host.add(variable)
            self._followed.add(variable)
            self.leaves[variable] = frozenset([index])
        for number, eqn in enumerate(facts.eqns):
            self.sides.append(self._side(number, eqn))

    @functools.cached_property
    def solution(self) -> tuple[dict[int, int], tuple[Demand, ...]]:
        """The parities that meet all demands made so far; see `Keying.solve`."""
        return self.keying.solve()

    def _product_uses(self) -> dict[Var, int]:
        """How many products that may go out use a value: each that stays makes others dearer."""
        uses: dict[Var, int] = {}
        for number, eqn in enumerate(self.facts.eqns):
            if is_product(eqn) and number not in self.demotions.banned:
                for v in set(variables(eqn)):
                    uses[v] = uses.get(v, 0) + 1
        return uses

    def _side(self, number: int, eqn: JaxprEqn) -> Side:
        operands = variables(eqn)
        if eqn.primitive is not reveal_p and all(v in self._anyone for v in operands):
            self._known_to_anyone(number, eqn)
            return Side.ANYONE
        if eqn.primitive is reveal_p or number in self.demotions.banned:
            self._refuse(eqn, self.demotions.banned.get(number, "it is revealed"))
            if is_product(eqn):
                self.kept_inside[number] = self.demotions.banned[number]
            return Side.ENCLAVE
        on_host = [v for v in operands if v in self.host]
        try:
            if is_product(eqn) and len(on_host) < len(operands):
                self._product(number, eqn)
            elif on_host and self._may_commute(eqn):
                self._commuting(number, eqn)
            else:
                return Side.ENCLAVE
        except NotEquivariantError as error:
            self._refuse(eqn, str(error))
            if is_product(eqn):
                self.kept_inside[number] = str(error)
            return Side.ENCLAVE
        out = eqn.outvars[0]
        self.host.add(out)
        if not (is_product(eqn) and on_host):
            self._followed.add(out)
        if self._of_leaves_alone(operands):
            sources = [self.leaves[v] for v in operands if v in self.leaves]
            self.leaves[out] = frozenset().union(*sources)
        return Side.HOST

    def _of_leaves_alone(self, operands: Sequence[Var]) -> bool:
        return all(v in self.leaves or v in self._anyone for v in operands)

    def _may_commute(self, eqn: JaxprEqn) -> bool:
        """Whether the scheme leaves equations besides products to the host."""
        scheme = self.question.scheme
        if scheme.products_alone:
            return False
        if scheme.group.orthogonal and not self.question.verify:
            return True
        # A value has one polarity, and what comes of an activation may be needed in the other.
        facts = self.facts
        return any(
            v in facts.cheap or v in facts.to_update or v in self.leaves
            for v in (*variables(eqn), *eqn.outvars)
        )

    def _refuse(self, eqn: JaxprEqn, reason: str) -> None:
        if any(v in self.host for v in variables(eqn)):
            for out in eqn.outvars:
                self.refused[out] = f"{reason}, at {source(eqn)}"

    def _known_to_anyone(self, number: int, eqn: JaxprEqn) -> None:
        axes: Axes | None = None
        try:
            operands = [self._operand(v) for v in eqn.invars]
            axes = commute(Context(self.keying, number, True), eqn, operands)
            if is_zero(eqn, operands):
                self._zero |= set(eqn.outvars)
        except NotEquivariantError:
            pass
        for v in eqn.outvars:
            constant = axes is not None and all(a.node is None for a in axes)
            self._anyone[v] = axes if constant else None

    def _operand(self, v: Var | Literal, update: bool = False) -> Operand:
        """An operand as the host has it.

        Raises:
          NotEquivariantError: the host does not have it in a usable form.
        """
        if isinstance(v, Literal):
            return Operand((), zero=not np.any(v.val), blinded=False)
        if v in self.host:
            return Operand(self.axes[v])
        if v in self._anyone:
            axes = self._anyone[v]
            if axes is None:
                raise NotEquivariantError("it meets a constant that varies along keyed axes")
            return Operand(axes, zero=v in self._zero, blinded=False)
        if update and not v.aval.shape:
            return Operand((), blinded=False)
        raise NotEquivariantError(FOLLOWS)

    def _product(self, number: int, eqn: JaxprEqn) -> None:
        """A product with at least one operand that the enclave would have to blind."""
        question = self.question
        if not question.offload:
            raise NotEquivariantError("placement is the enclave")
        if question.costs is not None and not question.scheme.keys_per_product:
            inside, outside = question.costs.inside(eqn), self._outside(eqn, question.costs)
            if not question.costs.worthwhile(inside, outside):
                self.too_dear[number] = question.costs.too_cheap(inside, outside)
                raise NotEquivariantError(self.too_dear[number])
        if question.verify:
            self._require_checkable(eqn)
        why = _refusal(question.scheme, eqn)
        if why is not None:
            raise NotEquivariantError(why)
        operands = []
        for v in eqn.invars:
            if isinstance(v, Literal):
                raise NotEquivariantError("an operand is a literal")
            if v not in self.axes:
                self.axes[v] = self.keying.fresh(v.aval.shape)
            operands.append(Operand(self.axes[v]))
        self.sent.add(number)
        rule = PRODUCTS[eqn.primitive]
        self.axes[eqn.outvars[0]] = rule(Context(self.keying, number, False), eqn, operands)

    def _outside(self, eqn: JaxprEqn, costs: CostModel) -> float:
        """Seconds that the enclave works for a product that goes out."""
        scheme, out = self.question.scheme, eqn.outvars[0]
        seconds = costs.latency + costs.check_of(eqn)
        for v in set(variables(eqn)) - self.host:
            seconds += costs.crossing(v.aval, scheme) / self._uses[v]
        if out not in self.facts.to_update or not self.demotions.resident:
            seconds += costs.crossing(out.aval, scheme, product=True)
        return seconds

    def _require_checkable(self, eqn: JaxprEqn) -> None:
        """Refuses a product that the enclave could not check."""
        for which, v in enumerate(eqn.invars):
            if isinstance(v, Var) and v in self.host:
                if v not in self.leaves:
                    raise NotEquivariantError("verify=True checks products of what was sent alone")
                why = unfollowed_product(eqn, which)
                if why is not None:
                    raise NotEquivariantError(why)

    def _commuting(self, number: int, eqn: JaxprEqn) -> None:
        given, out = variables(eqn), eqn.outvars[0]
        update = any(v in self.facts.cheap for v in eqn.outvars) or self._of_leaves_alone(given)
        inside = [v for v in given if v not in self.host and v not in self._anyone]
        if eqn.primitive is prims.select_n_p and eqn.invars[0] in inside and not update:
            raise NotEquivariantError("the condition that selects it is inside the enclave")
        if inside and not out.aval.shape:
            raise NotEquivariantError("a scalar is computed inside when any part of it is")
        operands = [self._operand(v, update) for v in eqn.invars]
        if self.question.verify and not followable(eqn, self._followed):
            raise NotEquivariantError(_NOT_FOLLOWED)
        context = Context(self.keying, number, update, number in self.demotions.loose)
        self.axes[out] = commute(context, eqn, operands)
        for v in inside:
            self.axes[v] = ()
