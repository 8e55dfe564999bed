"""Checks every product that the devices return, on blinded values and inside the enclave.

Freivalds' check. For ``Ŷ = X̂ Ŵ`` the enclave draws secret signs R, a fresh matrix for each product
and run, and compares ``Ŷ R`` with ``X̂ (Ŵ R)`` row by row::

    |Ŷ R - X̂ (Ŵ R)|_ik  ≤  T_i  =  5 u √(t + w) · √(S_i² + Y_i²)  +  underflow

with u the unit roundoff, t the terms of each element's sum, w the columns that are combined,
``S_i² = Σ_j Σ_k (X̂_ik Ŵ_kj)²`` the energy of row i's terms and ``Y_i`` the row's norm; what is
below 10⁻³ of all rows' average counts as that. If some element is off by more than ``T_i``, then
for any values of the other signs at most one of its own sign's two leaves the sum within the
tolerance. So an error that was chosen without knowing R escapes one column of R with probability
1/2 at most, and all 16 with 2⁻¹⁶, however many elements are wrong and whatever their pattern. The
blinded domain matters: unmixing would spread one wrong element over all others, below their
rounding. And whether a check passes depends on R and on what the host has anyway, so that a host
that tries which lies pass learns nothing.

Where the comparison fails, the enclave computes the product itself, in float64, and refuses the
result if an element is off by more than ``e_ij = 2048 u √(s² + y²)``, with y the element and s² the
energy of its terms: what rounding makes of it in any usual order of additions. So an unlucky honest
device costs time and not a run; one that multiplies in a shorter format than it was asked for is
refused.

The tolerance of an element is hence the larger of the two: a result with an element that is off by
more than both ``T_i`` and ``e_ij`` is accepted with probability 2⁻¹⁶ at most. One whose elements
are all within ``e_ij`` is accepted whatever ``T_i`` is, and an error below ``T_i`` as a rule,
however small the element. Over the RMS of a row of like elements neither is above 5·10⁻⁴ in
float32; one element that dominates its row of w may be off by 1.7·10⁻⁴ of itself, which is up to √w
times as much of the RMS. Operands whose product may overflow, or that are not finite, leave nothing
to compare: such a product is computed inside and the device's is not used. Trusted.

References:
  Freivalds, Probabilistic machines can use less running time, IFIP 1977.
  Tramer and Boneh, Slalom, ICLR 2019, https://arxiv.org/abs/1806.03287.
  Tempo (t-integrity), https://arxiv.org/abs/2401.11531.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.execution.executor import Compilation, Executor
from enclave_runtime.protocol.descriptions import (
    ELEMENT_ROUNDING,
    VECTORS,
    Convolution,
    DotGeneral,
    ProductDescription,
    block_width,
    rounding,
    unit_roundoff,
)
from enclave_runtime.protocol.program import ALIGNMENT, ArrayType, Crossing, Program

# Each attempt at a lie escapes with 2**-16, so the number of attempts is bounded.
MAX_WRONG_PRODUCTS = 256
# Rows far weaker than the average are held to a tolerance of this much of the average's.
FAINT_ROW = 1e-3


class WrongProductError(Exception):
    """The devices returned something that is not what was asked for; the text goes to the peer."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One product and the types of its operands and result; names the compiled check.

    Attributes:
      product: which product.
      lhs: the left operand's type, blinded.
      rhs: the right operand's.
      out: the result's.
    """

    product: ProductDescription
    lhs: ArrayType
    rhs: ArrayType
    out: ArrayType

    @property
    def unit(self) -> float:
        """Unit roundoff of the least exact format involved."""
        return unit_roundoff(self.lhs.dtype, self.rhs.dtype, self.out.dtype)

    @property
    def sizes(self) -> tuple[int, int]:
        """Terms of each sum, and columns of the result."""
        return self.product.sizes(self.lhs.shape, self.rhs.shape)

    @property
    def width(self) -> int:
        """Columns that are combined."""
        return block_width(*self.sizes, self.unit)


# The product and its projections, in JAX


def multiply(check: Check, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The product itself, in the result's format."""
    product = check.product
    exact, dtype = lax.Precision.HIGHEST, np.dtype(check.out.dtype)
    if isinstance(product, DotGeneral):
        numbers = (product.contract, product.batch)
        return lax.dot_general(
            lhs, rhs, numbers, precision=exact, preferred_element_type=dtype
        ).astype(dtype)
    return convolve(product, lhs, rhs, dtype).astype(dtype)


