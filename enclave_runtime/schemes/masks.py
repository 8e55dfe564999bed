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
from typing import Any, NamedTuple

import numpy as np

from enclave_runtime.crypto.encryption import refuse_pickling
from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.schemes.kernels import hadamard
from enclave_runtime.schemes.kernels.hadamard import AxisMap

ROUNDS = 3  # Hadamard transforms of the shorter axis, with D after the first and the second
CONDITION = 8.0  # of each D
WIDTH = 128  # of the shorter side, for each of which some strongest directions are taken down
MOST_WIDTHS = 4  # that count: further directions of wider tensors cost more than they show
CONCENTRATION = 3.0  # of the Dirichlet process: a few values of D make up most of it
_STICKS = 48  # values at most; what further ones would get is below 1e-5 of the whole
_TINY = 2.0**-90  # a scale this far from 1 would leave float32's range


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

    def spread(self, v: np.ndarray) -> np.ndarray:
        """``K_m E K_n v`` for v (…, n, q)."""
        m, n, axis = self.rows.size, self.columns.size, v.ndim - 2
        v = hadamard.unmix(v, {axis: self.columns}, keep=min(m, n))
        zeros = np.zeros((*v.shape[:axis], max(m - n, 0), v.shape[-1]), v.dtype)
        return hadamard.mix(v, {axis: self.rows}, extra=zeros)

    def gathered(self, v: np.ndarray) -> np.ndarray:
        """``v K_m E K_n`` for v (…, q, m)."""
        m, n, axis = self.rows.size, self.columns.size, v.ndim - 1
        v = hadamard.mix(v, {axis: self.rows.transpose()})
        if m < n:
            v = np.concatenate([v, np.zeros((*v.shape[:-1], n - m), v.dtype)], axis)
        return hadamard.mix(v[..., :n], {axis: self.columns.transpose()})


def cover(
    x: np.ndarray, energy: float, strongest: int, stream: KeyStream
) -> tuple[np.ndarray, Mask]:
    """Draws a tensor's mask and adds it, ``x + M``.

    Args:
      x: finite, (…, m, n) with at most one leading axis.
      energy: of Z, over that of what is left of x at the same leading index.
      strongest: directions that L Rᵀ takes down, for each `WIDTH` of the shorter side.
      stream: the only source of randomness.
    """
    *batch, m, n = x.shape
    copies = math.prod(batch)
    whole = energies(x)
    shorter = min(m, n)
    k = min(strongest * min(max(shorter // WIDTH, 1), MOST_WIDTHS), shorter // 4)
    left, right = np.empty((*batch, m, 0), x.dtype), np.empty((*batch, n, 0), x.dtype)
    if k:
        first, sizes, right = strongest_directions(x, k, whole, stream)
        own = np.square(sizes, dtype=np.float64).sum(-1, keepdims=True)
        rest = np.maximum(whole - own, 0)
        others = np.sqrt(rest / (min(m, n) - k))
        uniform = (0.5 + stream.uniform(copies * k)).reshape(sizes.shape)
        kept = np.minimum(sizes, others * uniform)
        left = (first * (sizes - kept)).astype(x.dtype)
        whole = rest + np.square(kept).sum(-1, keepdims=True)
    # Where there is nothing, the mask is of the size that numbers usually have.
    whole = np.where(whole > 0, whole, m * n)
    rows = _draw_map(stream, m, copies, flat=m >= n)
    columns = _draw_map(stream, n, copies, flat=m < n)
    mask = Mask(rows, columns, left, right)
    identity = np.broadcast_to(np.eye(min(m, n), dtype=x.dtype), (*batch, min(m, n), min(m, n)))
    z = mask.spread(identity) if m >= n else mask.gathered(identity)
    factors = np.sqrt(energy * whole / energies(z))
    rows.scale[:, -1] *= factors.reshape(-1, 1)
    z *= factors.astype(x.dtype)
    z += x
    return plus_product(z, -left, right.swapaxes(-1, -2)) if k else z, mask


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


def uncover(
    product: np.ndarray, left: np.ndarray, right: np.ndarray, first: Mask, second: Mask
) -> np.ndarray:
    """Takes ``M_a B̃ + A M_b`` off a product ``Ã B̃``, which leaves ``A B``.

    Args:
      product: ``Ã B̃``, (…, m, p); overwritten.
      left: A, (…, m, n), plain; transposed views are welcome.
      right: ``B̃ = B + M_b``, (…, n, p).
      first: M_a.
      second: M_b.
    """
    product -= first.spread(right)
    if left.flags.c_contiguous:
        product -= second.gathered(left)
    else:
        # Along its rows where it lies, without a transposed copy.
        product -= second.transposed.spread(left.swapaxes(-1, -2)).swapaxes(-1, -2)
    columns = [first.left, product_of(left, second.left)]
    rows = [product_of(first.right.swapaxes(-1, -2), right), second.right.swapaxes(-1, -2)]
    return plus_product(product, np.concatenate(columns, -1), np.concatenate(rows, -2))


# Matrices


def energies(x: np.ndarray) -> np.ndarray:
    """Sums of squares of each leading index, float64 (…, 1, 1)."""
    flat = np.ascontiguousarray(x).reshape(*x.shape[:-2], 1, -1)
    with np.errstate(over="ignore", under="ignore"):
        sums = np.matmul(flat, flat.swapaxes(-1, -2), dtype=x.dtype).astype(np.float64)
    # Squares of float32 may have overflowed, or lost digits.
    if not ((sums > 1e-25) & (sums < np.inf)).all():
        sums = np.square(flat, dtype=np.float64).sum(-1, keepdims=True)
    return sums


def strongest_directions(
    x: np.ndarray, count: int, energy: Any, stream: KeyStream
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """About the strongest singular directions of x (…, m, n), by a sketch and a power iteration.

    Args:
      x: finite.
      count: how many, at most min(m, n).
      energy: the sum of squares, or those of each leading index as (…, 1, 1).
      stream: draws the sketch.

    Returns:
      Left ones (…, m, count), sizes (…, 1, count), right ones (…, n, count).
    """
    *batch, m, n = x.shape
    sketch = stream.normal(math.prod(batch) * n * count, x.dtype).reshape(*batch, n, count)
    # Over x's size, so that nothing leaves float32's range.
    scale: np.ndarray = (1 / np.clip(np.sqrt(energy / (m * n)), _TINY, 1 / _TINY)).astype(x.dtype)
    sketch = product_of(x, sketch * scale)
    sketch = np.linalg.qr(product_of(x.swapaxes(-1, -2), sketch * scale))[0]
    left, sizes, turn = np.linalg.svd(product_of(x, sketch), full_matrices=False)
    return left, sizes[..., None, :], sketch @ turn.swapaxes(-1, -2)


def product_of(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``left @ right``, the rows of the result shared out over the processors."""
    out = np.empty((*left.shape[:-1], right.shape[-1]), left.dtype)

    def run(start: int, stop: int) -> None:
        np.matmul(left[..., start:stop, :], right, out=out[..., start:stop, :])

    hadamard.in_parallel(run, left.shape[-2], left.size)
    return out


def plus_product(x: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``x + left @ right``, its rows shared out over the processors."""
    out = np.empty_like(x)

    def run(start: int, stop: int) -> None:
        part = out[..., start:stop, :]
        np.matmul(left[..., start:stop, :], right, out=part)
        part += x[..., start:stop, :]

    hadamard.in_parallel(run, x.shape[-2], x.size)
    return out
