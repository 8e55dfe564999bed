"""Secret checksums of leaves that stay on the devices and are updated there.

The enclave knows the blinded operands X̂ and Ĝ that it sends, and not what has become of a weight Ŵ
that it blinded some runs ago. It keeps a *sketch* of it, ``C = Ŵ R`` in float64, for each way in
which products use the leaf: R are secret signs over the axes that survive the product, 16 vectors
for each block of at most 128 columns. Then ``Ŷ = X̂ Ŵ`` is right if ``Ŷ R = X̂ C``, for ``dX̂ = Ĝ
Ŵᵀ`` a sketch of the other axis serves, and the sketches follow what the devices do without Ŵ: ``Ŵ -
η X̂ᵀĜ`` has ``C - η X̂ᵀ(Ĝ R)``. Sums, multiples and changes of layout likewise; leaves that one
update adds up (a weight and its momentum) share their signs. A device that leaves an update out,
falsifies it or puts an older leaf back is caught when the leaf is next used, at the latest when it
is brought in (opened, saved, blinded anew), where it is held to its sketch before it is unblinded.

Tolerance. Rounding on the devices makes leaf and sketch drift apart, and for tiny updates in the
same direction each time (what is less than half a unit in the last place of w is lost whole), so
nothing is assumed of its signs: with each row i of a sketch goes a bound ``D_i`` on the norm of
what rounding has changed in the block. Every elementwise operation adds u times the row's norm,
which C itself shows, a product its own rounding, and linear maps carry the bound along. A leaf's
row passes if ``|Ŵ R - C|_i ≤ 5 D_i``, a product's if ``|Ŷ R - X̂ C|_ik ≤ 2 T_i + 5 Σ_j |X̂_ij|
D_j`` with T as in `integrity`. R is drawn without looking at the rounding, so an honest device
exceeds k times the norm of its rounding with probability ``2 exp(-k²/2)`` at most (Hoeffding),
8·10⁻⁶ for each of the comparisons even where each single rounding is the worst possible and in the
same direction; independent ones stay √n times below the bound after n updates and average out over
the rows, so that k is above 10. There is no closer look, since the enclave has no Ŵ. To keep the
tolerance below 10⁻³ of the RMS of a product's row the leaf is brought in, checked and blinded anew,
under fresh keys and signs, after `checksum_limit` runs: 8 for 256 rows in float32, 4 for 1024, 16
in float64. (16-bit formats would leave nothing to notice; such leaves stay in the enclave.)

What escapes. An error in a product or a leaf by more than the tolerance escapes with 2⁻¹⁶ at most.
R serves many comparisons, but up to the first that fails their outcomes are all alike and tell
nothing, so that the bound holds for every lie up to then; with it R is spent for products, in every
run that is open, and the leaf can only be brought in, in at most `MAX_FAILURES` attempts. What is
below the tolerance counts by the *leaf*: an error in one element of an update is noticed from about
``5 n u √w`` of the RMS of the weight's row on (n runs, w columns; 3·10⁻⁵ for 8 and 128), and errors
in all of a row together from ``5 n u`` of its norm on, not from a share of the update. Where a
sketch or an operand is not finite, or a product or leaf may leave its format, nothing can be
compared, and without Ŵ nothing can be computed inside: the run stops, or the leaf is not given out.
That depends on nothing that came back. So it is no lie, is not counted as one, and R stays secret;
a run that brings finite values goes on. Nothing passes against a tolerance that is not finite.

Trusted.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.protocol import updates
from enclave_runtime.protocol.descriptions import (
    CHECKSUM_ROUNDING,
    DRIFT,
    VECTORS,
    DotGeneral,
    ProductDescription,
    checksum_limit,
    checksum_width,
    rounding,
    unit_roundoff,
)
from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.protocol.updates import AxisNumbers, Update
from enclave_runtime.verifying.integrity import (
    FAINT_ROW,
    WrongProductError,
    all_finite,
    convolve,
    scale_of,
)

MAX_FAILURES = 8  # comparisons of a leaf with one checksum that may fail
_SUMMATION = 1e-12  # rounding of the sketches themselves, in float64
# The largest of 128 elements is at least 0.088 of their norm, so one vector shows as much with
# probability 1/2 at least; the RMS of 16 shows less than 1/46 of a norm with 2**-16 at most.
_ROOM = 64


class NotComparableError(WrongProductError):
    """Nothing can be compared, whatever came back; so an honest device may be behind it."""


class SpentSignsError(Exception):
    """A product with a leaf whose signs are spent, so that it was not compared."""


class Signs:
    """R, with what bounds its use. Shared by all sketches that are ever added up.

    Attributes:
      limit: runs that may use it.
      uses: runs that did, whether or not they were committed.
      failures: comparisons that failed.
      lock: held during a comparison, so that the next one knows how it ended.
    """

    def __init__(self, array: ArrayType, axes: AxisNumbers, stream: KeyStream):
        columns = math.prod(array.shape[a] for a in axes)
        terms, unit = array.size // max(columns, 1), unit_roundoff(array.dtype)
        self.width = checksum_width(terms, columns, unit)
        self.limit = checksum_limit(terms, self.width, unit)
        self.uses = 0
        self.failures = 0
        self.lock = threading.Lock()
        blocks = -(-columns // self.width)
        drawn = np.zeros((blocks * self.width, VECTORS), np.int8)
        drawn[:columns] = stream.signs(columns * VECTORS).reshape(columns, VECTORS)
        self.matrix = drawn.reshape(blocks, self.width, VECTORS)

    def __repr__(self) -> str:
        return "Signs(<secret>)"

    @property
    def spent(self) -> bool:
        """Whether a leaf under it has to be brought in."""
        return self.uses >= self.limit or self.failures > 0


class Sketch(NamedTuple):
    """A projected array and how far rounding may have moved it.

    Attributes:
      signs: R.
      values: float64[rows..., blocks * vectors].
      drift: D, float64[rows..., blocks].
    """

    signs: Signs
    values: np.ndarray
    drift: np.ndarray

    def __repr__(self) -> str:
        return f"Sketch({list(self.values.shape)}, <secret>)"

    @property
    def norms(self) -> np.ndarray:
        """Norm of each row of each block, as far as the 16 vectors show it."""
        largest = np.max(np.abs(self._by_vector), axis=-1, keepdims=True)
        # Squares of what is scaled to 1 do not overflow.
        scale = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
        return scale[..., 0] * np.sqrt(np.mean(np.square(self._by_vector / scale), axis=-1))

    @property
    def _by_vector(self) -> np.ndarray:
        return self.values.reshape(*self.drift.shape, VECTORS)

    def rounded(self, unit: float) -> Sketch:
        """After an operation that rounds each element."""
        return self._replace(drift=self.drift + unit * self.norms)


Checksum = Mapping[AxisNumbers, Sketch]


# Arithmetic


@functools.partial(jax.jit, static_argnames="axes")
def _project(x: jax.Array, matrix: jax.Array, axes: AxisNumbers) -> jax.Array:
    """``x R`` along axes, which become one last axis of (blocks, vectors)."""
    kept = [i for i in range(x.ndim) if i not in axes]
    blocks, width, vectors = matrix.shape
    x = jnp.transpose(x, (*kept, *axes)).reshape(*(x.shape[i] for i in kept), -1)
    x = jnp.pad(x, [(0, 0)] * len(kept) + [(0, blocks * width - x.shape[-1])])
    x = x.reshape(*x.shape[:-1], blocks, width)
    out = jnp.einsum("...bw,bwk->...bk", x, matrix.astype(x.dtype), precision="highest")
    return out.reshape(*out.shape[:-2], blocks * vectors)


def _narrowed(
    product: ProductDescription, lhs: jax.Array, rhs: jax.Array, which: int, gone: AxisNumbers
) -> jax.Array:
    """A product in which one operand's free axes are gone, for a last one; it is the result's."""
    if isinstance(product, DotGeneral):
        contract, batch = list(product.contract), list(product.batch)
        rank = (lhs, rhs)[which].ndim - 1 + len(gone)
        places = {a: n for n, a in enumerate(i for i in range(rank) if i not in gone)}
        contract[which] = tuple(places[a] for a in contract[which])
        batch[which] = tuple(places[a] for a in batch[which])
        numbers = ((contract[0], contract[1]), (batch[0], batch[1]))
        out = lax.dot_general(lhs, rhs, numbers, precision=lax.Precision.HIGHEST)
        last = out.ndim - 1
        if which == 0:
            last = lhs.ndim - len(contract[0]) - 1
        return jnp.moveaxis(out, last, -1)
    (axis,) = gone
    if which == 0:
        lhs = jnp.moveaxis(lhs, -1, axis)
    else:
        rhs = jnp.moveaxis(rhs, -1, axis)
    return jnp.moveaxis(convolve(product, lhs, rhs), product.out[which], -1)


class _Operands(NamedTuple):
    """Which operand of a product is projected, along which axes, and the result's format."""

    product: ProductDescription
    which: int
    axes: AxisNumbers
    dtype: str
    width: int

    def both(self, own: jax.Array, other: jax.Array) -> jax.Array:
        """The product of a projected operand with the other one."""
        lhs, rhs = (own, other) if self.which == 0 else (other, own)
        return _narrowed(self.product, lhs, rhs, self.which, self.axes)


