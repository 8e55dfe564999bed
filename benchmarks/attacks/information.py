"""The Tempo paper's other metric: mutual information of plain and blinded matrices, in bits.

Taken entry by entry at equal places, as the paper does, it is close to zero for every scheme, also
for those that the suite breaks: reordering alone makes it so. It is reported beside the same
figure between columns that the key joins, of which only the order within is taken away, beyond that
between wrong columns: that is what an attack has to work with.

Estimated by Kraskov's first nearest-neighbour estimator on a random sample, less what the same
estimator finds after one side is shuffled; values are ranked to normal scores first, which changes
no mutual information and helps with heavy tails. `binned` is a second opinion.

References:
  Kraskov, Stoegbauer and Grassberger, Estimating mutual information, 2004,
  https://arxiv.org/abs/cond-mat/0305641
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import KDTree
from scipy.special import digamma, ndtri
from scipy.stats import rankdata

from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.steps import attacked
from benchmarks.attacks.traces import Trace

SAMPLE = 2000
DRAWS = 4
NEIGHBOURS = 4
BINS = 16
SLACK = 0.1  # bits, more than three standard errors of a difference
TENSORS = ("x", "w", "g")


def normal_scores(x: np.ndarray) -> np.ndarray:
    """Ranks mapped to quantiles of a normal distribution."""
    return ndtri((rankdata(x) - 0.5) / len(x))


def kraskov(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
    """Mutual information of two scalars, in bits, from pairs of samples.

    Args:
      x: (samples,).
      y: (samples,).
      rng: breaks ties, of which ReLU's zeros give many.

    Returns:
      ``ψ(k) + ψ(n) - ⟨ψ(n_x + 1) + ψ(n_y + 1)⟩`` over log 2; may be a little below zero.
    """
    pair = [v + 1e-6 * rng.normal(size=len(v)) for v in (normal_scores(x), normal_scores(y))]
    joint = np.stack(pair, 1)
    distance = KDTree(joint).query(joint, NEIGHBOURS + 1, p=np.inf)[0][:, -1]
    counts = []
    for v in pair:
        ordered = np.sort(v)
        inside = np.searchsorted(ordered, v + distance, "left")
        inside = inside - np.searchsorted(ordered, v - distance, "right")
        counts.append(np.maximum(inside - 1, 0))
    terms = digamma(counts[0] + 1) + digamma(counts[1] + 1)
    return float((digamma(NEIGHBOURS) + digamma(len(x)) - terms.mean()) / np.log(2))


def binned(x: np.ndarray, y: np.ndarray) -> float:
    """Mutual information in bits from a histogram of equal shares, with Miller and Madow's term."""
    cells = [np.minimum((rankdata(v) - 0.5) / len(v) * BINS, BINS - 1).astype(int) for v in (x, y)]
    table = np.zeros((BINS, BINS))
    np.add.at(table, tuple(cells), 1)

    def entropy(counts: np.ndarray) -> float:
        counts = counts[counts > 0]
        share = counts / counts.sum()
        return float(-(share * np.log(share)).sum() + (len(counts) - 1) / (2 * counts.sum()))

    total = entropy(table.sum(0)) + entropy(table.sum(1)) - entropy(table.ravel())
    return float(total / np.log(2))


def information(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
    """`kraskov` on at most `SAMPLE` pairs, less its value on shuffled ones, a mean over `DRAWS`."""
    found = []
    for _ in range(DRAWS):
        chosen = rng.choice(len(x), min(SAMPLE, len(x)), replace=False)
        a, b = x[chosen], y[chosen]
        found.append(kraskov(a, b, rng) - kraskov(a, rng.permutation(b), rng))
    return float(np.mean(found))


def column_shapes(matrix: np.ndarray) -> np.ndarray:
    """Sorted magnitudes of every column over their length, less those of the mean column."""
    ordered = np.sort(np.abs(matrix), axis=0)
    ordered = ordered / (np.linalg.norm(ordered, axis=0) + 1e-300)
    return ordered - ordered.mean(1, keepdims=True)


def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
    """Measures every tensor of the first step, the worst product reported.

    Args:
      trace: of at least one step.
      rng: draws samples.
    """
    names = list(attacked(trace))
    if not names:
        return []
    found: dict[str, list[tuple[float, str]]] = {"entries": [], "columns": []}
    for name in names:
        view, truth = trace.views[0][name], trace.truth[0][name]
        for tensor in TENSORS:
            plain, seen = getattr(truth, tensor), getattr(view, tensor)
            # Decoys have no plain entry.
            cut = seen[: len(plain)]
            entries = information(plain.ravel(), cut.ravel(), rng)
            found["entries"].append((entries, f"{tensor} of {name}"))
            key = truth.b if tensor == "x" else truth.c
            if key is None:
                continue
            partner = np.abs(key).argmax(1)
            shapes = column_shapes(plain)[:, partner], column_shapes(cut)
            # Values of one rank spread alike in all columns: that much wrong columns say as well.
            wrong = shapes[1][:, rng.permutation(shapes[1].shape[1])]
            columns = information(shapes[0].ravel(), shapes[1].ravel(), rng)
            columns -= information(shapes[0].ravel(), wrong.ravel(), rng)
            found["columns"].append((columns, f"{tensor} of {name}"))
    measurements = []
    for what, values in found.items():
        if not values:
            continue
        value, where = max(values)
        metric = "entries at equal places" if what == "entries" else "sorted columns"
        measurements.append(
            measure(
                "information",
                f"bits, {metric}",
                value,
                chance=0,
                threshold=SLACK,
                best=float(np.log2(SAMPLE) / 2),
                note=f"worst in {where}",
            )
        )
    return measurements
