"""Rows and columns brought to one size by powers of two, and what no such scale brings into range.

Mixing spreads every row over all others, and with it its rounding: beside a row of a million times
its size, a row keeps no digits. So each axis of a family of products has scales, a power of two for
each index, that go on before the blinding and come off the products, both exactly::

    X' = S_m X S_n    W' = S_n⁻¹ W S_p    G' = S_m⁻¹ G S_p⁻¹

The tensor that is blinded first under an axis's key chooses its scales, and the others follow. What
is far from the usual size of its tensor after that, or not finite, is computed inside:

- rows and columns that would drown the others, or are not finite, are *removed*: zeros are blinded
  in their place, and all they add to a product is added inside;
- rows and columns that the others drown are *faint*: their own rows of a product are computed
  inside.

What the host gets is a blinded tensor like any other; that work was done inside shows in the time
it takes, and in nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from enclave_runtime.crypto.encryption import refuse_pickling

LEAST_SCALE = 2  # binary orders of magnitude; sizes closer to the usual one are left alone
LARGEST_SCALE = 60  # those of two axes together stay within float32's range
REMOVED = 5  # binary orders of magnitude above the usual size, and more
SWEEPS = 4  # over rows and columns; after one, a row has the size of what may have been one element
FAINT = 3  # binary orders of magnitude below the root mean square, and more


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
      faint: too small beside the others.
      zero: exactly.
    """

    removed: np.ndarray
    faint: np.ndarray
    zero: np.ndarray

    def __repr__(self) -> str:
        return "Lines(<secret>)"

    __reduce__ = refuse_pickling


class Equilibrated(NamedTuple):
    """A tensor (…, m, n) as it is blinded, and what is needed to make its products whole.

    Attributes:
      plain: the tensor.
      scaled: the tensor with scales, without what is removed; finite.
      rows: of the axis before the last.
      columns: of the last axis.
    """

    plain: np.ndarray
    scaled: np.ndarray
    rows: Lines
    columns: Lines

    def __repr__(self) -> str:
        return "Equilibrated(<secret>)"

    __reduce__ = refuse_pickling

    @property
    def transposed(self) -> Equilibrated:
        """The same of the transposed tensor."""
        plain, scaled = self.plain.swapaxes(-1, -2), self.scaled.swapaxes(-1, -2)
        return Equilibrated(plain, scaled, self.columns, self.rows)


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
    sizes = _sizes(x)
    removed, zero = ~np.isfinite(sizes), sizes == 0
    if removed.any():
        x = np.where(removed[..., None], x.dtype.type(0), x)
    sizes = np.where(removed, 0, sizes)
    x, across = _scaled(x, sizes, scales, parities)
    sizes = sizes if x is plain else _sizes(x)
    far = _far(sizes)
    if far.any():
        removed |= far
        x = np.where(far[..., None], x.dtype.type(0), x)
    if far.any() or across is None:
        across = _sizes(x.swapaxes(-1, -2))
    far_across = _far(across)
    if far_across.any():
        x = np.where(far_across[..., None, :], x.dtype.type(0), x)
    faint = _faint(np.where(far, 0, sizes))
    faint_across = _faint(np.where(far_across, 0, across))
    # What a scale took below the smallest number is faint, and not nothing.
    zero_across = across == 0
    if zero_across.any() and x is not plain:
        zero_across &= ~(plain.astype(bool) & ~removed[..., None]).any(-2)
        faint_across |= (across == 0) & ~zero_across
    faint |= (sizes == 0) & ~zero
    return Equilibrated(
        plain, x, Lines(removed, faint, zero), Lines(far_across, faint_across, zero_across)
    )


def unscale(
    product: np.ndarray, scales: tuple[AxisScales, AxisScales], parities: tuple[int, int]
) -> np.ndarray:
    """Takes the scales off a product (…, m, p); inverse to what they are to an operand."""
    for axis in (0, 1):
        product = _along(product, axis, _factors(scales[axis], 1 - parities[axis]))
    return product


def complete(product: np.ndarray, left: Equilibrated, right: Equilibrated) -> np.ndarray:
    """Makes a product whole: adds what was removed, computes what was faint, and sets zeros.

    Args:
      product: of what was blinded, without scales, (…, m, p).
      left: (…, m, n).
      right: (…, n, p).
    """
    rows = left.rows.removed | left.rows.faint
    columns = right.columns.removed | right.columns.faint
    between = left.columns.removed | right.rows.removed
    zeros = left.rows.zero[..., :, None] | right.columns.zero[..., None, :]
    if zeros.any():
        # Rounding would leave noise of the masks' size, which optimizers scale up.
        product = np.where(zeros, product.dtype.type(0), product)
    inside = [(lines.mean(-1)).max(initial=0) for lines in (rows, columns, between)]
    if not any(inside):
        return product
    a, b = left.plain, right.plain
    with np.errstate(all="ignore"):
        if sum(inside) >= 1:
            return np.matmul(a, b)
        product = product.copy()
        for index in np.ndindex(*product.shape[:-2]):
            r, c, n = rows[index], columns[index], between[index]
            if n.any():
                product[index] += a[index][:, n] @ b[index][n]
            if r.any():
                product[index][r] = a[index][r] @ b[index]
            if c.any():
                product[index][:, c] = a[index] @ b[index][:, c]
    return product


