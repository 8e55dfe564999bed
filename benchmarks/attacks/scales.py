"""S1, on schemes with coefficients: does the second polarity give the scales of columns away?

Two polarities of one operand share the order of their columns, and a column scaled by c in the one
is scaled by 1/c in the other. The ratio of the two columns' energies is then c⁴, whatever the
columns hold, up to what the scales of rows add; these change sign between polarities, too, or they
cancel. One factor common to all columns stays open.
"""

from __future__ import annotations

import numpy as np

from benchmarks.attacks.blinding import BLINDINGS
from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.traces import Trace

MARGIN = 0.1
SHUFFLES = 20
SHIFTS = range(-6, 7)  # powers of two of the common factor


def exponents(straight: np.ndarray, polar: np.ndarray) -> np.ndarray:
    """The power of two of each column's scale, up to one common factor.

    Args:
      straight: an operand whose columns are scaled by c.
      polar: the same with columns scaled by 1/c.

    Returns:
      Whole numbers, 0 where a column is zero.
    """
    energies = (straight**2).sum(0), (polar**2).sum(0)
    seen = np.minimum(*energies) > 0
    found = np.zeros(len(seen))
    logs = np.log2(energies[0][seen] / energies[1][seen]) / 4
    # The common factor that brings most of them nearest to whole numbers.
    turns = np.exp(2j * np.pi * logs)
    found[seen] = np.round(logs - np.angle(turns.mean()) / (2 * np.pi))
    return found


def share_right(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of equal exponents, under the best common factor."""
    return max(float((found + shift == truth).mean()) for shift in SHIFTS)


def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
    """Reads the scales of both axes of every W off the two polarities of x and of g.

    Args:
      trace: of at least one step; schemes without coefficients or second polarity give nothing.
      rng: shuffles guesses, for chance.
    """
    if BLINDINGS[trace.scheme].features != "scaled":
        return []
    shares = []
    for name, view in trace.views[0].items():
        truth = trace.truth[0][name]
        for key, pair in ((truth.b, (view.x, view.x_dual)), (truth.c, (view.g_dual, view.g))):
            straight, polar = pair
            if key is None or straight is None or polar is None:
                continue
            right = np.round(np.log2(np.abs(key).max(1)))
            found = exponents(straight, polar)
            lucky = [share_right(rng.permutation(found), right) for _ in range(SHUFFLES)]
            shares.append((share_right(found, right), float(np.mean(lucky))))
    if not shares:
        return []
    value, chance = np.mean(shares, axis=0)
    return [
        measure(
            "S1",
            "scales of columns",
            value,
            chance=chance,
            threshold=chance + MARGIN,
            note=f"up to one factor, mean of {len(shares)} axes",
        )
    ]
