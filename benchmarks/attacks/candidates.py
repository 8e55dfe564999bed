"""S11 to S13: a host that can guess what was blinded, and asks whether it was.

Schemes are public, so a host blinds each of its guesses under keys of its own, some hundreds of
times, learns to tell the guesses' spectra apart, and looks at what it saw. Singular values are all
that it can compare, since fresh keys leave nothing else in place; it compares their logarithms and
their power sums together, by the linear discriminant of each pair of guesses.

*S11*: which operand it was, from forward passes or gradients alone: X of a batch or of a sequence
with the weights known, Ĝ of a batch. The same values may pass again and again. *S12*: of which
rank. *S13*: whether fixed weights are the ones guessed, or off by a tenth.

Passes of the same values are independent draws of the scheme: of the library's where the library
made the trace under `Mixing`, of the suite's own blinding elsewhere. How well T of them tell two
guesses follows from how far single passes lie apart, since the mean of T scores is about normal.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import norm

from benchmarks.attacks import blinding
from benchmarks.attacks.blinding import BLINDINGS
from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.spectra import spectrum
from benchmarks.attacks.traces import ProductTruth, Trace
from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.protocol.program import KeyClass, Layout
from enclave_runtime.schemes import Mixing

LIMITS = {1: 0.6, 12: 0.6, 100: 0.7}  # AUC by passes; a hundred are the owner's to allow
SERVING_LIMITS = {1: 0.6, 12: 0.6, 100: 0.6}
CANDIDATES = 4
DRAWS = 400  # of each candidate: by the host to learn from, and as many passes to be judged by
POWERS = (2, 3, 4, 6, 8, 12)
SINGLE, SPREAD = 4, 12  # singular values looked at one by one: the strongest, and of the others
WIDTH = 64  # least side of an operand
RANK_WIDTH = 128  # below, decoys alone fill the rank
OTHERS = 4  # weights that are off
LEFT = (0.2, 0.45)  # share of rows that are no padding, of columns that are not pruned
TRIALS = 16  # ranks that are told
AGAIN = 8  # pairs of passes of each operand, to find it again
OFF = 0.1  # of fixed weights, by the norm of the difference


@dataclasses.dataclass(frozen=True)
class Guess:
    """What a host takes a blinded matrix for.

    Attributes:
      values: the matrix.
      powers: of two, by which its rows and columns are evened out; None where it comes first under
        a key and chooses them itself.
    """

    values: np.ndarray
    powers: tuple[np.ndarray | None, np.ndarray | None] = (None, None)


Blind = Callable[[Guess], np.ndarray]


def guess_of(truth: ProductTruth, operand: str) -> Guess:
    """What a host that knows a product's plain operands expects of one of them: x, w or g."""
    values = getattr(truth, operand)
    if truth.powers is None:
        return Guess(values)
    a, b, c = truth.powers
    # G as it is for dW, whose rows are less even than those of G for dX.
    return Guess(values, {"x": (a, b), "w": (1 / b, c), "g": (1 / a, None)}[operand])


def blinder(trace: Trace, rng: np.random.Generator, *, rows: bool) -> Blind:
    """Blinds a matrix under fresh keys as the trace's scheme does: X or G if `rows`, W if not."""
    if not (trace.recorded and trace.scheme == Mixing.name):
        how = BLINDINGS[trace.scheme]
        draw = blinding.blind_rows if rows else blinding.blind_weight
        return lambda guess: draw(how, guess.values, rng)
    scheme, stream = Mixing(), KeyStream(rng.bytes(32))

    def blind(guess: Guess) -> np.ndarray:
        x = guess.values
        decoys = scheme.decoys(len(x)) if rows else 0
        classes = KeyClass(x.shape[0], decoys=decoys), KeyClass(x.shape[1])
        keys = {number: scheme.draw(axis, stream) for number, axis in enumerate(classes)}
        parities = (1, 1) if rows else (0, 1)
        for key, factors, parity in zip(keys.values(), guess.powers, parities, strict=True):
            if factors is not None:
                exponents = np.log2(factors).astype(np.int64)[None]
                key.scales.exponents = exponents if parity else -exponents
        out = np.empty((len(x) + decoys, x.shape[1]))
        scheme.blind(x, Layout((0, 1), parities), keys, out, lambda: stream)
        return out

    return blind