def convolve(
    product: Convolution, lhs: jax.Array, rhs: jax.Array, dtype: np.dtype | None = None
) -> jax.Array:
    """A convolution, summed in `dtype` or else in its operands' format."""
    return lax.conv_general_dilated(
        lhs,
        rhs,
        product.strides,
        product.padding,
        product.lhs_dilation,
        product.rhs_dilation,
        lax.ConvDimensionNumbers(product.lhs, product.rhs, product.out),
        product.feature_groups,
        product.batch_groups,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )


def columns_last(check: Check, out: jax.Array) -> jax.Array:
    """The result as (…, columns)."""
    product, (_, columns) = check.product, check.sizes
    if isinstance(product, Convolution):
        out = jnp.moveaxis(out, product.out[1], -1)
        return out.reshape(*out.shape[:-1], product.groups, columns)
    free = len(check.rhs.shape) - len(product.contract[1]) - len(product.batch[1])
    return out.reshape(*out.shape[: out.ndim - free], columns)


def through(
    check: Check,
    lhs: jax.Array,
    rhs: jax.Array,
    combine: jax.Array,
    between: Callable[[jax.Array], jax.Array] = lambda narrow: narrow,
) -> jax.Array:
    """``lhs between(rhs combine)`` as (…, count), for ``combine`` (columns, count)."""
    product, count = check.product, combine.shape[1]
    if isinstance(product, Convolution):
        kernel = jnp.moveaxis(rhs, product.rhs[0], -1)
        kernel = kernel.reshape(*kernel.shape[:-1], product.groups, combine.shape[0]) @ combine
        kernel = between(kernel.reshape(*kernel.shape[:-2], product.groups * count))
        narrow = multiply(check, lhs, jnp.moveaxis(kernel, -1, product.rhs[0]))
        narrow = jnp.moveaxis(narrow, product.out[1], -1)
        return narrow.reshape(*narrow.shape[:-1], product.groups, count)
    contract, batch = product.contract[1], product.batch[1]
    free = [i for i in range(rhs.ndim) if i not in {*contract, *batch}]
    kept = [i for i in range(rhs.ndim) if i not in free]
    weights = combine.reshape(*(rhs.shape[i] for i in free), count)
    narrow = between(_dot(rhs, weights, ((free, range(len(free))), ((), ()))))
    places = {axis: place for place, axis in enumerate(kept)}
    numbers = (
        (product.contract[0], tuple(places[i] for i in contract)),
        (product.batch[0], tuple(places[i] for i in batch)),
    )
    return _dot(lhs, narrow, numbers)


def _dot(large: jax.Array, small: jax.Array, numbers: Any) -> jax.Array:
    """A `dot_general` with an operand whose one free axis, its last, is short."""
    (contract, other), (batch, other_batch) = numbers
    free = [i for i in range(large.ndim) if i not in {*contract, *batch}]
    if not free or not contract or max(contract) > min(free):
        return lax.dot_general(large, small, numbers)
    # XLA turns a left operand that is contracted along its leading axes, which is slow, and
    # undoes it where the large operand comes second, unless a barrier keeps the two apart.
    turned = lax.dot_general(small, large, ((other, contract), (other_batch, batch)))
    return jnp.moveaxis(lax.optimization_barrier(turned), len(batch), -1)


def all_finite(x: jax.Array) -> jax.Array:
    """Whether no element is NaN or infinite.

    No maximum tells: on a CPU XLA hands reductions of 4,096 elements and more to a library whose
    maximum forgets NaN, elementwise ones in a sum included (JAX 0.10 to 0.12). So nothing here is
    decided by one.
    """
    return jnp.all(jnp.isfinite(x))


def scale_of(x: jax.Array) -> jax.Array:
    """The largest magnitude, in float64, or 1 where all is zero; squares of ``x / scale`` fit.

    Of a finite array: it may or may not show a NaN, so callers ask `all_finite`.
    """
    largest = jnp.max(jnp.abs(x), initial=0).astype(np.float64)
    return jnp.where(largest == 0, 1, largest)


