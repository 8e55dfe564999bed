"""Rows and columns brought to one size by powers of two, and what no such scale brings into range.

Mixing spreads every row over all others, and with it its rounding: beside a row of a million times
its size, a row keeps no digits. So each axis of a family of products has scales, a power of two for
each index, that go on before the blinding and come off the products, both exactly::

    X' = S_m X S_n    W' = S_n⁻¹ W S_p    G' = S_a G S_p⁻¹    G" = S_m⁻¹ G S_b

where G' is for dX and G" for dW: the examples that a gradient has hardly learned may count for
thousands of times the others, and the rows of dX must be as exact as any.
The tensor that is blinded first under an axis's key chooses its scales, and the others follow. What
is far from the usual size of its tensor after that, or not finite, is computed inside:

- rows and columns that would drown the others, or are not finite, are *removed*: zeros are blinded
  in their place, and all they add to a product is added inside;
- rows and columns that the others drown are *faint*: where they are rows or columns of a product,
  these are computed inside.

What the host gets is a blinded tensor like any other; that work was done inside shows in the time
it takes, and in nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from enclave_runtime.crypto.encryption import refuse_pickling
from enclave_runtime.schemes.kernels.lines import Factors, Lengths, lengths, scaled
from enclave_runtime.schemes.kernels.threads import in_parallel

LEAST_SCALE = 2  # binary orders of magnitude; sizes closer to the usual one are left alone
LARGEST_SCALE = 60  # those of two axes together stay within float32's range
REMOVED = 3  # binary orders of magnitude above most others, and more
MOST = 0.75  # of the lines: examples that are not yet learned, say, may be few
SWEEPS = 4  # over rows and columns; after one, a row has the size of what may have been one element
DROWNED = 8.0  # times the rounding of a product whose rows and columns are all of one size


class AxisScales:
    """The scales of one axis's key, chosen once, by the tensor that is blinded first under it.

    Attributes:
      exponents: of two, int64[copies, size], by which tensors under the key itself are
        multiplied, and tensors under its inverse transpose divided; None until they are chosen.
    """

    __slots__ = ("copies", "exponents")

    def __init__(self, copies: int):
        self.copies = copies
        self.exponents: np.ndarray | None = None

    def __repr__(self) -> str:
        return "AxisScales(<secret>)"

    __reduce__ = refuse_pickling


class Lines(NamedTuple):
    """Which indices of an axis need more than their product from outside, bool[…, size].

    Attributes:
      removed: blinded as zeros.
      zero: exactly.
      share: lengths of what is blinded over their root mean square, float64.
    """

    removed: np.ndarray
    zero: np.ndarray
    share: np.ndarray

    def __repr__(self) -> str:
        return "Lines(<secret>)"

    __reduce__ = refuse_pickling


class Equilibrated(NamedTuple):
    """A tensor (…, m, n) as it is blinded, and what is needed to make its products whole.

    Attributes:
      plain: the tensor.
      scaled: the tensor with scales, without what is removed; finite.
      energies: the sums of its squares at each leading index, float64 (…, 1, 1).
      rows: of the axis before the last.
      columns: of the last axis.
    """

    plain: np.ndarray
    scaled: np.ndarray
    energies: np.ndarray
    rows: Lines
    columns: Lines

    def __repr__(self) -> str:
        return "Equilibrated(<secret>)"

    __reduce__ = refuse_pickling

    @property
    def transposed(self) -> Equilibrated:
        """The same of the transposed tensor."""
        plain, scaled = self.plain.swapaxes(-1, -2), self.scaled.swapaxes(-1, -2)
        return Equilibrated(plain, scaled, self.energies, self.columns, self.rows)


@np.errstate(all="ignore")
def equilibrate(
    x: np.ndarray, scales: tuple[AxisScales, AxisScales], parities: tuple[int, int]
) -> Equilibrated:
    """Brings a tensor's rows and columns into one range of sizes.

    Args:
      x: (…, m, n), float32 or float64, of any values; not written to.
      scales: of its last two axes; chosen here where they are not yet.
      parities: 1 where the axis is under the key, 0 where it is under its inverse transpose.
    """
    plain = x
    found = lengths(x, _factors(x, scales, parities))
    removed = ~np.isfinite(found.rows)
    if removed.any():
        x = _without(x, 0, removed)
        found = lengths(x, _factors(x, scales, parities))
    _choose(x, found, scales, parities)
    factors = _factors(x, scales, parities)
    if not factors.none:
        x, found = scaled(x, factors)
    sizes, zero = found.rows, (found.rows == 0) & ~removed
    if zero.any() and x is not plain:
        # What a scale took below the smallest number is not nothing.
        zero[zero] = ~plain[zero].astype(bool).any(-1)
    far = _far(sizes)
    if far.any():
        removed |= far
        x = _without(x, 0, far)
        found = lengths(x)
        sizes = found.rows
    across = found.columns
    far_across = _far(across)
    if far_across.any():
        x = _without(x, 1, far_across)
    zero_across = across == 0
    if zero_across.any() and x is not plain:
        zero_across &= ~(plain.astype(bool) & ~removed[..., None]).any(-2)
    across = np.where(far_across, 0, across)
    rows = Lines(removed, zero, _shares(sizes))
    columns = Lines(far_across, zero_across, _shares(across))
    return Equilibrated(plain, x, np.square(across).sum(-1)[..., None, None], rows, columns)


@np.errstate(all="ignore")
def unscale(
    product: np.ndarray, scales: tuple[AxisScales, AxisScales], parities: tuple[int, int]
) -> np.ndarray:
    """Takes the scales off a product (…, m, p); inverse to what they are to an operand."""
    factors = _factors(product, scales, (1 - parities[0], 1 - parities[1]))
    return product if factors.none else scaled(product, factors)[0]


@np.errstate(all="ignore")
def complete(product: np.ndarray, left: Equilibrated, right: Equilibrated) -> np.ndarray:
    """Makes a product whole: adds what was removed, computes what was faint, and sets zeros.

    Args:
      product: of what was blinded, without scales, (…, m, p); written to.
      left: (…, m, n).
      right: (…, n, p).
    """
    faint, faint_across = _faint(left.rows, right.columns)
    rows = left.rows.removed | faint
    columns = right.columns.removed | faint_across
    between = left.columns.removed | right.rows.removed
    if left.rows.zero.any() or right.columns.zero.any():
        # Rounding would leave noise of the masks' size, which optimizers scale up.
        product[left.rows.zero] = 0
        product.swapaxes(-1, -2)[right.columns.zero] = 0
    if not (rows.any() or columns.any() or between.any()):
        return product
    for index in np.ndindex(*product.shape[:-2]):
        a, b, out = left.plain[index], right.plain[index], product[index]
        r, c, n = rows[index], columns[index], between[index]
        if r.mean() + c.mean() + n.mean() >= 1:
            out[:] = _product(a, b)
            continue
        if n.any():
            out += _product(a[:, n], b[n])
        if r.any():
            out[r] = _product(a[r], b)
        if c.any():
            out[:, c] = _product(a, b[:, c])
    return product


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``left @ right`` of matrices, with no word on values: the host reads the enclave's log."""
    out = np.empty((len(left), right.shape[1]), left.dtype)

    def run(start: int, stop: int) -> None:
        with np.errstate(all="ignore"):
            np.matmul(left[start:stop], right, out=out[start:stop])

    in_parallel(run, len(left), left.size + right.size)
    return out


def _quantile(sizes: np.ndarray, share: float) -> np.ndarray:
    """What a share of those that are not 0 does not exceed, (…, 1), or 0 where all are."""
    counted = np.where(sizes > 0, sizes, np.inf)
    last = np.maximum((sizes > 0).sum(-1, keepdims=True), 1) - 1
    found = np.take_along_axis(np.sort(counted, axis=-1), (last * share).astype(int), axis=-1)
    return np.where(np.isfinite(found), found, 0)


def _choose(
    x: np.ndarray,
    found: Lengths,
    scales: tuple[AxisScales, AxisScales],
    parities: tuple[int, int],
) -> None:
    """Chooses the scales that are not yet, from x and the lengths that the chosen ones leave it."""
    free = [axis for axis in (0, 1) if scales[axis].exponents is None]
    factors, sizes = list(_factors(x, scales, parities)), list(found)
    known = [True, True]  # whether lengths are those that the factors leave
    if len(free) == 1:
        fixed = 1 - free[0]
        # What will be removed has no say in what becomes of the rest.
        far = _far(sizes[fixed])
        if far.any():
            x, known = _without(x, fixed, far), [False, False]
    orders = {axis: np.zeros((scales[axis].copies, x.shape[axis - 2]), np.int64) for axis in free}
    for _ in range(SWEEPS):
        changed = False
        for axis in free:
            if not known[axis]:
                sizes, known = list(lengths(x, Factors(*factors))), [True, True]
            more = _orders(sizes[axis], scales[axis].copies)
            total = np.clip(orders[axis] + more, -LARGEST_SCALE, LARGEST_SCALE)
            more, orders[axis] = total - orders[axis], total
            if more.any():
                changed, known[1 - axis] = True, False
                factors[axis] = np.ldexp(1.0, -total)
                less = np.ldexp(1.0, -more)
                sizes[axis] = sizes[axis] * (less if x.ndim > 2 else less[0])
        if not changed:
            break
    for axis in free:
        scales[axis].exponents = -orders[axis] if parities[axis] else orders[axis]


