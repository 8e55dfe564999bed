"""S8: what known training examples give away.

The host knows some rows of X and everything public, and asks three things. *Which direction is
which*: the known rows and a guess at the rest give X's principal axes, and those of X̂ of equal
rank are the same under an orthogonal key. *What is the row that is missing*: with all rows but one
known, the eigenvalues before and after that row give its share of every axis (the secular
equation). *Was this batch used*: with a checkpoint and a candidate batch the host computes the
spectrum of ``W dWᵀ``, which no key changes, and compares; or it blinds the candidate's gradients
under keys of its own, many times over, and asks under which candidate the singular values of Ĝ are
likely.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from benchmarks.attacks.blinding import BLINDINGS, blind_rows
from benchmarks.attacks.results import Measurement, measure, report
from benchmarks.attacks.spectra import spectrum as log_spectrum
from benchmarks.attacks.steps import attacked, links, unblind_directions
from benchmarks.attacks.traces import ProductTruth, ProductView, Trace

KNOWN = (1 / 128, 2 / 128, 8 / 128, 64 / 128, 127 / 128)  # share of rows
MISSING_ROWS = 12  # over which the secular equation is averaged
MAX_WIDTH = 256  # of the secular equation, whose products need all eigenvalues
EIGENVALUES = 32
MEMBERSHIP_STEPS, UNUSED = 20, 8  # steps, and batches that each is compared with
LIKELIHOOD_STEPS, LIKELIHOOD_PRODUCTS, LIKELIHOOD_UNUSED = 4, 2, 3
DRAWS = 24  # keys with which a candidate's gradients are blinded
SHRINKAGE = 0.3  # of the draws' covariance towards its diagonal
SIGMAS = 3  # beyond which membership is no luck
WINDOW = 9  # eigenvalues over which a trend is taken off


def principal_axes(gram: np.ndarray) -> np.ndarray:
    """Eigenvectors as columns, strongest first."""
    return np.linalg.eigh(gram)[1][:, ::-1]


def directions_known(
    view: ProductView, truth: ProductTruth, known: np.ndarray, others: np.ndarray, rows: int
) -> int:
    """How many of X's leading axes the host finds in X̂, by rank.

    Args:
      view: what the host saw.
      truth: keys to score with.
      known: rows of X.
      others: rows of the same kind, in place of those that are not known.
      rows: of X.
    """
    assert view.x is not None
    missing = (rows - len(known)) / max(1, len(others)) * (others.T @ others)
    expected = principal_axes(known.T @ known + missing)
    seen = principal_axes(view.x.T @ view.x)
    return links(unblind_directions(seen, truth, "b", polar=False), expected)[0]


def secular_shares(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Squared components of u on the axes of K, from the spectra of K and of ``K + u uᵀ``.

    ``(u·e_i)² = Π_j (λ_j - μ_i) / Π_{j≠i} (μ_j - μ_i)``, in logarithms.

    Args:
      before: μ, eigenvalues of K, all different.
      after: λ, eigenvalues of ``K + u uᵀ``, in the same order.

    >>> k, u = np.diag([1.0, 2.0, 4.0]), np.array([0.5, 1.0, 2.0])
    >>> secular_shares(np.diag(k), np.linalg.eigvalsh(k + np.outer(u, u))).round(6)
    array([0.25, 1.  , 4.  ])
    """
    above = np.log(np.abs(after[None] - before[:, None]) + 1e-300)
    between = np.abs(before[None] - before[:, None])
    np.fill_diagonal(between, 1)
    return np.exp(above.sum(1) - np.log(between + 1e-300).sum(1))


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two sequences, each less its running mean.

    Both rise and fall with the eigenvalues, whatever the guess; only what sticks out counts.
    """
    window = np.ones(WINDOW)
    weight = np.convolve(np.ones(len(a)), window, "same")
    a, b = (rankdata(v - np.convolve(v, window, "same") / weight) for v in (a, b))
    return float(np.corrcoef(a, b)[0, 1])


def missing_row(seen_x: np.ndarray, truth: ProductTruth, rng: np.random.Generator) -> float:
    """Guesses a row from all the others, as many times as there are `MISSING_ROWS`.

    Shares are compared after the share that an axis has on the average is taken off, since that
    much is known without X̂.

    Args:
      seen_x: X̂.
      truth: of the rows.
      rng: chooses the rows.

    Returns:
      Mean rank correlation of guessed and true shares.
    """
    x, n = truth.x, truth.x.shape[1]
    after = np.linalg.eigvalsh(seen_x.T @ seen_x)
    correlations = []
    for row in rng.choice(len(x), MISSING_ROWS, replace=False):
        known = np.delete(x, row, axis=0)
        before, axes = np.linalg.eigh(known.T @ known)
        kept = before > 1e-9 * before[-1]
        # The unknown scale: as if the missing row had the mean energy.
        scale = before.sum() * len(x) / (len(x) - 1) / after.sum()
        exact = abs(after.sum() - (x**2).sum()) < 1e-9 * after.sum()
        seen = after * (1.0 if exact else scale)
        guess = secular_shares(before[kept], seen[n - kept.sum() :])
        typical = np.log(before[kept])
        true = np.log((x[row] @ axes[:, kept]) ** 2 + 1e-300) - typical
        correlations.append(_rank_correlation(np.log(guess + 1e-300) - typical, true))
    return float(np.nan_to_num(correlations).mean())


def spectrum(product: np.ndarray, count: int = EIGENVALUES) -> np.ndarray:
    """Largest eigenvalues, complex, scaled to an energy of 1: a scalar on a tensor is no secret."""
    values = np.linalg.eigvals(product)
    values = values[np.argsort(-np.abs(values))][:count]
    return values / np.sqrt((np.abs(values) ** 2).sum() + 1e-300)


def mismatch(first: np.ndarray, second: np.ndarray) -> float:
    """Distance of two scaled spectra in the best assignment, 0 to 2."""
    distance = np.abs(first[:, None] - second[None]) ** 2
    rows, columns = linear_sum_assignment(distance)
    return float(np.sqrt(distance[rows, columns].sum()))


def _share_worse(used: float, unused: Sequence[float]) -> float:
    """Share of unused batches that fit worse than the one that was used; of ties, a half."""
    return float(np.mean([(used < other) + (used == other) / 2 for other in unused]))


def membership(trace: Trace, name: str, rng: np.random.Generator) -> list[float]:
    """Compares the spectrum seen in each step with those of its batch and of other steps'.

    Args:
      trace: of at least two steps.
      name: the product.
      rng: chooses the other steps.

    Returns:
      For every step the share of unused batches that fit worse than the one that was used: 0.5 on
      average if nothing shows, 1 if the batch is known for sure.
    """

    def smaller(w: np.ndarray, dw: np.ndarray) -> np.ndarray:
        return w @ dw.T if w.shape[0] <= w.shape[1] else w.T @ dw

    shares = []
    for step in range(min(len(trace.views), MEMBERSHIP_STEPS)):
        view, w = trace.views[step][name], trace.truth[step][name].w
        assert view.w is not None and view.dw is not None
        found = spectrum(smaller(view.w, view.dw))
        others = [i for i in range(len(trace.views)) if i != step]
        others = rng.choice(others, min(UNUSED, len(others)), replace=False)
        # The current weights with each candidate's gradient.
        used, *fits = (
            mismatch(found, spectrum(smaller(w, trace.truth[i][name].dw))) for i in (step, *others)
        )
        shares.append(_share_worse(used, fits))
    return shares


def likelihood(
    trace: Trace, name: str, rng: np.random.Generator, *, unknown: float = 0.0
) -> list[float]:
    """Compares the singular values of Ĝ with those of every candidate, blinded by the host itself.

    Args:
      trace: of at least two steps.
      name: the product.
      rng: chooses the other steps and draws the host's own keys.
      unknown: share of each candidate's rows that are another batch's.

    Returns:
      As `membership`. Distances are Mahalanobis', with the covariance of all candidates' draws.
    """
    how, shares = BLINDINGS[trace.scheme], []
    for step in range(min(len(trace.views), LIKELIHOOD_STEPS)):
        seen = trace.views[step][name].g
        assert seen is not None
        others = rng.permutation([i for i in range(len(trace.views)) if i != step])
        templates, scatter = [], []
        for number, i in enumerate((step, *others[:LIKELIHOOD_UNUSED])):
            rows = trace.truth[i][name].g.copy()
            foreign = rng.choice(len(rows), int(unknown * len(rows)), replace=False)
            third = others[(number + LIKELIHOOD_UNUSED) % len(others)]
            rows[foreign] = trace.truth[third][name].g[foreign]
            draws = np.array([log_spectrum(blind_rows(how, rows, rng)) for _ in range(DRAWS)])
            templates.append(draws.mean(0))
            scatter.append(draws - draws.mean(0))
        spread = np.concatenate(scatter)
        covariance = spread.T @ spread / (len(spread) - len(templates))
        covariance *= 1 - SHRINKAGE + SHRINKAGE * np.eye(len(covariance))
        # Orthogonal keys do not blur at all.
        precision = np.linalg.inv(covariance + 1e-9 * np.eye(len(covariance)))
        gaps = np.array(templates) - log_spectrum(seen)
        used, *fits = np.einsum("ij,jk,ik->i", gaps, precision, gaps)
        shares.append(_share_worse(used, fits))
    return shares


def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
    """Attacks every product: keys and rows in the first step, membership in all.

    Rows in place of unknown ones are those of another step, that is granting a checkpoint.

    Args:
      trace: of at least two steps.
      rng: chooses the known rows.
    """
    names = list(attacked(trace))
    if not names:
        return []
    measurements = []
    for share in KNOWN:
        found = {}
        for name in names:
            truth = trace.truth[0][name]
            rows = len(truth.x)
            count = int(np.clip(round(share * rows), 1, rows - 1))
            known = truth.x[rng.choice(rows, count, replace=False)]
            others = trace.truth[-1][name].x
            found[name] = directions_known(trace.views[0][name], truth, known, others, rows)
        worst = max(names, key=lambda name: found[name])
        measurements.append(
            measure(
                "S8",
                f"key directions, {128 * share:.0f} of 128 rows known",
                found[worst],
                chance=0,
                threshold=1,
                best=32,
                note=f"of 32, worst in {worst}",
            )
        )
    narrow = [n for n in names if trace.truth[0][n].w.shape[0] <= MAX_WIDTH]
    if narrow:
        gains = {}
        for name in narrow:
            x = trace.views[0][name].x
            assert x is not None
            gains[name] = missing_row(x, trace.truth[0][name], rng)
        worst = max(narrow, key=lambda n: gains[n])
        note = f"rank correlation, worst in {worst}"
        measurements.append(
            measure("S8", "missing row", gains[worst], chance=0, threshold=0.2, note=note)
        )
    shares = [share for n in names if "." not in n for share in membership(trace, n, rng)]
    if shares:
        ranks = min(UNUSED, len(trace.views) - 1)
        # If nothing shows, every share is 0, 1/k, 2/k, … or 1 with equal probability.
        spread = ((ranks + 2) / (12 * ranks * len(shares))) ** 0.5
        measurements.append(
            measure(
                "S8",
                "membership",
                float(np.mean(shares)),
                chance=0.5,
                threshold=0.5 + SIGMAS * spread,
                note=f"batches told from unused ones (AUC), {len(shares)} comparisons",
            )
        )
    return measurements + _report_likelihood(trace, [n for n in names if "." not in n], rng)


def _report_likelihood(
    trace: Trace, names: list[str], rng: np.random.Generator
) -> list[Measurement]:
    """Reported and not judged: no key of bounded condition hides a spectrum."""
    found = []
    for unknown, whose in ((0.0, "all rows known"), (0.5, "half the rows known")):
        shares = [
            share
            for name in names[:LIKELIHOOD_PRODUCTS]
            for share in likelihood(trace, name, rng, unknown=unknown)
        ]
        if shares:
            found.append(
                report(
                    "S8",
                    f"batch told by likelihood, {whose}",
                    float(np.mean(shares)),
                    chance=0.5,
                    note=f"AUC, {len(shares)} steps and products",
                )
            )
    return found
