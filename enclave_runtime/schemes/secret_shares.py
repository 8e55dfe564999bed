"""Replicated secret sharing over three pools of devices that do not collude: a proof, no heuristic.

Every operand is an integer matrix in a ring (`enclave_runtime.schemes.kernels.residues`), and the
sum of three shares of which any two are uniform. Pool i holds shares i and i + 1 of both operands::

    X = X_0 + X_1 + X_2    W = W_0 + W_1 + W_2
    Z_i = X_i (W_i + W_{i+1}) + X_{i+1} W_i    X W = Z_0 + Z_1 + Z_2

Two shares are uniform and independent of the operand, and those of different operands, steps and
attempts are independent of each other, so that all a pool ever sees has the same distribution
whatever is computed. Two pools together hold all three shares, and with them the operand. The
stream cipher stands for uniform bytes, as everywhere.

Fixed point: the enclave scales each operand by a power of two of its own, which stays inside, so
that its largest element has `bits` bits, and rounds it to integers. Sums of up to `MOST_TERMS`
products of those fit into the ring, so that a result is exact for the rounded operands. Longer sums
are refused: nothing wraps around.

References:
  Araki, Furukawa, Lindell, Nof and Ohara, CCS 2016, https://eprint.iacr.org/2016/768 (the products;
  here the enclave adds the results, so that pools need not talk to each other).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from enclave_runtime.crypto.encryption import refuse_pickling
from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes.contract import (
    Group,
    Scheme,
    SchemeCost,
    UnblindingError,
    register,
)
from enclave_runtime.schemes.kernels import residues
from enclave_runtime.schemes.kernels.residues import CHUNK, MOST_TERMS, Ring

POOLS = 3
POOL_AXIS = "pools"
_DOUBLE_BITS = 45  # of float64 operands
_FARTHEST = 1000  # exponents beyond would leave float64, and such values are as good as nothing


class FixedPoint(NamedTuple):
    """What `unblind` needs to know of one operand.

    Attributes:
      exponent: the operand is its integers times two to the power of minus this.
      bits: of its ring.
      finite: whether it has integers at all.
      plain: the operand itself, until the products with it have come back.
    """

    exponent: int
    bits: int
    finite: bool
    plain: jax.Array | np.ndarray | None

    def __repr__(self) -> str:
        return "FixedPoint(<secret>)"

    __reduce__ = refuse_pickling


@register
@dataclasses.dataclass(frozen=True)
class SecretShares(Scheme):
    """Splits every operand into three shares for three pools of devices that do not collude.

    One pool learns shapes and nothing else, whatever it computes and however many steps it watches:
    proved, see the module. Two pools together learn everything, and so does whoever runs all three:
    a process that drives the three of them, or a network that shows the traffic of two. Nothing
    stays on the devices, so any optimizer can be used.

    Operands are rounded to fixed point, relative to their largest element by ``2**-fraction_bits``
    at most in float32 and shorter formats (float64: 45 bits), and nothing else is rounded but the
    result. Where an operand is not finite, the enclave computes the product itself, which the host
    may tell from the time. Devices multiply integers of 8 bits, twice for each of 5 to 10 primes (8
    with 22 bits, 14 in float64) in each of three pools; each receives 2 bytes of every prime for an
    operand's element, and sends 1 for a result's.

    Attributes:
      pools: 3.
      fraction_bits: 8 to 28; 22 keep float32's accuracy for tensors whose largest element is up to
        about ten times the usual one.
      insecure_one_pool: lets all three pools' products run on one device, without a mesh. That
        protects nothing, and is for trying things out.
    """

    pools: int = POOLS
    fraction_bits: int = 22
    insecure_one_pool: bool = False

    name: ClassVar[str] = "secret_shares"
    group: ClassVar[Group] = Group.ADDITIVE
    reference: ClassVar[SchemeCost] = SchemeCost(overhead=1.5e-4, blinding=24.0, drawing=0.0)
    host_learns: ClassVar[str] = (
        "one pool of devices: shapes, and from the time that a product was computed inside, "
        "because an operand was not finite. Two pools together: everything"
    )

    def __post_init__(self) -> None:
        """Checks the parameters."""
        if self.pools != POOLS or type(self.pools) is not int:
            raise ValueError(f"SecretShares: pools is {POOLS}")
        if type(self.fraction_bits) is not int or not 8 <= self.fraction_bits <= 28:
            raise ValueError("SecretShares: fraction_bits is an int between 8 and 28")
        if type(self.insecure_one_pool) is not bool:
            raise ValueError("SecretShares: insecure_one_pool is True or False")

    @property
    def key_budget(self) -> int | None:
        """Nothing is kept."""
        return 0

    @property
    def products_alone(self) -> bool:
        """Pools have no more than operands and parts of results."""
        return True

    @property
    def device_pools(self) -> int:
        """The three."""
        return self.pools

    @property
    def device_work(self) -> float:
        """Two products of 8 bits for each prime of float32's ring, which each pool computes."""
        return 2.0 * len(self.fields("float32"))

    @property
    def rounding(self) -> str:
        """What fixed point leaves of an operand."""
        return (
            f"operands are rounded to {2.0**-self.fraction_bits:.1e} of their largest element "
            "(float64: 2.8e-14), and their products are exact"
        )

    def refuses_devices(self, axes: Mapping[str, int] | None) -> str | None:
        """Anything but a mesh of three devices along an axis named "pools"."""
        if axes is None:
            if self.insecure_one_pool:
                return None
            return (
                "SecretShares hides nothing from a device that has all three pools' shares. Give "
                'the pools devices of their own, `mesh=Mesh(devices, ("pools",))` of three, or '
                "set `insecure_one_pool=True` to try it out"
            )
        if dict(axes) != {POOL_AXIS: POOLS}:
            return (
                f"SecretShares runs on a mesh of {POOLS} devices with the one axis "
                f'"{POOL_AXIS}", and this one has {dict(axes)}'
            )
        return None

    def ring(self, dtype: str) -> Ring:
        """The ring that operands of a format lie in."""
        return _ring(_DOUBLE_BITS if dtype == "float64" else self.fraction_bits)

    def fields(self, dtype: str) -> tuple[int, ...]:
        """The primes of a format's ring."""
        return self.ring(dtype).primes

    def representation(self, array: ArrayType, *, product: bool) -> ArrayType:
        """Residues, int8: two shares for each pool, or of a product one part."""
        count = len(self.fields(array.dtype))
        lead = (self.pools, count) if product else (self.pools, 2, count)
        return ArrayType((*lead, *array.shape), "int8")

    def refuses(self, lhs: ArrayType, rhs: ArrayType, out: ArrayType, terms: int) -> str | None:
        """Sums that may overflow, and formats of different rings."""
        if terms > MOST_TERMS:
            return (
                f"each of its sums has {terms} terms, and more than {MOST_TERMS} may overflow the "
                "ring of SecretShares"
            )
        if len({self.ring(array.dtype) for array in (lhs, rhs, out)}) > 1:
            return "float64 meets another format, and each has a ring of its own"
        return None

    def device_product(
        self,
        product: Callable[..., jax.Array],
        lhs: jax.Array,
        rhs: jax.Array,
    ) -> jax.Array:
        """Each pool's part of a product: int8[pools, 2, primes, …] twice, to [pools, primes, …].

        The pools that a device has, one unless it has all, are one after the other.
        """
        pools, _, count = lhs.shape[:3]
        primes = jnp.asarray(residues.PRIMES[:count], jnp.int32)

        def part(given: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            (x, next_x), (w, next_w), prime = given
            both = _reduced(w.astype(jnp.int32) + next_w.astype(jnp.int32), prime)
            first = _reduced(product(x, both), prime).astype(jnp.int32)
            second = _reduced(product(next_x, w), prime).astype(jnp.int32)
            return _reduced(first + second, prime)

        def by_prime(x: jax.Array) -> jax.Array:
            return jnp.swapaxes(x, 1, 2).reshape(pools * count, 2, *x.shape[3:])

        parts = lax.map(part, (by_prime(lhs), by_prime(rhs), jnp.tile(primes, pools)))
        return parts.reshape(pools, count, *parts.shape[1:])

    def draw(self, key_class: KeyClass, stream: KeyStream) -> None:
        """Axes have no keys."""

    def blind(
        self,
        plain: jax.Array | np.ndarray,
        layout: Layout,
        keys: Mapping[int, None],
        out: np.ndarray,
        stream: Callable[[], KeyStream],
    ) -> FixedPoint:
        """Splits a float array into three shares."""
        ring, draws = self.ring(plain.dtype.name), stream()
        x = np.ascontiguousarray(_wide(plain)).reshape(-1)
        largest = max(-float(x.min(initial=0)), float(x.max(initial=0)))  # NaN if there is one
        finite = math.isfinite(largest)
        exponent = ring.bits - math.frexp(largest)[1] if finite and largest else 0
        exponent = min(exponent, _FARTHEST)
        shares = out.reshape(*out.shape[:3], -1)
        for start in range(0, x.size, CHUNK):
            part = x[start : start + CHUNK]
            scaled = part * np.float64(2.0**exponent) if finite else np.zeros(part.size)
            shares[..., start : start + CHUNK] = ring.split(np.rint(scaled), draws)
        return FixedPoint(exponent, ring.bits, finite, plain)

    def unblind(
        self,
        blinded: np.ndarray,
        layout: Layout,
        keys: Mapping[int, None],
        operands: tuple[FixedPoint, FixedPoint] | None,
    ) -> jax.Array:
        """Adds up the pools' parts of a product, and scales it.

        Raises:
          UnblindingError: the result is larger than its operands allow.
        """
        assert operands is not None, "only products come back under this scheme"
        ring = _ring(operands[0].bits)
        parts = blinded.reshape(*blinded.shape[:2], -1)
        result = np.empty(parts.shape[2])
        for start in range(0, result.size, CHUNK):
            own = parts[..., start : start + CHUNK]
            total = np.add(own[0], own[1], dtype=np.int16)
            result[start : start + CHUNK] = ring.integers(np.add(total, own[2], out=total))
        if max(-result.min(initial=0), result.max(initial=0)) > MOST_TERMS * 4.0**ring.bits:
            raise UnblindingError(
                "it is larger than its operands allow, so that a pool computed it wrong; "
                "`verify=True` notices every error"
            )
        exponent = -operands[0].exponent - operands[1].exponent
        with np.errstate(over="ignore"):  # infinite, as the plain product is
            result = np.ldexp(result, exponent)
            wide = result if ring.bits == _DOUBLE_BITS else result.astype(np.float32)
        return jnp.asarray(wide.reshape(blinded.shape[2:]))

    @property
    def describes_products(self) -> bool:
        """So that what may overflow is refused, and what is not finite is computed inside."""
        return True

    def inside(self, operands: tuple[FixedPoint, FixedPoint]) -> tuple[Any, Any] | None:
        """Where an operand is not finite."""
        first, second = operands
        return None if first.finite and second.finite else (first.plain, second.plain)

    def let_go(self, secret: FixedPoint) -> FixedPoint:
        """Without the operand."""
        return secret._replace(plain=None)

    @classmethod
    def load(cls) -> None:
        """Compiles or loads all kernels."""
        residues.warm_up()

    def warm_up(self, array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]) -> None:
        """Compiles the kernels; they do not depend on shapes."""
        self.load()


@functools.cache
def _ring(bits: int) -> Ring:
    return Ring(bits)


def _reduced(x: jax.Array, prime: jax.Array) -> jax.Array:
    """int32 modulo a prime, between -(p-1)/2 and (p-1)/2, as int8.

    By float32, since nothing divides integers in vectors: the first quotient is off by a few where
    x has more digits than that, and the second one is right.
    """
    inverse = 1 / prime.astype(jnp.float32)
    for _ in range(2):
        x = x - jnp.round(x.astype(jnp.float32) * inverse).astype(jnp.int32) * prime
    return x.astype(jnp.int8)


def _wide(x: jax.Array | np.ndarray) -> np.ndarray:
    """The values as float32 or float64."""
    if x.dtype in (np.float32, np.float64):
        return np.asarray(x)
    # By XLA: NumPy converts 16-bit formats one element at a time.
    return np.asarray(jnp.asarray(x).astype(np.float32))