def features(seen: np.ndarray) -> np.ndarray:
    """What a host compares of a blinded matrix: power sums and single values of its spectrum."""
    # From the Gram matrix of the shorter side, which takes a fraction of the time.
    shorter = seen if len(seen) <= seen.shape[1] else seen.T
    energies = np.linalg.eigvalsh(shorter @ shorter.T)[::-1]
    energies = np.maximum(energies, 1e-12 * energies[0])
    energies /= energies.mean()
    logs = np.log(energies) / 2
    powers = [np.log((energies**k).mean()) / k for k in POWERS]
    others = np.linspace(SINGLE, len(logs) - 1, SPREAD).astype(int)
    return np.array([*powers, *logs[:SINGLE], *logs[others]])


def separation(passes: np.ndarray) -> list[float]:
    """How far passes of each pair of candidates lie apart, in standard deviations of the score.

    Args:
      passes: features (candidates, passes, features). The host has the first half from draws of
        its own; the second half is told apart.

    Returns:
      Of each pair; below 0 where the discriminant points the wrong way.
    """
    half = passes.shape[1] // 2
    own, seen = passes[:, :half], passes[:, half:]

    def covariance(x: np.ndarray) -> np.ndarray:
        spread = (x - x.mean(1, keepdims=True)).reshape(-1, x.shape[2])
        return spread.T @ spread / (len(spread) - len(x))

    within, judged = covariance(own), covariance(seen)
    # Orthogonal keys do not blur at all.
    scale = np.sqrt(np.diag(within)) + 1e-9
    precision = np.linalg.inv(within / np.outer(scale, scale) + 1e-6 * np.eye(len(within)))
    found = []
    for i, j in itertools.combinations(range(len(own)), 2):
        score = precision @ ((own[i].mean(0) - own[j].mean(0)) / scale) / scale
        gap = score @ (seen[i].mean(0) - seen[j].mean(0))
        found.append(float(gap / np.sqrt(score @ judged @ score + 1e-24)))
    return found


def judge(
    attack: str,
    metric: str,
    apart: Sequence[float],
    draws: int,
    limits: dict[int, float],
    note: str,
    tried: int = 1,
) -> list[Measurement]:
    """AUC of telling pairs of candidates after some numbers of passes.

    Args:
      attack: `S11` or `S13`.
      metric: what was told.
      apart: `separation` of the pairs.
      draws: passes of each candidate that it was found from.
      limits: the largest AUC that passes, by number of passes; within as much luck as one in six
        has.
      note: to be said beside it.
      tried: products of which it is the worst, which takes that many times as much luck.
    """
    mean = float(np.mean(apart))
    # Pairs share candidates, so that as many of them are independent as there are candidates.
    luck = np.sqrt(2 / draws / (0.5 + np.sqrt(0.25 + 2 * len(apart))))
    luck *= norm.isf(norm.sf(1) / tried)
    found = []
    for passes, limit in limits.items():
        reach = np.sqrt(passes) / 2
        threshold = norm.cdf(norm.ppf(limit) + reach * luck)
        found.append(
            measure(
                attack,
                f"{metric}, T = {passes}",
                float(norm.cdf(reach * mean)),
                chance=0.5,
                threshold=float(threshold),
                note=f"AUC, {note}; {limit} and luck",
            )
        )
    return found


def passes_of(blind: Blind, candidates: Sequence[Guess], draws: int) -> np.ndarray:
    """Features (candidates, 2 draws, features) of fresh blindings of each."""
    return np.array([[features(blind(x)) for _ in range(2 * draws)] for x in candidates])