def deviations(
    check: Check, lhs: jax.Array, rhs: jax.Array, out: jax.Array, signs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How far a result is off; see the module for the formula.

    Args:
      check: the product.
      lhs: left operand.
      rhs: right operand.
      out: what came back.
      signs: R by blocks, (columns, blocks, vectors), zero outside each column's block.

    Returns:
      Whether the operands allow a comparison, and for each combined column its deviation over its
      tolerance: where one is not at most 1, the result is wrong.
    """
    (terms, columns), width = check.sizes, check.width
    blocks, vectors = signs.shape[1:]
    wide = np.dtype(check.out.dtype)
    lhs, rhs = lhs.astype(wide), rhs.astype(wide)
    # Squares of what is scaled to 1 neither overflow nor vanish. The host chooses `out`, so that
    # an energy that it brings to overflow would make the tolerance infinite.
    scales = [scale_of(x) for x in (lhs, rhs, out)]
    unit = scales[0] * scales[1]
    scale = jnp.maximum(unit, scales[2])
    bound = unit * (terms * columns) * jnp.any(lhs != 0) * jnp.any(rhs != 0)
    comparable = bound < float(np.finfo(wide).max) / 4
    comparable &= all_finite(lhs) & all_finite(rhs)
    combine = signs.astype(wide).reshape(columns, blocks * vectors)
    expected = through(check, lhs, rhs, combine)
    given = columns_last(check, out)
    difference = jnp.abs(given @ combine - expected).astype(np.float64)
    within = jnp.abs(signs[..., 0]).astype(wide)  # which block each column is in
    scaled = (lhs / scales[0].astype(wide), rhs / scales[1].astype(wide))
    terms_energy = through(check, jnp.square(scaled[0]), jnp.square(scaled[1]), within).astype(
        np.float64
    )
    row_energy = (jnp.square(given / scales[2].astype(wide)) @ within).astype(np.float64)
    energy = terms_energy * (unit / scale) ** 2 + row_energy * (scales[2] / scale) ** 2
    energy += FAINT_ROW**2 * jnp.mean(energy)
    # Devices flush what is smaller to zero, at random places.
    tiny = 10 * float(np.finfo(wide).tiny) * math.sqrt(terms * width)
    tolerance = rounding(terms, width, check.unit) * scale * jnp.sqrt(energy) + tiny
    by_block = difference.reshape(*difference.shape[:-1], blocks, vectors)
    # Against an infinite tolerance everything would pass.
    tolerance = jnp.where(jnp.isfinite(tolerance), tolerance, 0.0)
    return comparable, by_block / tolerance[..., None]


def _passes(
    check: Check, lhs: jax.Array, rhs: jax.Array, out: jax.Array, signs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether the operands allow a comparison, and whether the result passes it."""
    comparable, off = deviations(check, lhs, rhs, out, signs)
    return comparable, jnp.all(off <= 1) & all_finite(out)  # NaN is not at most 1


@functools.cache
def _compiled(check: Check) -> Callable[..., Any]:
    types = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (check.lhs, check.rhs, check.out)]
    signs = jax.ShapeDtypeStruct(draw_signs(check, None).shape, np.int8)
    return jax.jit(functools.partial(_passes, check)).lower(*types, signs).compile()


def _rounded(check: Check, lhs: jax.Array, rhs: jax.Array, out: jax.Array) -> jax.Array:
    """Whether every element is the product's but for rounding; computes the product.

    Equal terms round alike, so that a long sum of them errs by up to t u / 2 of itself, and some
    convolutions compute with differences; the bound leaves room for both.
    """
    double = dataclasses.replace(check, out=ArrayType(check.out.shape, "float64"))
    # Squares of large values would leave float64, and so make the tolerance infinite.
    scales = [jnp.maximum(scale_of(x), 1) for x in (lhs, rhs)]
    lhs, rhs = (x.astype(np.float64) / s for x, s in zip((lhs, rhs), scales, strict=True))
    given = out.astype(np.float64) / scales[0] / scales[1]
    exact = multiply(double, lhs, rhs)
    energy = multiply(double, jnp.square(lhs), jnp.square(rhs)) + jnp.square(exact)
    tolerance = ELEMENT_ROUNDING * check.unit * jnp.sqrt(energy)
    tiny = float(np.finfo(np.dtype(check.out.dtype)).tiny) * check.sizes[0]
    tolerance += tiny / scales[0] / scales[1]
    return jnp.all((jnp.abs(given - exact) <= tolerance) & jnp.isfinite(tolerance))


@functools.cache
def _looks_closer(check: Check) -> Callable[..., Any]:
    return jax.jit(functools.partial(_rounded, check))


@functools.cache
def computed_inside(check: Check) -> Callable[..., Any]:
    return jax.jit(functools.partial(multiply, check))


