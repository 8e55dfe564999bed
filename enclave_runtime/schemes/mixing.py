"""The default scheme: invertible mixing over masks of full rank, fresh keys for every product.

With a key matrix for each axis, A for rows, B for what is contracted, C for columns, and a mask M
for each tensor (`enclave_runtime.schemes.masks`)::

    X̂ = t_x A (X + M_x) Bᵀ      Ŵ = t_w B⁻ᵀ (W + M_w) Cᵀ   Ŷ = X̂ Ŵ
    Ĝ = t_g A⁻ᵀ (G + M_g) C⁻¹   dX̂ = Ĝ Ŵᵀ                  dŴ = X̂ᵀ Ĝ

Unblinding takes the keys off and then what the masks added, ``M_x W̃ + X M_w`` off Ŷ and likewise of
the others, by fast transforms. Each key is ``P S H P S H P S D H P S`` in fast form
(`enclave_runtime.schemes.kernels.hadamard`) with D log-uniform of condition 2. With a single
transform outside D, the Gram matrix of a blinded tensor would show which rows share a block; with
two, every row meets every other. The scalars t hide norms. Before all this, rows and columns get
one range of sizes, and what is not finite is left out and computed inside
(`enclave_runtime.schemes.equilibration`); X, W and G above are what is left to blind.

Without masks (``mask_energy=0``) the scheme is what it was before it had them: decoy rows R and Q
lie below X and G in the same places, ``X̂ = t_x A [X; R] Bᵀ``; unblinding cuts them off Ŷ and dX̂,
and takes RᵀQ off dŴ. W has a mask U Vᵀ that trades its strongest directions for random ones;
unblinding takes (X U) Vᵀ off Ŷ and (G V) Uᵀ off dX̂. That is cheaper, rounds less, and leaks
spectra and ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import jax
import numpy as np

from enclave_runtime.crypto.encryption import refuse_pickling
from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes import equilibration, masks
from enclave_runtime.schemes.contract import Group, Scheme, SchemeCost, keyed_axes, register
from enclave_runtime.schemes.equilibration import AxisScales, Equilibrated
from enclave_runtime.schemes.kernels import hadamard
from enclave_runtime.schemes.kernels.hadamard import AxisMap
from enclave_runtime.schemes.masks import Masked, plus_product, product_of
from enclave_runtime.schemes.orthogonal import mix_into, round_into, rounded, to_mixable

DECOY_ENERGY = 4.0  # of all decoy rows, over the signal's
_SAMPLED_ROWS = 512  # at most so many rows of the signal give decoys its spectrum
_BLOCK = 64  # rows and decoys together are a multiple of it
_ROUNDS = 3  # Hadamard transforms of a key: one inside D, two outside
NARROW = 256  # up to this shorter side spectra say most
NARROW_FACTOR = 1.5  # by which masks have more energy there, as much as rounding allows
_ROUNDING = 6e-7  # of Y in float32 without masks, at 1024³ as XLA multiplies on a CPU
_NARROWING = 2.4e-3  # of Y where X and W are rounded to bfloat16, without masks and decoys
_NARROWING_WITH_DECOYS = 3.0  # times as much, as they have most of the energy
_FAINT = 2.0**-6  # of a decoy's length, in directions that the signal may not have
_TINY = 2.0**-90  # a scalar this far from 1 would leave float32's range


class MixingKey(NamedTuple):
    """One axis's group element, the number of decoys along the axis, and its scales."""

    element: AxisMap
    decoys: int
    scales: AxisScales

    def __repr__(self) -> str:
        return "MixingKey(<secret>)"

    __reduce__ = refuse_pickling


