"""S3: aligns the Grams of adjacent layers, with no pairing, labels or plaintext.

Row keys vanish from ``ŶᵀŶ`` (if orthogonal) and from ``ŶᵀĜ`` (always), so over the steps that
share feature keys the Grams of a layer's output and of the next layer's input fluctuate together,
each in its own frame. The orthogonal matrix that takes one series to the other is the link.
"""

from __future__ import annotations

import numpy as np

from benchmarks.attacks import scoring
from benchmarks.attacks.blinding import BLINDINGS
from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.scoring import Link
from benchmarks.attacks.traces import ProductView, Trace

LENGTHS = (2, 4, 10, 50)
RESTARTS = 6
SINGLES = 3
ITERATIONS = 120
COMBINATIONS = 5  # of the fluctuations of each kind of Gram
LINKS = 3
# What passes of the mean and of the best; in a residual model, whose chance is beyond `RESIDUAL`,
# the share of what accuracy there is to gain.
RESIDUAL = 0.25
STOLEN = (("mean", np.mean, 0.25, 0.15), ("max", np.max, 0.35, 0.25))
Family = list[tuple[np.ndarray, np.ndarray]]


def _whitener(gram: np.ndarray) -> np.ndarray:
    """Inverse square root, with small eigenvalues held up."""
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, 1e-3 * values[-1])
    return (vectors / np.sqrt(values)) @ vectors.T


def grams(
    views: list[tuple[ProductView, ProductView]], rng: np.random.Generator, *, whiten: bool
) -> tuple[Family, tuple[np.ndarray, np.ndarray]]:
    """Pairs of matrices that one orthogonal O should take into each other: ``Oᵀ first O ≈ second``.

    With more than one step the mean over them is taken off, since what ReLU adds to every step
    alike would drown what the layers share; the means of gradients are kept.

    Returns:
      The pairs, each matrix of norm 1, and what makes each side orthogonal: identities, or with
      `whiten` the inverse square roots of mean Grams.
    """
    values: list[list[np.ndarray]] = [[], []]
    gradients: list[list[np.ndarray]] = [[], []]
    for pair in views:
        for side, view in enumerate(pair):
            value, gradient = (view.y, view.g_under_w) if side == 0 else (view.x, view.dx)
            assert value is not None and gradient is not None
            values[side].append(value / np.linalg.norm(value))
            gradients[side].append(gradient / np.linalg.norm(gradient))
    bases = []
    for side in (0, 1):
        mean = np.mean([v.T @ v for v in values[side]], axis=0)
        bases.append(_whitener(mean) if whiten else np.eye(len(mean)))
        dual = np.linalg.inv(bases[side]).T
        values[side] = [v @ bases[side] for v in values[side]]
        gradients[side] = [g @ dual for g in gradients[side]]
    series = [
        [[v.T @ v for v in side] for side in values],
        [[g.T @ g for g in side] for side in gradients],
        [
            [v.T @ g for v, g in zip(*both, strict=True)]
            for both in zip(values, gradients, strict=True)
        ],
    ]
    family: Family = []
    for number, (first, second) in enumerate(series):
        means = [np.mean(side, axis=0) for side in (first, second)]
        if number > 0 or len(views) == 1:
            family.append((means[0], means[1]))
        if len(views) > 1:
            moves = [(f - means[0], s - means[1]) for f, s in zip(first, second, strict=True)]
            family += _compress(moves, rng)
    family = [
        (f / (np.linalg.norm(f) + 1e-300), s / (np.linalg.norm(s) + 1e-300)) for f, s in family
    ]
    return family, (bases[0], bases[1])


def _compress(family: Family, rng: np.random.Generator) -> Family:
    """Replaces many fluctuations by fewer random sums of them, the same on both sides."""
    if len(family) <= COMBINATIONS:
        return family
    mix = rng.normal(size=(COMBINATIONS, len(family))) / np.sqrt(len(family))
    first, second = (np.stack([pair[side] for pair in family]) for side in (0, 1))
    return list(zip(np.tensordot(mix, first, 1), np.tensordot(mix, second, 1), strict=True))


