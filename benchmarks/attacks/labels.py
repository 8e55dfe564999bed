"""S7: the labels, from the last gradient that leaves the enclave.

The gradient of the logits is ``softmax - onehot``: in every row the entry of the true class is the
largest, so rows under a permutation give their labels at once, up to the classes' names. Behind
a dense key, and where the classifier stays inside, rows are clustered.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.decomposition import FastICA

from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.traces import Trace

STEPS = 3
SHUFFLES = 20
MOST_CLUSTERS = 20
MOST_ROWS = 1100


def _cluster(rows: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Clusters rows by direction, whatever their sign."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms > 0, norms, 1)
    strongest = np.abs(rows).argmax(1)
    rows = rows * np.where(rows[np.arange(len(rows)), strongest] < 0, -1.0, 1.0)[:, None]
    means = KMeans(clusters, n_init=4, random_state=seed)  # pyright: ignore[reportArgumentType]
    return means.fit_predict(rows)


def guesses(g: np.ndarray, classes: int, seed: int) -> dict[str, np.ndarray]:
    """A cluster for every row of a blinded gradient, by every method."""
    found = {"clusters": _cluster(g, min(classes, MOST_CLUSTERS), seed)}
    if g.shape[1] <= classes:
        found["largest entry"] = np.abs(g).argmax(1)
    # The gradient has about one direction for each class, so look for independent ones.
    u, s, _ = np.linalg.svd(g, full_matrices=False)
    rank = min(classes - 1, MOST_CLUSTERS, len(s))
    found["leading subspace"] = _cluster(u[:, :rank] * s[:rank], min(classes, MOST_CLUSTERS), seed)
    ica = FastICA(rank, whiten="unit-variance", max_iter=300, tol=1e-2, random_state=seed)
    components = np.asarray(ica.fit_transform(u[:, :rank]))
    found["independent components"] = np.abs(components).argmax(1)
    return found


def agreement(clusters: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose label is that of their cluster, under the best naming of clusters."""
    table = np.zeros((clusters.max() + 1, labels.max() + 1))
    np.add.at(table, (clusters, labels), 1)
    return float(table[linear_sum_assignment(-table)].sum() / len(labels))


def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
    """Guesses the labels of the batch; a mixed row counts for the row that weighs most in it."""
    name = [n for n in trace.names if trace.outside(n)][-1]
    scores: dict[str, list[float]] = {}
    shuffled: dict[str, list[float]] = {}
    attainable: dict[str, list[float]] = {}
    for step in range(max(0, len(trace.views) - STEPS), len(trace.views)):
        view, truth = trace.views[step][name], trace.truth[step][name]
        if view.g is None or truth.a is None or truth.c is None:
            continue
        labels = trace.labels[step].reshape(-1)
        # A convolution has a row for every pixel of an example.
        labels = np.unique(np.repeat(labels, len(truth.x) // len(labels)), return_inverse=True)[1]
        sources = np.abs(truth.a).argmax(1)[:MOST_ROWS]
        kept = sources < len(labels)
        labels = labels[sources[kept]]
        seed = int(rng.integers(2**31))
        for method, clusters in guesses(view.g[:MOST_ROWS], labels.max() + 1, seed).items():
            clusters = clusters[kept]
            scores.setdefault(method, []).append(agreement(clusters, labels))
            shuffled.setdefault(method, []).append(
                float(
                    np.mean([agreement(clusters, rng.permutation(labels)) for _ in range(SHUFFLES)])
                )
            )
        # A row of the host's can have one label only, even if W's columns are in the clear.
        assert view.g_under_w is not None
        named = guesses((view.g_under_w @ truth.c)[:MOST_ROWS], labels.max() + 1, seed)
        for method, clusters in named.items():
            attainable.setdefault(method, []).append(agreement(clusters[kept], labels))
    if not scores:
        return []
    best = max(scores, key=lambda m: np.mean(scores[m]) - np.mean(shuffled[m]))
    chance = float(np.mean(shuffled[best]))
    return [
        measure(
            "S7",
            "labels",
            float(np.mean(scores[best])),
            chance=chance,
            threshold=chance + 0.05,
            note=f"gradient of {name}; best: {best}",
            attainable=max(float(np.mean(values)) for values in attainable.values()),
        )
    ]