def _tolerance(
    energy: jax.Array, terms: int, use: _Operands, unit: float, scale: jax.Array | float = 1.0
) -> jax.Array:
    """What rounding may make of a row with this energy, in units of `scale` squared."""
    tiny = 10 * float(np.finfo(np.dtype(use.dtype)).tiny) * math.sqrt(terms * use.width)
    energy = energy + FAINT_ROW**2 * jnp.mean(energy)
    return CHECKSUM_ROUNDING * rounding(terms, use.width, unit) * scale * jnp.sqrt(energy) + tiny


def _row_energy(x: jax.Array, within: jax.Array, axes: AxisNumbers) -> jax.Array:
    return _project(jnp.square(x.astype(np.float64)), within, axes)


@functools.partial(jax.jit, static_argnames="use")
def _sketched(
    use: _Operands, own: jax.Array, other: jax.Array, matrix: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A product's sketch from its operands, and how far a device's rounding may be from it."""
    wide = np.dtype(use.dtype)
    terms, _ = use.product.sizes(*_shapes(use, own, other))
    unit = unit_roundoff(own.dtype.name, other.dtype.name, use.dtype)
    values = use.both(_project(own.astype(wide), matrix, use.axes), other.astype(wide))
    values = values.astype(np.float64)
    blocks, _, vectors = matrix.shape
    rows = jnp.square(values).reshape(*values.shape[:-1], blocks, vectors).mean(-1)
    energy = _row_energy(own, jnp.abs(matrix[..., :1]), use.axes)
    energy = use.both(energy, jnp.square(other.astype(np.float64)))
    return values, _tolerance(energy + rows, terms, use, unit) / DRIFT


def _shapes(use: _Operands, own: jax.Array, other: jax.Array) -> tuple[AxisNumbers, AxisNumbers]:
    return (own.shape, other.shape) if use.which == 0 else (other.shape, own.shape)


@functools.partial(jax.jit, static_argnames=("use", "shape", "out_axes"))
def _compared(
    use: _Operands,
    shape: AxisNumbers,
    out_axes: AxisNumbers,
    other: jax.Array,
    out: jax.Array,
    sketch: tuple[jax.Array, jax.Array, jax.Array],
    matrix: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Whether a product with a leaf can be compared, and whether it is right.

    The first depends on nothing that came back. That widens the tolerance, so that no value of it
    may make that infinite.
    """
    values, norms, drift = sketch
    wide, exact = np.dtype(use.dtype), other.astype(np.float64)
    shapes = (shape, other.shape) if use.which == 0 else (other.shape, shape)
    terms, _ = use.product.sizes(*shapes)
    unit = unit_roundoff(other.dtype.name, use.dtype)
    expected = use.both(values.astype(wide), other.astype(wide)).astype(np.float64)
    given = _project(out.astype(wide), matrix, out_axes).astype(np.float64)
    sizes = [scale_of(x) for x in (norms, exact, out.astype(np.float64))]
    scale = jnp.maximum(sizes[0] * sizes[1], sizes[2])
    energy = use.both(jnp.square(norms / sizes[0]), jnp.square(exact / sizes[1]))
    energy *= jnp.square(sizes[0] * sizes[1] / scale)
    energy += _row_energy(out / scale, jnp.abs(matrix[..., :1]), out_axes)
    drifted = DRIFT * use.both(drift, jnp.abs(exact))
    comparable = all_finite(drifted) & all_finite(values) & all_finite(exact)
    # Beyond, an honest device's sums, or those taken of its rows here, may overflow.
    bound = _ROOM * terms * use.width * sizes[0] * sizes[1]
    comparable &= bound < float(np.finfo(wide).max)
    tolerance = _tolerance(energy, terms, use, unit, scale) + drifted
    difference = jnp.abs(given - expected).reshape(*tolerance.shape, VECTORS)
    right = all_finite(out) & all_finite(tolerance) & jnp.all(difference <= tolerance[..., None])
    return comparable, right


def sketch(signs: Signs, x: np.ndarray, axes: AxisNumbers) -> Sketch:
    """The sketch of an array that the enclave has."""
    values = np.asarray(_project(jnp.asarray(x, np.float64), signs.matrix, axes))
    return Sketch(signs, values, np.zeros((*values.shape[:-1], signs.matrix.shape[0])))


def product_sketch(
    signs: Signs, update: Update, operands: tuple[jax.Array, jax.Array], axes: AxisNumbers
) -> Sketch:
    """The sketch of a product of two arrays that the enclave has, as devices multiply."""
    assert update.product is not None
    which, inner = updates.owner(update.product, (operands[0].ndim, operands[1].ndim), axes)
    use = _Operands(update.product, which, inner, update.dtype, signs.width)
    values, drift = _sketched(use, operands[which], operands[1 - which], signs.matrix)
    return Sketch(signs, np.asarray(values), np.asarray(drift))


@np.errstate(all="ignore")  # what is not finite is refused where it is compared
def apply(update: Update, operands: Sequence[Sketch], axes: AxisNumbers, factor: float) -> Sketch:
    """The sketch of an update's result along `axes`; for all but products."""
    first, unit = operands[0], unit_roundoff(update.dtype)
    if update.kind == updates.NEG:
        return first._replace(values=-first.values)
    if update.kind == updates.CONVERT:
        return first.rounded(unit)
    if update.kind in (updates.TRANSPOSE, updates.REVERSE):
        kept = [a for a in range(len(update.shape)) if a not in axes]
        if update.kind == updates.REVERSE:
            places = tuple(n for n, a in enumerate(kept) if a in update.axes)
            return Sketch(first.signs, *(np.flip(x, places) for x in first[1:]))
        old = [update.axes[a] for a in kept]
        order = (*(sorted(old).index(a) for a in old), len(kept))
        return Sketch(first.signs, *(np.transpose(x, order) for x in first[1:]))
    if update.kind in (updates.SCALE, updates.DIVIDE):
        scale = factor if update.kind == updates.SCALE else float(np.divide(1.0, factor))
        scaled = Sketch(first.signs, scale * first.values, abs(scale) * first.drift)
        return scaled.rounded(unit)
    assert update.kind in (updates.ADD, updates.SUB)
    second = operands[1]
    assert first.signs is second.signs, "leaves that are added up share their signs"
    sign = 1 if update.kind == updates.ADD else -1
    both = Sketch(first.signs, first.values + sign * second.values, first.drift + second.drift)
    return both.rounded(unit)


# Comparisons


class LeafUse(NamedTuple):
    """How a product uses a leaf: which operand it is, and the axes that are projected.

    Attributes:
      product: the product.
      which: the leaf's side.
      axes: the leaf's free axes.
      out_axes: what they are of the result.
    """

    product: ProductDescription
    which: int
    axes: AxisNumbers
    out_axes: AxisNumbers


def leaf_use(product: ProductDescription, ranks: tuple[int, int], which: int) -> LeafUse:
    """How a product of such ranks uses a leaf as its operand `which`."""
    out_axes, axes = updates.free_axes(product, ranks, which)
    return LeafUse(product, which, axes, out_axes)


def check_product(
    use: LeafUse, leaf: Sketch, shape: AxisNumbers, other: jax.Array, out: jax.Array, source: str
) -> None:
    """Checks that `out` is the product of a leaf and what was sent.

    Args:
      use: how the leaf is used.
      leaf: its sketch along `use.axes`.
      shape: its shape.
      other: the other operand.
      out: a private copy of what came back.
      source: names the product.

    Raises:
      WrongProductError: it is not.
      NotComparableError: its operands allow no comparison.
      SpentSignsError: a comparison under these signs failed before, in whatever run.
    """
    operands = _Operands(use.product, use.which, use.axes, out.dtype.name, leaf.signs.width)
    parts = (leaf.values, leaf.norms, leaf.drift)
    with leaf.signs.lock:
        if leaf.signs.failures > 0:
            raise SpentSignsError(
                f"a wrong value of this leaf or of a product with it came back before: {source}. "
                "The run was stopped, and the last committed state stands. Call again: the leaf "
                "is then brought in, checked and blinded anew"
            )
        comparable, right = _compared(
            operands, shape, use.out_axes, other, out, parts, leaf.signs.matrix
        )
        if not comparable:
            raise NotComparableError(
                f"an operand is not finite, or too large, so that nothing can be checked: {source}."
                " The run was stopped, and the last committed state stands"
            )
        if not right:
            leaf.signs.failures += 1
            raise WrongProductError(
                f"the devices returned a wrong product: {source}. The run was stopped, "
                "and the last committed state stands"
            )


def _allows_comparison(leaf: Sketch, dtype: np.dtype) -> bool:
    """Whether an honest device's leaf is finite, as far as its sketch tells."""
    with np.errstate(all="ignore"):
        largest = np.max(leaf.norms + DRIFT * leaf.drift, initial=0)
    finite = np.isfinite(leaf.values).all() and np.isfinite(leaf.drift).all()
    return bool(finite and _ROOM * largest < float(np.finfo(dtype).max))


def leaf_matches(leaf: Sketch, x: np.ndarray, axes: AxisNumbers) -> bool:
    """Whether an array from the devices is the one that a sketch followed."""
    given = sketch(leaf.signs, x, axes)
    tiny = 10 * float(np.finfo(x.dtype).tiny) * math.sqrt(leaf.signs.width)
    with np.errstate(all="ignore"):
        tolerance = DRIFT * leaf.drift + _SUMMATION * (leaf.norms + given.norms) + tiny
        difference = np.abs(given.values - leaf.values).reshape(*leaf.drift.shape, VECTORS)
    # Infinite tolerance would let everything pass.
    right = np.isfinite(tolerance)[..., None] & (difference <= tolerance[..., None])
    return bool(np.all(right))


def check_leaf(checksum: Checksum, x: np.ndarray, source: str) -> None:
    """Checks that an array from the devices fits its checksum.

    Args:
      checksum: the leaf's.
      x: a private copy.
      source: names the leaf.

    Raises:
      WrongProductError: it does not.
      NotComparableError: the leaf was not finite when the devices last updated it honestly.
    """
    for axes, leaf in checksum.items():
        with leaf.signs.lock:
            if leaf.signs.failures >= MAX_FAILURES:
                raise WrongProductError(
                    f"{leaf.signs.failures} wrong values came back for a leaf or its products: "
                    f"{source}. It is given up; restore it from a checkpoint"
                )
            if not _allows_comparison(leaf, x.dtype):
                raise NotComparableError(
                    f"a leaf is not finite, or too large, so that it cannot be checked: {source}. "
                    "What it was updated by made it so; restore it from a checkpoint"
                )
            if not leaf_matches(leaf, x, axes):
                leaf.signs.failures += 1
                raise WrongProductError(
                    f"the devices returned a wrong leaf: {source}. It was updated wrongly or "
                    "altered since"
                )
