"""Where each equation runs, which leaves live on the devices, and under which keys.

Placement is a fixpoint. It starts optimistically (every candidate leaf on the devices, every
worthwhile product offloaded), walks the program once, and demotes what did not work out: a leaf
that a trusted equation needs, an equation that does not commute with the blinding. Then it walks
again, until nothing is left to demote. Untrusted and pure: the enclave checks what it is asked to
run, not why.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as prims

from tempo_jax.equivariance.classes import ONE, Axes, Keying, resolve_parity
from tempo_jax.equivariance.operands import Context, NotEquivariantError, Operand
from tempo_jax.equivariance.product_rules import PRODUCTS
from tempo_jax.equivariance.rules import commute, is_zero
from tempo_jax.jaxprs.equations import source
from tempo_jax.jaxprs.primitives import cheap_p, reveal_p
from tempo_jax.jaxprs.products import feeds_update, is_product
from tempo_jax.jaxprs.types import Jaxpr, JaxprEqn, Literal, Var, nbytes
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.following import followable, unfollowed_product
from tempo_jax.schemes import Group, Scheme


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
class Placement:
    """Where everything is.

    Attributes:
      sides: one for each equation.
      axes: axes of every value that exists on the host, blinded or scalar.
      host: values that the host computes or holds, as opposed to those it is sent.
      keying: their classes.
      pivots: the solved parities.
      resident: input positions of device-resident leaves.
      reasons: why a leaf that was a candidate lives in the enclave, by input position.
      kept_inside: why a product stays in the enclave, by equation.
      sent: offloaded products with an operand that the enclave blinds for them.
    """

    sides: tuple[Side, ...]
    axes: Mapping[Var, Axes]
    host: frozenset[Var]
    keying: Keying
    pivots: Mapping[int, int]
    resident: frozenset[int]
    reasons: Mapping[int, str]
    kept_inside: Mapping[int, str]
    sent: frozenset[int]

    def classes(self, variable: Var) -> tuple[int | None, ...]:
        """For each axis its key class's representative, or None without a key."""
        keying = self.keying
        return tuple(
            keying.find(a.node) if a.node is not None and keying.keyed(a.node) else None
            for a in self.axes[variable]
        )

    def parities(self, variable: Var) -> tuple[int, ...]:
        """For each axis whether signs apply."""
        pivots = dict(self.pivots)
        return tuple(
            resolve_parity(a.parity, pivots) if self.keying.has_parity(a.node) else 0
            for a in self.axes[variable]
        )


def place(question: Question) -> Placement:
    """Finds the greatest consistent placement; see the module."""
    return _Placer(question).solve()


def too_cheap(inside: float, outside: float) -> str:
    """Why a product stays inside, from the seconds that either way takes."""
    return (
        f"computing it inside takes about {inside * 1e3:.2g} ms, blinding and moving its operands "
        f"{outside * 1e3:.2g} ms"
    )


_NARROW = "verify=True keeps it inside: 16-bit formats round more than a checksum may let pass"
_NOT_FOLLOWED = "verify=True follows linear updates on the devices alone"