class TensorSecret(NamedTuple):
    """What `unblind` needs to know of one blinded tensor.

    Attributes:
      scalars: the tensor's, (1,) or one for each leading index.
      rows: the key class of the axis before the last.
      tensor: the tensor itself and with its scales; None when it has been let go.
      decoys: its decoy rows, if any.
      masked: the tensor and its mask of full rank, if it has one.
      trade: by the key class of its axis, each of the two factors of the mask that trades
        directions.
    """

    scalars: np.ndarray
    rows: int | None = None
    tensor: Equilibrated | None = None
    decoys: np.ndarray | None = None
    masked: Masked | None = None
    trade: Mapping[int, np.ndarray] | None = None

    def __repr__(self) -> str:
        return "TensorSecret(<secret>)"

    __reduce__ = refuse_pickling


@register
@dataclasses.dataclass(frozen=True)
class Mixing(Scheme):
    """Mixes every axis by a fresh random invertible map, over masks of full rank: the default.

    Every product, forward and backward together, has keys and masks of its own at every step; see
    the module for the formula. It protects weights, inputs, labels and optimizer state
    *heuristically*: the attacks of ``benchmarks.attacks`` stay within their thresholds, and no
    proof is known (over the reals no uniform key exists). It does not hide shapes. Nothing stays
    on the devices, so any optimizer can be used. Products with fewer than 128 rows or a side below
    64, products of one-hot codes, the classifier with all that no trained weight follows, and the
    optimizer's own products stay in the enclave. Where the classifier is, is told from the
    program: logits that a further trained weight follows, such as a learned noise matrix, and
    labels that come as numbers and are an input of the model go out, unless `keep_inside` marks
    them.

    Masks cost rounding, √(1 + energy) for each of the two operands: relative errors of 6e-6 to 1e-5
    in float32, 0.4 % in float16 and 3 % in bfloat16, and twice the enclave's work. Without them
    (``Mixing(condition=4.0, decoy_rows=32, mask_energy=0)``, the default of earlier versions)
    errors are 5, 2.8 and 2.8 times plain JAX's, ranks are exact, and a host that has the weights
    names the sequence or batch it saw (S11 to S13 of the suite).

    With ``wire="bfloat16"`` blinded operands of float32 are rounded to bfloat16 as they are written
    to shared memory, which halves the bytes down to the devices, and lets these multiply on their
    units for 16 bits. Sums are float32, and so are results, so that `verify` checks as sharply as
    without. What the host sees is a function of what it would see in float32: it learns nothing
    more. But masks multiply that rounding too: a product is off by 2.9 %, of 7e-3 with decoys
    in place of masks and 2.7e-3 with neither, where plain JAX with operands in bfloat16 has 2.4e-3.
    The update of a perceptron of width 1024 with ReLU from 2048 rows is off by 14, 7 and 4.4 %
    (plain JAX's with such operands: 4.0 %). Other formats cross as they are.

    Rows and columns of any scale keep their digits: powers of two even them out before the
    blinding, and rows and columns that are far out after that, or not finite, are computed inside,
    which the host may tell from the time.

    Attributes:
      condition: bound on each key's condition number, at least 1.
      decoy_rows: least number of decoy rows, at least 0; they fill up to a multiple of 64.
      traded: strongest directions of each operand that its mask takes down, at least 0, for each
        64 of its shorter side up to 128. Without masks, those of an operand without decoys that
        are traded for random ones, if the other operand has decoys.
      mask_energy: of the masks of full rank, over the tensors', 0 (none) to 1000; of tensors with
        a side of at most 256 it is 1.5 times as much.
      wire: None, or "bfloat16", in which blinded operands of float32 cross then.

    References:
      The study in SECURITY.md.
    """

    condition: float = 2.0
    decoy_rows: int = 0
    traded: int = 8
    mask_energy: float = 10.0
    wire: str | None = None
    name: ClassVar[str] = "mixing"
    group: ClassVar[Group] = Group.INVERTIBLE
    reference: ClassVar[SchemeCost] = SchemeCost(overhead=4e-4, blinding=3.0, drawing=60.0)
    keys_per_product: ClassVar[bool] = True
    # Fewer rows than this, without decoys, or a shorter side than that, mix too little to hide.
    least_rows: ClassVar[int] = 128
    least_side: ClassVar[int] = 64
    first_layer_share: ClassVar[float] = 0.05
    host_learns: ClassVar[str] = (
        "shapes, and from the time that so much of a product was computed inside, because it was "
        "not finite or far out; weights, inputs and labels are protected heuristically, as far as "
        "the published attack suite tells, and less where the masks of full rank are turned off"
    )

    def __post_init__(self) -> None:
        """Checks the parameters."""
        if type(self.condition) not in (int, float) or not 1 <= self.condition <= 1e6:
            raise ValueError("Mixing: condition is a number between 1 and 1e6")
        if type(self.decoy_rows) is not int or not 0 <= self.decoy_rows <= 4096:
            raise ValueError("Mixing: decoy_rows is an int between 0 and 4096")
        if type(self.traded) is not int or not 0 <= self.traded <= 64:
            raise ValueError("Mixing: traded is an int between 0 and 64")
        if type(self.mask_energy) not in (int, float) or not 0 <= self.mask_energy <= 1000:
            raise ValueError("Mixing: mask_energy is a number between 0 and 1000")
        if self.wire not in (None, "bfloat16"):
            raise ValueError('Mixing: wire is None or "bfloat16"')

    @property
    def key_budget(self) -> int | None:
        """Nothing is kept."""
        return 0

    @property
    def rounding(self) -> str:
        """About how far a product is off in float32, for even scales and for spread ones."""
        narrowing = self.narrowing("float32")
        off = narrowing or _ROUNDING * (1 + NARROW_FACTOR * self.mask_energy)
        text = (
            f"each row and column of a float32 product is off by about {off:.1e} of its own size "
            f"where scales are even, and by at most {10 * off:.1e} whatever they are"
        )
        if narrowing:
            text += (
                f": its operands cross in {self.wire}, and masks and decoys multiply what that "
                f"rounds, which alone is {_NARROWING:.1e}. Try it with less `mask_energy`, which "
                "hides less, or `wire=None`, before you trust a training to it"
            )
        return text

    def narrowing(self, dtype: str) -> float:
        """What the wire's format leaves of float32 under masks and decoys."""
        if self.wire is None or dtype != "float32":
            return 0.0
        decoys = _NARROWING_WITH_DECOYS if self.decoy_rows else 1.0
        return _NARROWING * decoys * (1 + NARROW_FACTOR * self.mask_energy)

    def representation(self, array: ArrayType, *, product: bool) -> ArrayType:
        """Operands in the wire's format; sums of products stay in float32, and so do checks."""
        if self.wire is None or product or array.dtype != "float32":
            return array
        return ArrayType(array.shape, self.wire)

    @property
    def covers_activations(self) -> bool:
        """With masks of full rank alone: a sequence's spectrum names it."""
        return self.mask_energy > 0

    def decoys(self, rows: int) -> int:
        """At least `decoy_rows`, filling up to a multiple of 64."""
        least = self.decoy_rows
        return -(-(rows + least) // _BLOCK) * _BLOCK - rows if least else 0

    def arithmetic(self, rows: int, inner: int, columns: int, results: int, gradients: int) -> int:
        """What decoys and masks of low rank cost beside the mixing and masks of full rank."""
        decoys = self.decoys(rows)
        flops = gradients * 2 * decoys * inner * columns
        if self.mask_energy:
            return flops
        # The mask of W comes off each result.
        flops += results * 4 * self.traded * (rows + decoys) * (inner + columns)
        # A sketch of W, its singular directions, and the mask.
        return flops + 10 * self.traded * inner * columns

    def cheapest_operands(
        self, first: TensorSecret, second: TensorSecret
    ) -> tuple[TensorSecret, TensorSecret]:
        """The same without what trades directions."""
        return first, second._replace(trade=None)

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
        return MixingKey(element, key_class.decoys, AxisScales(key_class.copies))

    def blind(
        self,
        plain: jax.Array | np.ndarray,
        layout: Layout,
        keys: Mapping[int, MixingKey],
        out: np.ndarray,
        stream: Callable[[], KeyStream],
    ) -> TensorSecret:
        """Blinds a float matrix or batch of matrices; decoys lie along the axis before the last."""
        tensor = equilibration.equilibrate(to_mixable(plain), *_scales(layout, keys))
        x = tensor.scaled
        draws = stream()
        maps, count = {}, 0
        for axis, number, parity in keyed_axes(layout):
            element = keys[number].element
            maps[axis] = element if parity else element.inverse_transpose()
            count = max(count, keys[number].decoys)
        whole = tensor.energies
        # Nothing is no basis for a scale; it is hidden all the same.
        size = np.where(whole > 0, whole, 1.0)
        decoys, trade, covered, draft, covering = None, None, None, None, size
        rows = layout.classes[-2]
        assert rows is not None, "operands of products have keys on both axes"
        if self.mask_energy:
            energy = self.mask_energy * (NARROW_FACTOR if min(x.shape[-2:]) <= NARROW else 1)
            draft, covering = masks.draw(x, whole, energy, self.traded, draws)
        if count:
            decoys = _decoy_rows(x, count, float(size.sum()), draws)
        elif self.decoy_rows and not self.mask_energy:
            trade = self._trade(x, layout, size, draws)
            if trade is not None:
                first, second = trade.values()
                x = plus_product(x, first, second.swapaxes(-1, -2))
        if draft is None and decoys is None and trade is None and not whole.all():
            # It would arrive as nothing; its products are set to zeros or computed inside.
            noise = draws.normal(x.size, x.dtype).reshape(x.shape)
            x = np.where(whole > 0, x, noise)
        last = x.ndim - 1
        total = covering + size * DECOY_ENERGY * bool(count)
        if maps[last].copies == 1:
            total = total.sum(keepdims=True)
        total = total.reshape(-1)
        mean = np.clip(np.sqrt(total / (out.size / total.size)), _TINY, 1 / _TINY)
        scalars = 4 ** (draws.uniform(total.size) - 0.5) / mean
        maps[last] = maps[last].scaled(scalars)
        if draft is None:
            mix_into(out, x, maps, decoys)
        else:
            fits = out.dtype == x.dtype and out.flags.carray
            own = out if fits else np.empty(out.shape, x.dtype)
            mask, keyed = masks.blind(x, draft, (maps[last - 1], maps[last]), decoys, own)
            covered = Masked(x, mask, rows, maps[last - 1], keyed)
            if not fits:
                round_into(out, own)
        return TensorSecret(scalars, rows, tensor, decoys, covered, trade)

    def _trade(
        self, w: np.ndarray, layout: Layout, energy: np.ndarray, stream: KeyStream
    ) -> dict[int, np.ndarray] | None:
        """The two factors of W's mask, (…, n, 2 k) and (…, p, 2 k), by their axes' classes.

        About the k strongest singular directions are brought down to the size of the others,
        and k random directions come up.
        """
        *batch, n, p = w.shape
        k = min(self.traded, min(n, p) // 2)
        if k == 0:
            return None
        copies = math.prod(batch)

        def normal(rows: int) -> np.ndarray:
            return stream.normal(copies * rows * k, w.dtype).reshape(*batch, rows, k)

        def uniform() -> np.ndarray:
            return (0.5 + stream.uniform(copies * k)).reshape(*batch, 1, k)

        along, sizes = masks.strongest_directions(w, k, stream)
        rest = np.maximum(energy - np.square(sizes).sum(-1, keepdims=True), 0)
        others = np.sqrt(rest / (min(n, p) - k))
        removed = np.maximum(sizes - others * uniform(), 0)
        # Where there is nothing to remove, or nothing at all, directions come up all the same.
        usual = np.sqrt(energy / min(n, p))
        added = np.maximum(sizes, usual) * uniform()
        random = [np.linalg.qr(normal(rows))[0] for rows in (n, p)]
        (first, second) = (c for c in layout.classes[-2:] if c is not None)
        return {
            first: np.concatenate(
                [random[0] * added, -along * (removed / np.where(sizes > 0, sizes, 1))], -1
            ).astype(w.dtype),
            second: np.concatenate([random[1], w.swapaxes(-1, -2) @ along], -1),
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
        maps, keep = {}, None
        for axis, number, parity in keyed_axes(layout):
            element, decoys = keys[number].element, keys[number].decoys
            maps[axis] = element.inverse() if parity else element.transpose()
            if decoys:
                keep = blinded.shape[axis] - decoys
        assert left.tensor is not None and right.tensor is not None, "let go before the last use"
        last = blinded.ndim - 1
        maps[last] = maps[last].scaled(1 / (left.scalars * right.scalars))
        product = to_mixable(blinded)
        if left.masked is not None and right.masked is not None:
            plain = _without_masks(product, maps, left.masked, right.masked, layout)
        else:
            plain = hadamard.unmix(product, maps, keep=keep)
        if left.decoys is not None and right.decoys is not None:
            plain = plus_product(plain, -left.decoys.swapaxes(-1, -2), right.decoys)
        if right.trade is not None:
            # W's axes are the result's columns and what was summed over.
            outer = next(f for c, f in right.trade.items() if c == layout.classes[last])
            inner = next(f for c, f in right.trade.items() if c != layout.classes[last])
            plain = plus_product(
                plain, -product_of(left.tensor.scaled, inner), outer.swapaxes(-1, -2)
            )
        plain = equilibration.unscale(plain, *_scales(layout, keys))
        first, second = left.tensor, right.tensor
        if left.rows != layout.classes[-2]:
            first = first.transposed
        if right.rows == layout.classes[-1]:
            second = second.transposed
        plain = equilibration.complete(plain, first, second)
        # In memory of its own, which nobody writes to any more: XLA may read it where it lies.
        return jax.device_put(rounded(plain, blinded.dtype), may_alias=True)

    def let_go(self, secret: TensorSecret) -> TensorSecret:
        """Without its arrays: the products with it have all come back."""
        return TensorSecret(secret.scalars)

    @classmethod
    def load(cls) -> None:
        """Compiles or loads all kernels."""
        hadamard.warm_up()

    def warm_up(self, array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]) -> None:
        """Compiles the kernels; they do not depend on shapes."""
        self.load()


def _scales(
    layout: Layout, keys: Mapping[int, MixingKey]
) -> tuple[tuple[AxisScales, AxisScales], tuple[int, int]]:
    """The scales of a layout's last two axes, and the axes' parities."""
    (_, first, parity), (_, second, other) = list(keyed_axes(layout))[-2:]
    return (keys[first].scales, keys[second].scales), (parity, other)


def _without_masks(
    product: np.ndarray, maps: Mapping[int, AxisMap], left: Masked, right: Masked, layout: Layout
) -> np.ndarray:
    """Takes keys off a product of this layout, and what the masks of its operands added."""
    rows, columns = layout.classes[-2:]
    last = product.ndim - 1
    by_row, by_column = maps[last - 1], maps[last]
    if left.rows == rows:
        right = right.transposed if right.rows == columns else right
        return masks.unblind(product, (by_row, by_column), left, right, aligned=True)
    if right.rows == columns:
        turned = product.swapaxes(-1, -2)
        plain = masks.unblind(turned, (by_column, by_row), right, left, aligned=True)
        return np.ascontiguousarray(plain.swapaxes(-1, -2))
    return masks.unblind(product, (by_row, by_column), left.transposed, right, aligned=False)


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
