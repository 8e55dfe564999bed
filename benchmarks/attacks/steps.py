"""S4: can the host tell that two steps hold the same directions, in whatever frame?

Fresh keys turn every step's matrices into another frame, so a direction of one step means nothing
in the next, unless both can be named by something that keys leave alone. Four families of names
are tried on both axes of W: singular vectors of Ŵ, eigenvectors of the Grams, eigenvectors of
``X̂ᵀX̂ dX̂ᵀdX̂`` (the dual pencil, free of feature keys) and of ``Ŵ dŴᵀ`` (free of every key). Two
directions of one rank in their spectra are taken to be one direction of the model.

`links` and `overlap` are the yardsticks that S5 and S8 use as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.optimize import linear_sum_assignment

from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.traces import ProductTruth, ProductView, Trace

DIRECTIONS = 32  # leading directions that are counted
SUBSPACE = 12  # leading directions whose span is compared
WIDE_SUBSPACE = 48  # the same, beyond those that a mask can trade
WIDE_LIMIT = 0.25  # share of what chance leaves
COSINE = 0.9  # from which two directions count as one
WIDTH = 2 * DIRECTIONS  # a narrower axis has too few directions to tell linked from lucky
PAIRS = 3  # pairs of steps over which a count is averaged
HEADS = 2  # attention heads attacked
ITEMS = ("w", "gram", "dual", "eig")


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scales columns to length 1."""
    return vectors / (np.linalg.norm(vectors, axis=0) + 1e-300)


def links(first: np.ndarray, second: np.ndarray, count: int = DIRECTIONS) -> tuple[int, int]:
    """How many of the leading columns are one direction: by rank, and by the best assignment.

    Args:
      first: directions as columns, real or complex, strongest first.
      second: likewise, in the same frame.
      count: leading columns compared.

    Returns:
      Pairs of equal rank with a cosine of at least `COSINE`, and pairs with one in the assignment
      that an oracle would choose.

    >>> links(np.eye(4), np.eye(4)[:, [1, 0, 2, 3]])
    (2, 4)
    """
    cosines = np.abs(unit(first[:, :count]).conj().T @ unit(second[:, :count]))
    rows, columns = linear_sum_assignment(-cosines)
    by_rank = int((np.diag(cosines) >= COSINE).sum())
    return by_rank, max(by_rank, int((cosines[rows, columns] >= COSINE).sum()))


def overlap(first: np.ndarray, second: np.ndarray, count: int = SUBSPACE) -> float:
    """Mean squared cosine of the principal angles between the spans of the leading columns."""
    bases = [np.linalg.qr(v[:, :count])[0] for v in (first, second)]
    return float((np.abs(bases[0].conj().T @ bases[1]) ** 2).sum() / bases[0].shape[1])


def attacked(trace: Trace) -> Iterator[str]:
    """Products worth attacking: all that were outside whole, of attention a few heads."""
    heads: dict[str, int] = {}
    for name in trace.names:
        base = name.split(".")[0]
        heads[base] = heads.get(base, 0) + ("." in name)
        if trace.outside(name) and heads[base] <= HEADS:
            view = trace.views[0][name]
            if view.x is None or view.w is None or view.g is None:
                continue
            # Without keys, as where a batched product's axes carry fewer, nothing can be scored.
            if min(view.w.shape) >= WIDTH and trace.truth[0][name].b is not None:
                yield name


