"""Where each equation runs, which leaves live on the devices, and under which keys.

Placement is a fixpoint. It starts optimistically (every candidate leaf on the devices, every
worthwhile product offloaded), walks the program once, and demotes what did not work out: a leaf
that a trusted equation needs, an equation that does not commute with the blinding. Then it walks
again, until nothing is left to demote. Untrusted and pure: the enclave checks what it is asked to
run, not why.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from tempo_jax.equivariance.classes import ONE, Axes, Keying, resolve_parity
from tempo_jax.jaxprs.products import is_product, variables
from tempo_jax.jaxprs.types import JaxprEqn, Literal, Var, nbytes
from tempo_jax.planning.walk import FOLLOWS, Demotions, Facts, Question, Side, Walk
from tempo_jax.schemes import Group

_NARROW = "verify=True keeps it inside: 16-bit formats round more than a checksum may let pass"


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
        return tuple(
            resolve_parity(a.parity, self.pivots) if self.keying.has_parity(a.node) else 0
            for a in self.axes[variable]
        )


def place(question: Question) -> Placement:
    """Finds the greatest consistent placement; see the module."""
    facts = Facts(question)
    demotions = _start(facts)
    while True:
        walk = Walk(facts, demotions)
        objection = next((each for each in _objections(walk) if any(each)), None)
        if objection is None:
            return _settled(walk)
        demotions = _demoted(demotions, objection)


class Objection(NamedTuple):
    """Why a walk is no placement, and what has to change before the next.

    Attributes:
      equations: those that become the enclave's, with the reason.
      leaves: those that leave the devices, by input position, with the reason.
      loose: selections to let pass with the signs of their result left open.
    """

    equations: Mapping[int, str] = {}
    leaves: Mapping[int, str] = {}
    loose: frozenset[int] = frozenset()


def _objections(walk: Walk) -> Iterator[Objection]:
    """What may be wrong, in order: each is looked for only where nothing was wrong before."""
    yield Objection(equations=walk.too_dear)
    yield Objection(leaves=_needed_inside(walk))
    _tie_new_values(walk)
    yield _contradictions(walk)
    yield Objection(equations=_open_crossings(walk))
    yield Objection(equations=_exposed(walk))
    yield Objection(equations=_unchecked(walk) if walk.question.verify else {})
    yield Objection(leaves=_bare_leaves(walk))


def _demoted(before: Demotions, objection: Objection) -> Demotions:
    return Demotions(
        banned={**before.banned, **objection.equations},
        loose=before.loose | objection.loose,
        resident=before.resident - set(objection.leaves),
        reasons={**before.reasons, **objection.leaves},
    )


def _start(facts: Facts) -> Demotions:
    """Nothing is demoted but what the question already decides."""
    question = facts.question
    products = [n for n, eqn in enumerate(facts.eqns) if is_product(eqn)]
    decided = zip(products, question.stays, strict=True)
    banned = {n: why for n, why in decided if why is not None}
    candidates = _candidates(facts)
    barred = {i: why for i, why in question.barred.items() if i in candidates}
    if question.verify:
        narrow = {i for i in candidates if facts.inputs[i].aval.dtype.itemsize < 4}
        barred |= dict.fromkeys(narrow, _NARROW)
    return Demotions(banned, frozenset(), candidates - set(barred), barred)


def _candidates(facts: Facts) -> frozenset[int]:
    """Leaves that would lie on the devices if all went well."""
    question = facts.question
    if not question.offload or question.scheme.key_budget == 0:
        return frozenset()
    cheap = {
        i
        for i, o in question.carried.items()
        if isinstance(facts.outputs[o], Var) and facts.outputs[o] in facts.cheap
    }
    return frozenset(
        i
        for i in cheap | question.on_devices
        if jnp.issubdtype(facts.inputs[i].aval.dtype, jnp.floating)
        and math.prod(facts.inputs[i].aval.shape) > 1
    )


def _settled(walk: Walk) -> Placement:
    """The placement that a walk without objections found."""
    pivots, _ = walk.solution
    _pull_inside(walk)
    return Placement(
        tuple(walk.sides),
        walk.axes,
        frozenset(walk.host),
        walk.keying,
        pivots,
        walk.demotions.resident,
        walk.demotions.reasons,
        walk.kept_inside,
        frozenset(walk.sent),
    )


# What may be wrong


def _needed_inside(walk: Walk) -> dict[int, str]:
    """Leaves that an equation inside needs, or whose new value is inside."""
    facts, out = walk.facts, {}
    for eqn, side in zip(facts.eqns, walk.sides, strict=True):
        if side is Side.ENCLAVE:
            for v in variables(eqn):
                if v.aval.shape:
                    for leaf in walk.leaves.get(v, ()):
                        if leaf not in out:
                            out[leaf] = _cause(walk, eqn)
    for index, new in _new_values(walk):
        if index not in out and (not isinstance(new, Var) or new not in walk.host):
            number = facts.order.get(new) if isinstance(new, Var) else None
            inside = "its new value is an input that is inside the enclave"
            out[index] = inside if number is None else _cause(walk, facts.eqns[number])
    return out


def _new_values(walk: Walk) -> Iterator[tuple[int, Var | Literal]]:
    """Each resident leaf that is carried, with its new value."""
    for index in sorted(walk.demotions.resident):
        position = walk.question.carried.get(index)
        if position is not None:
            yield index, walk.facts.outputs[position]


def _tie_new_values(walk: Walk) -> None:
    """Demands that each leaf's new value is blinded as the leaf was."""
    for index, new in _new_values(walk):
        assert isinstance(new, Var), "a leaf whose new value is inside was demoted"
        old_axes, new_axes = walk.axes[walk.facts.inputs[index]], walk.axes[new]
        for old, updated in zip(old_axes, new_axes, strict=True):
            assert old.node is not None, "a leaf's axes have nodes of their own"
            if updated.node is None:
                parity = old.parity
            else:
                walk.keying.join(old.node, updated.node)
                parity = old.parity ^ updated.parity
            reason = "its new value carries other signs"
            walk.keying.demand_of_leaf(parity, old.node, index, reason)


