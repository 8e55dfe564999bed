"""S2: pairs the rows of adjacent layers, then learns the function between from the pairs.

Orthogonal feature keys leave every inner product of rows, so rows that were only permuted are
found by their neighbours; rows under one key need no finding. Dense fresh row keys are attacked
through row Grams, as S3 does through column Grams.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from benchmarks.attacks import congruence, scoring
from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.traces import ProductView, Trace

STEPS = 12  # whose pairs are pooled, where keys are kept
WINDOWS = 6
CENTRES = 1500  # pairs at most, for the kernel
MOST_ROWS = 2048  # rows of one step, where they are matched
MOST_ROTATED = 640  # the same, where they are rotated
POINTS, SHARE = 0.05, 0.25  # of accuracy over chance that pass, see `scoring.margin`
METHODS = 3  # of pairing rows
Pairs = tuple[np.ndarray, np.ndarray]


def _profiles(x: np.ndarray) -> np.ndarray:
    """Each row's sorted inner products with all rows, in units of the rows' mean energy."""
    gram = x @ x.T
    return np.sort(np.abs(gram), axis=1) / np.diag(gram).mean()


def match_rows(first: ProductView, second: ProductView, rounds: int = 15) -> np.ndarray:
    """Finds for each row of ŷ its row of x̂ from what orthogonal feature keys leave.

    Starts from profiles and refines by neighbours: a row's inner products with all rows, put in
    the order that the last round found, must look alike on both sides.
    """
    assert first.y is not None and second.x is not None
    assert first.g is not None and second.dx is not None
    pairs = [(first.y, second.x), (first.g, second.dx)]
    similarity = np.zeros((len(first.y), len(second.x)))
    for pair in pairs:
        a, b = (np.log(_profiles(v) + 1e-6) for v in pair)
        distance = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        similarity -= distance / distance.std()
    order = linear_sum_assignment(-similarity)[1]
    for _ in range(rounds):
        refined = np.zeros_like(similarity)
        for pair in pairs:
            a, b = (v / (np.linalg.norm(v, axis=1, keepdims=True) + 1e-300) for v in pair)
            a, b = np.abs(a @ a.T), np.abs(b @ b.T)[:, order]
            a, b = (v - v.mean(1, keepdims=True) for v in (a, b))
            a, b = (v / (np.linalg.norm(v, axis=1, keepdims=True) + 1e-300) for v in (a, b))
            refined += a @ b.T
        new = linear_sum_assignment(-refined)[1]
        if (new == order).all():
            break
        order = new
    return order


def rotate_rows(first: ProductView, second: ProductView, rng: np.random.Generator) -> np.ndarray:
    """Finds the orthogonal map of rows that takes the row Grams of ŷ and ĝ to those of x̂ and dx̂."""
    family: congruence.Family = []
    for one, other in ((first.y, second.x), (first.g, second.dx)):
        assert one is not None and other is not None
        a, b = one @ one.T, other @ other.T
        family.append((a / np.linalg.norm(a), b / np.linalg.norm(b)))
    starts = [congruence.first_guess(family, i % 2, rng, rank=i < 2) for i in range(3)]
    return max((congruence.align(family, s, 40) for s in starts), key=lambda f: f[1])[0]


def learn(pairs: Pairs, *, linear: bool) -> scoring.Surrogate:
    """Learns x̂ from ŷ by ridge regression, in the rows themselves or in a Gaussian kernel."""
    y, x = pairs[0][:CENTRES], pairs[1][:CENTRES]
    if linear:
        gram = y.T @ y
        ridge = 1e-3 * np.trace(gram) / len(gram)
        m = np.linalg.solve(gram + ridge * np.eye(len(gram)), y.T @ x)
        return lambda rows: rows @ m
    squares = (y**2).sum(1)
    width = 2 * np.median(squares)

    def kernel(rows: np.ndarray) -> np.ndarray:
        return np.exp(-((rows**2).sum(1)[:, None] + squares - 2 * rows @ y.T) / width)

    mean = x.mean(0)
    weights = np.linalg.solve(kernel(y) + 1e-3 * np.eye(len(y)), x - mean)
    return lambda rows: kernel(rows) @ weights + mean


def pair_up(
    trace: Trace, link: scoring.Link, steps: range, rng: np.random.Generator
) -> dict[str, Pairs]:
    """Pairs of rows by every method, pooled over the steps; also as many kinds of random pairs.

    The best method is reported, so chance has to be the best of as many tries.
    """
    found: dict[str, list[Pairs]] = {}
    for t in steps:
        first, second = trace.views[t][link[0]], trace.views[t][link[1]]
        y, x = first.y, second.x
        assert y is not None and x is not None
        found.setdefault("same rows", []).append((y, x))
        for i in range(METHODS):
            found.setdefault(f"chance {i}", []).append((y, x[rng.permutation(len(x))]))
        if len(y) <= MOST_ROWS:
            found.setdefault("matched rows", []).append((y, x[match_rows(first, second)]))
        if t == steps[-1] and len(y) <= MOST_ROTATED:
            rotation = rotate_rows(first, second, rng)
            found["rotated rows"] = [(rotation.T @ y, x)]
    joined = {}
    for name, pairs in found.items():
        y, x = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
        order = rng.permutation(len(y))
        joined[name] = y[order], x[order]
    return joined


def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
    """Steals with a surrogate learnt from pairs of rows: the best way to pair, and to learn."""
    if not (links := scoring.stealable(trace)):
        return []
    link = links[0]
    stolen: dict[str, list[float]] = {}
    for steps in scoring.windows(trace, STEPS)[-WINDOWS:]:
        for name, pairs in pair_up(trace, link, steps, rng).items():
            for linear in (True, False):
                surrogate = learn(pairs, linear=linear)
                accuracy = scoring.stolen(trace, steps[-1], link, surrogate)
                kind = "linear" if linear else "kernel"
                stolen.setdefault(f"{name}, {kind}", []).append(accuracy)
    means = {name: float(np.mean(values)) for name, values in stolen.items()}
    lucky = max(m for name, m in means.items() if name.startswith("chance"))
    chance = max(lucky, scoring.left_out(trace, len(trace.views) - 1, link))
    best = max((n for n in means if not n.startswith("chance")), key=lambda n: means[n])
    return [
        measure(
            "S2",
            "stolen",
            means[best],
            chance=chance,
            threshold=chance + scoring.margin(trace, chance, POINTS, SHARE),
            note=f"best: {best}; mean of {len(stolen[best])}",
        )
    ]
