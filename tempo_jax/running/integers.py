"""Products of 8-bit integers, exact and on the units that devices have for floats.

A sum of `TERMS` products of residues stays below 2**24, where float32 is exact, and so is every
format that tensor cores take, which hold 8-bit integers whole and add up in float32. Longer sums
are cut into blocks, which are added up as integers. Integer products exist on fewer devices, for
fewer layouts, and XLA's on a CPU are up to a hundred times slower off the favoured one. A library
that convolves by differences (Winograd) would not be exact; XLA's on a CPU does not. Untrusted.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tempo_jax.jaxprs import equations
from tempo_jax.jaxprs.primitives import dot_general_p
from tempo_jax.jaxprs.products import description
from tempo_jax.jaxprs.types import JaxprEqn

LARGEST = 125  # of an operand's elements
TERMS = 2**24 // LARGEST**2 - 1


def multiply(eqn: JaxprEqn, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The product of an equation, of int8 operands between ±`LARGEST`, as int32."""
    terms, _ = description(eqn).sizes(lhs.shape, rhs.shape)
    if terms <= TERMS:
        return _in_floats(eqn, lhs, rhs)
    if eqn.primitive is dot_general_p:
        return _dot(eqn, lhs, rhs)
    numbers = eqn.params["dimension_numbers"]
    features = lhs.shape[numbers.lhs_spec[1]]
    grouped = max(eqn.params["feature_group_count"], eqn.params["batch_group_count"]) > 1
    block = TERMS // (terms // features)
    if grouped or not block:
        return _bind(eqn, lhs, rhs, jnp.int32)
    left = _blocks(lhs, numbers.lhs_spec[1], block)
    right = _blocks(rhs, numbers.rhs_spec[1], block)
    return _summed(lambda x, w: _in_floats(eqn, x, w), left, right)


def _bind(eqn: JaxprEqn, lhs: jax.Array, rhs: jax.Array, dtype: Any) -> jax.Array:
    changes = {"precision": None, "preferred_element_type": dtype}
    (result,) = equations.bind(eqn, [lhs, rhs], **changes)
    return result


def _in_floats(eqn: JaxprEqn, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    return _bind(eqn, lhs, rhs, jnp.float32).astype(jnp.int32)


def _dot(eqn: JaxprEqn, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A `dot_general` whose sums are too long for float32."""
    (contract, other), (batch, other_batch) = eqn.params["dimension_numbers"]

    def blocks(x: jax.Array, summed: tuple[int, ...], along: tuple[int, ...]) -> jax.Array:
        free = [i for i in range(x.ndim) if i not in {*summed, *along}]
        x = lax.transpose(x, (*along, *free, *summed))
        flat = x.reshape(*x.shape[: len(along) + len(free)], math.prod(x.shape[-len(summed) :]))
        return _blocks(flat, flat.ndim - 1, TERMS)

    first = tuple(range(len(batch)))

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        numbers = (((x.ndim - 1,), (w.ndim - 1,)), (first, first))
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
        return lax.dot_general(x, w, numbers).astype(jnp.int32)

    return _summed(product, blocks(lhs, contract, batch), blocks(rhs, other, other_batch))


def _blocks(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Blocks along an axis, filled up with zeros; a new first axis counts them."""
    count = -(-x.shape[axis] // size)
    widths = [(0, count * size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, widths)
    x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _summed(product: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The sum of the products of blocks."""
    like = jax.eval_shape(product, lhs[0], rhs[0])
    start = jnp.zeros(like.shape, jnp.int32)
    total, _ = lax.scan(lambda sum, pair: (sum + product(*pair), None), start, (lhs, rhs))
    return total
