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


def test_spare_words_that_run_out_are_drawn_again():
    """More words are beyond the last multiple of 251 than there are spare ones at a time."""
    count = 200
    words = np.full(2 * count, 0xFFFF, np.uint16)
    words[count:] = np.arange(count) % 500  # what comes in their place
    source = stream()
    given = iter([words[:count].copy(), words[count : count + 64].copy(), *[words[-64:]] * 9])
    source._halfwords = lambda _: next(given)  # pyright: ignore[reportAttributeAccessIssue]
    drawn = source.residues((251,), 1, count)
    expected = np.concatenate([words[count : count + 64], *[words[-64:]] * 3])[:count]
    np.testing.assert_array_equal(drawn[0, 0], expected.astype(int) % 251 - 125)


@pytest.mark.parametrize("prime", PRIMES)
def test_every_word_below_the_last_multiple_gives_its_remainder(prime):
    words = np.arange(65536 - 65536 % prime, dtype=np.uint16)
    source = stream()
    given = iter([words.copy(), np.zeros(1, np.uint16)])
    source._halfwords = lambda _: next(given)  # pyright: ignore[reportAttributeAccessIssue]
    drawn = source.residues((prime,), 1, words.size)
    np.testing.assert_array_equal(drawn[0, 0], words.astype(int) % prime - prime // 2)