def _sizes(x: np.ndarray) -> np.ndarray:
    """The lengths of rows, float64 (…, m); not finite where a row's elements are not."""
    with np.errstate(all="ignore"):
        sums = np.einsum("...ij,...ij->...i", x, x).astype(np.float64)
        # Squares of float32 may have overflowed, or lost digits.
        unsure = ~((sums > 1e-25) & (sums < np.inf))
        if unsure.any():
            few = x[unsure].astype(np.float64)
            sums[unsure] = np.einsum("ij,ij->i", few, few)
    return np.sqrt(sums)


def _usual(sizes: np.ndarray) -> np.ndarray:
    """The median of those that are not 0, (…, 1), or 0 where all are."""
    counted = np.where(sizes > 0, sizes, np.inf)
    middle = (np.maximum((sizes > 0).sum(-1, keepdims=True), 1) - 1) // 2
    median = np.take_along_axis(np.sort(counted, axis=-1), middle, axis=-1)
    return np.where(np.isfinite(median), median, 0)


def _scaled(
    x: np.ndarray,
    sizes: np.ndarray,
    scales: tuple[AxisScales, AxisScales],
    parities: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray | None]:
    """A tensor of these lengths of rows with its scales, and its columns' lengths if known."""
    plain, free = x, [at.exponents is None for at in scales]
    for axis in (0, 1):
        if not free[axis]:
            x = _along(x, axis, _factors(scales[axis], parities[axis]))
    orders = [
        np.zeros((at.copies, n), np.int64) for at, n in zip(scales, x.shape[-2:], strict=True)
    ]
    lengths: list[np.ndarray | None] = [sizes if all(free) else None, None]
    for _ in range(SWEEPS):
        before = x
        for axis in (0, 1):
            if free[axis]:
                found = lengths[axis]
                if found is None:
                    found = _sizes(x.swapaxes(-1, -2) if axis else x)
                more = _orders(found, scales[axis].copies)
                total = np.clip(orders[axis] + more, -LARGEST_SCALE, LARGEST_SCALE)
                more, orders[axis] = total - orders[axis], total
                x, lengths = _along(x, axis, np.ldexp(1.0, -more)), [None, None]
                lengths[axis] = None if more.any() else found
        if x is before:
            break
    for axis in (0, 1):
        if free[axis]:
            scales[axis].exponents = -orders[axis] if parities[axis] else orders[axis]
    if any(free) and x is not plain:
        # In the order of a repeat, whose bits must be the same where numbers end.
        x = plain
        for axis in (0, 1):
            x = _along(x, axis, _factors(scales[axis], parities[axis]))
    return x, lengths[1]


def _orders(sizes: np.ndarray, copies: int) -> np.ndarray:
    """Binary orders of magnitude over the usual size, (copies, size)."""
    if copies == 1 and sizes.ndim > 1:
        sizes = np.sqrt(np.square(sizes).sum(tuple(range(sizes.ndim - 1))))
    sizes = np.where(np.isfinite(sizes), sizes, 0)
    usual = _usual(sizes)
    known = (sizes > 0) & (usual > 0)
    orders = np.rint(np.log2(np.where(known, sizes, 1)) - np.log2(np.where(usual > 0, usual, 1)))
    orders = np.where(known, orders, 0)
    return np.where(np.abs(orders) < LEAST_SCALE, 0, orders).astype(np.int64).reshape(copies, -1)


def _factors(scales: AxisScales, parity: int) -> np.ndarray:
    """Powers of two, (copies, size), which a tensor of this parity is multiplied by."""
    assert scales.exponents is not None, "products come back after their operands"
    return np.ldexp(1.0, scales.exponents if parity else -scales.exponents)


def _along(x: np.ndarray, axis: int, factors: np.ndarray) -> np.ndarray:
    """Times factors (copies, size) of the rows of x, axis 0, or columns; x itself if all are 1."""
    if (factors == 1).all():
        return x
    factors = factors if x.ndim > 2 else factors[0]
    with np.errstate(all="ignore"):
        return x * np.expand_dims(factors, -2 if axis else -1).astype(x.dtype)


def _far(sizes: np.ndarray) -> np.ndarray:
    """Which are far above the usual size, or not finite."""
    usual = _usual(np.where(np.isfinite(sizes), sizes, 0))
    return ~np.isfinite(sizes) | ((sizes > usual * 2.0**REMOVED) & (usual > 0))


def _faint(sizes: np.ndarray) -> np.ndarray:
    """Which are far below what mixing makes of all, and not 0."""
    mean = np.sqrt(np.square(sizes).mean(-1, keepdims=True))
    return (sizes > 0) & (sizes < mean * 2.0**-FAINT)
