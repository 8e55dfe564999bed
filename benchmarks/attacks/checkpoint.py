"""S5: what a public checkpoint gives away, when training starts from it.

The host knows weights close to those that it sees blinded. It matches rows and columns (enough
against permutations), singular directions, and two matrices that share a key: Ŵ gives the frame of
an axis up to signs and ``X̂ᵀX̂`` (or ``ŶᵀŶ``), known roughly from data of the same kind run through
the checkpoint, gives the signs. That is the whole of an orthogonal key.

Convolutions are why patches are made. Sent as it is, with keys on channels alone, a 3×3 convolution
is nine matrices sharing both keys, ``ŵ_j = B⁻ᵀ w_j Cᵀ``: linear equations for the keys, which
`solve_taps` solves. On patches the key mixes shifts and channels, and the equations are wrong.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse.linalg import LinearOperator, svds

from benchmarks.attacks import scoring
from benchmarks.attacks.blinding import TAPS
from benchmarks.attacks.linkage import balance
from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.steps import (
    COSINE,
    DIRECTIONS,
    attacked,
    dual_pencil,
    links,
    plain_directions,
    unblind_directions,
    unit,
)
from benchmarks.attacks.traces import ProductTruth, ProductView, Trace

DRIFTS = (0.0, 0.01, 0.05)
ROUNDS = 4


def match_rows_and_columns(w: np.ndarray, public: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which row and column of the checkpoint is which of Ŵ, under signs, orders and scales.

    Starts from sorted magnitudes, which no order or sign changes, then lets rows and columns
    correct each other.

    Returns:
      For each row, and for each column, of `w` an index into those of `public`.
    """
    seen, known = np.abs(balance(w)), np.abs(balance(public))

    def match(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        # Correlation rather than distance: the drift changes lengths most.
        a, b = (v - v.mean(1, keepdims=True) for v in (a, b))
        return linear_sum_assignment(-unit(a.T).T @ unit(b.T))[1]

    rows = match(np.sort(seen, 1), np.sort(known, 1))
    columns = match(np.sort(seen, 0).T, np.sort(known, 0).T)
    for _ in range(ROUNDS):
        columns = match(seen.T, known[rows].T)
        rows = match(seen, known[:, columns])
    return rows, columns


def _match_by_cosine(seen: np.ndarray, public: np.ndarray) -> np.ndarray:
    """Which column of `public` each column of `seen` is, whatever its sign and length."""
    return linear_sum_assignment(-np.abs(unit(seen).T @ unit(public)))[1]


def strongest(key: np.ndarray) -> np.ndarray:
    """The plain index that weighs most in each blinded one; for a permutation, the permutation."""
    return np.abs(key).argmax(1)


def align_with_signs(
    basis: np.ndarray, public: np.ndarray, gram: np.ndarray, expected: np.ndarray
) -> np.ndarray:
    """Chooses the sign of every direction of `basis`, so that Grams agree in both bases.

    Args:
      basis: the host's directions as columns, known up to signs.
      public: the same directions in the plain frame.
      gram: Gram in the host's frame.
      expected: about the same Gram in the plain frame.

    Returns:
      `basis` with signs.
    """
    agreement = (basis.T @ gram @ basis) * (public.T @ expected @ public)
    np.fill_diagonal(agreement, 0)
    # Without this the mean input's share would be all that counts.
    agreement = np.sign(agreement) * np.sqrt(np.abs(agreement))
    signs = np.sign(np.linalg.eigh(agreement)[1][:, -1])
    for _ in range(10):
        signs = np.where(agreement @ signs < 0, -1.0, 1.0)
    return basis * signs


def _signed_links(found: np.ndarray, public: np.ndarray) -> int:
    """Directions recovered with their signs, up to one sign for all."""
    cosines = (unit(found) * unit(public)).sum(0)
    return int(max((cosines >= COSINE).sum(), (cosines <= -COSINE).sum()))


def solve_taps(seen: np.ndarray, public: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the keys of matrices that share both: ``Bᵀ ŵ_j = w_j Cᵀ`` for every j.

    The equations are linear in (B, C). After whitening both sides, the solution is the leading pair
    of singular vectors of the map that takes C to the B it implies.

    Args:
      seen: (taps, n, p) ŵ_j.
      public: (taps, n, p) w_j, or near them.

    Returns:
      B and C, each up to a factor.
    """
    taps, n, p = seen.shape

    def inverse_root(gram: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(gram)
        return (vectors / np.sqrt(np.maximum(values, values[-1] * 1e-12))) @ vectors.T

    left = inverse_root(np.einsum("jip,jkp->ik", seen, seen))
    right = inverse_root(np.einsum("jni,jnk->ik", public, public))
    seen, public = left @ seen, public @ right

    def forward(c: np.ndarray) -> np.ndarray:
        c = c.reshape(p, p)
        return sum(public[j] @ c @ seen[j].T for j in range(taps)).ravel()  # pyright: ignore

    def backward(b: np.ndarray) -> np.ndarray:
        b = b.reshape(n, n)
        return sum(public[j].T @ b @ seen[j] for j in range(taps)).ravel()  # pyright: ignore

    operator = LinearOperator((n * n, p * p), matvec=forward, rmatvec=backward, dtype=np.float64)  # pyright: ignore
    # A fixed start, so that the result repeats.
    start = np.random.default_rng(0).normal(size=min(n * n, p * p))
    u, _, v = svds(operator, k=1, v0=start, maxiter=400)
    assert u is not None and v is not None
    b = (u.reshape(n, n) @ left).T
    c = (right @ v.reshape(p, p)).T
    return b, c


def key_rows_found(found: np.ndarray, key: np.ndarray) -> float:
    """Share of the key's rows that are right, up to one factor for all of them."""
    cosines = (unit(found.T) * unit(key.T)).sum(0)
    return float(max((cosines >= COSINE).mean(), (cosines <= -COSINE).mean()))


def drifted(w: np.ndarray, drift: float, rng: np.random.Generator) -> np.ndarray:
    """The checkpoint: weights before `drift` of their norm was trained onto them."""
    noise = rng.normal(size=w.shape)
    return w + drift * np.linalg.norm(w) / np.linalg.norm(noise) * noise


def rows_and_columns(
    view: ProductView, truth: ProductTruth, public: np.ndarray
) -> tuple[float, float]:
    """Shares of rows and columns of Ŵ that a checkpoint names.

    Returns:
      What `match_rows_and_columns` finds, and what it could if the other axis's key were known.
    """
    assert view.w is not None and truth.b is not None and truth.c is not None
    halves = np.linalg.solve(truth.c, view.w.T), truth.b.T @ view.w
    known = _match_by_cosine(halves[0], public.T), _match_by_cosine(halves[1], public)
    keys = strongest(truth.b), strongest(truth.c)
    matched, attainable = (
        np.mean([(names == key).mean() for names, key in zip(found, keys, strict=True)])
        for found in (match_rows_and_columns(view.w, public), known)
    )
    return float(matched), float(attainable)


def recover(
    view: ProductView,
    truth: ProductTruth,
    public: np.ndarray,
    own: tuple[np.ndarray, np.ndarray],
) -> dict[str, int]:
    """Attacks one product with a checkpoint.

    Args:
      view: what the host saw.
      truth: keys to score with.
      public: the checkpoint's weight.
      own: x and g of the attacker's own data, run through the checkpoint.

    Returns:
      Directions of W by rank, by oracle, and with signs; directions of the dual pencil by rank.
    """
    assert view.w is not None and view.x is not None and view.y is not None
    assert view.g_under_w is not None and view.dx is not None
    left, _, right = np.linalg.svd(view.w, full_matrices=False)
    known_left, _, known_right = np.linalg.svd(public, full_matrices=False)
    counts = {"rank": 0, "oracle": 0, "signed": 0, "dual": 0}
    x, y, g, dx = own[0], own[0] @ public, own[1], own[1] @ public.T
    for side, seen, known, pairs in (
        ("b", left, known_left, ((view.x, view.dx), (x, dx))),
        ("c", right.T, known_right.T, ((view.y, view.g_under_w), (y, g))),
    ):
        polar = side == "b"
        (gram, other), (wanted, other_wanted) = ([v.T @ v for v in pair] for pair in pairs)
        dual = unblind_directions(dual_pencil(gram, other), truth, side, polar=False)
        linked = links(dual, dual_pencil(wanted, other_wanted))[0]
        counts["dual"] = max(counts["dual"], linked)
        by_rank, by_oracle = links(
            unblind_directions(seen, truth, side, polar=polar), plain_directions(truth, side)
        )
        signed = align_with_signs(seen, known, gram, wanted)
        signed = unblind_directions(signed, truth, side, polar=polar)
        counts["rank"] = max(counts["rank"], by_rank)
        counts["oracle"] = max(counts["oracle"], by_oracle)
        counts["signed"] = max(counts["signed"], _signed_links(signed, known))
    return counts


def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
    """Attacks with a checkpoint at every drift: rows and columns in all steps, else the first.

    The attacker's own data are those of another step: other examples through the model.
    """
    step, other = 0, len(trace.views) - 1
    measurements = []
    # A product of activations has no checkpoint.
    names = [name for name in attacked(trace) if "." not in name]
    for drift in DRIFTS if names else ():
        found = {}
        for name in names:
            truth = trace.truth[step][name]
            public = drifted(truth.w, drift, rng)
            own = trace.truth[other][name].x, trace.truth[other][name].g
            found[name] = recover(trace.views[step][name], truth, public, own)
        chances = [1 / k for n in names for k in trace.truth[step][n].w.shape]
        tries = [
            rows_and_columns(views[name], truths[name], drifted(truths[name].w, drift, rng))
            for views, truths in zip(trace.views, trace.truth, strict=True)
            for name in names
        ]
        matched, attainable = np.mean(tries, axis=0)
        chance = float(np.mean(chances))
        measurements.append(
            measure(
                "S5",
                f"key rows and columns, {drift:.0%} drift",
                matched,
                chance=chance,
                # One hit is expected on each axis, whatever its size.
                threshold=scoring.twice_chance(chance, 2 * len(tries) / chance),
                note=f"mean of {len(names)} products and {len(trace.views)} steps",
                attainable=float(attainable),
            )
        )
        for item, metric, threshold in (
            ("rank", "w directions by rank", 1),
            ("oracle", "w directions by oracle", 2),
            ("signed", "key directions with signs", 2),
            ("dual", "dual directions by rank", 1),
        ):
            worst = max(names, key=lambda name: found[name][item])
            whole = min(trace.truth[step][worst].w.shape)
            best = whole if item == "signed" else DIRECTIONS
            measurements.append(
                measure(
                    "S5",
                    f"{metric}, {drift:.0%} drift",
                    found[worst][item],
                    chance=0,
                    threshold=threshold,
                    best=best,
                    note=f"of {best}, worst in {worst}",
                )
            )
    return measurements + [m for name in names for m in _taps(trace, name)]


def _taps(trace: Trace, name: str) -> list[Measurement]:
    """Takes patches for nine matrices sharing keys, with the checkpoint itself."""
    view, truth = trace.views[0][name], trace.truth[0][name]
    n, p = truth.w.shape
    if trace.victim != "cnn" or n % TAPS:
        return []
    assert view.w is not None and truth.b is not None
    taps, public = (w.reshape(TAPS, n // TAPS, p) for w in (view.w, truth.w))
    found, _ = solve_taps(taps, public)
    # Whatever the first block of the key is: for a convolution sent as it is, all of it.
    right = key_rows_found(found, truth.b[: n // TAPS, : n // TAPS])
    return [measure("S5", f"taps, {name}", right, chance=0, threshold=2 * TAPS / n)]