def draw_signs(check: Check, stream: KeyStream | None) -> np.ndarray:
    """R by blocks, int8[columns, blocks, vectors]; without a stream its zeros."""
    (_, columns), width = check.sizes, check.width
    vectors = VECTORS if width > 1 else 1  # a column alone needs no second opinion
    signs = np.zeros((columns, -(-columns // width), vectors), np.int8)
    if stream is not None:
        place = np.arange(columns)
        signs[place, place // width] = stream.signs(columns * vectors).reshape(columns, vectors)
    return signs


def matches(
    check: Check, lhs: jax.Array, rhs: jax.Array, out: jax.Array, stream: KeyStream
) -> bool | None:
    """Whether ``out`` is the product, up to rounding; None if the operands allow no comparison."""
    if min(*check.lhs.shape, *check.rhs.shape, *check.out.shape, 1) == 0:
        return None
    comparable, right = _compiled(check)(lhs, rhs, out, draw_signs(check, stream))
    if not comparable:
        return None
    return bool(right) or bool(_looks_closer(check)(lhs, rhs, out))


# A program's checks


def checks_of(program: Program) -> dict[int, Check]:
    """The check of each upload that is a product of two values that were sent."""
    types = {c.value: program.multiplied(c) for s in program.segments for c in s.downloads}
    checks = {}
    for crossing in (c for s in program.segments for c in s.uploads):
        assert crossing.operands is not None and crossing.product is not None
        if set(crossing.operands) <= set(types):
            lhs, rhs = (types[v] for v in crossing.operands)
            checks[crossing.value] = Check(crossing.product, lhs, rhs, program.multiplied(crossing))
    return checks


def prepare(program: Program, executor: Executor) -> list[Compilation]:
    """Starts compiling the checks of a program that `following.check_program` let pass."""
    started = []
    for check in set(checks_of(program).values()):
        if math.prod(check.out.shape):
            started.append(executor.prepare(check, functools.partial(_compiled, check)))
    return started


class Verifier:
    """The checks of one run, with private copies of what was sent.

    Shared memory belongs to the host, so an operand is never read back from there. Its copy
    is kept until the last product that uses it has come back.
    """

    def __init__(self, program: Program):
        """Plans how long each copy is kept."""
        self._checks = checks_of(program)
        self._copies: dict[int, jax.Array] = {}
        self._last: dict[int, int] = {}
        for index, segment in enumerate(program.segments):
            for crossing in segment.uploads:
                if crossing.value in self._checks:
                    assert crossing.operands is not None
                    self._last.update(dict.fromkeys(crossing.operands, index))

    def __repr__(self) -> str:
        return f"Verifier({len(self._checks)} products, <secret>)"

    def keep(self, crossing: Crossing, blinded: np.ndarray) -> None:
        """Keeps what is sent, if a product uses it; nobody may change the array any more."""
        if crossing.value in self._last:
            self._copies[crossing.value] = jnp.asarray(blinded)

    def forget(self, index: int) -> None:
        """Drops what only segments before this one needed."""
        for value in [v for v in self._copies if self._last[v] < index]:
            del self._copies[value]

    def checked(
        self, crossing: Crossing, received: np.ndarray, stream: Callable[[], KeyStream]
    ) -> np.ndarray:
        """A product that came back, if it is right; or computed inside if that cannot be told.

        Args:
          crossing: the upload.
          received: a private copy of it.
          stream: opens the stream of this product and run.

        Raises:
          WrongProductError: it is wrong.
        """
        check = self._checks[crossing.value]
        assert crossing.operands is not None
        # What was sent in fewer bits is multiplied as exactly as if it had all of them.
        types = zip(crossing.operands, (check.lhs, check.rhs), strict=True)
        lhs, rhs = (self._copies[v].astype(array.dtype) for v, array in types)
        right = matches(check, lhs, rhs, jnp.asarray(received), stream())
        if right is None:
            return np.asarray(computed_inside(check)(lhs, rhs))
        if not right:
            raise wrong_product(crossing)
        return received


def wrong_product(crossing: Crossing) -> WrongProductError:
    """What says which product is wrong."""
    return WrongProductError(
        f"the devices returned a wrong product: {crossing.source}. The run was stopped, "
        "and the last committed state stands"
    )


def private(array: ArrayType) -> np.ndarray:
    """Uninitialised private memory, aligned so that XLA reads it without a copy."""
    raw = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    flat = raw[start : start + array.nbytes]
    return flat.view(np.dtype(array.dtype)).reshape(array.shape)


def private_copy(shared: np.ndarray) -> np.ndarray:
    """What lies in shared memory now, where the host cannot change it any more."""
    own = private(ArrayType(shared.shape, shared.dtype.name))
    np.copyto(own, shared)
    return own
