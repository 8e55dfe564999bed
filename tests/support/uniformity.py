"""Statistics of residues: how far they are from uniform and independent, in standard deviations."""

import math
from collections.abc import Sequence

import numpy as np

LIMIT = 5.0  # of a statistic that is standard normal, up to skew: one in a few million


def chi_square(residues: np.ndarray, prime: int) -> float:
    """Pearson's statistic against uniform residues between -(p-1)/2 and (p-1)/2, standardised."""
    counts = np.bincount(residues.ravel().astype(int) + prime // 2, minlength=prime)
    expected = residues.size / prime
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (prime - 1)) / math.sqrt(2 * (prime - 1))


def joint_chi_square(one: np.ndarray, other: np.ndarray, prime: int) -> float:
    """The same for pairs: of residues at two places, against uniform and independent ones."""
    bins = 8
    cells = [(x.ravel().astype(int) + prime // 2) * bins // prime for x in (one, other)]
    edges = np.bincount(np.arange(prime) * bins // prime, minlength=bins) / prime
    counts = np.bincount(cells[0] * bins + cells[1], minlength=bins**2)
    expected = np.outer(edges, edges).ravel() * cells[0].size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (bins**2 - 1)) / math.sqrt(2 * (bins**2 - 1))


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation times the root of the count: standard normal if independent."""
    x, y = (np.asarray(v, np.float64).ravel() - np.mean(v) for v in (one, other))
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norm * math.sqrt(x.size)) if norm else 0.0


def worst(residues: np.ndarray, primes: Sequence[int], plain: np.ndarray) -> float:
    """The largest statistic of what one looks at: uniform, serially and with the plaintext.

    Args:
      residues: [parts, primes, n], what is seen of one value.
      primes: of the ring.
      plain: [n], the value.
    """
    found = [0.0]
    order = np.argsort(plain, kind="stable")
    for number, prime in enumerate(primes):
        seen = residues[:, number]
        for part in seen:
            found.append(chi_square(part, prime))
            found.append(joint_chi_square(part[:-1], part[1:], prime))
            found.append(abs(correlation(part[:-1], part[1:])))
            found.append(abs(correlation(part, plain)))
            half = len(order) // 2
            found.append(abs(correlation(part[order[:half]], plain[order[:half]])))
        if len(seen) > 1:
            for one in range(len(seen)):
                for other in range(one):
                    found.append(joint_chi_square(seen[one], seen[other], prime))
            # What a pool would try first: the sum of what it has.
            total = seen.astype(int).sum(0)
            found.append(chi_square((total + prime // 2) % prime - prime // 2, prime))
            found.append(abs(correlation(total, plain)))
    return max(found)
