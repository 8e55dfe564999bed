"""The same program with other roundings, to see what they alone change.

Its sums are in another order, and its products rounded more coarsely if that is wanted.

Untrusted and pure. Serves JAX 0.10 to 0.12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as prims

from tempo_jax.jaxprs.equations import bind
from tempo_jax.jaxprs.primitives import conv_p, dot_general_p
from tempo_jax.jaxprs.trace import trace
from tempo_jax.jaxprs.types import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, avals_of


def reordered(closed: ClosedJaxpr, seed: int, rounding: float = 0.0) -> Callable[..., list[Any]]:
    """A program in which what products, convolutions and sums add is permuted, at any depth.

    Of a convolution the features are, and so, in the gradient of its kernel, the batch. With exact
    arithmetic and no `rounding` the results would be the same.

    Args:
      closed: the program.
      seed: of the permutations and of the noise.
      rounding: standard deviation of normal noise that is added to what products and convolutions
        give, in units of the dtype's epsilon times the root mean square of the result.

    Returns:
      A function of the program's flat inputs.
    """
    return lambda *arguments: _evaluate(
        closed.jaxpr, closed.consts, arguments, np.random.default_rng(seed), rounding
    )


def _evaluate(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    rng: np.random.Generator,
    rounding: float,
) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, arguments, strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    for eqn in jaxpr.eqns:
        operands = _permuted(eqn, [read(v) for v in eqn.invars], rng)
        inner = {k: _inner(p, rng, rounding) for k, p in eqn.params.items()}
        changed = {k: p for k, p in inner.items() if p is not eqn.params[k]}
        results = bind(eqn, operands, **changed)
        if rounding and eqn.primitive in (dot_general_p, conv_p):
            results = [_noisy(x, rng, rounding) for x in results]
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _noisy(x: jax.Array, rng: np.random.Generator, rounding: float) -> jax.Array:
    """A product, rounded more coarsely."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    noise = jax.random.normal(jax.random.key(int(rng.integers(1 << 31))), x.shape, x.dtype)
    unit = rounding * float(jnp.finfo(x.dtype).eps)
    return x + (unit * jnp.sqrt(jnp.mean(x * x)) * noise).astype(x.dtype)


def _inner(param: Any, rng: np.random.Generator, rounding: float) -> Any:
    """An equation's parameter with the programs in it changed alike."""
    if type(param) in (tuple, list) and any(isinstance(p, ClosedJaxpr) for p in param):
        return type(param)(_inner(p, rng, rounding) for p in param)
    if not isinstance(param, ClosedJaxpr):
        # From JAX 0.11 on there is one class for both, and no such case.
        open_jaxpr = isinstance(param, Jaxpr) and not param.constvars
        return _inner(ClosedJaxpr(param, ()), rng, rounding).jaxpr if open_jaxpr else param
    if param.jaxpr.effects:
        return param
    changed = reordered(param, int(rng.integers(1 << 32)), rounding)
    return trace(changed, avals_of(param))


def _permuted(eqn: JaxprEqn, operands: list[Any], rng: np.random.Generator) -> list[Any]:
    """Operands among whose terms the sum of an equation runs in another order."""
    if eqn.primitive is dot_general_p:
        pairs = list(zip(*eqn.params["dimension_numbers"][0], strict=True))
    elif eqn.primitive is conv_p and eqn.params["feature_group_count"] == 1:
        numbers = eqn.params["dimension_numbers"]
        pairs = [(numbers.lhs_spec[1], numbers.rhs_spec[1])]
    elif eqn.primitive is prims.reduce_sum_p:
        pairs = [(axis,) for axis in eqn.params["axes"]]
    else:
        return operands
    for axes in pairs:
        size = operands[0].shape[axes[0]]
        if size > 1:
            order = _order(size, rng)
            operands = [jnp.take(x, order, axis) for x, axis in zip(operands, axes, strict=True)]
    return operands


def _order(size: int, rng: np.random.Generator) -> jax.Array:
    """A permutation by arithmetic, ``(a i + b) mod size``, since an open jaxpr takes no arrays."""
    bound = min(size, np.iinfo(np.int32).max // size)
    factor = next(
        a for a in (*rng.integers(1, max(bound, 2), 64).tolist(), 1) if math.gcd(a, size) == 1
    )
    return (factor * lax.iota(np.int32, size) + int(rng.integers(size))) % size