def _cause(walk: Walk, eqn: JaxprEqn) -> str:
    """The first equation that the host was refused among those that led to this one.

    One that was refused for its own sake, if there is any.
    """
    facts = walk.facts
    refused: dict[int, str] = {}
    pending, seen = [eqn], set()
    while pending:
        current = pending.pop()
        out = current.outvars[0]
        if out in seen:
            continue
        seen.add(out)
        if out in walk.refused:
            refused[facts.order[out]] = f"{current.primitive.name}: {walk.refused[out]}"
        led = [v for v in variables(current) if v in facts.cheap or v in facts.to_update]
        pending += [facts.eqns[facts.order[v]] for v in led if v in facts.order]
    own = {number: why for number, why in refused.items() if FOLLOWS not in why}
    refused = own or refused
    return refused[min(refused)] if refused else "its gradient is computed in the enclave"


def _contradictions(walk: Walk) -> Objection:
    """Demands that contradict those before them: the first of all, and others far from it.

    Of each class only the first counts, and none that comes of an equation which is demoted
    already: it may be settled by that. So a hundred equal layers take one more walk, and not a
    hundred.
    """
    facts = walk.facts
    _, contradictions = walk.solution
    if not contradictions:
        return Objection()
    found = {c.equation: c.reason for c in reversed(contradictions) if c.equation is not None}
    equations: dict[int, str] = {}
    loose: set[int] = set()
    settled: set[Var] = set()  # what comes of equations that are demoted
    for number, eqn in enumerate(facts.eqns):
        if any(v in settled for v in variables(eqn)):
            settled |= set(eqn.outvars)
        elif number in found:
            settled |= set(eqn.outvars)
            # A selection passes loosely first; an equation that fails again is the enclave's.
            if eqn.primitive is prims.select_n_p and number not in walk.demotions.loose:
                loose.add(number)
            else:
                equations[number] = found[number]
    leaves = {
        c.leaf: c.reason
        for c in contradictions
        if c.leaf is not None and facts.outputs[walk.question.carried[c.leaf]] not in settled
    }
    return Objection(equations, leaves, frozenset(loose))


