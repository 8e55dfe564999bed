"""Updates that the enclave can follow by a checksum: which they are, and their description.

Under `verify=True` a leaf stays on the devices only if every equation from what the enclave sent to
the leaf's new value is linear in what the devices have, with factors that the enclave knows; see
`enclave_runtime.verifying.checksum`. Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as prims

from enclave_runtime.protocol import updates
from enclave_runtime.protocol.fields import ProgramError
from enclave_runtime.protocol.updates import AxisNumbers, Needs, Update, free_axes
from tempo_jax.jaxprs import equations
from tempo_jax.jaxprs.primitives import cheap_p, optimization_barrier_p
from tempo_jax.jaxprs.products import described, description, is_product
from tempo_jax.jaxprs.types import Jaxpr, JaxprEqn, Literal, Var

_SAME = (cheap_p, prims.copy_p, optimization_barrier_p)
_KINDS: dict[Any, str] = {
    prims.add_p: updates.ADD,
    prims.add_jaxvals_p: updates.ADD,
    prims.sub_p: updates.SUB,
    prims.neg_p: updates.NEG,
    prims.mul_p: updates.SCALE,
    prims.div_p: updates.DIVIDE,
    prims.transpose_p: updates.TRANSPOSE,
    prims.rev_p: updates.REVERSE,
    prims.convert_element_type_p: updates.CONVERT,
}


def _is_same(eqn: JaxprEqn) -> bool:
    if eqn.primitive is prims.integer_pow_p:
        return eqn.params["y"] == 1
    return eqn.primitive in _SAME and len(eqn.outvars) == 1


def followable(eqn: JaxprEqn, followed: set[Var]) -> bool:
    """Whether an equation is linear in operands that are followed, its factors numbers."""
    on_host = [isinstance(v, Var) and v in followed for v in eqn.invars]
    wide = all(
        jnp.issubdtype(v.aval.dtype, jnp.floating) and v.aval.dtype.itemsize >= 4
        for v in (eqn.invars[0], *eqn.outvars)
    )
    if not wide:
        return False
    if eqn.primitive in (prims.mul_p, prims.div_p):
        first, second = on_host
        if eqn.primitive is prims.div_p and second:
            return False
        other = eqn.invars[0 if second else 1]
        return first != second and not other.aval.shape
    return all(on_host) and (eqn.primitive in _KINDS or _is_same(eqn))


def unfollowed_product(eqn: JaxprEqn, which: int) -> str | None:
    """Why a product with a leaf as operand `which` cannot be checked, if it cannot."""
    ranks = (len(eqn.invars[0].aval.shape), len(eqn.invars[1].aval.shape))
    try:
        _, axes = free_axes(description(eqn), ranks, which)
    except ProgramError as error:
        return f"verify=True: {error}"
    size = math.prod(eqn.invars[which].aval.shape[a] for a in axes)
    return None if size > 1 else "verify=True: the product leaves no axis of the leaf"


@dataclasses.dataclass(frozen=True)
class Following:
    """What the enclave follows of a placed program.

    Attributes:
      updates: in order; variables stand for the numbers of values.
      names: for results of equations that change nothing the variable that has their value.
      inputs: projections of resident leaves, by input position.
      outputs: projections of their new values, by output position.
      failing: leaves that cannot be followed after all, with the reason.
    """

    updates: tuple[Update, ...]
    names: Mapping[Var, Var]
    inputs: Mapping[int, tuple[AxisNumbers, ...]]
    outputs: Mapping[int, tuple[AxisNumbers, ...]]
    failing: Mapping[int, str]

    def name(self, v: Any) -> Any:
        """The variable that stands for a value."""
        return _resolved(self.names, v)


def _resolved(names: Mapping[Var, Var], v: Any) -> Any:
    while v in names:
        v = names[v]
    return v


def follow(
    jaxpr: Jaxpr,
    host: Sequence[JaxprEqn],
    resident: Sequence[int],
    carried: Mapping[int, int],
    kept: Sequence[int],
) -> Following:
    """Describes the updates of a placed program, and finds the projections that leaves need.

    Args:
      jaxpr: the flat program.
      host: the host's equations, in order.
      resident: input positions of leaves on the devices.
      carried: for each input that is a leaf of the carried state, its output's position.
      kept: positions of outputs that stay on the devices.
    """
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    known: set[Any] = {jaxpr.invars[i] for i in resident}
    names: dict[Var, Var] = {}
    made: dict[Any, Update] = {}
    uses: list[tuple[Any, AxisNumbers]] = []
    above: dict[Any, frozenset[int]] = {jaxpr.invars[i]: frozenset([i]) for i in resident}

    for eqn in host:
        out = eqn.outvars[0]
        operands = [_resolved(names, v) if isinstance(v, Var) else v for v in eqn.invars]
        shape, dtype = tuple(out.aval.shape), np.dtype(out.aval.dtype).name
        if is_product(eqn):
            leaves = [i for i, v in enumerate(operands) if v in known]
            for which in leaves:
                ranks = (len(operands[0].aval.shape), len(operands[1].aval.shape))
                uses.append((operands[which], free_axes(description(eqn), ranks, which)[1]))
            if leaves:
                continue
            made[out] = Update(
                *(out, updates.PRODUCT, tuple(operands), shape, dtype),
                product=description(eqn),
                source=described(eqn),
            )
            known.add(out)
            above[out] = frozenset()
            continue
        mine = [v for v in operands if isinstance(v, Var) and v in known]
        above[out] = frozenset().union(*(above[v] for v in mine))
        if _is_same(eqn):
            names[out] = mine[0]
            continue
        kind, axes, factor = _KINDS[eqn.primitive], (), None
        if kind in (updates.SCALE, updates.DIVIDE):
            (other,) = [v for v in operands if v not in mine or isinstance(v, Literal)]
            factor = _number(other, made_by, set(jaxpr.invars) | set(jaxpr.constvars))
            operands = mine if factor is not None else [*mine, other]
        elif kind == updates.TRANSPOSE:
            axes = tuple(eqn.params["permutation"])
        elif kind == updates.REVERSE:
            axes = tuple(eqn.params["dimensions"])
        made[out] = Update(*(out, kind, tuple(operands), shape, dtype), axes=axes, factor=factor)
        known.add(out)
    ranks = {v: len(v.aval.shape) for u in made.values() if u.product for v in u.operands}
    return _projected(jaxpr, made, names, ranks, uses, above, resident, carried, kept)


def _projected(
    jaxpr: Jaxpr,
    made: Mapping[Any, Update],
    names: Mapping[Var, Var],
    ranks: Mapping[Any, int],
    uses: Sequence[tuple[Any, AxisNumbers]],
    above: Mapping[Any, frozenset[int]],
    resident: Sequence[int],
    carried: Mapping[int, int],
    kept: Sequence[int],
) -> Following:
    """Finds projections that a leaf's new value has whenever the leaf has to have them."""
    whole = Following((), names, {}, {}, {})
    failing: dict[int, str] = {}
    needs = Needs(tuple(made.values()), ranks)

    def want(value: Any, axes: AxisNumbers, leaves: frozenset[int]) -> None:
        try:
            needs.want(value, axes)
        except ProgramError as error:
            failing.update(dict.fromkeys(above[value] | leaves, f"verify=True: {error}"))

    for value, axes in uses:
        want(value, axes, frozenset())
    pairs = {o: i for i, o in carried.items() if i in set(resident)}
    values = {o: whole.name(jaxpr.outvars[o]) for o in kept}
    while True:
        before = {v: tuple(axes) for v, axes in needs.of.items()}
        for o, value in values.items():
            leaf = jaxpr.invars[pairs[o]] if o in pairs else None
            rank = len(jaxpr.outvars[o].aval.shape)
            wanted = list(needs.of.get(leaf, {})) or list(needs.of.get(value, {}))
            for axes in wanted or [(rank - 1,)]:
                want(value, axes, frozenset([pairs[o]] if o in pairs else []))
        # What is only read, never written or multiplied, is held to something as well.
        for i in resident:
            leaf = jaxpr.invars[i]
            if not needs.of.get(leaf):
                needs.want(leaf, (len(leaf.aval.shape) - 1,))
        if failing or before == {v: tuple(axes) for v, axes in needs.of.items()}:
            break
    inputs = {i: tuple(needs.of[jaxpr.invars[i]]) for i in resident}
    outputs = {}
    for o, value in values.items():
        leaf = jaxpr.invars[pairs[o]] if o in pairs else value
        outputs[o] = tuple(needs.of.get(leaf, {}))
    needed = tuple(u for u in made.values() if u.value in needs.of)
    return Following(needed, names, inputs, outputs, failing)


def _number(v: Any, made_by: Mapping[Any, JaxprEqn], given: set[Any]) -> float | None:
    """A scalar that depends on literals alone, as the devices have it; None for others."""
    if isinstance(v, Literal):
        return float(np.asarray(v.val, v.aval.dtype))
    pending, eqns = [v], {}
    while pending:
        u = pending.pop()
        if u in given or u not in made_by:
            return None
        eqn = made_by[u]
        eqns[id(eqn)] = eqn
        pending += [w for w in eqn.invars if isinstance(w, Var)]
    order = [eqn for eqn in made_by.values() if id(eqn) in eqns]
    unique = list({id(eqn): eqn for eqn in order}.values())
    (value,) = equations.evaluate(unique, {}, [v])
    return float(np.asarray(value))
