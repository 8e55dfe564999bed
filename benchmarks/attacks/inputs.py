"""S6: inputs, from X̂ alone and examples of the same kind.

Three attacks, each aimed at one kind of key. *Matching* names the columns of X̂ by their sorted
magnitudes and then by their correlations: it undoes permutations, with signs and scales. *PCA*
names the principal axes by rank, gives them signs by third moments and turns the rows onto public
ones from there: it undoes orthogonal feature keys as long as rows are merely permuted. *ICA* looks
for non-Gaussian directions, of features (which undoes any feature key as long as rows are merely
permuted) and of rows (which would undo row keys).

Patches of a convolution hold every channel nine times, shifted, and neighbouring rows share most
entries; both show in the covariance of the attacker's own patches, which PCA and matching use as a
whole, and nine columns of one channel have all but the same sorted values. Hidden layers are
attacked with the plain activations of other examples, that is granting the host a checkpoint.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from benchmarks.attacks import scoring
from benchmarks.attacks.linkage import balance, fix_signs
from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.steps import attacked, unit
from benchmarks.attacks.traces import ProductTruth, Trace

QUANTILES = 64
MATCHING_ROUNDS = 12
STARTS = 8  # of matching columns
FLIPPED = 6  # principal axes whose signs are tried, both, as starts
MAX_RESTARTED = 128  # columns up to which there is more than one start
TURNS = 20  # rounds of turning rows onto public ones
WEIGHTS = (0.1, 0.3, 1.0, 3.0)  # of magnitudes beside correlations
ICA_ROUNDS = 60
COMPONENTS = 32  # directions that ICA separates
MAX_STEPS = 4  # whose rows are joined
SUBSETS = 20  # sets of images not in the batch, which say how far luck goes
SIGMAS = 3
MAX_IMAGES = 512  # compared; patches are many more
ALIKE = 0.95  # correlation from which two columns of plain X are one


def _correlations(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(0)
    return unit(centred).T @ unit(centred)


def _cosines(x: np.ndarray) -> np.ndarray:
    return unit(x).T @ unit(x)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances of all rows of `a` to all of `b`, over their median."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return squares / (np.median(squares) + 1e-300)


def _profile(x: np.ndarray) -> np.ndarray:
    """Sorted magnitudes of every column at fixed quantiles, as rows."""
    return np.quantile(np.abs(x), np.linspace(0, 1, QUANTILES), axis=0).T


def match_columns(
    x: np.ndarray, public: np.ndarray, rng: np.random.Generator, *, scaled: bool
) -> np.ndarray:
    """Which public column each column of X̂ is, under orders, signs and scales.

    Args:
      x: blinded rows.
      public: plain rows of the same kind.
      rng: draws starts, since digits are nearly symmetric and a mirrored match is hard to leave.
      scaled: whether the scheme scales columns, which is public.
    """
    if scaled:
        x, public = balance(x), balance(public)
    else:
        x = x * np.linalg.norm(public) / np.sqrt(len(public)) / np.linalg.norm(x) * np.sqrt(len(x))
    cost = _distances(_profile(x), _profile(public))
    # Cosines rather than correlations, since signs of rows would spoil means.
    grams = np.abs(_cosines(x)), np.abs(_cosines(public))
    best, least = np.arange(0), np.inf
    starts = STARTS if len(cost) <= MAX_RESTARTED else 1
    for weight, start in itertools.product(WEIGHTS, range(starts)):
        noise = start / starts * cost.std() * rng.normal(size=cost.shape)
        order = linear_sum_assignment(cost + noise)[1]
        for _ in range(MATCHING_ROUNDS):
            fit = _distances(grams[0], grams[1][:, order])
            previous, order = order, linear_sum_assignment(fit + weight * cost)[1]
            if (previous == order).all():
                break
        error = float(((grams[0] - grams[1][np.ix_(order, order)]) ** 2).sum())
        if error < least:
            best, least = order, error
    return best


def pixels_found(order: np.ndarray, key: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    """Share of columns named right, those that never change aside, and what guessing reaches.

    A column counts as named right if the one it is taken for is the same in plain `x`, as some
    pixels at the border all but are.
    """
    truth = np.abs(key).argmax(1)
    varies = x.std(0) > 0.05 * x.std()
    alike = (np.abs(_correlations(x)) >= ALIKE) & varies & varies[:, None]
    hits = alike[order, truth] | (order == truth)
    chance = float(alike[np.ix_(varies, varies)].mean())
    # A key may lean towards columns that never change alone.
    return (float(hits[varies[truth]].mean()) if varies[truth].any() else 0.0), chance


def _columns_that_belong(trace: Trace, step: int, name: str) -> np.ndarray:
    """Which plain column each blinded one holds most of, with the row key known."""
    view, truth = trace.views[step][name], trace.truth[step][name]
    assert view.x is not None and truth.a is not None
    rows = np.linalg.solve(truth.a, view.x)[: len(truth.x)]
    return linear_sum_assignment(-np.abs(unit(rows).T @ unit(truth.x)))[1]


def align_by_pca(x: np.ndarray, public: np.ndarray) -> np.ndarray:
    """Rows of X̂ in the plain frame, as far as an orthogonal key can be undone.

    Principal axes of equal rank are taken for each other. Signs come from third moments of the
    scores; where rows are mixed these are gone. From there, and from other signs of the strongest
    axes, rows are turned onto the public rows that they come nearest to, again and again.

    Args:
      x: (rows, n), blinded.
      public: plain rows of the same kind.

    Returns:
      (rows, n) estimates; their rows are still in the frame of the row key.

    References:
      Besl and McKay, A method for registration of 3-D shapes, 1992. Grave et al., Unsupervised
      alignment of embeddings with Wasserstein Procrustes, https://arxiv.org/abs/1805.11222
    """
    x = x * np.linalg.norm(public) / np.sqrt(len(public)) / np.linalg.norm(x) * np.sqrt(len(x))
    x = fix_signs(x)
    axes = [np.linalg.eigh(v.T @ v)[1][:, ::-1] for v in (x, public)]
    scores = x @ axes[0], public @ axes[1]
    # A row key leaves signs of rows open; the first axis, the mean input, settles them.
    weights = [np.sign(s[:, :1]) for s in scores]
    third = [((s**3) * w).mean(0) for s, w in zip(scores, weights, strict=True)]
    first = [(s * w).mean(0) for s, w in zip(scores, weights, strict=True)]
    evidence = third[0] * third[1] / (third[1] ** 2 + 1e-300) ** 0.5
    evidence = evidence + first[0] * first[1] * 0.1
    signs = np.where(evidence < 0, -1.0, 1.0)
    # Which way the first axes point is chance, and the mean input lies along both.
    signs[0] = np.sign(scores[0][:, 0].sum() * scores[1][:, 0].sum()) or 1.0
    flipped = FLIPPED if x.shape[1] <= MAX_RESTARTED else 0
    found = []
    for flips in itertools.product((1.0, -1.0), repeat=flipped):
        tried = signs.copy()
        tried[1 : 1 + flipped] *= flips
        found.append(_turn_onto(x, public, axes[0] * tried @ axes[1].T))
    return min(found, key=lambda f: f[1])[0]


def _turn_onto(x: np.ndarray, public: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, float]:
    """Refines an orthogonal `turn` of the rows of `x` towards their nearest public rows.

    Returns:
      The turned rows, and how far they stay from public ones, up to a constant.
    """
    squares = (public**2).sum(1)
    for _ in range(TURNS):
        nearest = public[(squares - 2 * x @ turn @ public.T).argmin(1)]
        left, _, right = np.linalg.svd(x.T @ nearest)
        previous, turn = turn, left @ right
        if np.allclose(previous, turn):
            break
    turned = x @ turn
    return turned, float((squares - 2 * turned @ public.T).min(1).mean())


def separate(x: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """FastICA: directions v, as columns, whose ``x v`` are least Gaussian.

    Args:
      x: (samples, n).
      count: directions, taken from the span of the strongest.
      rng: starts it.

    References:
      Hyvarinen and Oja, Independent component analysis: algorithms and applications, 2000.
    """
    centred = x - x.mean(0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    count = min(count, int((values > 1e-6 * values[0]).sum()))
    whiten = axes[:count].T / values[:count] * np.sqrt(len(x))
    white = centred @ whiten
    turn = np.linalg.qr(rng.normal(size=(count, count)))[0]
    for _ in range(ICA_ROUNDS):
        tanh = np.tanh(white @ turn)
        turn = white.T @ tanh / len(x) - turn * (1 - tanh**2).mean(0)
        left, _, right = np.linalg.svd(turn)
        turn = left @ right
    return whiten @ turn


def features_separated(x: np.ndarray, key: np.ndarray, rng: np.random.Generator) -> float:
    """Share of the directions that ICA finds in X̂ that are single columns of plain X."""
    found = key.T @ separate(x, min(x.shape[1], 2 * COMPONENTS), rng)
    return float((np.abs(unit(found)).max(0) >= 0.9).mean())


def correlation_of_images(
    guesses: np.ndarray,
    inside: np.ndarray,
    outside: np.ndarray,
    mean: np.ndarray,
    rng: np.random.Generator,
) -> tuple[float, float, float]:
    """Mean over guesses of the best correlation with an image of the batch, and with others.

    Of ranks rather than values, so that a few bright pixels do not decide, after the mean image is
    taken off: it is no secret. Were the guesses independent of the batch, it would be one more set
    of images drawn like the others, so these say how far luck goes.

    Args:
      guesses: what the attacker reconstructed, one a row.
      inside: the batch.
      outside: more images of the same kind that the host never saw.
      mean: of a third set, so that neither side is centred better.
      rng: draws `SUBSETS` sets of one size from both.

    Returns:
      The batch's value, the others', and how far two draws of one kind would differ.
    """

    def standard(v: np.ndarray) -> np.ndarray:
        ranks = rankdata(v - mean, axis=1)
        return unit((ranks - ranks.mean(1, keepdims=True)).T).T

    # Sets that share many images would seem to differ less than they do.
    count = min(len(inside), len(outside) // 6)
    # A guess may have the wrong sign.
    both = [np.abs(standard(guesses) @ standard(v).T) for v in (inside, outside)]
    means = []
    for similar in both:
        drawn = (rng.choice(similar.shape[1], count, replace=False) for _ in range(SUBSETS))
        means.append([similar[:, d].max(1).mean() for d in drawn])
    # A batch drawn whole has no spread of its own, and that of one drawn in part is small.
    spread = np.hypot(np.std(means[0]), np.std(means[1]))
    return float(np.mean(means[0])), float(np.mean(means[1])), float(spread)


def nearest_labels(guesses: np.ndarray, public: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels of the most similar public images, whatever the guesses' signs and lengths."""
    mean = public.mean(0)
    similarity = unit((guesses - mean).T).T @ unit((public - mean).T)
    return labels[np.abs(similarity).argmax(1)]


