"""What products do to keys: contracted axes cancel, the others carry over.

Untrusted and pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tempo_jax.equivariance.classes import ONE, Axes, Axis, Keying
from tempo_jax.equivariance.operands import Context, NotEquivariantError, Operand
from tempo_jax.jaxprs.primitives import conv_p, dot_general_p
from tempo_jax.jaxprs.types import JaxprEqn
from tempo_jax.schemes import Group


def dot_general(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    """``Ŷ = X̂ Ŵ``: contracted axes share a class and cancel, the others carry over."""
    lhs, rhs = (o.axes for o in operands)
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    keying = context.keying
    for i, j in zip(lhs_contract, rhs_contract, strict=True):
        _contract(context, lhs[i], rhs[j], "dot_general")
    out = []
    for i, j in zip(lhs_batch, rhs_batch, strict=True):
        axis = _pair(context, lhs[i], rhs[j])
        if axis.node is not None and keying.group is Group.INVERTIBLE:
            # Every index of the batch has keys of its own instead.
            keying.strip_key(axis.node)
        elif axis.node is not None:
            # Both operands would bring a sign or a scale, and the product would not show one.
            keying.mark_batch(axis.node)
        out.append(Axis(axis.node, 0))
    out += [a for i, a in enumerate(lhs) if i not in {*lhs_contract, *lhs_batch}]
    out += [a for j, a in enumerate(rhs) if j not in {*rhs_contract, *rhs_batch}]
    return tuple(out)


def _pair(context: Context, a: Axis, b: Axis) -> Axis:
    """Joins two axes that a product brings together."""
    if a.node is None or b.node is None:
        return a if b.node is None else b
    context.keying.join(a.node, b.node)
    return a


def _contract(context: Context, a: Axis, b: Axis, name: str) -> None:
    """Two axes that a product sums over, whose keys must cancel."""
    keying, equation = context.keying, context.equation
    known = _pair(context, a, b)
    if known.node is None:
        return
    if a.node is None or b.node is None:
        # One operand is constant along the axis, so this sums the other along it.
        if not keying.group.orthogonal and keying.keyed(known.node):
            raise NotEquivariantError(f"{name} sums along an axis whose key is not orthogonal")
        reason = f"{name} sums along a signed or mixed axis"
        keying.demand(a.parity ^ b.parity, known.node, equation, reason)
    elif keying.group is Group.ORTHOGONAL:
        for axis in (a, b):
            reason = f"{name} contracts a square along a mixed axis"
            keying.demand(axis.parity ^ ONE, known.node, equation, reason)
    elif keying.group.orthogonal:
        reason = f"{name} contracts a signed axis with an unsigned one"
        keying.demand(a.parity ^ b.parity, known.node, equation, reason)
    else:
        reason = f"{name} contracts two axes of the same polarity"
        keying.demand(a.parity ^ b.parity ^ ONE, known.node, equation, reason)


def conv_general_dilated(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    """Keys on batch, in-feature and out-feature; spatial and grouped axes carry none."""
    lhs, rhs = (o.axes for o in operands)
    numbers = eqn.params["dimension_numbers"]
    lhs_batch, lhs_feature, *lhs_space = numbers.lhs_spec
    rhs_out, rhs_in, *rhs_space = numbers.rhs_spec
    keying = context.keying
    for axes, spatial in ((lhs, lhs_space), (rhs, rhs_space)):
        for i in spatial:
            _strip(keying, axes[i])
    if eqn.params["feature_group_count"] > 1:
        for axis in (lhs[lhs_feature], rhs[rhs_in], rhs[rhs_out]):
            _strip(keying, axis)
    else:
        _contract(context, lhs[lhs_feature], rhs[rhs_in], "conv_general_dilated")
    if eqn.params["batch_group_count"] > 1:
        for axis in (lhs[lhs_batch], rhs[rhs_out]):
            _strip(keying, axis)
    shape = eqn.outvars[0].aval.shape
    out: list[Axis] = [Axis(None, 0)] * len(shape)
    out_batch, out_feature, *out_space = numbers.out_spec
    for i in out_space:
        node = keying.node(shape[i])
        keying.strip_key(node)
        out[i] = Axis(node, 0)
    out[out_batch], out[out_feature] = lhs[lhs_batch], rhs[rhs_out]
    if eqn.params["batch_group_count"] > 1:
        node = keying.node(shape[out_batch])
        keying.strip_key(node)
        out[out_batch] = Axis(node, 0)
    return tuple(out)


def _strip(keying: Keying, axis: Axis) -> None:
    if axis.node is not None:
        keying.strip_key(axis.node)


PRODUCTS: dict[Any, Callable[[Context, JaxprEqn, Sequence[Operand]], Axes]] = {
    dot_general_p: dot_general,
    conv_p: conv_general_dilated,
}
