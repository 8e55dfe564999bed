"""S4, on keys made of Hadamard blocks: where do the blocks lie?

A key ``P S (I ⊗ H) D V`` in fast form, V orthogonal, makes of any matrix with a flat spectrum one
whose row Gram is about ``P S (I ⊗ H D² H) Sᵀ Pᵀ``: rows of one block of 64 correlate, rows of two
blocks do not. D's condition of 4 correlates them by 0.09 on the average, which is about the noise
of one entry of one Gram, and there are thousands. Within a block, D² is seen through the columns of
H, whose ±1 can be rounded; with the outer factor gone, what is left of the key is orthogonal, and
falls as orthogonal keys do.

What stops it is a second Hadamard round outside D: then every row correlates with every other. Keys
are judged by the blocks of their outermost round, which such a key has as well. The library covers
what 64 leaves over by one block that overlaps the one before; `attack_library` draws such keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from benchmarks.attacks.blinding import BLINDINGS, BLOCK, CONDITION, Key
from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.steps import attacked
from benchmarks.attacks.traces import Trace
from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.protocol.program import KeyClass
from enclave_runtime.schemes import Mixing
from enclave_runtime.schemes.kernels import hadamard

FLATTENED = 0.5  # singular values above this quantile are cut down to it
BALANCING = 5
MARGIN = 0.1
SHUFFLES = 20
MIXING_ROUNDS = 3
SIZES = (96, 100, 160, 192, 224)  # of the library's keys; all but 192 have an overlapping block
DRAWS = 5
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
    count = -(-len(energy) // BLOCK)
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


def outer_blocks(key: Key) -> np.ndarray | None:
    """Block of each row in the key's outermost transform, or None if that has no blocks."""
    if len(key.stages) < 2 or key.size < 2 * BLOCK:
        return None
    mixing, last = key.stages[-2].mixing, key.stages[-1]
    return last.permutation // BLOCK if mixing is not None and len(mixing) == BLOCK else None


def library_key(rng: np.random.Generator, size: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """A key of the library's own kind, and the block of each of its rows.

    Where 64 does not divide the size, the last transform covers the last 64 positions again, so
    that they count as one block and what is left of the one before as another.

    Args:
      rng: seeds the library's stream.
      size: of the axis.
      rounds: transforms; `Mixing` has three.
    """
    stream = KeyStream(rng.bytes(32))
    if rounds == MIXING_ROUNDS:
        element = Mixing().draw(KeyClass(size), stream).element
    else:
        element = hadamard.draw(stream, size, condition=CONDITION, rounds=rounds)
    position = element.order[0, -1]
    block = np.where(position >= size - BLOCK, size // BLOCK, position // BLOCK)
    return element.dense(), block if size % BLOCK else position // BLOCK


def _share(found: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Share of rows in the right block, and of shuffled rows."""
    lucky = [share_right(rng.permutation(found), truth) for _ in range(SHUFFLES)]
    return share_right(found, truth), float(np.mean(lucky))


def find_library_blocks(size: int, rounds: int, rng: np.random.Generator) -> tuple[float, float]:
    """Finds the blocks of library keys that blind normal matrices; means over `DRAWS` keys.

    Returns:
      Share of rows in the right block, and of shuffled rows.
    """
    shares = []
    for _ in range(DRAWS):
        w, x = rng.normal(size=(size, size)), rng.normal(size=(2 * size, size))
        key, truth = library_key(rng, size, rounds)
        other = library_key(rng, size, rounds)[0]
        seen = np.linalg.solve(key.T, w) @ other.T
        shares.append(_share(find_blocks([key @ x.T], [seen], rng), truth, rng))
    value, chance = np.mean(shares, axis=0)
    return float(value), float(chance)


def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
    """Finds the blocks of all three keys of every product in the first step.

    Reported is the share of a key's rows in the right block of its outermost transform, whatever
    lies under it.

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
        assert view.g_under_w is not None
        columns = [view.w.T], [view.g_under_w.T]
        operands = ([view.x], [view.g]), ([view.x.T], [view.w]), columns
        for axis, key, (straight, polar) in zip(AXES, keys, operands, strict=True):
            truth = outer_blocks(key)
            if truth is not None:
                found = find_blocks(straight, polar, rng)
                shares[axis].append((*_share(found, truth, rng), name))
    measurements = []
    for axis, values in shares.items():
        if values:
            value, chance, name = max(values, key=lambda v: v[0] - v[1])
            note = f"one step, worst in {name}"
            measurements.append(_judge(f"blocks of {axis} keys", value, chance, note))
    return measurements


def attack_library(
    trace: Trace, rng: np.random.Generator, sizes: Sequence[int] = SIZES
) -> list[Measurement]:
    """Finds the blocks of keys as the library draws them, of sizes that the victims lack.

    Args:
      trace: says the scheme, which decides how many rounds there are; others have no such keys.
      rng: draws keys and operands.
      sizes: of the keys.
    """
    rounds = {"invertible": MIXING_ROUNDS, "milder": MIXING_ROUNDS, "two rounds": 2}.get(
        BLINDINGS[trace.scheme].features
    )
    if rounds is None:
        return []
    note = f"drawn by the library, {rounds} rounds, mean of {DRAWS}"
    found = {size: find_library_blocks(size, rounds, rng) for size in sizes}
    return [_judge(f"blocks of keys of {size}", *found[size], note) for size in sizes]


def _judge(metric: str, value: float, chance: float, note: str) -> Measurement:
    return measure("S4", metric, value, chance=chance, threshold=chance + MARGIN, note=note)
