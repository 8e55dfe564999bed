"""S1: which columns of a layer's output are which inputs of the next layer?

Row keys are fresh, so columns are compared by what survives any order, sign and scaling of rows:
where zeros lie, sorted values, energies over the steps that share keys, and Grams. Every method
gives a similarity of each pair of columns; each is tried alone, and all together.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment, quadratic_assignment

from benchmarks.attacks import scoring
from benchmarks.attacks.blinding import BLINDINGS
from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.traces import ProductView, Trace

WINDOWS = 6  # sets of keys over which a count is averaged, so that luck evens out
LINKS = 4  # attention heads attacked
Views = list[tuple[ProductView, ProductView]]


def balance(x: np.ndarray, rounds: int = 10) -> np.ndarray:
    """Scales rows and columns until all have a mean square of 1: any diagonal scaling goes."""
    x = np.array(x)
    for _ in range(rounds):
        for axis in (1, 0):
            norm = np.sqrt((x**2).mean(axis, keepdims=True))
            x /= np.where(norm > 0, norm, 1)
    return x


def fix_signs(x: np.ndarray) -> np.ndarray:
    """Undoes random signs of rows, up to one for all.

    Inputs that are not negative, such as pixels or ReLU's, give every product a strong mean row,
    and each row's sign is that of its share of it.
    """
    gram = x.T @ x
    mean = np.linalg.eigh(gram)[1][:, -1]
    return x * np.where(x @ mean < 0, -1.0, 1.0)[:, None]


def _canonical(x: np.ndarray, *, scaled: bool) -> np.ndarray:
    """Undoes what the scheme may do to rows, and scales columns to a mean square of 1."""
    if scaled:
        return balance(x)
    x = fix_signs(x)
    norm = np.sqrt((x**2).mean(0))
    return x / np.where(norm > 0, norm, 1)


def _standardize(similarity: np.ndarray) -> np.ndarray:
    return (similarity - similarity.mean()) / (similarity.std() + 1e-12)


def _correlate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of every column of `a` with every column of `b`."""
    a, b = (v - v.mean(0) for v in (a, b))
    a, b = (v / (np.linalg.norm(v, axis=0) + 1e-12) for v in (a, b))
    return a.T @ b


def zero_patterns(views: Views) -> np.ndarray | None:
    """Refines colours of a bipartite graph: ReLU's gradient is zero where its output is.

    Columns take the colour of the multiset of their zeros' rows, and rows that of their zeros'
    columns, until all differ; equal colours are one column.
    """
    similarity = None
    for first, second in views:
        if first.g is None or second.x is None:
            continue
        zeros = first.g == 0, second.x == 0
        if min(z.mean() for z in zeros) < 0.01 or zeros[0].shape[0] != zeros[1].shape[0]:
            continue
        colours = [_refine(z) for z in zeros]
        # Counts beside the colours, since a dead column or one lost zero must not spoil the rest.
        counts = [z.sum(0).astype(float) for z in zeros]
        found = 10.0 * (colours[0][:, None] == colours[1]) - np.abs(counts[0][:, None] - counts[1])
        similarity = found if similarity is None else similarity + found
    return similarity


def _refine(zeros: np.ndarray, rounds: int = 4) -> np.ndarray:
    """Colours of columns, uint64; depends on nothing but the pattern up to order."""

    def scramble(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0x7FB5D329728EA185)
        return (x ^ (x >> np.uint64(27))) * np.uint64(0x81DADEF4BC2DD44D)

    pattern = zeros.astype(np.uint64)
    columns = np.ones(zeros.shape[1], np.uint64)
    for _ in range(rounds):
        rows = scramble(pattern @ columns + np.uint64(1))
        columns = scramble(pattern.T @ rows + np.uint64(1))
    return columns