def _open_crossings(walk: Walk) -> dict[int, str]:
    """Values that cannot be unblinded, yet would reach the enclave or an output."""
    facts, keying = walk.facts, walk.keying
    pivots, _ = walk.solution
    leaving = {v for v in facts.outputs if v in walk.host}
    for eqn, side in zip(facts.eqns, walk.sides, strict=True):
        if side is Side.ENCLAVE:
            leaving |= {v for v in variables(eqn) if v in walk.host}
    out = {}
    for v in leaving:
        for axis in walk.axes[v]:
            if not keying.has_parity(axis.node):
                continue
            culprit = keying.left_open(axis.parity, pivots)
            if culprit is not None:
                out[culprit] = "select_n mixes values whose signs differ"
            elif keying.group is Group.ORTHOGONAL and axis.parity != ONE:
                out[facts.order[v]] = "a sum of squares over part of the mixed axes"
    return out


def _exposed(walk: Walk) -> dict[int, str]:
    """Products that would show the host a value without any key on it."""
    out = {}
    for number in sorted(walk.sent):
        if walk.sides[number] is Side.HOST:
            eqn = walk.facts.eqns[number]
            for v in (*variables(eqn), *eqn.outvars):
                if not any(walk.keying.keyed(a.node) for a in walk.axes[v]):
                    out[number] = "no axis of an operand or of the result can carry a key"
    return out


def _unchecked(walk: Walk) -> dict[int, str]:
    """Equations of the host whose result the enclave needs though nothing checks it."""
    facts, resident = walk.facts, walk.demotions.resident
    kept = {facts.inputs[i] for i in resident}
    kept |= {facts.outputs[o] for i, o in walk.question.carried.items() if i in resident}
    readers = {v: "an output" for v in facts.outputs if v in walk.host and v not in kept}
    for eqn, side in zip(facts.eqns, walk.sides, strict=True):
        if side is Side.ENCLAVE:
            inside = [v for v in variables(eqn) if v in walk.host]
            readers.update(dict.fromkeys(inside, f"`{eqn.primitive.name}` in the enclave"))
    made = {facts.order[v]: reader for v, reader in readers.items() if v in facts.order}
    return {
        n: f"{reader} reads it, and verify=True can check products alone"
        for n, reader in made.items()
        if not is_product(facts.eqns[n])
    }


def _bare_leaves(walk: Walk) -> dict[int, str]:
    """Resident leaves none of whose axes carries a key."""
    return {
        index: "none of its axes can carry a key"
        for index in walk.demotions.resident
        if not any(walk.keying.keyed(a.node) for a in walk.axes[walk.facts.inputs[index]])
    }


def _pull_inside(walk: Walk) -> None:
    """Moves layout equations into the enclave that would only make an upload larger."""
    facts, resident = walk.facts, walk.demotions.resident
    stays = {facts.outputs[o] for i, o in walk.question.carried.items() if i in resident}
    on_host_uses: set[Var] = set()
    uploaded: set[Var] = set()
    for number in reversed(range(len(facts.eqns))):
        eqn = facts.eqns[number]
        operands = set(variables(eqn))
        if walk.sides[number] is Side.HOST and not is_product(eqn):
            out = eqn.outvars[0]
            missing = sum(nbytes(v) for v in (operands & walk.host) - uploaded)
            if (
                out not in on_host_uses
                and out not in stays
                and not any(v in walk.leaves for v in operands)
                and nbytes(out) >= missing
            ):
                walk.sides[number] = Side.ENCLAVE
                walk.host.discard(out)
                del walk.axes[out]
        if walk.sides[number] is Side.HOST:
            on_host_uses |= operands
        elif walk.sides[number] is Side.ENCLAVE:
            uploaded |= operands & walk.host
