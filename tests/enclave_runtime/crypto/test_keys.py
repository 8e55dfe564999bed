"""Blinding keys: one stream for each use, uniform, and never shown.

The tests of uniformity run on a fixed key, so they repeat; each also runs on a generator
that is biased the way such code tends to be, and must reject it.
"""

import copy
import itertools
import pickle
from collections.abc import Callable

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from scipy import stats

from enclave_runtime.crypto.encryption import session_keys
from enclave_runtime.crypto.keys import KeySchedule, KeyStream
from enclave_runtime.protocol.configuration import Launched, Serving
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.protocol.tags import NOWHERE
from enclave_runtime.schemes import Mixing, SignedPermutation, Tempo
from enclave_runtime.schemes.mixing import TensorSecret
from enclave_runtime.sessions.admission import Origin, Tag
from enclave_runtime.sessions.store import Blinded, KeyUses, Resident

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


@given(key=KEYS, count=st.integers(0, 300))
def test_uniform_and_normal_values_are_determined_by_the_stream(key, count):
    uniform = KeyStream(key).uniform(count)
    assert uniform.dtype == np.float64 and uniform.shape == (count,)
    assert ((uniform > 0) & (uniform < 1)).all()
    np.testing.assert_array_equal(uniform, KeyStream(key).uniform(count))
    for dtype in (np.float32, np.float64):
        normal = KeyStream(key).normal(count, dtype)
        assert normal.dtype == dtype and normal.shape == (count,)
        assert (np.abs(normal) < 6.8).all()
        np.testing.assert_array_equal(normal, KeyStream(key).normal(count, dtype))


class _Constant(KeyStream):
    """Gives one word for ever."""

    def __init__(self, word: int):
        self._word = word

    def words(self, count: int) -> np.ndarray:
        return np.full(count, self._word, np.uint64)


def test_extreme_words_give_values_inside_the_bounds():
    lowest, highest = _Constant(0), _Constant(2**64 - 1)
    assert lowest.uniform(1)[0] == 2.0**-53 and highest.uniform(1)[0] == 1 - 2.0**-53
    for stream in (lowest, highest):
        assert (np.abs(stream.normal(2, np.float64)) < 6.8).all()
        assert np.isfinite(stream.normal(2, np.float64)).all()
        np.testing.assert_array_equal(np.sort(stream.permutation(99)), np.arange(99))


def test_shuffle_is_fisher_and_yates():
    words, expected = KeyStream(KEY).words(100).tolist(), list(range(100))
    for i in range(99, 0, -1):
        j = words[i] * (i + 1) >> 64
        expected[i], expected[j] = expected[j], expected[i]
    assert KeyStream(KEY).permutation(100).tolist() == expected


def test_normal_values_are_those_of_box_and_muller():
    words = KeyStream(KEY).words(3 * 4096).reshape(3, 1, 4096)
    u = ((words & np.uint64(2**32 - 1)) + 0.5) / 2**32
    quarter = ((words >> np.uint64(32) & np.uint64(2**30 - 1)) + 0.5) / 2**30
    radius, angle = np.sqrt(-2 * np.log(u)), quarter * np.pi / 2
    bits = [words >> np.uint64(62) & np.uint64(1), words >> np.uint64(63)]
    signs = 1.0 - 2 * np.concatenate(bits, 1)
    expected = signs * radius * np.concatenate([np.cos(angle), np.sin(angle)], 1)
    got = KeyStream(KEY).normal(3 * 8192, np.float64)
    np.testing.assert_allclose(got, expected.reshape(-1), rtol=0, atol=1e-10)


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


