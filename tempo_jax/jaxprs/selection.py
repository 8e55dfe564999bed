"""Branches computed whether or not they are taken, and selected among.

The predicate of a `cond` or `while` is the enclave's. What its branches send out is therefore sent
whether they are taken or not, and the enclave selects among the results: a NaN in a branch that is
not taken goes no further, and what may never end, or raise, is skipped there. Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from tempo_jax.jaxprs.types import from_physical, is_key_array, physical


@dataclasses.dataclass(frozen=True)
class Branch:
    """What has to be true for a traced equation to count.

    Attributes:
      which: an index, or a boolean array of which any element may be true.
      case: the index's value, or None for a boolean array.
    """

    which: Any
    case: int | None = None

    def taken(self) -> Any:
        """Whether it is true, as a traced boolean scalar."""
        if self.case is None:
            return jnp.any(self.which)
        return jnp.equal(self.which, self.case)


def predicate(branches: Sequence[Branch]) -> Any:
    """Whether all of these are taken, as a traced boolean scalar."""
    first, *others = [branch.taken() for branch in branches]
    for other in others:
        first = jnp.logical_and(first, other)
    return first


class Selections:
    """Which traced values were selected, by which index and among which.

    The backward pass of a `cond` is another one on the same index, and what it gets of the branches
    not taken is zero. Within a branch its own value stands for the selected one, which makes no
    difference where the branch is taken. So what goes out of the others is not zero, which would
    tell the host of them; and a gradient is recognised as that of its product.
    """

    def __init__(self):
        """Starts without any."""
        self._made: dict[int, tuple[Any, Any, Sequence[Any]]] = {}

    def record(self, chosen: Any, index: Any, values: Sequence[Any]) -> None:
        """Remembers a selected value; it is kept alive, so that its identity names it."""
        if isinstance(index, Tracer):
            self._made[id(chosen)] = (chosen, index, values)

    def within(self, x: Any, index: Any, case: int) -> Any:
        """What a value is wherever `index` is `case`."""
        while id(x) in self._made and self._made[id(x)][1] is index:
            x = self._made[id(x)][2][case]
        return x


def as_array(x: Any, aval: Any) -> Any:
    """A traced value as it is, and a constant as an array of this type."""
    if isinstance(x, Tracer) or is_key_array(aval):
        return x
    return jnp.broadcast_to(jnp.asarray(x, aval.dtype), aval.shape)


def select_where(which: Any, taken: Any, other: Any) -> Any:
    """``taken`` where `which`, else ``other``.

    Args:
      which: booleans whose shape begins the values'.
      taken: any array, typed keys included.
      other: of the same type.
    """
    shape = jnp.shape(taken)
    spread = lax.broadcast_in_dim(which, shape, tuple(range(jnp.ndim(which))))
    return lax.select_n(spread, other, taken)


def blank(aval: Any) -> Any:
    """Zeros of a type, typed keys included."""
    struct = physical(aval)
    return from_physical(jnp.zeros(struct.shape, struct.dtype), aval)


def finite_or(x: Any, other: Any) -> Any:
    """`x` with `other` in the place of elements that are NaN or infinite."""
    if not jnp.issubdtype(jax.typeof(x).dtype, jnp.inexact):
        return x
    return lax.select_n(jnp.isfinite(x), other, x)
