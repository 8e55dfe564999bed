"""Blinding keys: one stream for each use, uniform, and never shown.

The tests of uniformity run on a fixed key, so they repeat; each also runs on a generator
that is biased the way such code tends to be, and must reject it.
"""

import itertools
from collections.abc import Callable

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from scipy import stats

from enclave_runtime.keys import KeySchedule, KeyStream
from enclave_runtime.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes import signed_permutation
from enclave_runtime.store import Blinded, Resident

KEY = bytes(range(32))
# A fair generator is rejected once in a million runs; the planted biases lie far beyond.
LEVEL = 1e-6

KEYS = st.binary(min_size=32, max_size=32)


# Streams


def test_stream_is_chacha20():
    encryptor = Cipher(algorithms.ChaCha20(KEY, bytes(16)), mode=None).encryptor()
    expected = np.frombuffer(encryptor.update(bytes(80)), np.uint64)
    np.testing.assert_array_equal(KeyStream(KEY).words(10), expected)


@given(key=KEYS, first=st.integers(0, 9), second=st.integers(0, 9))
def test_stream_never_gives_a_word_twice(key, first, second):
    stream = KeyStream(key)
    parts = np.concatenate([stream.words(first), stream.words(second)])
    np.testing.assert_array_equal(parts, KeyStream(key).words(first + second))
    assert len(set(parts.tolist())) == first + second


def test_streams_differ_by_use_and_by_session():
    uses = [("class", 1), ("class", 2), ("class", 1, 2), ("class", 12), ("class", 2, 1)]
    uses += [("class", 1, 23), ("class", 12, 3), ("class", 123), ("other", 1), ("class",)]
    first, second = KeySchedule(), KeySchedule()
    words = [tuple(s.stream(*use).words(4)) for s in (first, second) for use in uses]
    assert len(set(words)) == 2 * len(uses)
    # The same use gives the same stream: that is why callers never name one twice.
    assert tuple(first.stream("class", 1).words(4)) == words[0]


@given(key=KEYS, size=st.integers(0, 300))
def test_permutations_are_permutations(key, size):
    permutation = KeyStream(key).permutation(size)
    assert permutation.dtype == np.int32
    np.testing.assert_array_equal(np.sort(permutation), np.arange(size))


@given(key=KEYS, size=st.integers(0, 300))
def test_signs_are_signs(key, size):
    signs = KeyStream(key).signs(size)
    assert signs.dtype == np.int8 and signs.shape == (size,)
    assert set(signs.tolist()) <= {-1, 1}


# Uniformity


def _by_few_bits(stream: KeyStream, size: int) -> np.ndarray:
    """Sorts words of two bits: ties keep their order."""
    return np.argsort(stream.words(size) & np.uint64(3), kind="stable")


def _naive_shuffle(stream: KeyStream, size: int) -> np.ndarray:
    """Exchanges each element with any other, which Fisher and Yates do not."""
    order = np.arange(size)
    for i, j in enumerate(stream.words(size) % np.uint64(size)):
        order[i], order[int(j)] = order[int(j)], order[i]
    return order


def _cyclic(stream: KeyStream, size: int) -> np.ndarray:
    """Only shifts."""
    return np.roll(np.arange(size), int(stream.words(1)[0] % np.uint64(size)))


def _derangement(stream: KeyStream, size: int) -> np.ndarray:
    """Never the identity."""
    while True:
        order = stream.permutation(size)
        if (order != np.arange(size)).any():
            return order


Permute = Callable[[KeyStream, int], np.ndarray]


def order_p_value(permute: Permute, size: int = 4, draws: int = 9600) -> float:
    """Chi-square over all orders of a few elements."""
    stream, number = (
        KeyStream(KEY),
        {p: i for i, p in enumerate(itertools.permutations(range(size)))},
    )
    counts = np.zeros(len(number))
    for _ in range(draws):
        counts[number[tuple(permute(stream, size).tolist())]] += 1
    return float(stats.chisquare(counts).pvalue)


