"""The default scheme: invertible mixing, decoy rows, and fresh keys for every product and step.

With a key matrix for each axis, A for rows, B for what is contracted, C for columns::

    X̂ = t_x A [X; R] Bᵀ      Ŵ = t_w B⁻ᵀ W Cᵀ      Ŷ = X̂ Ŵ
    Ĝ = t_g A⁻ᵀ [G; Q] C⁻¹   dX̂ = Ĝ Ŵᵀ             dŴ = X̂ᵀ Ĝ

R and Q are decoy rows in the same places; unblinding cuts them off Ŷ and dX̂, and takes
RᵀQ off dŴ. Each key is ``P S H P S H P S D H P S`` in fast form (`enclave_runtime.hadamard`)
with D log-uniform of condition 4. With a single transform outside D, the Gram matrix of a
blinded tensor would show which rows share a block; with two, every row meets every other.
The scalars t hide norms.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime import hadamard
from enclave_runtime.hadamard import AxisMap
from enclave_runtime.keys import KeyStream
from enclave_runtime.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes.contract import Group, Scheme, keyed_axes
from enclave_runtime.schemes.orthogonal import mix_into, rounded, to_mixable

DECOY_ENERGY = 4.0  # of all decoy rows, over the signal's
_SAMPLED_ROWS = 512  # at most so many rows of the signal go into covariance-matched decoys
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


class TensorSecret(NamedTuple):
    """What `unblind` needs to know of one blinded tensor.

    Attributes:
      scalar: the tensor's.
      decoys: its decoy rows, if any.
      energy: the sum of its squares, which may be 0 or not finite.
    """

    scalar: float
    decoys: np.ndarray | None
    energy: float

    def __repr__(self) -> str:
        return "TensorSecret(<secret>)"


@dataclasses.dataclass(frozen=True)
class Mixing(Scheme):
    """Mixes every axis by a fresh random invertible map, with decoy rows: the default.

    Every product, forward and backward together, has keys of its own at every step; see the
    module for the formula. It protects weights, inputs, labels and optimizer state
    *heuristically*: the attacks of ``benchmarks.attacks`` fail against it, and no proof is
    known (over the reals no uniform key exists). It does not hide shapes, ranks, or a part
    of each weight's leading singular directions. Nothing stays on the devices, so any
    optimizer can be used. Products with fewer than 128 rows or a side below 64, the
    classifier with its logits, and the optimizer's own products stay in the enclave.

    Attributes:
      condition: bound on each key's condition number, at least 1.
      decoy_rows: least number of decoy rows, at least 0; they fill up to a multiple of 64.

    References:
      The study in SECURITY.md.
    """

    condition: float = 4.0
    decoy_rows: int = 32
    name: ClassVar[str] = "mixing"
    group: ClassVar[Group] = Group.INVERTIBLE
    keys_per_product: ClassVar[bool] = True
    host_learns: ClassVar[str] = (
        "shapes, ranks and part of the leading singular directions of each weight; weights, inputs "
        "and labels are protected heuristically, as far as the published attack suite tells"
    )

    def __post_init__(self) -> None:
        """Checks the parameters."""
        if type(self.condition) not in (int, float) or not 1 <= self.condition <= 1e6:
            raise ValueError("Mixing: condition is a number between 1 and 1e6")
        if type(self.decoy_rows) is not int or not 0 <= self.decoy_rows <= 4096:
            raise ValueError("Mixing: decoy_rows is an int between 0 and 4096")

    @property
    def key_budget(self) -> int | None:
        """Nothing is kept."""
        return 0

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
        for axis, number, weight in keyed_axes(layout):
            element, decoys = keys[number]
            maps[axis] = element if weight else element.inverse_transpose()
            count = max(count, decoys)
        true_energy = _energy(x)
        # Nothing, and what is not finite, is no basis for a scale; it is hidden all the same.
        energy = true_energy if np.isfinite(true_energy) and true_energy > 0 else 1.0
        decoys = _decoy_rows(x, count, energy, draws) if count else None
        total = energy * (1 + DECOY_ENERGY * bool(count))
        mean = np.sqrt(total / out.size)
        scalar = float(4 ** (draws.uniform(1)[0] - 0.5) / np.clip(mean, _TINY, 1 / _TINY))
        last = x.ndim - 1
        maps[last] = maps[last].scaled(scalar)
        mix_into(out, x, maps, decoys)
        return TensorSecret(scalar, decoys, true_energy)

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
        for axis, number, weight in keyed_axes(layout):
            element, decoys = keys[number]
            maps[axis] = element.inverse() if weight else element.transpose()
            if decoys:
                keep = blinded.shape[axis] - decoys
        last = blinded.ndim - 1
        maps[last] = maps[last].scaled(1 / (left.scalar * right.scalar))
        plain = hadamard.unmix(to_mixable(blinded), maps, keep=keep)
        if zero:
            # Rounding would leave noise of the decoys' size, which optimizers scale up.
            plain[...] = 0
        elif left.decoys is not None and right.decoys is not None:
            _subtract_product(plain, left.decoys, right.decoys)
        return jnp.asarray(rounded(plain, blinded.dtype))

    def warm_up(self, array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]) -> None:
        """Compiles the kernels; they do not depend on shapes."""
        hadamard.warm_up()


def _subtract_product(plain: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """``plain -= leftᵀ right`` in place, its rows shared out over the processors."""
    rows = plain.shape[-2]
    turned = left.swapaxes(-1, -2)

    def run(start: int, stop: int) -> None:
        plain[..., start:stop, :] -= turned[..., start:stop, :] @ right

    hadamard.in_parallel(run, rows, plain.size)


def _energy(x: np.ndarray) -> float:
    """The sum of squares, in float64 where float32 would overflow or underflow."""
    flat = x.reshape(-1)
    energy = float(np.dot(flat, flat))
    if not _LEAST_ENERGY < energy < np.inf:
        wide = flat.astype(np.float64)
        energy = float(np.dot(wide, wide))
    return energy


def _decoy_rows(x: np.ndarray, count: int, energy: float, stream: KeyStream) -> np.ndarray:
    """Decoys for (…, m, n), with the signal's spectrum: half in its basis, half in a random one."""
    *batch, rows, columns = x.shape
    copies = math.prod(batch)
    sample = x if rows <= _SAMPLED_ROWS else x[..., stream.permutation(rows)[:_SAMPLED_ROWS], :]
    taken = sample.shape[-2]
    combine = stream.normal(copies * count * taken, x.dtype).reshape(*batch, count, taken)
    # A little of every direction, where the signal may have nothing (or be nothing).
    decoys = combine @ sample
    faint = _FAINT * math.sqrt(energy * taken / x.size)
    decoys += faint * stream.normal(decoys.size, x.dtype).reshape(decoys.shape)
    half = count // 2
    turn = hadamard.draw(stream, columns, condition=1.0)
    turned = np.ascontiguousarray(decoys[..., half:, :])
    decoys[..., half:, :] = hadamard.mix(turned, {turned.ndim - 1: turn})
    lengths = np.sqrt(np.square(decoys, dtype=np.float64).sum(-1, keepdims=True))
    amplitude = (0.5 + stream.uniform(copies * count)).reshape(*batch, count, 1)
    amplitude *= math.sqrt(DECOY_ENERGY * energy / np.square(amplitude).sum())
    return decoys * np.where(lengths > 0, amplitude / lengths, 0).astype(x.dtype)
