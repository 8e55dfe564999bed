"""Checks products that are computed modulo primes: Freivalds' check, exact and without tolerance.

For ``Y = X W`` modulo a prime p the enclave draws three secret vectors v, uniform modulo p, and
compares ``Y v`` with ``X (W v)``. If Y is wrong modulo p, each escapes with probability 1/p, and
all three with less than 2⁻²²; an honest result passes always. Y is the sum of what the pools sent,
and X and W come from the enclave's own copies of the shares. Trusted.

References:
  Freivalds, Probabilistic machines can use less running time, IFIP 1977.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.execution.executor import Compilation, Executor
from enclave_runtime.protocol.program import ArrayType, Crossing, Program
from enclave_runtime.verifying import integrity
from enclave_runtime.verifying.integrity import Check, Verifier, columns_last, through

VECTORS = 3
Fields = Callable[[str], tuple[int, ...]]  # the primes for a format


def _total(parts: np.ndarray) -> np.ndarray:
    """The sum over pools, int16."""
    return np.asarray(parts.sum(axis=0, dtype=np.int16))


def _reduced(x: jax.Array, prime: jax.Array) -> jax.Array:
    """Integers below 2**53 modulo a prime, between -p/2 and p/2."""
    return x - prime * jnp.round(x / prime)


def _right(check: Check, primes: tuple[int, ...], *given: jax.Array) -> jax.Array:
    """Whether a result is right modulo every prime.

    Args:
      check: the product.
      primes: the ring's.
      *given: left operand and right one, [primes, …], the result, likewise, and vectors,
        [primes, columns, vectors]; integers of a few times the primes at most.
    """
    exact = dataclasses.replace(check, out=ArrayType(check.out.shape, "float64"))

    def one(part: Any) -> jax.Array:
        lhs, rhs, out, vectors, prime = (x.astype(np.float64) for x in part)
        reduce = functools.partial(_reduced, prime=prime)
        expected = through(exact, reduce(lhs), reduce(rhs), vectors, reduce)
        found = columns_last(exact, reduce(out)) @ vectors
        return jnp.all(reduce(reduce(expected) - reduce(found)) == 0)

    return jnp.all(lax.map(one, (*given, jnp.asarray(primes))))


@functools.cache
def _compiled(check: Check, primes: tuple[int, ...]) -> Callable[..., jax.Array]:
    lhs, rhs, out = (
        jax.ShapeDtypeStruct((len(primes), *a.shape), np.int16)
        for a in (check.lhs, check.rhs, check.out)
    )
    vectors = jax.ShapeDtypeStruct((len(primes), check.sizes[1], VECTORS), np.int8)
    function = functools.partial(_right, check, primes)
    return jax.jit(function).lower(lhs, rhs, out, vectors).compile()


def prepare(program: Program, fields: Fields, executor: Executor) -> list[Compilation]:
    """Starts compiling the checks of a program that `schemes.check_program` let pass."""
    started = []
    for check in set(integrity.checks_of(program).values()):
        primes = fields(check.out.dtype)
        started.append(
            executor.prepare((check, primes), functools.partial(_compiled, check, primes))
        )
    return started


class RingVerifier(Verifier):
    """The checks of one run, with the operands' residues."""

    def __init__(self, program: Program, fields: Fields):
        """Plans how long residues are kept."""
        super().__init__(program)
        self._fields = fields

    def keep(self, crossing: Crossing, blinded: np.ndarray) -> None:
        """Keeps the sum of the pools' first shares, if a product uses it."""
        super().keep(crossing, _total(blinded[:, 0]))

    def checked(
        self, crossing: Crossing, received: np.ndarray, stream: Callable[[], KeyStream]
    ) -> np.ndarray:
        """A product that came back, if it is right; see `integrity.Verifier.checked`."""
        check = self._checks[crossing.value]
        primes = self._fields(check.out.dtype)
        assert crossing.operands is not None
        lhs, rhs = (self._copies[v] for v in crossing.operands)
        out = _total(received)
        vectors = stream().residues(primes, VECTORS, check.sizes[1])
        vectors = np.ascontiguousarray(np.moveaxis(vectors, 0, -1))
        if not _compiled(check, primes)(lhs, rhs, out, vectors):
            raise integrity.wrong_product(crossing)
        return received
