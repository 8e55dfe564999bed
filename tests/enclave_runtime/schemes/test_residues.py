"""The ring of secret shares: exact against Python's integers, and masks that are uniform."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclave_runtime.crypto.keys import KeySchedule, KeyStream
from enclave_runtime.schemes.kernels.residues import LARGEST, MOST_TERMS, PRIMES, Ring
from tests.support.uniformity import LIMIT, chi_square

BITS = (8, 14, 18, 22, 28, 45)


def stream(key: int = 0) -> KeyStream:
    return KeyStream(bytes([key]) * 32)


def balanced(value: int, prime: int) -> int:
    return (value + prime // 2) % prime - prime // 2


def residues_of(values: list[int], ring: Ring) -> np.ndarray:
    return np.array([[balanced(v, p) for v in values] for p in ring.primes], np.int16)


def test_moduli_are_primes_that_a_byte_holds():
    for p in PRIMES:
        assert p < 256 and all(p % q for q in range(2, p))
    assert len(set(PRIMES)) == len(PRIMES)


@pytest.mark.parametrize("bits", BITS)
def test_ring_holds_the_longest_sum(bits):
    ring = Ring(bits)
    assert 2 * MOST_TERMS * 4**bits < math.prod(ring.primes)
    assert MOST_TERMS * LARGEST**2 < 2**31  # as the devices add up
    shorter = Ring(bits).primes[:-1]
    assert 200 * MOST_TERMS * 4**bits > math.prod(shorter) * 99  # no prime more than needed


def test_operands_that_need_more_primes_are_refused():
    with pytest.raises(ValueError, match="more than 14 primes"):
        _ = Ring(46).primes


@given(bits=st.sampled_from(BITS), data=st.data())
def test_integers_are_their_residues(bits, data):
    ring = Ring(bits)
    bound = MOST_TERMS * 4**bits
    values = data.draw(st.lists(st.integers(-bound, bound), min_size=1, max_size=9))
    values += [0, 1, -1, bound, -bound, bound - 1]
    np.testing.assert_array_equal(
        ring.integers(residues_of(values, ring)), np.array(values, np.float64)
    )


@given(bits=st.sampled_from(BITS), seed=st.integers(0, 255), data=st.data())
def test_shares_add_up(bits, seed, data):
    ring, bound = Ring(bits), 2**bits
    values = data.draw(st.lists(st.integers(-bound, bound), min_size=1, max_size=9))
    shares = ring.split(np.array(values, np.float64), stream(seed))
    for pool in range(3):  # shares i and i + 1
        np.testing.assert_array_equal(shares[pool, 1], shares[(pool + 1) % 3, 0])
    half = np.array(ring.primes)[:, None] // 2
    assert (np.abs(shares.astype(int)) <= half).all()
    np.testing.assert_array_equal(
        ring.integers(shares[:, 0].sum(0, dtype=np.int16)), np.array(values, np.float64)
    )


def test_residues_are_uniform_and_fresh():
    keys = KeySchedule()
    drawn = keys.stream("test", 1).residues(PRIMES, 2, 20_000)
    again = keys.stream("test", 2).residues(PRIMES, 2, 20_000)
    for number, prime in enumerate(PRIMES):
        own = drawn[:, number].ravel()
        assert chi_square(own, prime) < LIMIT
        assert (own == again[:, number].ravel()).mean() < 2 / prime
    one, other = drawn[0, 0], drawn[1, 0]
    assert (one == other).mean() < 2 / PRIMES[0]


def test_a_byte_modulo_a_prime_would_not_pass():
    words = stream().words(40_000 // 8).view(np.uint8)
    assert chi_square((words % 179).astype(np.int16) - 89, 179) > LIMIT


def test_spare_bytes_that_run_out_are_drawn_again():
    """Three spare bytes a time would never do for 20,000 of the smallest prime."""
    drawn = stream(5).residues((3, 5), 1, 20_000)  # 98 % are rejected
    assert set(np.unique(drawn[0, 0])) == {-1, 0, 1}
    assert chi_square(drawn[0, 0], 3) < LIMIT and chi_square(drawn[0, 1], 5) < LIMIT