class _Placer:
    """State of the fixpoint: what was demoted so far, and facts that never change."""

    def __init__(self, question: Question):
        self.question = question
        self.eqns = question.jaxpr.eqns
        self.inputs = question.jaxpr.invars
        self.outputs = question.jaxpr.outvars
        self.order = {v: n for n, eqn in enumerate(self.eqns) for v in eqn.outvars}
        self.cheap = self._cheap_values()
        self.to_update = feeds_update(self.eqns)
        products = [n for n, eqn in enumerate(self.eqns) if is_product(eqn)]
        decided = zip(products, question.stays, strict=True)
        self.banned: dict[int, str] = {n: why for n, why in decided if why is not None}
        self.loose: set[int] = set()
        self.reasons: dict[int, str] = {}
        self.resident = self._candidates()

    def _cheap_values(self) -> set[Var]:
        """Values that descend from a marked update."""
        cheap: set[Var] = set()
        for eqn in self.eqns:
            if eqn.primitive is cheap_p or any(v in cheap for v in _variables(eqn)):
                cheap |= set(eqn.outvars)
        return cheap

    def _product_uses(self) -> dict[Var, int]:
        """How many products that may go out use a value."""
        uses: dict[Var, int] = {}
        for number, eqn in enumerate(self.eqns):
            if is_product(eqn) and number not in self.banned:
                for v in set(_variables(eqn)):
                    uses[v] = uses.get(v, 0) + 1
        return uses

    def _candidates(self) -> set[int]:
        question = self.question
        if not question.offload or question.scheme.key_budget == 0:
            return set()
        cheap = {
            i
            for i, o in question.carried.items()
            if isinstance(self.outputs[o], Var) and self.outputs[o] in self.cheap
        }
        candidates = {
            i
            for i in cheap | question.on_devices
            if jnp.issubdtype(self.inputs[i].aval.dtype, jnp.floating)
            and math.prod(self.inputs[i].aval.shape) > 1
        }
        barred = {i: why for i, why in question.barred.items() if i in candidates}
        if question.verify:
            narrow = {i for i in candidates if self.inputs[i].aval.dtype.itemsize < 4}
            barred |= dict.fromkeys(narrow, _NARROW)
        self.reasons.update(barred)
        return candidates - set(barred)

    def solve(self) -> Placement:
        while True:
            # Products that go out share operands: each that stays makes others dearer.
            self.uses = self._product_uses()
            walk = _Walk(self)
            if walk.too_dear:
                self.banned.update(walk.too_dear)
                continue
            demoted = walk.demotions()
            if demoted:
                self._demote(demoted)
                continue
            pivots, contradiction = walk.keying.solve()
            if contradiction is not None:
                if contradiction.equation < 0:
                    self._demote({-1 - contradiction.equation: contradiction.reason})
                else:
                    self._loosen_or_ban(contradiction.equation, contradiction.reason)
                continue
            open_crossings = walk.open_crossings(pivots)
            if open_crossings:
                self.banned.update(open_crossings)
                continue
            exposed = walk.exposed()
            if exposed:
                self.banned.update(exposed)
                continue
            unchecked = walk.unchecked() if self.question.verify else {}
            if unchecked:
                self.banned.update(unchecked)
                continue
            bare = walk.bare_leaves()
            if bare:
                self._demote(bare)
                continue
            walk.pull_inside()
            return Placement(
                tuple(walk.sides),
                walk.axes,
                frozenset(walk.host),
                walk.keying,
                pivots,
                frozenset(self.resident),
                self.reasons,
                walk.kept_inside,
                frozenset(walk.sent),
            )

    def _loosen_or_ban(self, number: int, reason: str) -> None:
        """Lets a selection pass loosely first; an equation that fails again is the enclave's."""
        if self.eqns[number].primitive is prims.select_n_p and number not in self.loose:
            self.loose.add(number)
        else:
            self.banned[number] = reason

    def _demote(self, leaves: Mapping[int, str]) -> None:
        self.resident -= set(leaves)
        self.reasons.update(leaves)


def _variables(eqn: JaxprEqn) -> list[Var]:
    return [v for v in eqn.invars if isinstance(v, Var)]


