"""Products: the equations worth offloading, what they do to keys, and how much work they are.

Untrusted and pure; used by `_equivariance`, `_cost`, `_placement`, `_matrix_form` and `_plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from enclave_runtime.products import Convolution, DotGeneral, Product
from tempo_jax._jaxpr import (
    Jaxpr,
    JaxprEqn,
    Var,
    conv_p,
    dot_general_p,
    equations,
    keep_p,
    subjaxprs,
)
from tempo_jax._keying import ONE, Axes, Axis, Keying
from tempo_jax._operands import Context, NotEquivariantError, Operand
from tempo_jax.schemes import Group

KEPT = "`keep_inside` marks its result or an operand"


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
        keying.demand(a.weight ^ b.weight, known.node, equation, reason)
    elif keying.group is Group.ORTHOGONAL:
        for axis in (a, b):
            reason = f"{name} contracts a square along a mixed axis"
            keying.demand(axis.weight ^ ONE, known.node, equation, reason)
    elif keying.group.orthogonal:
        reason = f"{name} contracts a signed axis with an unsigned one"
        keying.demand(a.weight ^ b.weight, known.node, equation, reason)
    else:
        reason = f"{name} contracts two axes of the same polarity"
        keying.demand(a.weight ^ b.weight ^ ONE, known.node, equation, reason)


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


def is_product(eqn: JaxprEqn) -> bool:
    """Whether this is a product that could be offloaded: real floats in and out."""
    return eqn.primitive in PRODUCTS and all(
        jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (*eqn.invars, *eqn.outvars)
    )


def products_above(jaxpr: Jaxpr) -> dict[Var, int]:
    """For each variable the products that it depends on, as a bit set over equations."""
    return _products_reached(jaxpr, lambda number, before: before | 1 << number)


def near_products(jaxpr: Jaxpr) -> dict[Var, int]:
    """For each variable the products on which it depends through no other, as a bit set."""
    return _products_reached(jaxpr, lambda number, _: 1 << number)


def _products_reached(jaxpr: Jaxpr, after: Callable[[int, int], int]) -> dict[Var, int]:
    """Bit sets of products by variable; `after` gives a product's result from its operands'."""
    reached: dict[Var, int] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        bits = 0
        for v in eqn.invars:
            if isinstance(v, Var):
                bits |= reached.get(v, 0)
        if is_product(eqn):
            bits = after(number, bits)
        reached |= dict.fromkeys(eqn.outvars, bits)
    return reached


def kept_products(jaxpr: Jaxpr) -> frozenset[int]:
    """Products that `keep_inside` keeps in the enclave, by equation.

    They give a marked value or take one, through no other product. Control flow that
    holds a mark marks what it takes and gives.
    """
    near = near_products(jaxpr)
    kept = 0
    marked: set[Var] = set()
    for number, eqn in enumerate(jaxpr.eqns):
        operands = [v for v in eqn.invars if isinstance(v, Var)]
        inner = (e for body in subjaxprs(eqn) for e in equations(body))
        if eqn.primitive is keep_p or any(e.primitive is keep_p for e in inner):
            for v in operands:
                kept |= near.get(v, 0)
            marked |= set(eqn.outvars)
        elif not marked.isdisjoint(operands):
            if is_product(eqn):
                kept |= 1 << number
            else:
                marked |= set(eqn.outvars)
    return frozenset(n for n in range(len(jaxpr.eqns)) if kept >> n & 1)


def work(eqn: JaxprEqn) -> int:
    """Floating-point operations of a product (a multiply-add counts as two)."""
    lhs, rhs = (v.aval.shape for v in eqn.invars)
    out = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive is dot_general_p:
        (contract, _), _ = eqn.params["dimension_numbers"]
        return 2 * out * math.prod(lhs[i] for i in contract)
    _, in_feature, *space = eqn.params["dimension_numbers"].rhs_spec
    return 2 * out * math.prod(rhs[i] for i in (in_feature, *space))


def description(eqn: JaxprEqn) -> Product:
    """A product in the protocol's terms."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive is dot_general_p:
        (left, right), (left_batch, right_batch) = numbers
        return DotGeneral((tuple(left), tuple(right)), (tuple(left_batch), tuple(right_batch)))
    return Convolution(
        tuple(eqn.params["window_strides"]),
        tuple((low, high) for low, high in eqn.params["padding"]),
        tuple(eqn.params["lhs_dilation"]),
        tuple(eqn.params["rhs_dilation"]),
        tuple(numbers.lhs_spec),
        tuple(numbers.rhs_spec),
        tuple(numbers.out_spec),
        eqn.params["feature_group_count"],
        eqn.params["batch_group_count"],
    )


def contracted_axes(eqn: JaxprEqn) -> tuple[int, ...]:
    """Axes of a product's left operand that it sums over and that may carry a key."""
    if eqn.primitive is dot_general_p:
        (contract, _), _ = eqn.params["dimension_numbers"]
        return tuple(contract)
    if eqn.primitive is conv_p:
        return (eqn.params["dimension_numbers"].lhs_spec[1],)
    return ()