def place_p_value(permute: Permute, size: int = 16, draws: int = 4000) -> float:
    """Chi-square over where each element goes, for longer permutations."""
    stream, counts = KeyStream(KEY), np.zeros((size, size))
    for _ in range(draws):
        counts[np.arange(size), permute(stream, size)] += 1
    statistic = ((counts - draws / size) ** 2).sum() / (draws / size)
    # Rows and columns add up to `draws`, which leaves (n-1)² degrees of freedom.
    return float(stats.chi2.sf(statistic * (size - 1) / size, (size - 1) ** 2))


def sign_p_value(sign: Callable[[KeyStream, int], np.ndarray], bits: int = 10) -> float:
    """Chi-square over words of `bits` successive signs, which sees bias and correlation."""
    signs = sign(KeyStream(KEY), bits * 200_000).reshape(-1, bits) < 0
    words = signs @ (1 << np.arange(bits))
    return float(stats.chisquare(np.bincount(words, minlength=1 << bits)).pvalue)


def test_orders_are_uniform():
    assert order_p_value(KeyStream.permutation) > LEVEL


def test_places_are_uniform():
    assert place_p_value(KeyStream.permutation) > LEVEL


def test_signs_are_uniform():
    assert sign_p_value(KeyStream.signs) > LEVEL


@pytest.mark.parametrize("biased", [_by_few_bits, _naive_shuffle, _cyclic, _derangement])
def test_biased_orders_are_rejected(biased):
    assert order_p_value(biased) < LEVEL


@pytest.mark.parametrize("biased", [_by_few_bits, _naive_shuffle])
def test_biased_places_are_rejected(biased):
    assert place_p_value(biased) < LEVEL


def _unbalanced(stream: KeyStream, size: int) -> np.ndarray:
    return np.where(stream.words(size) % np.uint64(100) < 51, 1, -1)


def _repeated(stream: KeyStream, size: int) -> np.ndarray:
    """Every bit is used twice."""
    return np.repeat(stream.signs(-(-size // 2)), 2)[:size]


@pytest.mark.parametrize("biased", [_unbalanced, _repeated])
def test_biased_signs_are_rejected(biased):
    assert sign_p_value(biased) < LEVEL


def test_permutation_and_signs_of_a_key_are_independent():
    stream, counts = KeyStream(KEY), np.zeros((6, 8))
    number = {p: i for i, p in enumerate(itertools.permutations(range(3)))}
    for _ in range(9600):
        key = signed_permutation.draw(KeyClass(3, True), stream)
        counts[
            number[tuple(key.permutation.tolist())], (np.asarray(key.signs) < 0) @ [1, 2, 4]
        ] += 1
    assert stats.chisquare(counts.ravel()).pvalue > LEVEL


# Keys of the group


@given(key=KEYS, size=st.integers(0, 40), signed=st.booleans())
def test_drawn_keys_are_consistent(key, size, signed):
    drawn = signed_permutation.draw(KeyClass(size, signed), KeyStream(key))
    np.testing.assert_array_equal(drawn.permutation[drawn.inverse], np.arange(size))
    assert (drawn.signs is not None) == signed


# Nothing is shown


def test_representations_show_nothing():
    stream = KeyStream(KEY)
    signed = signed_permutation.draw(KeyClass(5, True), stream)
    array, layout = ArrayType((5,), "float64"), Layout((0,), (1,))
    secrets = {
        "KeyStream(<secret>)": stream,
        "KeySchedule(<secret>)": KeySchedule(),
        "SignedPermutationKey(<secret>)": signed,
        f"Resident({array}, <secret>)": Resident(array, jnp.arange(5.0)),
        f"Blinded({array}, signed_permutation, <secret>)": Blinded(
            array, "signed_permutation", layout, {0: signed}
        ),
    }
    for text, secret in secrets.items():
        assert repr(secret) == str(secret) == f"{secret}" == text
        assert repr([secret]) == f"[{text}]"