def _descending(values: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return vectors[:, np.argsort(-np.abs(values))]


def dual_pencil(s: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Eigenvectors of ``s d``, both positive semidefinite, strongest first.

    Symmetrized with the root of `s`, so that eigenvalues that lie close do no harm.
    """
    values, vectors = np.linalg.eigh(s)
    root = vectors * np.sqrt(np.maximum(values, values[-1] * 1e-12))
    values, vectors = np.linalg.eigh(root.T @ d @ root)
    return _descending(values, root @ vectors)


def directions(view: ProductView, side: str) -> dict[str, tuple[np.ndarray, bool]]:
    """Directions of one axis of W as the host computes them from one step.

    Args:
      view: of one product.
      side: ``b`` for the inner axis, ``c`` for W's columns.

    Returns:
      For each of `ITEMS` directions as columns, and whether they turn with ``K⁻ᵀ`` rather than K.
    """
    x, w, y, g, dx, dw = (getattr(view, name) for name in ("x", "w", "y", "g", "dx", "dw"))
    if side == "b":
        left, _, _ = np.linalg.svd(w, full_matrices=False)
        gram, other = x.T @ x, dx.T @ dx
    else:
        left = np.linalg.svd(w, full_matrices=False)[2].T
        gram, other = y.T @ y, g.T @ g
    # The smaller of Ŵ dŴᵀ and Ŵᵀ dŴ has all eigenvalues that are not zero.
    if w.shape[0] <= w.shape[1]:
        values, vectors = np.linalg.eig(w @ dw.T)
        work = (vectors, True) if side == "b" else (dw.T @ vectors, True)
    else:
        values, vectors = np.linalg.eig(w.T @ dw)
        work = (w @ vectors, True) if side == "b" else (vectors, False)
    work = (_descending(values, work[0]), work[1])
    values, vectors = np.linalg.eigh(gram)
    return {
        "w": (left, side == "b"),
        "gram": (_descending(values, vectors), False),
        "dual": (dual_pencil(gram, other), False),
        "eig": work,
    }


def unblind_directions(
    found: np.ndarray, truth: ProductTruth, side: str, *, polar: bool
) -> np.ndarray:
    """Takes directions out of the host's frame, for scoring: ``K⁻¹ v``, or ``Kᵀ v`` if `polar`."""
    key = truth.b if side == "b" else truth.c
    assert key is not None, "the keys are not known, so nothing can be scored"
    return key.T @ found if polar else np.linalg.solve(key, found)


def plain_directions(truth: ProductTruth, side: str) -> np.ndarray:
    """W's own singular vectors on one axis."""
    left, _, right = np.linalg.svd(truth.w, full_matrices=False)
    return left if side == "b" else right.T


def counted(item: str, whole: np.ndarray) -> int:
    """How many directions are compared: of ``Ŵ dŴᵀ``, where size says little, all."""
    return whole.shape[1] if item == "eig" else DIRECTIONS


def _over_chance(first: np.ndarray, second: np.ndarray) -> float:
    """Overlap of wide leading subspaces, 0 by chance and 1 if they are one."""
    chance = WIDE_SUBSPACE / len(first)
    return (overlap(first, second, WIDE_SUBSPACE) - chance) / (1 - chance)


def compare_steps(trace: Trace, name: str) -> dict[str, tuple[float, ...]]:
    """Links directions of consecutive steps.

    Returns:
      For each of `ITEMS` the directions linked by rank and by oracle and the overlap of the leading
      subspaces between steps, each a mean over steps and the worse of the two axes; then the
      overlap with W's own leading subspace, chance for all but `w`; last, for `w` alone, that of
      `WIDE_SUBSPACE` directions between steps, as a share of what chance leaves.
    """
    steps = range(min(len(trace.views), PAIRS + 1))
    totals: dict[str, list[np.ndarray]] = {item: [] for item in ITEMS}
    for side in ("b", "c"):
        seen = [
            {
                item: unblind_directions(v, trace.truth[t][name], side, polar=polar)
                for item, (v, polar) in directions(trace.views[t][name], side).items()
            }
            for t in steps
        ]
        own = [plain_directions(trace.truth[t][name], side) for t in steps]
        for item in ITEMS:
            pairs = [
                (
                    *links(seen[t][item], seen[t + 1][item], counted(item, own[t])),
                    overlap(seen[t][item], seen[t + 1][item]),
                    overlap(seen[t][item], own[t]),
                    _over_chance(seen[t][item], seen[t + 1][item]) if item == "w" else 0.0,
                )
                for t in steps[:-1]
            ]
            totals[item].append(np.mean(pairs, axis=0))
    return {item: tuple(np.max(v, axis=0)) for item, v in totals.items()}  # pyright: ignore


def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
    """Links directions of consecutive steps, every product, the worst reported.

    Leading subspaces are compared between steps, which needs no truth; how much of W's own leading
    subspace a step shows stands in the note.

    Args:
      trace: of at least two steps; large batches and repeated batches leak most.
      rng: not used.
    """
    del rng
    if len(trace.views) < 2:
        return []
    found = {name: compare_steps(trace, name) for name in attacked(trace)}
    if not found:
        return []
    measurements = []
    for item in ITEMS:
        for i, how in enumerate(("by rank", "by oracle")):
            worst = max(found, key=lambda name: found[name][item][i])
            whole = counted(item, plain_directions(trace.truth[0][worst], "b"))
            measurements.append(
                measure(
                    "S4",
                    f"{item} directions linked {how}",
                    found[worst][item][i],
                    chance=0,
                    threshold=1 + i,
                    best=whole,
                    note=f"of {whole}, worst in {worst}",
                )
            )
    # In attention the second operand is made of activations, whose mean is no secret of W's.
    weights = [name for name in found if "." not in name]
    heads = [name for name in found if "." in name]
    for item, metric, threshold, names in (
        ("w", "w subspace", 0.45, weights),
        ("w", "attention w subspace", 0.45, heads),
        ("dual", "dual subspace", 0.88, list(found)),
    ):
        if not names:
            continue
        worst = max(names, key=lambda name: found[name][item][2])
        own = max(found[name][item][3] for name in names)
        note = f"between steps, worst in {worst}"
        measurements.append(
            measure(
                "S4",
                metric,
                found[worst][item][2],
                chance=SUBSPACE / min(trace.truth[0][worst].w.shape),
                threshold=threshold,
                note=note + (f"; of W's own {own:.2f}" if item == "w" else ""),
            )
        )
    if weights:
        worst = max(weights, key=lambda name: found[name]["w"][4])
        measurements.append(
            measure(
                "S4",
                f"w subspace of {WIDE_SUBSPACE}, over chance",
                found[worst]["w"][4],
                chance=0,
                threshold=WIDE_LIMIT,
                note=f"between steps, worst in {worst}",
            )
        )
    return measurements
