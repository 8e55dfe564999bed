"""Products: the equations worth offloading, and how much work they are.

Untrusted and pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from enclave_runtime.protocol.descriptions import Convolution, DotGeneral, ProductDescription
from enclave_runtime.protocol.program import MAX_SOURCE
from tempo_jax.jaxprs.equations import equations, line, subjaxprs
from tempo_jax.jaxprs.primitives import cheap_p, conv_p, dot_general_p, keep_p
from tempo_jax.jaxprs.types import Jaxpr, JaxprEqn, Var

KEPT = "`keep_inside` marks its result or an operand"


_PRODUCTS = (dot_general_p, conv_p)


def is_product(eqn: JaxprEqn) -> bool:
    """Whether this is a product that could be offloaded: real floats in and out.

    A float of 8 bits or fewer has no digits to spare for a blinded value's rounding.
    """
    return eqn.primitive in _PRODUCTS and all(
        jnp.issubdtype(v.aval.dtype, jnp.floating) and v.aval.dtype.itemsize > 1
        for v in (*eqn.invars, *eqn.outvars)
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


def description(eqn: JaxprEqn) -> ProductDescription:
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


def described(eqn: JaxprEqn) -> str:
    """An equation in an error's text: its operands' types and where it comes from."""
    operands = " × ".join(v.aval.str_short() for v in eqn.invars)
    return f"{eqn.primitive.name} {operands} at {line(eqn)}"[:MAX_SOURCE]


def contracted_axes(eqn: JaxprEqn) -> tuple[int, ...]:
    """Axes of a product's left operand that it sums over and that may carry a key."""
    if eqn.primitive is dot_general_p:
        (contract, _), _ = eqn.params["dimension_numbers"]
        return tuple(contract)
    if eqn.primitive is conv_p:
        return (eqn.params["dimension_numbers"].lhs_spec[1],)
    return ()


def feeds_update(eqns: Sequence[JaxprEqn]) -> set[Var]:
    """Values that reach a marked update through unary equations alone."""
    feeds: set[Var] = set()
    for eqn in reversed(eqns):
        if len(variables(eqn)) == 1 and (
            eqn.primitive is cheap_p or any(v in feeds for v in eqn.outvars)
        ):
            feeds.add(variables(eqn)[0])
    return feeds


def variables(eqn: JaxprEqn) -> list[Var]:
    """An equation's operands that are no constants."""
    return [v for v in eqn.invars if isinstance(v, Var)]