def first_guess(family: Family, pivot: int, rng: np.random.Generator, *, rank: bool) -> np.ndarray:
    """Pairs the eigenvectors of one matrix by rank; their signs from all the others."""
    sizes = [len(m) for m in family[0]]
    if not rank:
        return np.linalg.qr(rng.normal(size=(sizes[1], sizes[0])))[0].T
    first, second = (np.linalg.eigh(m + m.T)[1][:, -sizes[0] :] for m in family[pivot])
    agreement = np.zeros((sizes[0], sizes[0]))
    for f, s in family:
        agreement += (first.T @ f @ first) * (second.T @ s @ second)
    signs = np.linalg.eigh(agreement + agreement.T)[1][:, -1]
    return (first * np.where(signs < 0, -1, 1)) @ second.T


def align(
    family: Family, start: np.ndarray, iterations: int = ITERATIONS
) -> tuple[np.ndarray, float]:
    """Maximizes ``Σ tr(Oᵀ first O secondᵀ)`` over orthogonal O by repeated polar steps.

    Returns:
      O, and the sum divided by its number of terms: 1 if every pair is congruent.
    """
    o, score = start, -np.inf
    firsts, seconds = (np.stack([pair[side] for pair in family]) for side in (0, 1))
    symmetric = np.abs(firsts - firsts.swapaxes(1, 2)).max() < 1e-12
    # With a multiple of O added every step climbs, even where the sum is not convex.
    shift = 0.02 * len(family)
    for number in range(iterations):
        moved = firsts @ o
        gradient = np.einsum("tij,tjk->ik", moved, seconds.swapaxes(1, 2), optimize=True)
        new = float((gradient * o).sum()) / len(family)
        if not symmetric:
            other = firsts.swapaxes(1, 2) @ o
            gradient = (gradient + np.einsum("tij,tjk->ik", other, seconds, optimize=True)) / 2
        if number % 10 == 9:
            if new - score < 1e-6:
                break
            score = new
        u, _, v = np.linalg.svd(gradient + shift * o, full_matrices=False)
        o = u @ v
    return o, float(np.einsum("tij,jk,tlk,il->", firsts, o, seconds, o, optimize=True)) / len(
        family
    )


def _families(
    trace: Trace, link: Link, steps: range, rng: np.random.Generator
) -> list[tuple[Family, tuple[np.ndarray, np.ndarray]]]:
    """What to align: as it is, and for keys that are not orthogonal also whitened."""
    views = [(trace.views[t][link[0]], trace.views[t][link[1]]) for t in steps]
    invertible = BLINDINGS[trace.scheme].features in ("invertible", "milder")
    return [grams(views, rng, whiten=w) for w in ((True, False) if invertible else (False,))]


