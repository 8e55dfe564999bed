"""The default scheme: invertible mixing, decoy rows, and fresh keys for every product and step.

With a key matrix for each axis, A for rows, B for what is contracted, C for columns::

    X̂ = t_x A [X; R] Bᵀ      Ŵ = t_w B⁻ᵀ (W + U Vᵀ) Cᵀ   Ŷ = X̂ Ŵ
    Ĝ = t_g A⁻ᵀ [G; Q] C⁻¹   dX̂ = Ĝ Ŵᵀ                   dŴ = X̂ᵀ Ĝ

R and Q are decoy rows in the same places; unblinding cuts them off Ŷ and dX̂, and takes RᵀQ off dŴ.
The mask U Vᵀ trades W's strongest directions for random ones; unblinding takes (X U) Vᵀ off Ŷ and
(G V) Uᵀ off dX̂. Each key is ``P S H P S H P S D H P S`` in fast form
(`enclave_runtime.schemes.kernels.hadamard`) with D log-uniform of condition 4. With a single
transform outside D, the Gram matrix of a blinded tensor would show which rows share a block; with
two, every row meets every other. The scalars t hide norms.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.crypto.encryption import refuse_pickling
from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes.contract import Group, Scheme, SchemeCost, keyed_axes, register
from enclave_runtime.schemes.kernels import hadamard
from enclave_runtime.schemes.kernels.hadamard import AxisMap
from enclave_runtime.schemes.orthogonal import mix_into, rounded, to_mixable

DECOY_ENERGY = 4.0  # of all decoy rows, over the signal's
_SAMPLED_ROWS = 512  # at most so many rows of the signal give decoys its spectrum
_BLOCK = 64  # rows and decoys together are a multiple of it
_ROUNDS = 3  # Hadamard transforms of a key: one inside D, two outside
_FAINT = 2.0**-6  # of a decoy's length, in directions that the signal may not have
_LEAST_ENERGY = 1e-25  # below, squares of float32 may have lost digits
_TINY = 2.0**-90  # a scalar this far from 1 would leave float32's range


class MixingKey(NamedTuple):
    """One axis's group element and the number of decoys along the axis."""

    element: AxisMap
    decoys: int

    def __repr__(self) -> str:
        return "MixingKey(<secret>)"

    __reduce__ = refuse_pickling


class TensorSecret(NamedTuple):
    """What `unblind` needs to know of one blinded tensor.

    Attributes:
      scalar: the tensor's.
      decoys: its decoy rows, if any.
      energy: the sum of its squares, which may be 0 or not finite.
      plain: the tensor itself, if it has decoys; needed where the other operand has a mask.
      mask: by the key class of its axis, each of the two factors of the mask added to the tensor.
    """

    scalar: float
    decoys: np.ndarray | None
    energy: float
    plain: np.ndarray | None = None
    mask: Mapping[int, np.ndarray] | None = None

    def __repr__(self) -> str:
        return "TensorSecret(<secret>)"

    __reduce__ = refuse_pickling