def reconstruct(
    seen: list[np.ndarray],
    public: np.ndarray,
    order: np.ndarray,
    rng: np.random.Generator,
    *,
    scaled: bool,
) -> dict[str, np.ndarray]:
    """Guesses at plain rows of X by every attack.

    Args:
      seen: blinded rows, and those of later steps under the same feature key.
      public: plain rows of the same kind.
      order: what `match_columns` found.
      rng: starts ICA.
      scaled: whether the scheme scales columns.

    Returns:
      For each attack (guesses, n), those of `matching` and `pca` in the order of X̂'s rows.
    """
    x, size = seen[0], np.linalg.norm(public) / np.sqrt(len(public))
    matched = np.zeros((len(x), public.shape[1]))
    # Signs of columns: those that make the columns agree with their mean.
    signed = fix_signs(fix_signs(balance(x) if scaled else x).T).T
    matched[:, order] = signed * size / np.linalg.norm(signed) * np.sqrt(len(x))
    aligned = align_by_pca(np.concatenate(seen), public)[: len(x)]
    count = min(COMPONENTS, *aligned.shape)
    # Columns are the samples here: which mixtures of rows look least like mixtures?
    rows = (aligned.T @ separate(aligned.T, count, rng)).T
    return {"matching": matched, "pca": aligned, "row ICA": rows}