def groups(trace: Trace, count: int) -> dict[str, list[Guess]]:
    """Operands among which a host may have to tell, by what they are.

    X and G of each step of a dense product, and of attention both operands for each sequence, of
    one head; of text also X of single sequences.
    """
    found: dict[str, list[Guess]] = {}
    for name in trace.names:
        if not trace.outside(name) or "." in name or min(trace.truth[0][name].w.shape) < WIDTH:
            continue
        truths = [step[name] for step in trace.truth[:count]]
        found[f"batch from X, {name}"] = [guess_of(t, "x") for t in truths]
        found[f"batch from G, {name}"] = [guess_of(t, "g") for t in truths]
        length = trace.inputs[0].shape[-1]
        if trace.inputs[0].dtype.kind == "i" and len(truths[0].x) >= count * length:
            sequences = truths[0].x[: count * length].reshape(count, length, -1)
            found[f"sequence from X, {name}"] = [Guess(x) for x in sequences]
    for base in ("qk", "pv"):
        heads = [f"{base}.{i}.0" for i in range(count)]
        if all(h in trace.truth[0] and trace.outside(h) for h in heads):
            for which, operand in (("first", "x"), ("second", "w")):
                found[f"sequence from attention, {which} of {base}"] = [
                    guess_of(trace.truth[0][h], operand) for h in heads
                ]
    return found


def attack(
    trace: Trace,
    rng: np.random.Generator,
    *,
    count: int = CANDIDATES,
    draws: int = DRAWS,
    products: int = 1 << 9,
    kinds: tuple[str, ...] = ("batch", "sequence"),
) -> list[Measurement]:
    """S11: tells operands apart, and finds one again without knowing any.

    Args:
      trace: of at least `count` steps, for batches.
      rng: draws keys.
      count: candidates.
      draws: of each candidate by the host, and as many passes to be told.
      products: at most so many groups of candidates of a kind, the last ones.
      kinds: of candidates.
    """
    blind, measurements = blinder(trace, rng, rows=True), []
    found: dict[str, list[tuple[str, list[Guess]]]] = {}
    for name, candidates in groups(trace, count).items():
        kind, _, product = name.partition(",")
        if kind.startswith(kinds):
            found.setdefault(kind, []).append((product.strip(), candidates))
    for kind, members in found.items():
        apart: dict[str, list[float]] = {}
        again: list[tuple[float, int, str]] = []
        for product, candidates in members[-products:]:
            passes = passes_of(blind, candidates, draws)
            apart[product] = separation(passes)
            again.append((*found_again(passes), product))
        worst = max(apart, key=lambda product: np.mean(apart[product]))
        note = f"among {count} with the weights known, worst in {worst}"
        measurements += judge("S11", kind, apart[worst], draws, LIMITS, note, len(apart))
        value, comparisons, product = max(again)
        measurements.append(
            measure(
                "S11",
                f"{kind}, found again",
                value,
                chance=1 / count,
                threshold=2 / count,
                note=f"share without knowledge, of {comparisons}, worst in {product}",
            )
        )
    return measurements


def found_again(passes: np.ndarray) -> tuple[float, int]:
    """How often a pass is nearest to another one of the same values, among one of each.

    Returns:
      The share, and of how many.
    """
    candidates, count, _ = passes.shape
    spread = passes.reshape(-1, passes.shape[2]).std(0) + 1e-9
    right = []
    for first in range(0, count - 1, 2):
        a, b = passes[:, first] / spread, passes[:, first + 1] / spread
        nearest = np.square(a[:, None] - b[None]).sum(-1).argmin(1)
        right += list(nearest == np.arange(candidates))
    return float(np.mean(right)), len(right)


def rank_told(seen: np.ndarray, added: int) -> int:
    """The rank that the widest gap of the spectrum tells, less what the scheme adds to it."""
    logs = spectrum(seen)
    return int(np.argmax(logs[:-1] - logs[1:])) + 1 - added