def moment_p_value(values: np.ndarray, order: int) -> float:
    """Whether a moment of supposedly standard normal values is as far off as chance lets it be."""
    mean, square = (float(stats.norm.moment(n)) for n in (order, 2 * order))
    error = (np.mean(values**order) - mean) / np.sqrt((square - mean**2) / values.size)
    return float(2 * stats.norm.sf(abs(error)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_normal_values_are_normal(dtype):
    values = KeyStream(KEY).normal(1_000_001, dtype).astype(np.float64)
    assert stats.kstest(values, "norm").pvalue > LEVEL
    assert min(moment_p_value(values, order) for order in (1, 2, 3, 4, 6)) > LEVEL
    # Values half a block apart come from one word; they and their squares must not be
    # correlated.
    for power in (1, 2):
        for lag in (1, 2, 4096):
            first, second = values[:-lag] ** power, values[lag:] ** power
            correlation = np.corrcoef(first, second)[0, 1]
            assert 2 * stats.norm.sf(abs(correlation) * np.sqrt(first.size)) > LEVEL


@pytest.mark.parametrize("biased", [lambda x: 1.01 * x, lambda x: x + 0.01, np.abs])
def test_values_that_are_not_normal_are_rejected(biased):
    values = biased(KeyStream(KEY).normal(1_000_001, np.float64))
    assert stats.kstest(values, "norm").pvalue < LEVEL
    assert min(moment_p_value(values, order) for order in (1, 2, 3, 4, 6)) < LEVEL


def test_uniform_values_are_uniform():
    values = KeyStream(KEY).uniform(1_000_000)
    assert stats.kstest(values, "uniform").pvalue > LEVEL
    assert stats.kstest(values**1.01, "uniform").pvalue < LEVEL
    low_bits = (values * 2**52).astype(np.uint64) & np.uint64(255)
    assert stats.chisquare(np.bincount(low_bits.astype(int), minlength=256)).pvalue > LEVEL


def test_permutation_and_signs_of_a_key_are_independent():
    stream, counts = KeyStream(KEY), np.zeros((6, 8))
    number = {p: i for i, p in enumerate(itertools.permutations(range(3)))}
    for _ in range(9600):
        key = SignedPermutation().draw(KeyClass(3), stream)
        counts[
            number[tuple(key.permutation.tolist())], (np.asarray(key.factors) < 0) @ [1, 2, 4]
        ] += 1
    assert stats.chisquare(counts.ravel()).pvalue > LEVEL


# Keys of the group


@given(key=KEYS, size=st.integers(0, 40), batch=st.booleans())
def test_drawn_keys_are_consistent(key, size, batch):
    drawn = SignedPermutation().draw(KeyClass(size, batch), KeyStream(key))
    np.testing.assert_array_equal(drawn.permutation[drawn.inverse], np.arange(size))
    assert (drawn.factors is None) == batch


# Nothing is shown


TAG = Tag(NOWHERE, Origin(bytes(16)), 0)


def test_representations_show_nothing():
    stream = KeyStream(KEY)
    scheme = SignedPermutation()
    signed = scheme.draw(KeyClass(5), stream)
    array, layout = ArrayType((5,), "float64"), Layout((0,), (1,))
    secrets = {
        "KeyStream(<secret>)": stream,
        "KeySchedule(<secret>)": KeySchedule(),
        "PermutationKey(<secret>)": signed,
        f"Resident({array}, <secret>)": Resident(array, jnp.arange(5.0), TAG),
        f"Blinded({array}, signed_permutation, <secret>)": Blinded(
            array, TAG, scheme, layout, {0: signed}, {0: False}, {0: KeyUses()}
        ),
    }
    for text, secret in secrets.items():
        assert repr(secret) == str(secret) == f"{secret}" == text
        assert repr([secret]) == f"[{text}]"


SIGNED = SignedPermutation().draw(KeyClass(5), KeyStream(KEY))
ARRAY = ArrayType((5,), "float64")


@pytest.mark.parametrize(
    "secret",
    [
        session_keys(KEY),
        Launched(KEY),
        Serving("127.0.0.1", 0, 0, KEY),
        KeySchedule(),
        SIGNED,
        Tempo().draw(KeyClass(5), KeyStream(KEY)),
        Mixing().draw(KeyClass(128), KeyStream(KEY)),
        TensorSecret(np.ones(1)),
        Resident(ARRAY, jnp.arange(5.0), TAG),
        Blinded(
            *(ARRAY, TAG, SignedPermutation(), Layout((0,), (1,))),
            *({0: SIGNED}, {0: False}, {0: KeyUses()}),
        ),
    ],
    ids=lambda secret: type(secret).__name__,
)
@pytest.mark.parametrize("convert", [pickle.dumps, copy.copy, copy.deepcopy])
def test_secrets_are_not_pickled(secret, convert):
    with pytest.raises(TypeError, match="holds secrets and cannot be pickled or copied"):
        convert(secret)
    with pytest.raises(TypeError, match="holds secrets"):
        (convert if convert is not copy.copy else copy.deepcopy)({"among others": [secret]})