def _public(trace: Trace, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the same kind for the attacker, others to compare with, and the former's labels.

    Pixels come from the data set. What only a checkpoint could give comes from other steps.
    """
    data = trace.model.data()
    x = trace.truth[0][name].x
    if trace.inputs[0].shape == x.shape and np.allclose(trace.inputs[0], x):
        batch = {row.tobytes() for row in np.asarray(x)}
        unseen = np.array([row for row in data.inputs if row.tobytes() not in batch])
        return data.test_inputs, unseen, data.test_labels
    steps = [truth[name].x for truth in trace.truth[1:]] or [x]
    # Half of another step for the attacker, the other half to compare with.
    half = len(steps[0]) // 2
    return steps[-1][:half], steps[0][half:], np.zeros(0)


def _seen(trace: Trace, steps: range, name: str) -> list[np.ndarray]:
    """X̂ of each step."""
    found = [trace.views[t][name].x for t in steps]
    return [x for x in found if x is not None]


def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
    """Attacks the inputs of the first product outside, and the columns of all.

    Args:
      trace: of at least two steps.
      rng: starts matching and ICA.
    """
    scaled = "tempo" in trace.scheme
    measurements, matched, separated = [], {}, {}
    # Not the last step, whose rows the attacker may have of a hidden layer.
    windows = scoring.windows(trace, MAX_STEPS)[: min(MAX_STEPS, len(trace.views) - 1)]
    for i, name in enumerate(attacked(trace)):
        truth = trace.truth[0][name]
        assert truth.b is not None
        public, others, labels = _public(trace, name)
        base = name.split(".")[0]
        # As long as feature keys are kept, every step adds rows.
        seen = [_seen(trace, window, name) for window in windows]
        orders = []
        for window, views in zip(windows, seen, strict=True):
            rows = np.concatenate(views)
            orders.append(match_columns(rows, public, rng, scaled=scaled))
            there = trace.truth[window[0]][name]
            assert there.b is not None
            found = pixels_found(orders[-1], there.b, there.x)
            attainable = pixels_found(
                _columns_that_belong(trace, window[0], name), there.b, there.x
            )
            matched.setdefault(base, []).append((*found, attainable[0], truth.x.shape[1]))
        separated.setdefault(base, []).append(features_separated(seen[0][0], truth.b, rng))
        if i == 0:
            guesses = reconstruct(seen[0], public, orders[0], rng, scaled=scaled)
            measurements += _score_images(trace, name, guesses, (public, others), rng)
            if len(labels):
                measurements.append(_score_labels(trace, truth, guesses, public, labels))
    for base, values in matched.items():
        found, chance, attainable, width = np.mean(values, axis=0)
        note = f"{width:.0f} columns"
        measurements.append(
            measure(
                "S6",
                f"columns matched, {base}",
                found,
                chance=chance,
                threshold=scoring.twice_chance(chance, width * len(values)),
                note=f"{note}; mean of {len(values)}",
                attainable=float(attainable),
            )
        )
        value = float(np.mean(separated[base]))
        measurements.append(_judge("columns separated", base, value, 0, 0.05, note + ", by ICA"))
    return measurements


def _judge(
    metric: str, name: str, value: float, chance: float, threshold: float, note: str
) -> Measurement:
    metric = f"{metric}, {name}"
    return measure("S6", metric, value, chance=chance, threshold=threshold, note=note)


def _score_images(
    trace: Trace,
    name: str,
    guesses: dict[str, np.ndarray],
    known: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
) -> list[Measurement]:
    """Compares every attack's guesses with the batch and with other images."""
    mean, others = known[0].mean(0), known[1][: 4 * MAX_IMAGES]
    inside = trace.truth[0][name].x[:MAX_IMAGES]
    measurements = []
    for attack_name, guess in guesses.items():
        scores = correlation_of_images(guess[:MAX_IMAGES], inside, others, mean, rng)
        value, chance, luck = scores
        note = "best image of the batch; chance: of other images"
        threshold = chance + SIGMAS * luck
        measurements.append(
            _judge(f"images by {attack_name}", name.split(".")[0], value, chance, threshold, note)
        )
    return measurements


def _score_labels(
    trace: Trace,
    truth: ProductTruth,
    guesses: dict[str, np.ndarray],
    public: np.ndarray,
    labels: np.ndarray,
) -> Measurement:
    """Labels of nearest public images, for the example that weighs most in each row of X̂."""
    assert truth.a is not None
    weights = np.abs(truth.a[:, : len(truth.x)])
    right = trace.labels[0].reshape(-1)[weights.argmax(1)]
    accuracies = {
        k: float((nearest_labels(guesses[k], public, labels) == right).mean())
        for k in ("matching", "pca")
    }
    best = max(accuracies, key=lambda k: accuracies[k])
    # A mixed row is no image, even if the feature key is known.
    mixed = fix_signs(truth.a[:, : len(truth.x)] @ truth.x)
    attainable = float((nearest_labels(mixed, public, labels) == right).mean())
    chance = float(np.bincount(trace.labels[0].reshape(-1)).max() / len(truth.x))
    return measure(
        "S6",
        "labels by nearest image",
        accuracies[best],
        chance=chance,
        threshold=chance + 0.05,
        note=f"by {best}",
        attainable=attainable,
    )
