"""S4, over many steps: does the spectrum of W, averaged over fresh keys, name the model?

Keys of condition 4 blur every singular value, but the blur is fresh in every step and averages out:
over T steps what is left of it shrinks with √T. The host compares the mean log spectrum of Ŵ with
that of candidates, each blinded with keys of the host's own, for the scheme is public. Candidates
are the victim's W and near ones: of the same layer trained from other seeds on the same data, and
of the victim itself at another stage of its training. Reported is how often the victim's W fits
better than a near one: 0.5 is chance, 1 a sure choice.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from benchmarks.attacks import blinding, traces
from benchmarks.attacks.blinding import BLINDINGS
from benchmarks.attacks.results import Measurement, report
from benchmarks.attacks.steps import WIDTH
from benchmarks.attacks.traces import Trace
from benchmarks.attacks.victims import VICTIMS

OTHERS = 4  # models trained from other seeds
EARLIER = (0.5, 0.9)  # stages of the victim's own training, as shares of its steps
DRAWS = 60  # keys with which a candidate is blinded
SEEDS = 1000  # of the others, away from those of traces


def spectrum(w: np.ndarray) -> np.ndarray:
    """Log singular values, strongest first, without the matrix's size; faint ones are held up."""
    values = np.linalg.svd(w, compute_uv=False)
    logs = np.log(np.maximum(values, 1e-6 * values[0]))
    return logs - logs.mean()


@functools.cache
def train_weights(victim: str, seed: int, steps: int) -> dict[str, np.ndarray]:
    """A victim's weights after some plain steps, as matrices."""
    model = dataclasses.replace(VICTIMS[victim], warm_up=steps)
    drawn = traces.batches(model, seed, 0, model.batch, repeat=False)
    parameters, _ = traces.warm_up(model, seed, drawn)
    arrays = {name: np.asarray(value) for name, value in parameters.items()}
    return {name: v.reshape(-1, v.shape[-1]) for name, v in arrays.items() if v.ndim > 1}


def expected(
    scheme: str, w: np.ndarray, rng: np.random.Generator, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of a candidate's spectrum under fresh keys, and masks, of the scheme."""
    how = BLINDINGS[scheme]
    spectra = []
    for _ in range(draws):
        spectra.append(spectrum(blinding.blind_weight(how, w, rng)))
    # Orthogonal keys do not blur at all.
    return np.mean(spectra, axis=0), np.var(spectra, axis=0) + 1e-12


def misfit(seen: np.ndarray, template: tuple[np.ndarray, np.ndarray]) -> float:
    """How badly a mean spectrum fits a candidate's, each singular value in its own blur."""
    mean, variance = template
    return float(((seen - mean) ** 2 / variance).sum())


def attack(
    trace: Trace, rng: np.random.Generator, others: int = OTHERS, draws: int = DRAWS
) -> list[Measurement]:
    """Tells W from near ones by spectra of single steps, and by their mean over all.

    Args:
      trace: of as many steps as are to be averaged.
      rng: draws the host's own keys.
      others: models trained from other seeds.
      draws: keys for each candidate.
    """
    total, warm_up = len(trace.views), trace.model.warm_up
    near = [(SEEDS + trace.seed * others + i, warm_up + total // 2) for i in range(others)]
    near += [(trace.seed, int(share * warm_up)) for share in EARLIER]
    models = [train_weights(trace.victim, seed, steps) for seed, steps in near]
    wins: dict[int, list[bool]] = {1: [], total: []}
    for name in models[0]:
        view = trace.views[0].get(name)
        if view is None or view.w is None or min(view.w.shape) < WIDTH:
            continue
        # The victim's W moves; the middle one is as good a candidate as the host may hope for.
        own = expected(trace.scheme, trace.truth[total // 2][name].w, rng, draws)
        templates = [expected(trace.scheme, model[name], rng, draws) for model in models]
        seen = [spectrum(v[name].w) for v in trace.views if v[name].w is not None]  # pyright: ignore
        for length in wins:
            means = seen if length == 1 else [np.mean(seen, axis=0)]
            wins[length] += [misfit(m, own) < misfit(m, t) for m in means for t in templates]
    return [
        report(
            "S4",
            f"spectrum told from near ones, T = {length}",
            float(np.mean(values)),
            chance=0.5,
            note=f"{len(values)} comparisons",
        )
        for length, values in wins.items()
        if values
    ]
