"""What commutes with the blinding: rules that decide where each equation may run.

An equation may run on blinded values if applying it to them gives the blinded result, ``f(g·x) =
g·f(x)``, for every element g of the scheme's group: permutations and signs let many elementwise
functions pass, orthogonal keys linear maps and full sums of squares, other keys linear maps alone.
This is decided for each equation from the classes and parities of its operands' axes. There are two
strictnesses:

* *linear* rules hold for any value and never force two classes to become one; the
  host uses them to move and add up products;
* *update* rules also cover what optimizers do (squares, roots, signs, reductions). They
  apply only inside a `cheap_update` or to functions of device-resident leaves alone, so that
  no activation's nonlinearity ever ties two layers' keys together.

An equation without a rule runs in the enclave: forgetting a rule may cost speed, never correctness
or secrecy. Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from tempo_jax.equivariance.classes import Axes, Axis
from tempo_jax.equivariance.operands import Context, NotEquivariantError, Operand
from tempo_jax.equivariance.product_rules import PRODUCTS
from tempo_jax.jaxprs.primitives import cheap_p, optimization_barrier_p
from tempo_jax.jaxprs.types import JaxprEqn

_NEUTRAL = Axis(None, 0)  # of a value that is constant along it


def _aligned(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> list[Operand]:
    """Operands with the axes of an elementwise result.

    Scalars (of `select_n`, `clamp`) are constant along all of them, and an operand of size 1 along
    those where the others repeat it: lax broadcasts these without an equation that says so.
    """
    shape = eqn.outvars[0].aval.shape
    full = []
    for o in operands:
        axes = o.axes or (_NEUTRAL,) * len(shape)
        if len(axes) != len(shape):
            raise NotEquivariantError("operands of different ranks")
        fitting = tuple(
            a if a.node is None or context.keying.size(a.node) == n else _NEUTRAL
            for a, n in zip(axes, shape, strict=True)
        )
        full.append(dataclasses.replace(o, axes=fitting))
    return full


def _same_parity(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    """Elementwise, and additive in all operands: classes and parities must agree."""
    name = eqn.primitive.name
    full = [o for o in _aligned(context, eqn, operands) if not o.zero]
    if not full:
        return (_NEUTRAL,) * len(eqn.outvars[0].aval.shape)
    out = []
    for axes in zip(*(o.axes for o in full), strict=True):
        matched = context.match(axes, name)
        if any(a.node is None for a in axes):
            context.need_signs_alone(matched, f"{name} of a constant and a blinded value")
        for axis in axes:
            reason = f"{name} mixes values whose signs or polarities differ"
            context.keying.demand(
                axis.parity ^ matched.parity, matched.node, context.equation, reason
            )
        out.append(matched)
    return tuple(out)


def _multiply(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    name = eqn.primitive.name
    if sum(o.blinded for o in operands) > 1 or (
        eqn.primitive is prims.div_p and operands[1].blinded
    ):
        context.need_update(name)
    if eqn.primitive is prims.div_p and operands[1].blinded:
        context.need_elementwise(name, operands[1:])
    out = []
    for axes in zip(*(o.axes for o in _aligned(context, eqn, operands)), strict=True):
        matched = context.match(axes, name)
        if sum(a.node is not None for a in axes) > 1:
            context.need_square(axes, name)
        parity = 0
        for axis in axes:
            parity ^= axis.parity
        out.append(Axis(matched.node, parity))
    return tuple(out)


def _any_function(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    """An arbitrary elementwise function: only of values that carry no signs."""
    name = eqn.primitive.name
    context.need_elementwise(name, operands)
    out = []
    for axes in zip(*(o.axes for o in _aligned(context, eqn, operands)), strict=True):
        matched = context.match(axes, name)
        for axis in axes:
            reason = f"{name} is not an odd function, and its operand carries signs"
            context.keying.demand(axis.parity, matched.node, context.equation, reason)
        out.append(Axis(matched.node, 0))
    return tuple(out)


def _odd_function(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    context.need_elementwise(eqn.primitive.name, operands)
    return operands[0].axes


def _even_function(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    context.need_elementwise(eqn.primitive.name, operands)
    return tuple(Axis(a.node, 0) for a in operands[0].axes)


def _square(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    context.need_update(eqn.primitive.name)
    for axis in operands[0].axes:
        context.need_square([axis, axis], eqn.primitive.name)
    return tuple(Axis(a.node, 0) for a in operands[0].axes)


def _integer_pow(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    if eqn.params["y"] == 2:
        return _square(context, eqn, operands)
    rule = _odd_function if eqn.params["y"] % 2 else _even_function
    return rule(context, eqn, operands)


def _select(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    context.need_update("select_n")
    which, *cases = operands
    if not context.keying.group.elementwise and context.any_keyed([which]):
        raise NotEquivariantError("select_n decides by a value that carries keys")
    varying = [c for c in cases if c.blinded or c.zero]
    if context.loose and len(varying) < len(cases):
        # As in optax's safe norms, which square the result: right up to its signs.
        chosen = tuple(
            a if a.node is None else Axis(a.node, context.keying.unsettled(context.equation))
            for a in _same_parity(context, eqn, varying)
        )
    else:
        chosen = _same_parity(context, eqn, cases)
    (which,) = _aligned(context, eqn, [which])
    out = []
    for decision, value in zip(which.axes, chosen, strict=True):
        context.need_parity(decision, 0, "select_n decides by a value that carries signs")
        matched = context.match([value, decision], "select_n")
        out.append(Axis(matched.node, value.parity))
    return tuple(out)


def _convert(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    source, target = eqn.invars[0].aval.dtype, eqn.params["new_dtype"]
    if jnp.issubdtype(source, jnp.floating) and jnp.issubdtype(target, jnp.floating):
        return operands[0].axes
    return _any_function(context, eqn, operands)


def _identity(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    return operands[0].axes


def _transpose(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    return tuple(operands[0].axes[i] for i in eqn.params["permutation"])


def _squeeze(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    gone = {d % len(operands[0].axes) for d in eqn.params["dimensions"]}
    return tuple(a for i, a in enumerate(operands[0].axes) if i not in gone)


def _broadcast(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    out = [_NEUTRAL] * len(eqn.params["shape"])
    given = eqn.invars[0].aval.shape
    for axis, size, target in zip(
        operands[0].axes, given, eqn.params["broadcast_dimensions"], strict=True
    ):
        if size == eqn.params["shape"][target]:
            out[target] = axis
    return tuple(out)


def _reshape(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    """Keeps keyed axes whole; only axes without a key are merged or split."""
    if eqn.params["dimensions"] is not None:
        raise NotEquivariantError("reshape with a permutation")
    before, after = eqn.invars[0].aval.shape, eqn.params["new_sizes"]
    axes, keying = operands[0].axes, context.keying
    if 0 in before:
        raise NotEquivariantError("reshape of an empty array")
    out: list[Axis] = []
    i = j = 0
    while i < len(before) or j < len(after):
        # The smallest groups of axes on both sides that hold the same elements.
        ends = (i + 1, j + 1)
        if i < len(before) and j < len(after) and before[i] == after[j]:
            out.append(axes[i])
            i, j = ends
            continue
        first_i, first_j = i, j
        left = right = 1
        while True:
            if left <= right and i < len(before):
                left *= before[i]
                i += 1
            elif j < len(after):
                right *= after[j]
                j += 1
            elif i < len(before):
                left *= before[i]
                i += 1
            if left == right and (i > first_i or j > first_j):
                break
        group = axes[first_i:i]
        if any(keying.keyed(a.node) for a in group):
            large = [a for a, n in zip(group, before[first_i:i], strict=True) if n > 1]
            sizes = [n for n in after[first_j:j] if n > 1]
            if len(large) != 1 or len(sizes) != 1:
                raise NotEquivariantError("reshape merges or splits a keyed axis")
            out.extend(large[0] if n > 1 else _NEUTRAL for n in after[first_j:j])
        elif all(a.node is None for a in group):
            out.extend(_NEUTRAL for _ in range(first_j, j))
        else:
            for n in after[first_j:j]:
                node = keying.node(n)
                keying.strip_key(node)
                out.append(Axis(node, 0))
    return tuple(out)


def _along_unkeyed(axis_numbers: Callable[[JaxprEqn], Sequence[int]]) -> Callable[..., Axes]:
    """Rules for layout operations that touch some axes' order; those must carry no key."""

    def rule(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
        touched = set(axis_numbers(eqn))
        out = list(operands[0].axes)
        for number in touched:
            if any(context.keying.keyed(o.axes[number].node) for o in operands if o.axes):
                raise NotEquivariantError(f"{eqn.primitive.name} along a keyed axis")
            node = context.keying.node(eqn.outvars[0].aval.shape[number])
            context.keying.strip_key(node)
            out[number] = Axis(node, 0)
        for number in set(range(len(out))) - touched:
            axes = [o.axes[number] for o in operands if o.axes and not o.zero]
            if not axes:
                out[number] = _NEUTRAL
                continue
            matched = context.match(axes, eqn.primitive.name)
            for axis in axes:
                reason = f"{eqn.primitive.name} joins values whose signs differ"
                context.keying.demand(
                    axis.parity ^ matched.parity, matched.node, context.equation, reason
                )
            out[number] = matched
        return tuple(out)

    return rule


def _pad_axes(eqn: JaxprEqn) -> list[int]:
    return [i for i, edge in enumerate(eqn.params["padding_config"]) if any(edge)]


def _slice_axes(eqn: JaxprEqn) -> list[int]:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return [i for i, (m, n) in enumerate(zip(before, after, strict=True)) if m != n]


def _pad(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    if not operands[1].zero:
        context.need_update("pad with a value other than zero")
        for axis in operands[0].axes:
            context.need_signs_alone(axis, "pad with a value other than zero")
            context.need_parity(axis, 0, "pad with a value other than zero")
    return _along_unkeyed(_pad_axes)(context, eqn, operands[:1])


def _reduce_sum(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    context.need_update("reduce_sum")
    gone = set(eqn.params["axes"])
    for number in gone:
        context.need_signs_alone(operands[0].axes[number], "reduce_sum")
        reason = "reduce_sum adds up elements that carry signs"
        context.need_parity(operands[0].axes[number], 0, reason)
    return tuple(a for i, a in enumerate(operands[0].axes) if i not in gone)


def _reduce_order(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    """reduce_max and the like: of values that carry no signs at all."""
    context.need_elementwise(eqn.primitive.name, operands)
    for axis in operands[0].axes:
        context.need_parity(axis, 0, f"{eqn.primitive.name} compares values that carry signs")
    gone = set(eqn.params["axes"])
    return tuple(a for i, a in enumerate(operands[0].axes) if i not in gone)


_RULES: dict[Any, Callable[[Context, JaxprEqn, Sequence[Operand]], Axes]] = {
    **PRODUCTS,
    **dict.fromkeys(
        (prims.neg_p, prims.copy_p, prims.reduce_precision_p, cheap_p, optimization_barrier_p),
        _identity,
    ),
    **dict.fromkeys((prims.add_p, prims.sub_p, prims.add_jaxvals_p), _same_parity),
    **dict.fromkeys((prims.mul_p, prims.div_p), _multiply),
    **dict.fromkeys((prims.abs_p, prims.is_finite_p, prims.cosh_p), _even_function),
    prims.square_p: _square,
    **dict.fromkeys(
        (
            prims.sign_p,
            prims.tanh_p,
            prims.sinh_p,
            prims.asinh_p,
            prims.sin_p,
            prims.tan_p,
            prims.asin_p,
            prims.atan_p,
            prims.atanh_p,
            prims.cbrt_p,
            prims.erf_p,
            prims.erf_inv_p,
        ),
        _odd_function,
    ),
    **dict.fromkeys(
        (
            prims.sqrt_p,
            prims.rsqrt_p,
            prims.exp_p,
            prims.exp2_p,
            prims.expm1_p,
            prims.log_p,
            prims.log1p_p,
            prims.logistic_p,
            prims.pow_p,
            prims.max_p,
            prims.min_p,
            prims.clamp_p,
            prims.floor_p,
            prims.ceil_p,
            prims.round_p,
            prims.cos_p,
            prims.eq_p,
            prims.ne_p,
            prims.lt_p,
            prims.le_p,
            prims.gt_p,
            prims.ge_p,
            prims.and_p,
            prims.or_p,
            prims.not_p,
            prims.xor_p,
            prims.rem_p,
        ),
        _any_function,
    ),
    prims.integer_pow_p: _integer_pow,
    prims.select_n_p: _select,
    prims.convert_element_type_p: _convert,
    prims.transpose_p: _transpose,
    prims.squeeze_p: _squeeze,
    prims.broadcast_in_dim_p: _broadcast,
    prims.reshape_p: _reshape,
    prims.rev_p: _along_unkeyed(lambda eqn: eqn.params["dimensions"]),
    prims.concatenate_p: _along_unkeyed(lambda eqn: [eqn.params["dimension"]]),
    prims.slice_p: _along_unkeyed(_slice_axes),
    prims.pad_p: _pad,
    prims.reduce_sum_p: _reduce_sum,
    **dict.fromkeys(
        (prims.reduce_max_p, prims.reduce_min_p, prims.reduce_and_p, prims.reduce_or_p),
        _reduce_order,
    ),
}


def commute(context: Context, eqn: JaxprEqn, operands: Sequence[Operand]) -> Axes:
    """The axes of an equation's result if it runs on blinded operands.

    Raises:
      NotEquivariantError: it has no rule, or its operands do not fit the rule. Parities that do
        not fit become demands of the keying instead, which may be settled later.
    """
    rule = _RULES.get(eqn.primitive)
    if rule is None or len(eqn.outvars) != 1:
        raise NotEquivariantError(f"{eqn.primitive.name} has no rule")
    return rule(context, eqn, operands)


def is_zero(eqn: JaxprEqn, operands: Sequence[Operand]) -> bool:
    """Whether a result is zero because its operand is."""
    keeps = (
        prims.broadcast_in_dim_p,
        prims.concatenate_p,
        prims.slice_p,
        prims.rev_p,
        prims.convert_element_type_p,
        prims.reshape_p,
        prims.transpose_p,
        prims.squeeze_p,
        prims.neg_p,
        prims.copy_p,
        cheap_p,
    )
    return eqn.primitive in keeps and all(o.zero for o in operands)