def link_layers(
    trace: Trace, link: Link, steps: range, rng: np.random.Generator, restarts: int
) -> list[tuple[np.ndarray, float]]:
    """Estimates the map from the first product's columns to the second's inner axis.

    Returns:
      For each restart, the map ``x̂ ≈ ± ŷ M`` and the alignment reached. Grams do not tell the sign.
    """
    families = _families(trace, link, steps, rng)
    found = []
    for number in range(restarts):
        family, bases = families[number % len(families)]
        turn = number // len(families)
        # Every second restart pairs eigenvectors by rank, of another matrix each time.
        start = first_guess(family, turn // 2 * 7 % len(family), rng, rank=turn % 2 == 0)
        o, score = align(family, start)
        found.append((bases[0] @ o @ np.linalg.inv(bases[1]), score))
    return found


def random_maps(
    trace: Trace, link: Link, steps: range, rng: np.random.Generator, count: int
) -> list[np.ndarray]:
    """Maps as `link_layers` makes them, with a random rotation in the middle: chance."""
    families = _families(trace, link, steps, rng)
    found = []
    for number in range(count):
        family, bases = families[number % len(families)]
        o = first_guess(family, 0, rng, rank=False)
        found.append(bases[0] @ o @ np.linalg.inv(bases[1]))
    return found


def rescale(trace: Trace, step: int, link: Link, m: np.ndarray) -> np.ndarray:
    """Scales a map so that ``ŷ M`` has the energy of x̂ without its mean row."""
    y, x = trace.views[step][link[0]].y, trace.views[step][link[1]].x
    assert y is not None and x is not None
    values = np.linalg.eigvalsh(x.T @ x)
    return m * np.sqrt(values[:-1].sum() / ((y @ m) ** 2).sum())


def steal(trace: Trace, step: int, link: Link, m: np.ndarray) -> float:
    """Stolen accuracy of a linear link, the better of its signs."""
    scaled = rescale(trace, step, link, m)
    return max(
        scoring.stolen(trace, step, link, lambda y, s=sign: s * (y @ scaled)) for sign in (1, -1)
    )


def count_directions(trace: Trace, step: int, link: Link, m: np.ndarray) -> int:
    """How many of the strongest directions, 16 of values and 16 of gradients, M links."""
    view = trace.views[step][link[1]]
    assert view.x is not None and view.dx is not None
    strongest = [np.linalg.eigh(v.T @ v)[1][:, -16:] for v in (view.x, view.dx)]
    v = np.concatenate(strongest, 1)
    return scoring.directions_linked(trace, step, link, m @ v, v)


def attack(
    trace: Trace,
    rng: np.random.Generator,
    lengths: tuple[int, ...] = LENGTHS,
    restarts: int = RESTARTS,
    singles: int = SINGLES,
) -> list[Measurement]:
    """Aligns T steps as if keys were kept, and single steps, which need no kept keys at all.

    Args:
      trace: with keys.
      rng: starts the alignments.
      lengths: numbers of steps T.
      restarts: of every alignment.
      singles: steps that are attacked one by one.
    """
    total = len(trace.views)
    spans = [range(t, t + 1) for t in range(max(0, total - singles), total)]
    spans += [range(total - t, total) for t in lengths if 1 < t <= total]
    stolen: dict[int, list[float]] = {}
    counts: dict[int, list[float]] = {}
    chances: tuple[list[float], list[float]] = ([], [])
    for link in trace.links()[:LINKS]:
        for span in spans:
            maps = [m for m, _ in link_layers(trace, link, span, rng, restarts)]
            guesses = random_maps(trace, link, span, rng, 2)
            for kept, m in [(True, m) for m in maps] + [(False, m) for m in guesses]:
                count = count_directions(trace, span[-1], link, m)
                (counts.setdefault(len(span), []) if kept else chances[0]).append(count)
                if link in scoring.stealable(trace):
                    accuracy = steal(trace, span[-1], link, m)
                    (stolen.setdefault(len(span), []) if kept else chances[1]).append(accuracy)
    found = []
    if counts:
        length = max(counts, key=lambda t: np.mean(counts[t]))
        chance = float(np.mean(chances[0]))
        found.append(
            measure(
                "S3",
                "directions linked",
                float(np.mean(counts[length])),
                chance=chance,
                threshold=2 * chance + 1,
                note=f"of 32; T = {length}, mean of {len(counts[length])}",
                best=32,
            )
        )
    if stolen:
        link = scoring.stealable(trace)[0]
        chance = max(float(np.mean(chances[1])), scoring.left_out(trace, total - 1, link))
        for name, reduce, limit, share in STOLEN:
            length = max(stolen, key=lambda t: reduce(stolen[t]))
            found.append(
                measure(
                    "S3",
                    f"stolen, {name}",
                    float(reduce(stolen[length])),
                    chance=chance,
                    threshold=limit
                    if chance < RESIDUAL
                    else chance + scoring.margin(trace, chance, limit, share),
                    note=f"T = {length}, {len(stolen[length])} restarts",
                )
            )
    return found