def _orders(sizes: np.ndarray, copies: int) -> np.ndarray:
    """Binary orders of magnitude over the usual size, (copies, size)."""
    if copies == 1 and sizes.ndim > 1:
        sizes = np.sqrt(np.square(sizes).sum(tuple(range(sizes.ndim - 1))))
    sizes = np.where(np.isfinite(sizes), sizes, 0)
    usual = _quantile(sizes, 0.5)
    known = (sizes > 0) & (usual > 0)
    orders = np.rint(np.log2(np.where(known, sizes, 1)) - np.log2(np.where(usual > 0, usual, 1)))
    orders = np.where(known, orders, 0)
    return np.where(np.abs(orders) < LEAST_SCALE, 0, orders).astype(np.int64).reshape(copies, -1)


def axis_factors(scales: AxisScales, parity: int) -> np.ndarray:
    """Powers of two, (copies, size), which a tensor of this parity is multiplied by."""
    assert scales.exponents is not None, "products come back after their operands"
    return np.ldexp(1.0, scales.exponents if parity else -scales.exponents)


def _factors(
    x: np.ndarray, scales: tuple[AxisScales, AxisScales], parities: tuple[int, int]
) -> Factors:
    """What a tensor of these parities is multiplied by; 1 where nothing is chosen yet."""
    return Factors(
        *(
            np.ones((1, size)) if of.exponents is None else axis_factors(of, parity)
            for of, parity, size in zip(scales, parities, x.shape[-2:], strict=True)
        )
    )


def _without(x: np.ndarray, axis: int, lines: np.ndarray) -> np.ndarray:
    """A copy of x with zeros in some of its rows, axis 0, or columns."""
    return np.where(_lines(lines, axis), x.dtype.type(0), x)


def _lines(values: np.ndarray, axis: int) -> np.ndarray:
    """One value for each row, axis 0, or column, as it meets the elements of these."""
    return np.expand_dims(values, -2 if axis else -1)


def _far(sizes: np.ndarray) -> np.ndarray:
    """Which are far above most others, or not finite."""
    most = _quantile(np.where(np.isfinite(sizes), sizes, 0), MOST)
    return ~np.isfinite(sizes) | ((sizes > most * 2.0**REMOVED) & (most > 0))


def _shares(sizes: np.ndarray) -> np.ndarray:
    """Sizes over their root mean square; 0 where all are."""
    mean = np.sqrt(np.square(sizes).mean(-1, keepdims=True))
    return sizes / np.where(mean > 0, mean, 1)


def _faint(rows: Lines, columns: Lines) -> tuple[np.ndarray, np.ndarray]:
    """Which rows and columns of a product rounding drowns, together with what they meet.

    An element's rounding is that of an even product, times what its row and its column lack.
    """
    lacks = [np.where(at.removed | at.zero, 0, 1 / at.share) for at in (rows, columns)]
    kept = [(lack > 0) & (lack <= DROWNED) for lack in lacks]
    means = [
        np.sqrt(np.square(np.where(keep, lack, 0)).sum(-1) / np.maximum(keep.sum(-1), 1))
        for lack, keep in zip(lacks, kept, strict=True)
    ]
    first, second = (
        lack * np.maximum(other, 1)[..., None] > DROWNED
        for lack, other in zip(lacks, reversed(means), strict=True)
    )
    return first, second