def attack_ranks(
    trace: Trace, rng: np.random.Generator, *, trials: int = TRIALS
) -> list[Measurement]:
    """S12: counts rows that are no padding, examples that count in the loss, columns left of W.

    Args:
      trace: whose operands lose rows or columns.
      rng: chooses how many, and draws keys.
      trials: of each kind.
    """
    names = [
        n
        for n in trace.names
        if trace.outside(n) and min(trace.truth[0][n].w.shape) >= RANK_WIDTH and "." not in n
    ]
    if not names:
        return []
    measurements = []
    for kind, field in (("rows that are no padding", "x"), ("rows in the loss", "g")):
        measurements.append(
            _rank(
                kind, [getattr(trace.truth[0][n], field) for n in names], True, trace, rng, trials
            )
        )
    weights = [trace.truth[0][n].w for n in names]
    return [*measurements, _rank("columns that are not pruned", weights, False, trace, rng, trials)]


def _rank(
    what: str,
    matrices: Sequence[np.ndarray],
    rows: bool,
    trace: Trace,
    rng: np.random.Generator,
    trials: int,
) -> Measurement:
    """How often the rank of a matrix with zero rows, or columns, is told exactly."""
    how, blind = BLINDINGS[trace.scheme], blinder(trace, rng, rows=rows)
    right = []
    for trial in range(trials):
        x = matrices[trial % len(matrices)].copy()
        x = x if rows else x.T
        # No wider than what is left of it, so that the count decides the rank.
        kept = int(rng.uniform(*LEFT) * min(x.shape))
        x[rng.permutation(len(x))[kept:]] = 0
        added = blinding.decoy_count(len(x)) if rows and how.decoys != "none" else 0
        added += blinding.STRONGEST if not rows and how.masked else 0
        rank = np.linalg.matrix_rank(x)
        right.append(rank_told(blind(Guess(x if rows else x.T)), added) == rank)
    return measure(
        "S12",
        f"ranks told: {what}",
        float(np.mean(right)),
        chance=1 / min(min(x.shape) for x in matrices),
        threshold=1.5 / trials,
        note=f"by the widest gap of the spectrum, of {trials}; one lucky hit passes",
    )


def attack_weights(
    trace: Trace,
    rng: np.random.Generator,
    *,
    draws: int = DRAWS,
    products: int = 1 << 9,
    count: int = OTHERS,
) -> list[Measurement]:
    """S13: tells fixed weights in serving from others that are a tenth off.

    Args:
      trace: whose weights are served.
      rng: draws the others, and keys.
      draws: of each by the host, and as many passes.
      products: at most so many, the last ones.
      count: of the others.
    """
    blind = blinder(trace, rng, rows=False)
    apart: dict[str, list[float]] = {}
    names = [n for n in trace.names if trace.outside(n) and "." not in n]
    wide = [n for n in names if min(trace.truth[0][n].w.shape) >= WIDTH]
    for name in wide[-products:]:
        own_guess = guess_of(trace.truth[0][name], "w")
        w = own_guess.values
        others = rng.normal(size=(count, *w.shape))
        others *= OFF * np.linalg.norm(w) / np.linalg.norm(others, axis=(1, 2), keepdims=True)
        own = passes_of(blind, [own_guess], count * draws).reshape(count, 2 * draws, -1)
        off = passes_of(blind, [Guess(other, own_guess.powers) for other in w + others], draws)
        apart[name] = [separation(np.stack(pair))[0] for pair in zip(own, off, strict=True)]
    if not apart:
        return []
    worst = max(apart, key=lambda name: np.mean(apart[name]))
    return judge(
        "S13",
        "weights told from a tenth off",
        apart[worst],
        draws,
        SERVING_LIMITS,
        f"worst in {worst}",
        len(apart),
    )
