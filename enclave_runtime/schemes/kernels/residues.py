"""Arithmetic modulo a product of small primes: what `secret_shares` computes in.

An integer of the ring Z_M, M = p_1 ⋯ p_k, is its residues modulo the primes, each between -(p-1)/2
and (p-1)/2, so that it fits into 8 bits. Sums and products of elements are those of their residues,
an element is uniform if and only if its residues are uniform and independent, and every residue
lies in a field. Devices multiply 8-bit integers and add them up in 32 bits faster than anything
else that is exact. Trusted.

References:
  Ozaki, Uchino and Imamura, Ozaki Scheme II, 2025, https://arxiv.org/abs/2504.08009 (the same
  residues, to multiply floating-point matrices).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from enclave_runtime.compiled.kernel import Kernel
from enclave_runtime.crypto.keys import KeyStream

_split = Kernel("enclave_runtime.compiled.definitions.residues", "split")

# The largest below 2**8, so that few are needed.
PRIMES = (251, 241, 239, 233, 229, 227, 223, 211, 199, 197, 193, 191, 181, 179)
LARGEST = (PRIMES[0] - 1) // 2  # of a residue
# So many products of two residues add up in an int32 without overflow.
MOST_TERMS = (2**31 - 1) // LARGEST**2
_PART_BITS = 38  # of the integers that reconstruction adds up in float64, exactly
CHUNK = 4096  # elements that are worked on at once, in the cache


@dataclasses.dataclass(frozen=True)
class Ring:
    """Fixed point in Z_M: integers up to ``2**bits``, and sums of products of two of them.

    Attributes:
      bits: of an operand.
    """

    bits: int

    @functools.cached_property
    def primes(self) -> tuple[int, ...]:
        """As many as hold sums of `MOST_TERMS` products, with a hundredth of M to spare.

        Raises:
          ValueError: there are too few.
        """
        bound = 2 * MOST_TERMS * 4**self.bits * 100
        for count in range(1, len(PRIMES) + 1):
            if math.prod(PRIMES[:count]) * 99 >= bound:
                return PRIMES[:count]
        raise ValueError(f"operands of {self.bits} bits need more than {len(PRIMES)} primes")

    @functools.cached_property
    def _reconstruction(self) -> np.ndarray:
        """Float64[parts + 1, primes + 1]: weights by parts of 38 bits, with -M; weights over M."""
        modulus = math.prod(self.primes)
        weights = []
        for p in self.primes:
            rest = modulus // p
            weights.append(rest * pow(rest, -1, p))
        parts = -(-modulus.bit_length() // _PART_BITS)
        mask = (1 << _PART_BITS) - 1
        rows = [
            [w >> part * _PART_BITS & mask for w in weights]
            + [-(modulus >> part * _PART_BITS & mask)]
            for part in range(parts)
        ]
        return np.array([*rows, [*(w / modulus for w in weights), 0.0]])

    def integers(self, residues: np.ndarray) -> np.ndarray:
        """float64[n] of [primes, n] residues, each reduced or a sum of three that are.

        Exact in [-M/2, M/2] but for float64's own rounding: every sum is of integers below 2**53.
        """
        table = self._reconstruction
        sums = table[:, :-1] @ residues.astype(np.float64)
        multiples = np.rint(sums[-1])
        total = np.zeros(residues.shape[1])
        for part in reversed(range(len(table) - 1)):
            total *= 2.0**_PART_BITS
            total += sums[part] + table[part, -1] * multiples
        return total

    def split(self, integers: np.ndarray, stream: KeyStream) -> np.ndarray:
        """Three shares of integers, int8[3, 2, primes, n]: shares i and i + 1 for each pool i.

        Any two of the three are uniform and independent of the integers, float64[n], and all
        three add up to them.
        """
        count = integers.size
        out = np.empty((3, 2, len(self.primes), count), np.int8)
        shares = stream.residues(self.primes, 2, count)
        _split(integers, np.array(self.primes, np.float64), shares, out)
        return out


def warm_up() -> None:
    """Compiles the kernels; they do not depend on shapes."""
    Ring(8).split(np.zeros(1), KeyStream(bytes(32)))
