"""Primitives as objects: JAX's that it does not export by name, kinds of them, and our own marks.

Untrusted and pure. Serves JAX 0.10 to 0.12.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import io_callback
from jax.extend import core as jex_core
from jax.extend.core import primitives as prims
from jax.interpreters import ad, batching, mlir

from tempo_jax.jaxprs.types import JaxprEqn, Literal, physical

dot_general_p = prims.dot_general_p


conv_p = prims.conv_general_dilated_p


def _identity_primitive(name: str) -> jex_core.Primitive:
    """A primitive that returns its argument under every transformation."""
    primitive = jex_core.Primitive(name)
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda aval: aval)
    ad.deflinear2(primitive, lambda cotangent, _: [cotangent])
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, lambda _, operand: [operand])
    return primitive


# Marks an output that the function itself makes public; see `tempo_jax.reveal`.
reveal_p = _identity_primitive("tempo_reveal")


# Marks the operands of an update that may run on blinded values; see `cheap_update`.
cheap_p = _identity_primitive("tempo_cheap_update")


# Marks an operand that is blinded for its own uses alone; see `planning.matrix_form`.
blind_p = _identity_primitive("tempo_blind")


def _keep_rule(cotangent: Any, _: Any) -> list[Any]:
    return [keep_p.bind(cotangent)]


# Marks a value that no product may show, nor that of its gradient; see `tempo_jax.keep_inside`.
keep_p = _identity_primitive("tempo_keep_inside")


ad.deflinear2(keep_p, _keep_rule)


def _primitive_of(function: Callable[..., Any], *arguments: Any) -> jex_core.Primitive:
    """The primitive to which a call traces, for those that JAX does not export."""
    return jax.make_jaxpr(function)(*arguments).jaxpr.eqns[0].primitive


_DEBUGGING = {
    _primitive_of(lambda x: jax.debug.callback(lambda _: None, x), 0.0),
    _primitive_of(lambda x: jax.debug.print("{}", x), 0.0),
}


_SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


_pure_callback_p = _primitive_of(lambda x: jax.pure_callback(lambda y: y, _SCALAR, x), 0.0)


_io_callback_p = _primitive_of(lambda x: io_callback(lambda y: y, _SCALAR, x), 0.0)


optimization_barrier_p = _primitive_of(lax.optimization_barrier, 0.0)


_KEY = jax.eval_shape(lambda: jax.random.key(0))


_random_unwrap_p = _primitive_of(jax.random.key_data, _KEY)


def is_callback(eqn: JaxprEqn) -> bool:
    """Whether an equation calls back into Python for a result that the program may use."""
    if is_check(eqn):
        return False
    return eqn.primitive is _pure_callback_p or (
        eqn.primitive is _io_callback_p and bool(eqn.outvars)
    )


def raises(eqn: JaxprEqn) -> bool:
    """Whether an equation is reached only to raise, in a failed check of Equinox (`error_if`)."""
    called = getattr(eqn.params.get("callback"), "callback_func", None)  # JAX 0.10-0.12
    module = getattr(called, "__module__", None)
    return eqn.primitive is _pure_callback_p and module == "equinox._errors"


def is_check(eqn: JaxprEqn) -> bool:
    """Whether this is a failed check whose results, which stand for what failed, can show it.

    One of them must be able to be NaN, which shows the failure where nothing can raise.
    """
    return raises(eqn) and any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars)


def is_written_in_jax(primitive: jex_core.Primitive) -> bool:
    """Whether a primitive is one of Equinox or Lineax, whose lowering only traces its `impl`."""
    module = getattr(primitive.impl, "__module__", None) or ""
    return module.split(".")[0] in ("equinox", "lineax")


# What `vmap` leaves of a result that it has to bring into another order, or to repeat.
_REARRANGING = {_random_unwrap_p, prims.transpose_p, prims.broadcast_in_dim_p}


def is_revealed(v: Any, made_by: Mapping[Any, JaxprEqn]) -> bool:
    """Whether a value is the result of `reveal`, or its array, maybe rearranged."""
    eqn = made_by.get(v)
    while (
        eqn is not None
        and (eqn.primitive in _REARRANGING or _is_in_bytes(eqn))
        and not isinstance(eqn.invars[0], Literal)
    ):
        eqn = made_by.get(eqn.invars[0])
    return eqn is not None and eqn.primitive is reveal_p


def _is_in_bytes(eqn: JaxprEqn) -> bool:
    """Whether this gives narrow elements in bytes, with the same values."""
    if eqn.primitive is not prims.convert_element_type_p:
        return False
    narrow = eqn.invars[0].aval
    return narrow.dtype != eqn.outvars[0].aval.dtype == physical(narrow).dtype


def is_debugging(eqn: JaxprEqn) -> bool:
    """Whether an equation only shows values: `jax.debug`, or an `io_callback` without results."""
    return eqn.primitive in _DEBUGGING or (eqn.primitive is _io_callback_p and not eqn.outvars)


# Cheap enough, and fused by XLA, that computing them again can beat keeping their result.
LIGHT = {
    prims.abs_p,
    prims.add_p,
    prims.add_jaxvals_p,
    prims.and_p,
    prims.bitcast_convert_type_p,
    prims.broadcast_in_dim_p,
    prims.ceil_p,
    prims.clamp_p,
    prims.concatenate_p,
    prims.convert_element_type_p,
    prims.copy_p,
    prims.div_p,
    prims.eq_p,
    prims.floor_p,
    prims.ge_p,
    prims.gt_p,
    prims.integer_pow_p,
    prims.iota_p,
    prims.is_finite_p,
    prims.le_p,
    prims.lt_p,
    prims.max_p,
    prims.min_p,
    prims.mul_p,
    prims.ne_p,
    prims.neg_p,
    prims.not_p,
    prims.or_p,
    prims.pad_p,
    prims.reduce_precision_p,
    prims.reshape_p,
    prims.rev_p,
    prims.rsqrt_p,
    prims.select_n_p,
    prims.sign_p,
    prims.slice_p,
    prims.sqrt_p,
    prims.square_p,
    prims.squeeze_p,
    prims.stop_gradient_p,
    prims.sub_p,
    prims.transpose_p,
    prims.xor_p,
}
# JAX 0.12: what tanh's derivative became.
LIGHT |= {p for p in [getattr(prims, "one_minus_square_p", None)] if p is not None}
# Transcendental functions: worth computing again only instead of keeping more than a few bytes.
HEAVY = {
    prims.cbrt_p,
    prims.cos_p,
    prims.erf_p,
    prims.exp2_p,
    prims.exp_p,
    prims.expm1_p,
    prims.log1p_p,
    prims.log_p,
    prims.logistic_p,
    prims.pow_p,
    prims.sin_p,
    prims.tanh_p,
}
