"""The types of jaxprs, and of the arrays that stand for abstract values.

Untrusted and pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax._src.lax.lax import _convert_element_type  # JAX 0.10-0.12: sets weak types.
from jax.extend import core as jex_core

from enclave_runtime.protocol.program import ArrayType

if TYPE_CHECKING:
    # JAX declares `aval` as an abstract class without shape and dtype.
    class Var:
        """A variable of a jaxpr."""

        aval: Any

    class Literal:
        """A constant operand."""

        aval: Any
        val: Any

    class JaxprEqn:
        """An equation."""

        primitive: Any
        params: dict[str, Any]
        invars: list[Any]
        outvars: list[Any]
        source_info: Any
        ctx: Any
        effects: Any

        def replace(self, **changes: Any) -> JaxprEqn:
            """A changed copy."""
            ...

    class Jaxpr:
        """A program without the values of its constants."""

        constvars: list[Var]
        invars: list[Var]
        outvars: list[Any]
        eqns: list[JaxprEqn]
        effects: Any

        def replace(self, **changes: Any) -> Jaxpr:
            """A changed copy."""
            ...

    class ClosedJaxpr:
        """A program with the values of its constants."""

        jaxpr: Jaxpr
        consts: Sequence[Any]

        def __init__(self, jaxpr: Jaxpr, consts: Sequence[Any]): ...
else:
    ClosedJaxpr = jex_core.ClosedJaxpr
    Jaxpr = jex_core.Jaxpr
    JaxprEqn = jex_core.JaxprEqn
    Literal = jex_core.Literal
    Var = jex_core.Var


def is_key_array(aval: Any) -> bool:
    """Whether this is an array of typed `jax.random` keys."""
    return jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)


# Elements of less than a byte have no size of their own in NumPy and in shared memory, and JAX
# 0.10.2 does not give a compiled program its own int4 results back. A byte holds each exactly.
_IN_BYTES = {
    np.dtype(narrow): np.dtype(byte)
    for narrow, byte in (
        *((ml_dtypes.int2, np.int8), (ml_dtypes.uint2, np.uint8)),
        *((ml_dtypes.int4, np.int8), (ml_dtypes.uint4, np.uint8)),
        (ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn),
    )
}


def physical(aval: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the array that represents a value.

    It differs for typed keys and for elements of less than a byte.
    """
    struct = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    if is_key_array(aval):
        return jax.eval_shape(jax.random.key_data, struct)
    return jax.ShapeDtypeStruct(aval.shape, _IN_BYTES.get(aval.dtype, aval.dtype))


def to_physical(x: Any) -> Any:
    """Typed `jax.random` keys as their uint32 data, narrow elements in bytes, others as is."""
    aval = jax.typeof(x)
    if is_key_array(aval):
        return jax.random.key_data(x)
    byte = _IN_BYTES.get(aval.dtype)
    return x if byte is None else x.astype(byte)


def from_physical(x: Any, aval: Any) -> Any:
    """Inverse of `to_physical` for a value of this type."""
    if not is_key_array(aval):
        return x.astype(aval.dtype) if aval.dtype in _IN_BYTES else x
    # JAX 0.10-0.12: a key type's implementation has no public name.
    return jax.random.wrap_key_data(x, impl=aval.dtype._impl.name)


def with_weak_type(x: jax.Array, weak_type: bool) -> jax.Array:
    """The same array, weakly typed as `weak_type` says."""
    if is_key_array(x) or x.weak_type == weak_type:
        return x
    return jnp.asarray(_convert_element_type(x, x.dtype, weak_type))


def avals_of(closed: ClosedJaxpr) -> list[jax.ShapeDtypeStruct]:
    """Types of a program's inputs, to trace it anew."""
    return [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type)
        for v in closed.jaxpr.invars
    ]


def array_type(aval: Any) -> ArrayType:
    """Shape and dtype of an abstract value in the protocol's terms."""
    struct = physical(aval)
    return ArrayType(tuple(struct.shape), np.dtype(struct.dtype).name)


def nbytes(variable: Var) -> int:
    """Size of a value in bytes."""
    array = physical(variable.aval)
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize
