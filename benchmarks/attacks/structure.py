"""S4, on keys made of Hadamard blocks: where do the blocks lie?

A key ``P S (I ⊗ H) D V`` in fast form, V orthogonal, makes of any matrix with a flat spectrum one
whose row Gram is about ``P S (I ⊗ H D² H) Sᵀ Pᵀ``: rows of one block of 64 correlate, rows of two
blocks do not. D's condition of 4 correlates them by 0.09 on the average, which is about the noise
of one entry of one Gram, and there are thousands. Within a block, D² is seen through the columns of
H, whose ±1 can be rounded; with the outer factor gone, what is left of the key is orthogonal, and
falls as orthogonal keys do.

What stops it is a second Hadamard round outside D: then every row correlates with every other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans

from benchmarks.attacks.blinding import BLOCK, Key
from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.steps import attacked
from benchmarks.attacks.traces import Trace

FLATTENED = 0.5  # singular values above this quantile are cut down to it
BALANCING = 5
MARGIN = 0.1
SHUFFLES = 20
AXES = ("row", "inner", "column")


def flat_gram(matrix: np.ndarray) -> np.ndarray:
    """Row Gram with mean 1 on its diagonal, after the strongest directions were cut down."""
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    left = left * np.minimum(values, np.quantile(values, FLATTENED))
    gram = left @ left.T
    return gram * len(gram) / np.trace(gram)


def find_blocks(
    straight: Sequence[np.ndarray], polar: Sequence[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """Which block of 64 each row of a key belongs to, up to the blocks' names.

    Args:
      straight: matrices whose rows the key K acts on.
      polar: matrices whose rows ``K⁻ᵀ`` acts on; D² is inverted there, so Grams are subtracted.
      rng: starts the clustering.

    Returns:
      A block number for each row.
    """
    contrast = sum(map(flat_gram, polar), np.zeros(())) - sum(
        map(flat_gram, straight), np.zeros(())
    )
    energy = contrast**2
    np.fill_diagonal(energy, 0)
    # Rows of little energy would make a cluster of their own.
    for _ in range(BALANCING):
        scale = np.sqrt(energy.mean(1))
        energy = energy / scale[:, None] / scale
    count = len(energy) // BLOCK
    leading = np.linalg.eigh(energy)[1][:, -count:]
    seed = int(rng.integers(2**31))
    clusters = KMeans(count, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
    return clusters.fit_predict(leading)


def share_right(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of rows in the right block, under the best naming of blocks."""
    count = int(max(found.max(), truth.max())) + 1
    table = np.zeros((count, count))
    np.add.at(table, (found, truth), 1)
    return float(table[linear_sum_assignment(-table)].sum() / len(found))


def true_blocks(key: Key) -> np.ndarray | None:
    """Block of each row, or None if rows of the key's own Gram do not fall into blocks.

    A second round outside D, or no D at all, leaves nothing to find, whatever the key is made of.
    """
    gram = key.matrix @ key.matrix.T
    linked = np.abs(gram) > 1e-9 * gram.max()
    count, blocks = connected_components(linked)
    return blocks if count == key.size // BLOCK > 1 else None


def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
    """Finds the blocks of all three keys of every product in the first step.

    Reported is the share of a key's rows in the right block.

    Args:
      trace: of at least one step.
      rng: starts the clustering.
    """
    shares: dict[str, list[tuple[float, float, str]]] = {axis: [] for axis in AXES}
    for name in attacked(trace):
        view, keys = trace.views[0][name], trace.truth[0][name].keys
        assert view.x is not None and view.w is not None and view.g is not None
        if keys is None:
            continue
        operands = ([view.x], [view.g]), ([view.x.T], [view.w]), ([view.w.T], [view.g.T])
        for axis, key, (straight, polar) in zip(AXES, keys, operands, strict=True):
            if key.size < 2 * BLOCK:
                continue
            truth = true_blocks(key)
            value, chance = 1 / (key.size // BLOCK), 1 / (key.size // BLOCK)
            if truth is not None:
                found = find_blocks(straight, polar, rng)
                lucky = [share_right(rng.permutation(found), truth) for _ in range(SHUFFLES)]
                value, chance = share_right(found, truth), float(np.mean(lucky))
            shares[axis].append((value, chance, name if truth is not None else "no blocks"))
    measurements = []
    for axis, values in shares.items():
        if not values:
            continue
        value, chance, name = max(values, key=lambda v: v[0] - v[1])
        note = "keys have no blocks" if name == "no blocks" else f"one step, worst in {name}"
        measurements.append(
            measure(
                "S4",
                f"blocks of {axis} keys",
                value,
                chance=chance,
                threshold=chance + MARGIN,
                note=note,
            )
        )
    return measurements