def sorted_columns(views: Views, *, scaled: bool) -> np.ndarray:
    """Compares sorted values: an increasing function keeps their order, ReLU the largest.

    Both signs of every column are tried. What is compared is the shape of the largest values: as
    many as the next layer's column has that are not zero, at most half.
    """
    total = np.zeros(())
    for first, second in views:
        assert first.y is not None and second.x is not None
        y, x = (_canonical(v, scaled=scaled) for v in (first.y, second.x))
        x = np.sort(np.abs(x), axis=0)[::-1]
        best = None
        for sign in (1, -1):
            ordered = np.sort(sign * y, axis=0)[::-1]
            distance = np.zeros((y.shape[1], x.shape[1]))
            for j in range(x.shape[1]):
                kept = int(np.clip((x[:, j] > 1e-9).sum(), 8, len(x) - 1))
                kept = min(kept, len(ordered) - 1)
                shape = ordered[:kept] - ordered[kept]
                shape = shape / (np.linalg.norm(shape, axis=0) + 1e-12)
                target = x[:kept, j] - (0 if kept < len(x) // 2 else x[kept, j])
                distance[:, j] = shape.T @ target / (np.linalg.norm(target) + 1e-12)
            best = distance if best is None else np.maximum(best, distance)
        assert best is not None
        total = total - np.log(1 - best + 1e-6)
    return total


def energies(views: Views, *, scaled: bool) -> np.ndarray | None:
    """Correlates, over the steps, the energies of columns and the products of value and gradient.

    Value times gradient is free of row keys altogether: ``Ŷᵀ Ĝ = C Yᵀ G C⁻¹``.
    """
    if len(views) < 4:
        return None
    series: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for first, second in views:
        pairs = {"value": (first.y, second.x), "gradient": (first.g_under_w, second.dx)}
        for name, pair in pairs.items():
            for kept, matrix in zip(series.setdefault(name, ([], [])), pair, strict=True):
                assert matrix is not None
                norms = np.linalg.norm(matrix, axis=1, keepdims=True)
                norms = np.where(scaled & (norms > 0), norms, 1)
                energy = ((matrix / norms) ** 2).mean(0)
                kept.append(np.log(energy + 1e-30))
        work = series.setdefault("work", ([], []))
        assert first.y is not None and first.g_under_w is not None
        assert second.x is not None and second.dx is not None
        work[0].append((first.y * first.g_under_w).sum(0))
        work[1].append((second.x * second.dx).sum(0))
    # The common rise and fall of all columns says nothing of which is which.
    centred = {
        n: [np.array(s) - np.mean(s, 1, keepdims=True) for s in p] for n, p in series.items()
    }
    centred["work"] = [np.array(s) for s in series["work"]]
    fishers = [np.arctanh(np.clip(_correlate(*p), -1 + 1e-9, 1 - 1e-9)) for p in centred.values()]
    return np.sum(fishers, axis=0)


def work_of_one_step(views: Views) -> np.ndarray:
    """Compares ``y·g`` and ``x·dx`` of every column: equal for ReLU, but for the bias."""
    total = np.zeros(())
    for first, second in views:
        assert first.y is not None and first.g_under_w is not None
        assert second.x is not None and second.dx is not None
        a, b = (first.y * first.g_under_w).sum(0), (second.x * second.dx).sum(0)
        total = total - np.log(np.abs(a[:, None] - b) + 1e-3 * np.abs(a).mean())
    return total


def _mean_gram(matrices: list[np.ndarray]) -> np.ndarray:
    """Mean over steps of the absolute correlations of columns."""
    return np.mean([np.abs(m.T @ m) / len(m) for m in map(balance, matrices)], axis=0)


def graph_matching(
    views: Views, start: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray | None:
    """Matches the Grams of both sides as weighted graphs (FAQ), from a similarity if there is one.

    Returns:
      A permutation matrix as a similarity, or None if the sides differ in size.
    """
    sides = []
    for side in (0, 1):
        values = [
            v for pair in views if (v := pair[side].y if side == 0 else pair[side].x) is not None
        ]
        gradients = [
            v
            for pair in views
            if (v := pair[side].dx if side else pair[side].g_under_w) is not None
        ]
        sides.append([_mean_gram(values), _mean_gram(gradients)])
    size = len(sides[0][0])
    if len(sides[1][0]) != size:
        return None
    # Two graphs as one: side by side on the diagonal they would need a larger problem.
    first, second = (_standardize(s[0]) + _standardize(s[1]) for s in sides)
    options = {"maximize": True, "rng": rng, "maxiter": 40}
    if start is not None:
        rows, columns = linear_sum_assignment(-start)
        hard = np.zeros((size, size))
        hard[rows, columns] = 1
        options["P0"] = 0.7 * hard + 0.3 / size
    found = quadratic_assignment(first, second, method="faq", options=options)
    similarity = np.zeros((size, size))
    similarity[np.arange(size), found.col_ind] = 1
    return similarity


def shifted_copies(views: Views, *, scaled: bool) -> np.ndarray:
    """Which columns of patches are shifts of one channel: they hold almost the same values.

    Returns:
      (9 n, 9 n), each column with its nine nearest marked.
    """
    profiles = []
    for _, second in views:
        assert second.x is not None
        profiles.append(np.sort(np.abs(_canonical(second.x, scaled=scaled)), axis=0))
    profile = np.concatenate(profiles)
    squares = (profile**2).sum(0)
    distance = squares[:, None] + squares - 2 * profile.T @ profile
    nearest = np.argsort(distance, axis=0)[:9]
    marked = np.zeros_like(distance)
    np.put_along_axis(marked, nearest, 1.0, axis=0)
    return marked


def similarities(
    views: Views, rng: np.random.Generator, *, scaled: bool = True
) -> dict[str, np.ndarray]:
    """Every method's similarity of columns, those that apply.

    Args:
      views: of the steps that share feature keys.
      rng: for graph matching.
      scaled: whether the scheme scales rows, which is public.
    """
    found = {
        "zero patterns": zero_patterns(views),
        "sorted columns": sorted_columns(views, scaled=scaled),
        "energies": energies(views, scaled=scaled),
        "work": work_of_one_step(views),
    }
    found = {name: _standardize(s) for name, s in found.items() if s is not None}
    found["all"] = np.sum(list(found.values()), axis=0)
    if found["all"].shape[0] != found["all"].shape[1]:
        found["copies"] = found["all"] @ shifted_copies(views, scaled=scaled)
    matched = graph_matching(views, found["all"], rng)
    if matched is not None:
        found["mean-Gram graph"] = matched
    return found


def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
    """Links columns of adjacent products, by the best of all methods.

    A convolution's x has nine columns for each channel; each is matched to its best y.
    """
    counts: dict[str, list[float]] = {}
    attainable = []
    links = trace.links()[:LINKS]
    if not links:
        return []
    chance = 0.0
    scaled = BLINDINGS[trace.scheme].rows == "scaled"
    for link in links:
        for steps in scoring.windows(trace)[-WINDOWS:]:
            pairs = scoring.columns_that_belong(trace, steps[-1], link)
            attainable.append(scoring.columns_linked(trace, steps[-1], link, pairs))
            views = [tuple(trace.views[t][name] for name in link) for t in steps]
            for name, similarity in similarities(views, rng, scaled=scaled).items():  # pyright: ignore
                pairs = scoring.paired(similarity)
                linked = scoring.columns_linked(trace, steps[-1], link, pairs)
                counts.setdefault(name, []).append(linked)
                chance = max(chance, 1 / len(similarity))
    means = {name: float(np.mean(c)) for name, c in counts.items()}
    best = max(means, key=lambda name: means[name])
    return [
        measure(
            "S1",
            "columns linked",
            means[best],
            chance=chance,
            # Twice chance and one column.
            threshold=3 * chance,
            note=f"best: {best}; mean of {len(counts[best])}",
            attainable=float(np.mean(attainable)),
        )
    ]
