"""Blinding in NumPy: every scheme and weak control of the suite, with its keys known.

Written from the formulas alone, apart from `enclave_runtime`, so that controls no shipped scheme
offers can be attacked, and so that a fault of the library is not repeated here:
``X̂ = t A (X + M) Bᵀ``, ``Ŵ = t B⁻ᵀ (W + M) Cᵀ``, ``Ĝ = t A⁻ᵀ (G + M) C⁻¹``, in schemes with decoys
``X̂ = t A [X; R] Bᵀ``, ``Ĝ = t A⁻ᵀ [G; Q] C⁻¹``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
import scipy.linalg

BLOCK = 64  # rows that one Hadamard block mixes
CONDITION = 4.0
MASKED_CONDITION = 2.0  # of keys over masks of full rank
DECOYS = 32
DECOY_ENERGY = 4.0
FAINT = 2.0**-6
STRONGEST = 8
MASK_WIDTH, MOST_WIDTHS = 64, 2  # for each of which so many are taken down, and for how many
MASK_ENERGY, NARROW, NARROW_FACTOR = 10.0, 256, 1.5  # more where a side is at most `NARROW`
MASK_CONDITION = 8.0
CONCENTRATION = 3.0  # of the random distribution of a mask's scales
STICKS = 48
FRACTION_BITS, RING = 22, 1 << 50  # of shares; any ring that holds an operand has the same law
TAPS = 9  # of a 3×3 convolution


class Stage(NamedTuple):
    """``x ↦ M diag(factors) x[permutation]``, M orthogonal: none, one block repeated, or whole."""

    permutation: np.ndarray
    factors: np.ndarray
    mixing: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Key:
    """An invertible matrix K as a product of stages."""

    size: int
    stages: tuple[Stage, ...]

    def apply(self, x: np.ndarray, *, polar: bool = False) -> np.ndarray:
        """``K x``, or ``K⁻ᵀ x`` if `polar`."""
        for permutation, factors, mixing in self.stages:
            x = x[permutation] * (1 / factors if polar else factors)[:, None]
            if mixing is not None:
                blocks = x.reshape(-1, len(mixing), x.shape[1])
                x = (mixing @ blocks).reshape(x.shape)
        return x

    @functools.cached_property
    def matrix(self) -> np.ndarray:
        """K, float64 (size, size)."""
        return self.apply(np.eye(self.size))


class DenseKey(Key):
    """A key given as its matrix."""

    def __init__(self, matrix: np.ndarray):
        """Keeps the matrix, (n, n)."""
        object.__setattr__(self, "size", len(matrix))
        object.__setattr__(self, "stages", ())
        object.__setattr__(self, "matrix", matrix)

    def apply(self, x: np.ndarray, *, polar: bool = False) -> np.ndarray:
        """See `Key.apply`."""
        return np.linalg.solve(self.matrix.T, x) if polar else self.matrix @ x


def permutation_key(rng: np.random.Generator, size: int) -> Key:
    """A uniform permutation."""
    return Key(size, (Stage(rng.permutation(size), np.ones(size), None),))


def plain_key(rng: np.random.Generator, size: int) -> Key:
    """No key: nothing is drawn."""
    del rng
    return Key(size, ())


def signed_key(rng: np.random.Generator, size: int) -> Key:
    """A uniform signed permutation."""
    return Key(size, (Stage(rng.permutation(size), rng.choice([-1.0, 1.0], size), None),))


def scaled_key(rng: np.random.Generator, size: int) -> Key:
    """A permutation with positive powers of two."""
    return Key(size, (Stage(rng.permutation(size), 2.0 ** rng.integers(-3, 4, size), None),))


def orthogonal_key(rng: np.random.Generator, size: int) -> Key:
    """Two rounds of fast Hadamard mixing, or Haar matrices where the size does not allow them."""
    return _mixing_key(rng, size, np.ones(size), 2)


def invertible_key(rng: np.random.Generator, size: int) -> Key:
    """``P S H P S H P S D H P S`` with D log-uniform, so that the condition is at most 4."""
    return _mixing_key(rng, size, _scales(rng, size), 3)


def milder_key(rng: np.random.Generator, size: int) -> Key:
    """The same with a condition of at most 2."""
    return _mixing_key(rng, size, np.sqrt(_scales(rng, size)), 3)


def channel_key(rng: np.random.Generator, size: int) -> Key:
    """One key for all nine shifts of a patch's channels, as a convolution sent as it is has."""
    if size % TAPS:
        return invertible_key(rng, size)
    offsets = np.arange(TAPS)[:, None] * (size // TAPS)
    stages = (
        Stage((s.permutation + offsets).ravel(), np.tile(s.factors, TAPS), s.mixing)
        for s in invertible_key(rng, size // TAPS).stages
    )
    return Key(size, tuple(stages))


def two_round_key(rng: np.random.Generator, size: int) -> Key:
    """``P S H P S D H P S``: the same with a single transform outside D, which shows its blocks."""
    return _mixing_key(rng, size, _scales(rng, size), 2)


def _scales(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.exp(rng.uniform(-0.5, 0.5, size) * np.log(CONDITION))


def _mixing_key(rng: np.random.Generator, size: int, scales: np.ndarray, rounds: int) -> Key:
    if size % BLOCK:
        mixings = [_haar(rng, size) for _ in range(rounds)]
    else:
        mixings = [scipy.linalg.hadamard(BLOCK) / np.sqrt(BLOCK)] * rounds
    factors = [np.ones(size), scales, *[np.ones(size)] * (rounds - 1)]
    signs = rng.choice([-1.0, 1.0], (rounds + 1, size))
    return Key(
        size,
        tuple(
            Stage(rng.permutation(size), s * f, m)
            for s, f, m in zip(signs, factors, [*mixings, None], strict=True)
        ),
    )


def mask_key(rng: np.random.Generator, size: int) -> Key:
    """``P S H P S D H P S D H P S``, D's scales from a random distribution: a Dirichlet process."""

    def scales() -> np.ndarray:
        broken = rng.beta(1, CONCENTRATION, STICKS)
        shares = broken * np.cumprod(np.append(1, 1 - broken[:-1]))
        exponents = rng.choice(rng.uniform(-0.5, 0.5, STICKS), size, p=shares / shares.sum())
        return np.exp(exponents * np.log(MASK_CONDITION))

    key = _mixing_key(rng, size, scales(), 3)
    first, second, third, last = key.stages
    return Key(size, (first, second, third._replace(factors=third.factors * scales()), last))


def _haar(rng: np.random.Generator, size: int) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(size, size)))
    return q * np.sign(np.diag(r))


GROUPS = {
    "plain": plain_key,
    "permutation": permutation_key,
    "signed": signed_key,
    "scaled": scaled_key,
    "orthogonal": orthogonal_key,
    "invertible": invertible_key,
    "milder": milder_key,
    "channels": channel_key,
    "two rounds": two_round_key,
}
FOREVER = 10**9


@dataclasses.dataclass(frozen=True)
class Blinding:
    """What a scheme or a control does.

    Attributes:
      rows: group of row keys, drawn for every product and step.
      features: group of the keys of W's axes.
      lifetime: steps for which feature keys are kept.
      decoys: `none`; `coupled`: rows below X and G; `matched`: the same, half of them of the
        signal's own covariance.
      shared_rows: whether all products of a step use one row key.
      scalars: whether every tensor gets a random scalar.
      masked: whether a low-rank mask is added to W.
      energy: of a mask of full rank on every tensor, over what is left of the tensor; 0: none.
      keeps_inside: whether the classifier and thin products stay in the enclave.
      shares: whether a tensor becomes what is left of it, in fixed point, less two uniform shares:
        the one of three that depends on it, as one pool has it.
      dual: whether dW is computed from second versions of X and G, in the other polarity.
    """

    rows: str
    features: str
    lifetime: int
    decoys: str = "none"
    shared_rows: bool = False
    scalars: bool = False
    masked: bool = False
    energy: float = 0.0
    keeps_inside: bool = False
    dual: bool = False
    shares: bool = False


_MIXING = Blinding("milder", "milder", 1, scalars=True, energy=MASK_ENERGY, keeps_inside=True)
# What `Mixing` was before it had masks of full rank.
_DECOYS = dataclasses.replace(
    _MIXING,
    rows="invertible",
    features="invertible",
    decoys="coupled",
    masked=True,
    energy=0.0,
)
SCHEMES = {
    "signed_permutation": Blinding("signed", "signed", FOREVER),
    "tempo": Blinding("scaled", "scaled", FOREVER, dual=True),
    "orthogonal": Blinding("orthogonal", "orthogonal", 1),  # the library's default budget
    "mixing": _MIXING,
    "secret_shares": Blinding("plain", "plain", 1, shares=True),
}
CONTROLS = {
    "kept_orthogonal": Blinding("orthogonal", "orthogonal", FOREVER),
    "fresh_orthogonal": Blinding("orthogonal", "orthogonal", 1),
    "kept_invertible": Blinding("orthogonal", "invertible", FOREVER),
    "permuted_rows": Blinding("permutation", "orthogonal", FOREVER),
    "plain_features": Blinding("orthogonal", "plain", FOREVER),
    "shared_rows": Blinding("orthogonal", "orthogonal", FOREVER, shared_rows=True),
    # On patches, while the library's scheme sends convolutions as they are.
    "signed_patches": Blinding("signed", "signed", FOREVER),
    "direct_convolution": Blinding("invertible", "channels", 1),
    "mixing_decoys": _DECOYS,
    "mixing_without_decoys": dataclasses.replace(_DECOYS, decoys="none", masked=False),
    "mixing_two_rounds": dataclasses.replace(_DECOYS, rows="two rounds", features="two rounds"),
    "mixing_matched": dataclasses.replace(_DECOYS, decoys="matched", masked=False),
}
BLINDINGS = SCHEMES | CONTROLS


def cover(how: Blinding, x: np.ndarray, rng: np.random.Generator, *, rows: bool) -> np.ndarray:
    """What a tensor's keys are applied to: the tensor with its masks, and decoys below `rows`."""
    if how.shares:
        return draw_share(rng, x)
    if how.energy:
        x = x + draw_full_mask(rng, x, how.energy)
    if rows and how.decoys != "none":
        x = np.concatenate([x, decoys_below(how, x, rng)])
    if not rows and how.masked:
        x = x + draw_mask(rng, x)
    return x


def blind_rows(how: Blinding, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """X̂ or Ĝ but for its scalar, keys drawn for nothing else, as a host draws: schemes are public.

    Keys and their inverse transposes have one distribution, up to the order of stages.
    """
    x = cover(how, x, rng, rows=True)
    a, b = GROUPS[how.rows](rng, len(x)), GROUPS[how.features](rng, x.shape[1])
    return b.apply(a.apply(x, polar=True).T, polar=True).T


def blind_weight(how: Blinding, w: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ŵ but for its scalar, likewise."""
    b, c = (GROUPS[how.features](rng, size) for size in w.shape)
    return c.apply(b.apply(cover(how, w, rng, rows=False), polar=True).T).T


def decoy_count(rows: int) -> int:
    """How many decoys fill `rows` and `DECOYS` more up to whole blocks."""
    return -(rows + DECOYS) % BLOCK + DECOYS


def decoys_below(how: Blinding, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The decoy rows of a scheme that has some, as many as `decoy_count` says."""
    draw = matched_decoys if how.decoys == "matched" else draw_decoys
    return draw(rng, x, decoy_count(len(x)))


def draw_decoys(rng: np.random.Generator, x: np.ndarray, count: int) -> np.ndarray:
    """Rows with X's spectrum in a fresh random basis."""
    rows = rng.normal(size=(count, len(x))) @ x
    # A little of every direction, also where X has none.
    rows += FAINT * rng.normal(size=rows.shape) * np.sqrt((x**2).sum() / x.shape[1])
    rows = orthogonal_key(rng, x.shape[1]).apply(rows.T).T
    energy = np.sqrt((rows**2).sum(1, keepdims=True))
    rows *= rng.uniform(0.5, 1.5, (count, 1)) / np.where(energy > 0, energy, 1)
    return rows * np.sqrt(DECOY_ENERGY * (x**2).sum() / (rows**2).sum())


def matched_decoys(rng: np.random.Generator, x: np.ndarray, count: int) -> np.ndarray:
    """Half of them combinations of X's rows, which raise the directions that they should hide."""
    matched = rng.normal(size=(count // 2, len(x))) @ x
    matched *= rng.uniform(0.5, 1.5, (len(matched), 1)) / np.linalg.norm(matched, axis=1)[:, None]
    matched *= np.sqrt(DECOY_ENERGY / 2 * (x**2).sum() / (matched**2).sum())
    return np.concatenate([matched, draw_decoys(rng, x, count - len(matched)) / np.sqrt(2)])


def _strongest(
    rng: np.random.Generator, w: np.ndarray, count: int = STRONGEST
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """About the leading singular directions, and the usual size of the others.

    A random sketch and one power iteration find them.
    """
    sketch = np.linalg.qr(w.T @ (w @ rng.normal(size=(w.shape[1], count))))[0]
    left, sizes, turn = np.linalg.svd(w @ sketch, full_matrices=False)
    rest = max((w**2).sum() - (sizes**2).sum(), 0.0) / (min(w.shape) - count)
    return left, sizes, sketch @ turn.T, float(np.sqrt(rest))


def draw_full_mask(rng: np.random.Generator, x: np.ndarray, energy: float) -> np.ndarray:
    """Z - L Rᵀ: X's strongest directions down to the size of the others, a cut fast map on top."""
    m, n = x.shape
    energy *= NARROW_FACTOR if min(m, n) <= NARROW else 1
    widths = min(max(min(m, n) // MASK_WIDTH, 1), MOST_WIDTHS)
    left, sizes, right, rest = _strongest(rng, x, STRONGEST * widths)
    kept = np.minimum(sizes, rest * rng.uniform(0.5, 1.5, STRONGEST * widths))
    removed = left * (sizes - kept) @ right.T
    # The shorter axis's map makes the spectrum, the longer one's is orthogonal.
    z = mask_key(rng, min(m, n)).apply(np.eye(max(m, n), min(m, n)).T).T
    z = _mixing_key(rng, max(m, n), np.ones(max(m, n)), 1).apply(z)
    z = z if m >= n else z.T
    whole = (kept**2).sum() + max((x**2).sum() - (sizes**2).sum(), 0.0) or float(m * n)
    return z * np.sqrt(energy * whole / (z**2).sum()) - removed


def draw_share(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """``X - X_0 - X_1`` modulo `RING`, over `RING`: between -1/2 and 1/2."""
    integers = np.rint(x * (2.0**FRACTION_BITS / (np.abs(x).max() or 1.0))).astype(np.int64)
    left = integers - rng.integers(0, RING, x.shape) - rng.integers(0, RING, x.shape)
    return ((left + RING // 2) % RING - RING // 2) / RING


def draw_mask(rng: np.random.Generator, w: np.ndarray) -> np.ndarray:
    """Trades W's strongest directions for random ones: a mask of rank ``2 STRONGEST``.

    They are brought down to the size of the others, and as many random directions of their size
    come up.
    """
    n, p = w.shape
    left, sizes, right, rest = _strongest(rng, w)
    removed = np.maximum(sizes - rest * rng.uniform(0.5, 1.5, STRONGEST), 0)
    added = sizes * rng.uniform(0.5, 1.5, STRONGEST)
    r, s = (np.linalg.qr(rng.normal(size=(size, STRONGEST)))[0] for size in (n, p))
    return r * added @ s.T - left * removed @ right.T
