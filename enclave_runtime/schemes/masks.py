"""Masks of full rank that are cheap to take off, because they are fast maps themselves.

Keys of bounded condition blur a tensor's singular values and keep its rank. Whoever can guess the
tensor blinds guesses under keys of its own and asks under which one the values seen are likely. So
X (m, n) gets a mask before it gets keys::

    X̃ = X + M    M = Z - L Rᵀ    X̃ W̃ - M_x W̃ - X M_w = X W

L Rᵀ brings X's strongest directions down to the size of the others, which a mask of the energy that
rounding allows would not cover. ``Z = K_m E K_n`` is made of maps of both axes
(`enclave_runtime.schemes.kernels.hadamard`), E a cut identity, so that Z times a matrix takes a few
passes over it. The map of the shorter axis is ``P S H P S D H P S D H P S`` and makes the spectrum;
that of the longer one, ``P S H P S``, is orthogonal. Z alone hides nothing, since its rows are told
apart by their products: it needs dense keys on both sides.

Were the entries of D independent, the spectrum of Z would be the same in every draw but for parts
in √n, and what X adds to it would show the better the larger the matrix. They follow a
distribution that is random itself (a Dirichlet process), so that every moment of the spectrum
varies by as much at any size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from enclave_runtime.crypto.encryption import refuse_pickling
from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.schemes.kernels import hadamard
from enclave_runtime.schemes.kernels.hadamard import AxisMap
from enclave_runtime.schemes.kernels.passes import aligned_empty
from enclave_runtime.schemes.kernels.threads import in_parallel
from enclave_runtime.schemes.kernels.tile_programs import (
    TiledMatrix,
    TileProgram,
    empty_tiles,
    padded,
)

ROUNDS = 3  # Hadamard transforms of the shorter axis, with D after the first and the second
CONDITION = 8.0  # of each D
WIDTH = 64  # of the shorter side, for each of which some strongest directions are taken down
MOST_WIDTHS = 2  # that count: further directions of wider tensors tell nothing (S11 to S13)
CONCENTRATION = 3.0  # of the Dirichlet process: a few values of D make up most of it
_STICKS = 48  # values at most; what further ones would get is below 1e-5 of the whole
_LEAST_REST = 1e-6  # of a tensor's energy that its mask is drawn for
_LEAST_SIZE = 1e-4  # of a direction, over the strongest one's


class Draft(NamedTuple):
    """What is drawn of a mask before the tensor X is gone through again: R is ``Xᵀ U``.

    Attributes:
      rows: as of `Mask`.
      columns: as of `Mask`.
      along: U, orthonormal columns (…, m, k) that X's strongest directions lie along.
      left: L, these times the share of X that is taken down along them.
    """

    rows: AxisMap
    columns: AxisMap
    along: np.ndarray
    left: np.ndarray

    def __repr__(self) -> str:
        return "Draft(<secret>)"

    __reduce__ = refuse_pickling

    def mask(self, right: np.ndarray) -> Mask:
        """The mask with its R (…, n, k)."""
        return Mask(self.rows, self.columns, self.left, right)


class Mask(NamedTuple):
    """The mask ``M = K_m E K_n - L Rᵀ`` of one tensor (…, m, n).

    Attributes:
      rows: K_m, one copy for each leading index.
      columns: K_n, likewise.
      left: L, (…, m, k); k may be 0.
      right: R, (…, n, k).
    """

    rows: AxisMap
    columns: AxisMap
    left: np.ndarray
    right: np.ndarray

    def __repr__(self) -> str:
        return "Mask(<secret>)"

    __reduce__ = refuse_pickling

    @property
    def transposed(self) -> Mask:
        """The mask of the transposed tensor."""
        rows, columns = self.columns.transpose(), self.rows.transpose()
        return Mask(rows, columns, self.right, self.left)


def draw(
    x: np.ndarray, whole: np.ndarray, energy: float, strongest: int, stream: KeyStream
) -> tuple[Draft, np.ndarray]:
    """Draws a tensor's mask.

    Args:
      x: finite, (…, m, n) with at most one leading axis.
      whole: the sums of its squares at each leading index, (…, 1, 1).
      energy: of Z, over that of what is left of x at the same leading index.
      strongest: directions that L Rᵀ takes down, for each `WIDTH` of the shorter side.
      stream: the only source of randomness.

    Returns:
      The mask but for R, and about the energies of x with it.
    """
    *batch, m, n = x.shape
    copies = math.prod(batch)
    shorter = min(m, n)
    k = min(strongest * min(max(shorter // WIDTH, 1), MOST_WIDTHS), shorter // 4)
    along = left = np.empty((*batch, m, 0), x.dtype)
    if k:
        along, sizes = strongest_directions(x, k, stream)
        rest = np.maximum(whole - np.square(sizes).sum(-1, keepdims=True), 0)
        others = np.sqrt(rest / (shorter - k))
        uniform = (0.5 + stream.uniform(copies * k)).reshape(sizes.shape)
        kept = np.minimum(sizes, others * uniform)
        left = (along * (1 - kept / np.where(sizes > 0, sizes, 1))).astype(x.dtype)
        # Of a tensor of so low a rank nothing is left but its rounding, which is to be covered too.
        whole = np.maximum(rest + np.square(kept).sum(-1, keepdims=True), _LEAST_REST * whole)
    # Where there is nothing, the mask is of the size that numbers usually have.
    whole = np.where(whole > 0, whole, m * n)
    rows = _draw_map(stream, m, copies, flat=m >= n)
    columns = _draw_map(stream, n, copies, flat=m < n)
    # The other map is orthogonal.
    own_energies = _map_energies(columns if m >= n else rows)
    rows.scale[:, -1] *= np.sqrt(energy * whole.reshape(-1, 1) / own_energies[:, None])
    return Draft(rows, columns, along, left), (1 + energy) * whole


def _draw_map(stream: KeyStream, size: int, copies: int, *, flat: bool) -> AxisMap:
    """The map of one axis: orthogonal, or with random scales after every transform but the last."""
    rounds = 1 if flat else ROUNDS
    element = hadamard.draw(stream, size, condition=1.0, copies=copies, rounds=rounds)
    for stage in range(1, rounds):
        element.scale[:, stage] *= _random_scales(stream, copies, size)
    return element


def _random_scales(stream: KeyStream, copies: int, size: int) -> np.ndarray:
    """Float64[copies, size] in ``CONDITION**±0.5``, each copy's from a distribution of its own.

    The distribution of exponents is a Dirichlet process over a uniform one, made by breaking a
    stick (Sethuraman 1994).
    """
    broken = 1 - stream.uniform(copies * _STICKS).reshape(copies, _STICKS) ** (1 / CONCENTRATION)
    left = np.cumprod(1 - broken, axis=1)
    bounds = 1 - left  # up to where each value reaches
    exponents = stream.uniform(copies * _STICKS).reshape(copies, _STICKS) - 0.5
    chosen = stream.uniform(copies * size).reshape(copies, size)
    scales = np.empty((copies, size))
    for copy in range(copies):
        places = np.searchsorted(bounds[copy, :-1], chosen[copy])
        scales[copy] = np.exp(exponents[copy, places] * math.log(CONDITION))
    return scales


def _map_energies(axis_map: AxisMap) -> np.ndarray:
    """The sums of squares of a map's matrices, float64[copies]: of one that `_draw_map` draws.

    What is left of the first transform and right of the last scales is orthogonal, and the squares
    of H's entries are 1 / b within a block; only the last block and the tail overlap.
    """
    copies, gathers, n = axis_map.order.shape
    if gathers == 2:
        return np.full(copies, float(n))
    block = hadamard.block_size(n)
    whole = n - n % block - block
    ending = np.square(hadamard.dense_transform(n - whole, axis_map.tail_first))
    squares = np.square(axis_map.scale)
    energy = squares[:, 1]
    for stage in range(2, gathers - 1):
        blocks = energy[:, :whole].reshape(copies, -1, block).mean(-1, keepdims=True)
        mixed = np.concatenate(
            [
                np.broadcast_to(blocks, (*blocks.shape[:2], block)).reshape(copies, whole),
                energy[:, whole:] @ ending.T,
            ],
            axis=1,
        )
        energy = squares[:, stage] * np.take_along_axis(mixed, axis_map.order[:, stage], 1)
    return energy.sum(1)


# Passes


class Masked(NamedTuple):
    """A tensor with its mask, for as long as products with it come back.

    Attributes:
      plain: the tensor X, (…, m, n), as it was masked.
      mask: the mask M.
      rows: the key class of the axis before the last.
      key: A, what that axis was multiplied by.
      keyed: ``A [X + M; R]``, where R are decoys.
    """

    plain: np.ndarray
    mask: Mask
    rows: int
    key: AxisMap
    keyed: TiledMatrix

    def __repr__(self) -> str:
        return "Masked(<secret>)"

    __reduce__ = refuse_pickling

    @property
    def transposed(self) -> Masked:
        """The transposed tensor with its mask; `key` and `keyed` are not."""
        return self._replace(plain=self.plain.swapaxes(-1, -2), mask=self.mask.transposed)


def blind(
    x: np.ndarray,
    draft: Draft,
    keys: tuple[AxisMap, AxisMap],
    decoys: np.ndarray | None,
    out: np.ndarray,
) -> tuple[Mask, TiledMatrix]:
    """Writes ``A [X + M; R] Bᵀ`` to memory that the host may see.

    Args:
      x: X, (…, m, n).
      draft: M.
      keys: A and B.
      decoys: R, if any.
      out: C-contiguous, of x's dtype.

    Returns:
      M and ``A [X + M; R]``.
    """
    *batch, m, n = x.shape
    copies, rows, count = math.prod(batch), keys[0].size, draft.left.shape[-1]
    keyed = empty_tiles(copies, rows, n, x.dtype)
    first = TileProgram(x.dtype, copies, n)
    first.load(0, x, -2)
    right = np.empty((*batch, n, 0), x.dtype)
    if count:
        along = padded(draft.along)
        right = np.empty((*batch, n, along.shape[-1]), x.dtype)
        first.inner(0, along, m, 0)
        first.write(0, right)
        first.outer(0, padded(-draft.left), 0)
    first.unit(1, n)
    _spread(first, 1, draft.columns, draft.rows.scaled(-1.0))
    first.subtract(0, 1, m)
    if decoys is not None:
        first.load(0, decoys, -2, at=m)
    first.map(0, keys[0])
    first.store(0, keyed, -2)
    first.run()
    second = TileProgram(x.dtype, copies, rows)
    second.load(0, keyed, -1)
    second.map(0, keys[1])
    second.store(0, out, -1)
    second.run()
    return draft.mask(right[..., :count]), keyed


def _spread(program: TileProgram, tile: int, columns: AxisMap, rows: AxisMap) -> None:
    """``K_m E K_n`` of a tile of n positions."""
    program.map(tile, columns)
    program.resize(tile, columns.size, rows.size)
    program.map(tile, rows)


def unblind(
    product: np.ndarray,
    keys: tuple[AxisMap, AxisMap],
    left: Masked,
    right: Masked,
    aligned: bool,
) -> np.ndarray:
    """Takes the keys off a product of two masked tensors, and what the masks added to it.

    Args:
      product: of what `blind` wrote, (…, m, p) or with more rows, which are cut.
      keys: what takes the keys of its rows and of its columns off.
      left: X (m, n), with its mask M.
      right: W (n, p), likewise.
      aligned: whether the product's rows have the key of X's, under which ``A (X + M)`` is at hand;
        if not, the rows of what `right` holds are W's.

    Returns:
      ``X W``, in memory of its own that starts on a cache line.
    """
    n, p = right.plain.shape[-2:]
    *batch, m, _ = left.plain.shape
    copies, rows = math.prod(batch), product.shape[-2]
    x, w, dtype = left.mask, right.mask, product.dtype
    out = aligned_empty((*batch, m, p), dtype)
    strips = empty_tiles(copies, rows, p, dtype)
    first = TileProgram(dtype, copies, rows)
    first.load(0, product, -1)
    first.map(0, keys[1])
    met = None
    if aligned:
        # A X̃ W̃ - A X̃ M_w, but for the directions that M_w takes down.
        if w.left.shape[-1]:
            met = np.empty((*batch, rows, padded(w.right).shape[-1]), dtype)
        first.load(1, left.keyed, -1)
        _take_off_second(first, 1, w, met)
    first.store(0, strips, -1)
    first.run()
    second = TileProgram(dtype, copies, p)
    second.load(0, strips, -2)
    second.map(0, keys[0])
    if aligned:
        second.load(1, right.plain, -2)
    else:
        second.load(1, right.keyed, -2)
        second.map(1, right.key.inverse())
    if x.left.shape[-1]:
        second.inner(1, padded(x.right), n, 0)
    _spread(second, 1, x.columns, x.rows)
    second.subtract(0, 1, m)
    if x.left.shape[-1]:
        second.outer(0, padded(x.left), 0)
    if met is not None:
        met = hadamard.unmix(met, {met.ndim - 2: keys[0]}, keep=m)
        second.read(1, padded(w.right))
        second.outer(0, padded(met), 1)
    if aligned:
        second.store(0, out, -2)
        second.run()
        return out
    second.store(0, strips, -2)
    second.run()
    third = TileProgram(dtype, copies, m)
    third.load(0, strips, -1)
    third.load(1, left.plain, -1)
    _take_off_second(third, 1, w, None)
    if w.left.shape[-1]:
        third.outer(0, padded(w.right), 0)
    third.store(0, out, -1)
    third.run()
    return out


def _take_off_second(program: TileProgram, tile: int, mask: Mask, met: np.ndarray | None) -> None:
    """From rows of a product in tile 0 those of X ``Z``, for rows of X in another tile.

    What these meet of the directions that the mask takes down is left in factors 0, and in `met`.
    """
    if mask.left.shape[-1]:
        program.inner(tile, padded(mask.left), mask.rows.size, 0)
    if met is not None:
        program.write(0, met)
    turned = mask.transposed
    _spread(program, tile, turned.columns, turned.rows)
    program.subtract(0, tile, mask.columns.size)


# Matrices


def strongest_directions(
    x: np.ndarray, count: int, stream: KeyStream
) -> tuple[np.ndarray, np.ndarray]:
    """About the left strongest singular directions of x (…, m, n), by one product with it.

    Rows are added up with random signs, as many sums as there are directions, and x maps the space
    that the sums span (Clarkson and Woodruff 2013, with a part of a power iteration).

    Returns:
      Orthonormal columns (…, m, count), zeros where there are fewer, and x's size along them,
      float64 (…, 1, count).
    """
    image = product_of(x, np.linalg.qr(_sums_of_rows(x, count, stream))[0])
    wide = image.astype(np.float64)
    squares, turn = np.linalg.eigh(wide.swapaxes(-1, -2) @ wide)
    sizes = np.sqrt(np.maximum(squares, 0))[..., None, :]
    # What is fainter is the image's rounding.
    sizes *= sizes > _LEAST_SIZE * sizes.max(-1, keepdims=True)
    along = wide @ turn * ((sizes > 0) / np.where(sizes > 0, sizes, 1))
    return along.astype(x.dtype), sizes


def _sums_of_rows(x: np.ndarray, count: int, stream: KeyStream) -> np.ndarray:
    """Sums of every count-th row with random signs, (…, n, count)."""
    *batch, m, n = x.shape
    signs = stream.signs(math.prod(batch) * m).astype(x.dtype).reshape(*batch, m, 1)
    whole = m - m % count
    # (…, count, 1, rows) @ (…, count, rows, n)
    factors = signs[..., :whole, :].reshape(*batch, -1, count, 1).swapaxes(-3, -2)
    factors = np.ascontiguousarray(factors.swapaxes(-2, -1))
    parts = x[..., :whole, :].reshape(*batch, -1, count, n).swapaxes(-3, -2)
    sums = np.empty((*batch, count, 1, n), x.dtype)

    def run(start: int, stop: int) -> None:
        np.matmul(factors, parts[..., start:stop], out=sums[..., start:stop])

    in_parallel(run, n, x.size)
    sums = sums[..., 0, :]
    sums[..., : m - whole, :] += signs[..., whole:, :] * x[..., whole:, :]
    return sums.swapaxes(-1, -2)


def product_of(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``left @ right``, the rows of the result shared out over the processors."""
    out = np.empty((*left.shape[:-1], right.shape[-1]), left.dtype)

    def run(start: int, stop: int) -> None:
        np.matmul(left[..., start:stop, :], right, out=out[..., start:stop, :])

    in_parallel(run, left.shape[-2], left.size)
    return out


def plus_product(x: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``x + left @ right``, its rows shared out over the processors."""
    out = np.empty_like(x)

    def run(start: int, stop: int) -> None:
        part = out[..., start:stop, :]
        np.matmul(left[..., start:stop, :], right, out=part)
        part += x[..., start:stop, :]

    in_parallel(run, x.shape[-2], x.size)
    return out