class _Walk:
    """One walk through the program under the current demotions."""

    def __init__(self, placer: _Placer):
        self.placer = placer
        self.question = placer.question
        self.keying = Keying(placer.question.scheme.group)
        self.sides: list[Side] = []
        self.axes: dict[Var, Axes] = {}
        self.host: set[Var] = set()
        self.anyone: dict[Var, Axes | None] = {}
        self.zero: set[Var] = set()
        self.leaves: dict[Var, frozenset[int]] = {}  # values made of resident leaves alone
        self.kept_inside: dict[int, str] = {}
        self.refused: dict[Var, str] = {}
        self.too_dear: dict[int, str] = {}  # products that cost more outside than inside
        self.sent: set[int] = set()  # products with an operand that the enclave blinds
        self.followed: set[Var] = set()  # what a checksum can follow
        for index in sorted(placer.resident):
            variable = placer.inputs[index]
            self.axes[variable] = self.keying.leaf(variable.aval.shape)
            self.host.add(variable)
            self.followed.add(variable)
            self.leaves[variable] = frozenset([index])
        for number, eqn in enumerate(placer.eqns):
            self.sides.append(self._side(number, eqn))

    # One equation

    def _side(self, number: int, eqn: JaxprEqn) -> Side:
        variables = _variables(eqn)
        if eqn.primitive is not reveal_p and all(v in self.anyone for v in variables):
            self._known_to_anyone(number, eqn)
            return Side.ANYONE
        if eqn.primitive is reveal_p or number in self.placer.banned:
            self._refuse(eqn, self.placer.banned.get(number, "it is revealed"))
            if is_product(eqn):
                self.kept_inside[number] = self.placer.banned[number]
            return Side.ENCLAVE
        on_host = [v for v in variables if v in self.host]
        try:
            if is_product(eqn) and len(on_host) < len(variables):
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
            self.followed.add(out)
        if all(v in self.leaves or v in self.anyone for v in variables):
            sources = [self.leaves[v] for v in variables if v in self.leaves]
            self.leaves[out] = frozenset().union(*sources)
        return Side.HOST

    def _may_commute(self, eqn: JaxprEqn) -> bool:
        """Whether the scheme leaves equations besides products to the host."""
        scheme = self.question.scheme
        if scheme.keys_per_product:
            return False
        if scheme.group.orthogonal and not self.question.verify:
            return True
        # A value has one polarity, and what comes of an activation may be needed in the other.
        related = self.placer.cheap | self.placer.to_update | set(self.leaves)
        return any(v in related for v in (*_variables(eqn), *eqn.outvars))

    def _refuse(self, eqn: JaxprEqn, reason: str) -> None:
        if any(v in self.host for v in _variables(eqn)):
            for out in eqn.outvars:
                self.refused[out] = f"{reason}, at {source(eqn)}"

    def _known_to_anyone(self, number: int, eqn: JaxprEqn) -> None:
        axes: Axes | None = None
        try:
            operands = [self._operand(v) for v in eqn.invars]
            axes = commute(Context(self.keying, number, True), eqn, operands)
            if is_zero(eqn, operands):
                self.zero |= set(eqn.outvars)
        except NotEquivariantError:
            pass
        for v in eqn.outvars:
            constant = axes is not None and all(a.node is None for a in axes)
            self.anyone[v] = axes if constant else None

    def _operand(self, v: Var | Literal, update: bool = False) -> Operand:
        """An operand as the host has it.

        Raises:
          NotEquivariantError: the host does not have it in a usable form.
        """
        if isinstance(v, Literal):
            return Operand((), zero=not np.any(v.val), blinded=False)
        if v in self.host:
            return Operand(self.axes[v])
        if v in self.anyone:
            axes = self.anyone[v]
            if axes is None:
                raise NotEquivariantError("it meets a constant that varies along keyed axes")
            return Operand(axes, zero=v in self.zero, blinded=False)
        if update and not v.aval.shape:
            return Operand((), blinded=False)
        raise NotEquivariantError("another operand is inside the enclave")

    def _product(self, number: int, eqn: JaxprEqn) -> None:
        """A product with at least one operand that the enclave would have to blind."""
        question, placer = self.question, self.placer
        if not question.offload:
            raise NotEquivariantError("placement is the enclave")
        if question.costs is not None and not question.scheme.keys_per_product:
            costs, scheme = question.costs, question.scheme
            outside = costs.latency + costs.check_of(eqn)
            for v in set(_variables(eqn)) - self.host:
                outside += costs.crossing(v.aval, scheme) / placer.uses[v]
            out = eqn.outvars[0]
            if out not in placer.to_update or not placer.resident:
                outside += costs.crossing(out.aval, scheme)
            inside = costs.inside(eqn)
            if not costs.worthwhile(inside, outside):
                self.too_dear[number] = too_cheap(inside, outside)
                raise NotEquivariantError(self.too_dear[number])
        if question.verify and any(v in self.host for v in _variables(eqn)):
            if any(v in self.host and v not in self.leaves for v in _variables(eqn)):
                raise NotEquivariantError("verify=True checks products of what was sent alone")
            which = next(i for i, v in enumerate(eqn.invars) if v in self.host)
            why = unfollowed_product(eqn, which)
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

    def _commuting(self, number: int, eqn: JaxprEqn) -> None:
        variables = _variables(eqn)
        update = any(v in self.placer.cheap for v in eqn.outvars) or all(
            v in self.leaves or v in self.anyone for v in variables
        )
        inside = [v for v in variables if v not in self.host and v not in self.anyone]
        if inside and not eqn.outvars[0].aval.shape:
            raise NotEquivariantError("a scalar is computed inside when any part of it is")
        operands = [self._operand(v, update) for v in eqn.invars]
        if self.question.verify and not followable(eqn, self.followed):
            raise NotEquivariantError(_NOT_FOLLOWED)
        context = Context(self.keying, number, update, number in self.placer.loose)
        self.axes[eqn.outvars[0]] = commute(context, eqn, operands)
        for v in inside:
            self.axes[v] = ()

    # What did not work out

    def demotions(self) -> dict[int, str]:
        """Leaves that cannot stay on the devices, with the reason."""
        placer, out = self.placer, {}
        for number, eqn in enumerate(placer.eqns):
            if self.sides[number] is Side.ENCLAVE:
                for v in _variables(eqn):
                    if v.aval.shape:
                        for leaf in self.leaves.get(v, ()):
                            why = self._cause(eqn)
                            out.setdefault(leaf, why)
        for index in sorted(placer.resident - set(out)):
            position = self.question.carried.get(index)
            if position is None:
                continue
            new = placer.outputs[position]
            if not isinstance(new, Var) or new not in self.host:
                out[index] = self._why_inside(new)
                continue
            old_axes, new_axes = self.axes[placer.inputs[index]], self.axes[new]
            for old, updated in zip(old_axes, new_axes, strict=True):
                assert old.node is not None
                if updated.node is None:
                    parity = old.parity
                else:
                    self.keying.join(old.node, updated.node)
                    parity = old.parity ^ updated.parity
                reason = "its new value carries other signs"
                self.keying.demand(parity, old.node, -1 - index, reason)
        return out

    def _cause(self, eqn: JaxprEqn) -> str:
        """The first equation that the host was refused among those that led to this one."""
        refused: dict[int, str] = {}
        pending, seen = [eqn], set()
        while pending:
            current = pending.pop()
            out = current.outvars[0]
            if out in seen:
                continue
            seen.add(out)
            if out in self.refused:
                number = self.placer.order[out]
                refused[number] = f"{current.primitive.name}: {self.refused[out]}"
            cheap = [v for v in _variables(current) if v in self.placer.cheap]
            pending += [self.placer.eqns[self.placer.order[v]] for v in cheap]
        return refused[min(refused)] if refused else "its gradient is computed in the enclave"

    def _why_inside(self, output: Var | Literal) -> str:
        """Why a leaf's new value is not on the host."""
        number = self.placer.order.get(output) if isinstance(output, Var) else None
        if number is None:
            return "its new value is an input that is inside the enclave"
        return self._cause(self.placer.eqns[number])

    def exposed(self) -> dict[int, str]:
        """Products that would show the host a value without any key on it."""
        out = {}
        for number, eqn in enumerate(self.placer.eqns):
            if self.sides[number] is not Side.HOST or number not in self.sent:
                continue
            for v in (*_variables(eqn), *eqn.outvars):
                if not any(self.keying.keyed(a.node) for a in self.axes[v]):
                    out[number] = "no axis of an operand or of the result can carry a key"
        return out

    def open_crossings(self, pivots: dict[int, int]) -> dict[int, str]:
        """Values that cannot be unblinded, yet would reach the enclave or an output."""
        leaving = {v for v in self.placer.outputs if v in self.host}
        for eqn, side in zip(self.placer.eqns, self.sides, strict=True):
            if side is Side.ENCLAVE:
                leaving |= {v for v in _variables(eqn) if v in self.host}
        out = {}
        for v in leaving:
            for axis in self.axes[v]:
                if not self.keying.has_parity(axis.node):
                    continue
                culprit = self.keying.left_open(axis.parity, pivots)
                if culprit is not None:
                    out[culprit] = "select_n mixes values whose signs differ"
                elif self.keying.group is Group.ORTHOGONAL and axis.parity != ONE:
                    out[self.placer.order[v]] = "a sum of squares over part of the mixed axes"
        return out

    def unchecked(self) -> dict[int, str]:
        """Equations of the host whose result the enclave needs though nothing checks it."""
        placer = self.placer
        kept = {placer.inputs[i] for i in placer.resident}
        kept |= {
            placer.outputs[o] for i, o in self.question.carried.items() if i in placer.resident
        }
        readers = {v: "an output" for v in placer.outputs if v in self.host and v not in kept}
        for eqn, side in zip(placer.eqns, self.sides, strict=True):
            if side is Side.ENCLAVE:
                inside = [v for v in _variables(eqn) if v in self.host]
                readers.update(dict.fromkeys(inside, f"`{eqn.primitive.name}` in the enclave"))
        made = {placer.order[v]: reader for v, reader in readers.items() if v in placer.order}
        return {
            n: f"{reader} reads it, and verify=True can check products alone"
            for n, reader in made.items()
            if not is_product(placer.eqns[n])
        }

    def bare_leaves(self) -> dict[int, str]:
        """Resident leaves none of whose axes carries a key."""
        return {
            index: "none of its axes can carry a key"
            for index in self.placer.resident
            if not any(self.keying.keyed(a.node) for a in self.axes[self.placer.inputs[index]])
        }

    def pull_inside(self) -> None:
        """Moves layout equations into the enclave that would only make an upload larger."""
        placer = self.placer
        stays = {
            placer.outputs[o] for i, o in self.question.carried.items() if i in placer.resident
        }
        on_host_uses: set[Var] = set()
        uploaded: set[Var] = set()
        for number in reversed(range(len(placer.eqns))):
            eqn = placer.eqns[number]
            variables = _variables(eqn)
            if self.sides[number] is Side.HOST and not is_product(eqn):
                out = eqn.outvars[0]
                missing = sum(nbytes(v) for v in set(variables) & self.host - uploaded)
                leaf = any(v in self.leaves for v in variables)
                if (
                    out not in on_host_uses
                    and out not in stays
                    and not leaf
                    and nbytes(out) >= missing
                ):
                    self.sides[number] = Side.ENCLAVE
                    self.host.discard(out)
                    del self.axes[out]
            if self.sides[number] is Side.HOST:
                on_host_uses |= set(variables)
            elif self.sides[number] is Side.ENCLAVE:
                uploaded |= set(variables) & self.host