@register
@dataclasses.dataclass(frozen=True)
class Mixing(Scheme):
    """Mixes every axis by a fresh random invertible map, with decoy rows: the default.

    Every product, forward and backward together, has keys of its own at every step; see the
    module for the formula. It protects weights, inputs, labels and optimizer state
    *heuristically*: the attacks of ``benchmarks.attacks`` stay within their thresholds, and no
    proof is known (over the reals no uniform key exists). It does not hide shapes, ranks, a
    part of each weight's singular directions, or, from an owner of the weights and of every
    row of a batch, that this batch was used. Nothing stays on the devices, so any optimizer
    can be used. Products with fewer than 128 rows or a side below 64, products of one-hot
    codes, the classifier with all that no trained weight follows, and the optimizer's own
    products stay in the enclave. Where the classifier is, is told from the program: logits
    that a further trained weight follows, such as a learned noise matrix, and labels that come
    as numbers and are an input of the model go out, unless `keep_inside` marks them.

    Attributes:
      condition: bound on each key's condition number, at least 1.
      decoy_rows: least number of decoy rows, at least 0; they fill up to a multiple of 64.
      traded: strongest directions of the other operand that are traded for random ones, at
        least 0. Without decoys it cannot be told which operand that is, and none are.

    References:
      The study in SECURITY.md.
    """

    condition: float = 4.0
    decoy_rows: int = 32
    traded: int = 8
    name: ClassVar[str] = "mixing"
    group: ClassVar[Group] = Group.INVERTIBLE
    reference: ClassVar[SchemeCost] = SchemeCost(overhead=4e-4, blinding=3.0, drawing=60.0)
    keys_per_product: ClassVar[bool] = True
    # Fewer rows than this, without decoys, or a shorter side than that, mix too little to hide.
    least_rows: ClassVar[int] = 128
    least_side: ClassVar[int] = 64
    first_layer_share: ClassVar[float] = 0.05
    host_learns: ClassVar[str] = (
        "shapes, ranks, part of each weight's singular directions and, if it has the weights and "
        "all of a batch, that the batch was used; weights, inputs and labels are protected "
        "heuristically, as far as the published attack suite tells"
    )

    def __post_init__(self) -> None:
        """Checks the parameters."""
        if type(self.condition) not in (int, float) or not 1 <= self.condition <= 1e6:
            raise ValueError("Mixing: condition is a number between 1 and 1e6")
        if type(self.decoy_rows) is not int or not 0 <= self.decoy_rows <= 4096:
            raise ValueError("Mixing: decoy_rows is an int between 0 and 4096")
        if type(self.traded) is not int or not 0 <= self.traded <= 64:
            raise ValueError("Mixing: traded is an int between 0 and 64")

    @property
    def key_budget(self) -> int | None:
        """Nothing is kept."""
        return 0

    def decoys(self, rows: int) -> int:
        """At least `decoy_rows`, filling up to a multiple of 64."""
        least = self.decoy_rows
        return -(-(rows + least) // _BLOCK) * _BLOCK - rows if least else 0

    def arithmetic(self, rows: int, inner: int, columns: int, results: int, gradients: int) -> int:
        """What decoys and masks cost beside the mixing."""
        decoys = self.decoys(rows)
        flops = gradients * 2 * decoys * inner * columns
        # The mask of W comes off each result.
        flops += results * 4 * self.traded * (rows + decoys) * (inner + columns)
        # A sketch of W, its singular directions, and the mask.
        return flops + 10 * self.traded * inner * columns

    def cheapest_operands(self, secret: TensorSecret) -> tuple[TensorSecret, TensorSecret]:
        """A first operand, and a second without decoys and mask."""
        return secret, secret._replace(decoys=None)

    def draw(self, key_class: KeyClass, stream: KeyStream) -> MixingKey:
        """Draws an element for each copy, over the axis with its decoys."""
        size = key_class.size + key_class.decoys
        element = hadamard.draw(
            stream,
            size,
            condition=float(self.condition),
            copies=key_class.copies,
            rounds=_ROUNDS,
        )
        return MixingKey(element, key_class.decoys)

    def blind(
        self,
        plain: jax.Array | np.ndarray,
        layout: Layout,
        keys: Mapping[int, MixingKey],
        out: np.ndarray,
        stream: Callable[[], KeyStream],
    ) -> TensorSecret:
        """Blinds a float matrix or batch of matrices; decoys lie along the axis before the last."""
        x = to_mixable(plain)
        draws = stream()
        maps, count = {}, 0
        for axis, number, parity in keyed_axes(layout):
            element, decoys = keys[number]
            maps[axis] = element if parity else element.inverse_transpose()
            count = max(count, decoys)
        true_energy = _energy(x)
        # Nothing, and what is not finite, is no basis for a scale; it is hidden all the same.
        energy = true_energy if np.isfinite(true_energy) and true_energy > 0 else 1.0
        plain = x
        decoys, mask = None, None
        if count:
            decoys = _decoy_rows(x, count, energy, draws)
        elif self.decoy_rows and np.isfinite(true_energy):
            mask = self._mask(x, layout, energy, draws)
            if mask is not None:
                first, second = mask.values()
                x = _plus_product(x, first, second.swapaxes(-1, -2))
        total = energy * (1 + DECOY_ENERGY * bool(count))
        mean = np.sqrt(total / out.size)
        scalar = float(4 ** (draws.uniform(1)[0] - 0.5) / np.clip(mean, _TINY, 1 / _TINY))
        last = x.ndim - 1
        maps[last] = maps[last].scaled(scalar)
        mix_into(out, x, maps, decoys)
        return TensorSecret(scalar, decoys, true_energy, plain if count else None, mask)

    def _mask(
        self, w: np.ndarray, layout: Layout, energy: float, stream: KeyStream
    ) -> dict[int, np.ndarray] | None:
        """The two factors of W's mask, (…, n, 2 k) and (…, p, 2 k), by their axes' classes.

        About the k strongest right singular directions (a random sketch and one power
        iteration) are brought down to the size of the others, and k random directions come up.
        """
        *batch, n, p = w.shape
        k = min(self.traded, min(n, p) // 2)
        if k == 0:
            return None
        copies = math.prod(batch)

        def normal(rows: int) -> np.ndarray:
            return stream.normal(copies * rows * k, w.dtype).reshape(*batch, rows, k)

        def uniform() -> np.ndarray:
            return (0.5 + stream.uniform(copies * k)).reshape(*batch, 1, k).astype(w.dtype)

        # Over W's size, so that nothing leaves float32's range.
        scale = w.dtype.type(1 / np.clip(math.sqrt(energy / w.size), _TINY, 1 / _TINY))
        sketch = _product(w, normal(p) * scale)
        sketch = np.linalg.qr(_product(w.swapaxes(-1, -2), sketch * scale))[0]
        left, sizes, turn = np.linalg.svd(_product(w, sketch), full_matrices=False)
        right = sketch @ turn.swapaxes(-1, -2)
        sizes = sizes[..., None, :]
        whole: Any = energy
        if copies > 1:
            whole = np.square(w, dtype=np.float64).sum((-1, -2), keepdims=True)
        own = np.square(sizes, dtype=np.float64).sum(-1, keepdims=True)
        rest = np.maximum(whole - own, 0)
        others = np.sqrt(rest / (min(n, p) - k)).astype(w.dtype)
        removed = np.maximum(sizes - others * uniform(), 0)
        # Where there is nothing to remove, or nothing at all, directions come up all the same.
        usual = math.sqrt(energy / copies / min(n, p))
        added = np.maximum(sizes, usual) * uniform()
        random = [np.linalg.qr(normal(rows))[0] for rows in (n, p)]
        (first, second) = (c for c in layout.classes[-2:] if c is not None)
        return {
            first: np.concatenate([random[0] * added, -left * removed], -1).astype(w.dtype),
            second: np.concatenate([random[1], right], -1).astype(w.dtype),
        }

    def unblind(
        self,
        blinded: np.ndarray,
        layout: Layout,
        keys: Mapping[int, MixingKey],
        operands: tuple[TensorSecret, TensorSecret] | None,
    ) -> jax.Array:
        """Takes keys, scalars and decoys off a product of two blinded values."""
        assert operands is not None, "only products come back under this scheme"
        left, right = operands
        zero = left.energy * right.energy == 0 and np.isfinite(left.energy + right.energy)
        maps, keep = {}, None
        for axis, number, parity in keyed_axes(layout):
            element, decoys = keys[number]
            maps[axis] = element.inverse() if parity else element.transpose()
            if decoys:
                keep = blinded.shape[axis] - decoys
        last = blinded.ndim - 1
        maps[last] = maps[last].scaled(1 / (left.scalar * right.scalar))
        plain = hadamard.unmix(to_mixable(blinded), maps, keep=keep)
        if zero:
            # Rounding would leave noise of the decoys' size, which optimizers scale up.
            plain[...] = 0
        elif left.decoys is not None and right.decoys is not None:
            plain = _plus_product(plain, -left.decoys.swapaxes(-1, -2), right.decoys)
        elif right.mask is not None:
            assert left.plain is not None, "an operand was let go before its last use"
            # W's axes are the result's columns and what was summed over.
            outer = next(f for c, f in right.mask.items() if c == layout.classes[last])
            inner = next(f for c, f in right.mask.items() if c != layout.classes[last])
            projected = _product(left.plain, inner)
            plain = _plus_product(plain, -projected, outer.swapaxes(-1, -2))
        return jnp.asarray(rounded(plain, blinded.dtype))

    def let_go(self, secret: TensorSecret) -> TensorSecret:
        """Without the plain tensor: products with a masked operand have all come back."""
        return secret._replace(plain=None)

    def warm_up(self, array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]) -> None:
        """Compiles the kernels; they do not depend on shapes."""
        hadamard.warm_up()


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``left @ right``, the rows of the result shared out over the processors."""
    out = np.empty((*left.shape[:-1], right.shape[-1]), left.dtype)

    def run(start: int, stop: int) -> None:
        np.matmul(left[..., start:stop, :], right, out=out[..., start:stop, :])

    hadamard.in_parallel(run, left.shape[-2], left.size)
    return out


def _plus_product(x: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``x + left @ right``, its rows shared out over the processors."""
    out = np.empty_like(x)

    def run(start: int, stop: int) -> None:
        part = out[..., start:stop, :]
        np.matmul(left[..., start:stop, :], right, out=part)
        part += x[..., start:stop, :]

    hadamard.in_parallel(run, x.shape[-2], x.size)
    return out


def _energy(x: np.ndarray) -> float:
    """The sum of squares, in float64 where float32 would overflow or underflow."""
    flat = x.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        energy = float(np.dot(flat, flat))
    if not _LEAST_ENERGY < energy < np.inf:
        wide = flat.astype(np.float64)
        energy = float(np.dot(wide, wide))
    return energy


def _decoy_rows(x: np.ndarray, count: int, energy: float, stream: KeyStream) -> np.ndarray:
    """Decoys for (…, m, n): the signal's spectrum in a random basis.

    Decoys in the signal's own basis would raise its strongest directions, so that the pencil of
    ``X̂ᵀX̂`` and ``dX̂ᵀdX̂`` shows these to a host that has a checkpoint.
    """
    *batch, rows, columns = x.shape
    copies = math.prod(batch)
    sample = x if rows <= _SAMPLED_ROWS else x[..., stream.permutation(rows)[:_SAMPLED_ROWS], :]
    taken = sample.shape[-2]
    combine = stream.normal(copies * count * taken, x.dtype).reshape(*batch, count, taken)
    # A little of every direction, where the signal may have nothing (or be nothing).
    decoys = combine @ sample
    faint = _FAINT * math.sqrt(energy * taken / x.size)
    decoys += faint * stream.normal(decoys.size, x.dtype).reshape(decoys.shape)
    turn = hadamard.draw(stream, columns, condition=1.0, copies=copies)
    decoys = hadamard.mix(decoys, {decoys.ndim - 1: turn})
    lengths = np.sqrt(np.square(decoys, dtype=np.float64).sum(-1, keepdims=True))
    amplitude = (0.5 + stream.uniform(copies * count)).reshape(*batch, count, 1)
    amplitude *= math.sqrt(DECOY_ENERGY * energy / np.square(amplitude).sum())
    return decoys * np.where(lengths > 0, amplitude / lengths, 0).astype(x.dtype)
