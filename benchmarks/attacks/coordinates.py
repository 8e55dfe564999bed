"""Coordinates that attacks are scored in, where operands are evened out before they are masked.

A row or column far smaller than the others goes up by a power of two before mask and key go on.
Taken back to plain coordinates, whatever direction the host names then leans towards the few
indices that went up most: two that have nothing to do with each other agree, and random ones come
near to single columns. That is so of noise that never saw a tensor as it is of what the host saw.

So an attack that scores directions or columns by the keys is scored twice (`scored_twice`): on
the evened-out operands, which is where masks lie, by its own thresholds; and in plain coordinates,
where what the same attack reaches on noise counts as chance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from benchmarks.attacks.blinding import DenseKey
from benchmarks.attacks.results import Measurement
from benchmarks.attacks.traces import Powers, ProductTruth, ProductView, Trace
from enclave_runtime.schemes.equilibration import AxisScales, equilibrate

Run = Callable[[Trace, np.random.Generator], list[Measurement]]

NOISES = 5  # views of noise, whose spread says how far luck goes
SIGMAS = 3


def evened_operands(truth: ProductTruth, powers: Powers) -> tuple[np.ndarray, ...]:
    """X, W and G as the enclave masked them: evened out, without what is too far out."""
    a, b, c = (AxisScales(1) for _ in powers)
    for scales, factors in zip((a, b, c), powers, strict=True):
        scales.exponents = np.log2(factors).astype(np.int64)[None]
    return tuple(
        np.asarray(equilibrate(plain, scales, parities).scaled)
        for plain, scales, parities in (
            (truth.x, (a, b), (1, 1)),
            (truth.w, (b, c), (0, 1)),
            (truth.g, (a, c), (0, 0)),
        )
    )


def evened_truth(truth: ProductTruth) -> ProductTruth:
    """The same product in the coordinates of what was masked."""
    if truth.powers is None or truth.keys is None:
        return truth
    a, b, c = (
        DenseKey(key.matrix / np.pad(f, (0, key.size - len(f)), constant_values=1))
        for key, f in zip(truth.keys, truth.powers, strict=True)
    )
    x, w, g = evened_operands(truth, truth.powers)
    return dataclasses.replace(truth, x=x, w=w, g=g, keys=(a, b, c), powers=None)


def evened(trace: Trace) -> Trace:
    """The same trace, with all truth in the coordinates of what was masked."""
    truth = [{name: evened_truth(t) for name, t in step.items()} for step in trace.truth]
    return dataclasses.replace(trace, truth=truth)


def noise(trace: Trace, rng: np.random.Generator) -> Trace:
    """The same trace, but the host saw products of normal numbers, which carry nothing."""

    def view(seen: ProductView) -> ProductView:
        x, w, g = (
            None if v is None else rng.normal(size=v.shape) for v in (seen.x, seen.w, seen.g)
        )
        assert x is not None and w is not None
        if g is None:
            return ProductView(x, w, x @ w, None, None, None)
        return ProductView(x, w, x @ w, g, g @ w.T, x.T @ g)

    views = [{name: view(seen) for name, seen in step.items()} for step in trace.views]
    return dataclasses.replace(trace, views=views)


def is_uneven(trace: Trace) -> bool:
    """Whether some power of two was not 1."""
    every = (truth.powers for step in trace.truth for truth in step.values())
    return any((factors != 1).any() for powers in every for factors in powers or ())


def evened_out(run: Run) -> Run:
    """An attack that is scored on the evened-out operands alone."""
    return lambda trace, rng: run(evened(trace), rng)


def scored_twice(run: Run) -> Run:
    """An attack that is scored on the evened-out operands and, against noise, on plain ones."""

    def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
        if not is_uneven(trace):
            return run(trace, rng)
        found = run(evened(trace), rng)
        blank = [{m.metric: m.value for m in run(noise(trace, rng), rng)} for _ in range(NOISES)]
        return found + [
            _over_noise(m, [values.get(m.metric, np.nan) for values in blank])
            for m in run(trace, rng)
        ]

    return attack


def _over_noise(m: Measurement, lucky: list[float]) -> Measurement:
    """A measurement in plain coordinates, for which what noise reaches is chance."""
    chance = max(m.chance, float(np.mean(lucky)))
    # The same share of what chance leaves.
    share = (m.threshold - m.chance) / (m.best - m.chance)
    threshold = max(m.threshold, chance + SIGMAS * float(np.std(lucky)) + share * (m.best - chance))
    return dataclasses.replace(
        m,
        metric=f"{m.metric}, plain coordinates",
        chance=chance,
        threshold=threshold,
        passed=bool(m.value <= threshold),
        note=f"{m.note}; chance: noise in the host's place",
    )
