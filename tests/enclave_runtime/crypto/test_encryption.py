"""AES-GCM between client and enclave: round trips, and everything altered refused."""

import hashlib
import hmac
import itertools
import math
import os
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given

from enclave_runtime.crypto import encryption
from enclave_runtime.crypto.encryption import DecryptionError
from tests.support.fresh import run_fresh

KEY = bytes(range(32))
DTYPES = (
    *(jnp.bool_, jnp.int8, jnp.int16, jnp.int32, jnp.int64, jnp.uint8, jnp.uint16, jnp.uint32),
    *(jnp.uint64, jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.float8_e4m3fn),
    *(jnp.float8_e5m2, jnp.complex64, jnp.complex128),
)
SHAPES = ((), (1,), (0,), (7,), (2, 3), (2, 0, 4), (3, 1, 2, 1))


def random_array(seed: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Random bits, so that NaNs and negative zeros occur."""
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    if dtype == np.bool_:
        raw = bytes(b & 1 for b in raw)
    return np.frombuffer(raw, dtype).reshape(shape)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal shape, dtype and bytes; NaNs count as their bits."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert actual.tobytes() == expected.tobytes()


# Round trips


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.dtype(d) for d in DTYPES], ids=str)
def test_decryption_inverts_encryption(dtype, shape):
    plain = random_array(1, shape, dtype)
    encrypted = encryption.encrypt_array(KEY, plain, "session")
    assert encrypted.dtype == np.uint8
    assert encrypted.shape == (plain.nbytes + encryption.OVERHEAD_BYTES,)
    opened = encryption.decrypt_array(KEY, encrypted, "session", shape, dtype)
    assert_same_bits(opened, plain)
    assert not opened.flags.writeable


@given(
    dtype=st.sampled_from(DTYPES).map(np.dtype),
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    seed=st.integers(0, 2**32 - 1),
    session=st.text(max_size=10),
    key=st.binary(min_size=32, max_size=32),
)
def test_round_trip_of_any_array(dtype, shape, seed, session, key):
    plain = random_array(seed, shape, dtype)
    encrypted = encryption.encrypt_array(key, plain, session)
    assert_same_bits(encryption.decrypt_array(key, encrypted, session, shape, dtype), plain)


@pytest.mark.parametrize("view", [np.s_[::2], np.s_[:, ::-1], np.s_[1:3, 1:2], np.s_[:, None]])
def test_round_trip_of_views(view):
    plain = np.arange(24.0).reshape(4, 6)[view]
    for array in (plain, plain.T):
        encrypted = encryption.encrypt_array(KEY, array, "s")
        opened = encryption.decrypt_array(KEY, encrypted, "s", array.shape, array.dtype)
        np.testing.assert_array_equal(opened, array)


@given(plain=st.binary(max_size=64), context=st.binary(max_size=16))
def test_round_trip_of_bytes(plain, context):
    encrypted = encryption.encrypt_bytes(KEY, plain, context)
    assert encryption.decrypt_bytes(KEY, encrypted, context) == plain
    # The layout is nonce, ciphertext, tag, as AESGCM reads them.
    assert AESGCM(KEY).decrypt(encrypted[:12], encrypted[12:], context) == plain


# Refusals

PLAIN = np.arange(6, dtype=np.float32).reshape(2, 3)


def refuse(encrypted: np.ndarray, **changes: object) -> None:
    """Asserts that decryption fails with an error that says nothing of the content."""
    arguments = {"key": KEY, "session": "session", "shape": (2, 3), "dtype": np.dtype("float32")}
    with pytest.raises(DecryptionError, match="^a ciphertext failed its authentication$"):
        encryption.decrypt_array(encrypted=encrypted, **{**arguments, **changes})


def test_each_flipped_bit_is_refused():
    encrypted = encryption.encrypt_array(KEY, PLAIN, "session")
    for position in range(encrypted.size):
        altered = encrypted.copy()
        altered[position] ^= 1 << position % 8
        refuse(altered)


def test_truncated_and_extended_ciphertexts_are_refused():
    encrypted = encryption.encrypt_array(KEY, PLAIN, "session")
    for size in (0, 1, 11, 12, 13, 27, 28, encrypted.size - 1):
        refuse(encrypted[:size])
    refuse(np.append(encrypted, np.uint8(0)))


@pytest.mark.parametrize(
    "changes",
    [
        {"key": KEY[::-1]},
        {"session": "session2"},
        {"session": ""},
        {"shape": (3, 2)},
        {"shape": (6,)},
        {"shape": (2, 3, 1)},
        {"dtype": np.dtype("int32")},
        {"dtype": np.dtype("float64")},
        {"shape": (2, 6), "dtype": np.dtype("float16")},
        {"session": "session|(2, 3)", "shape": ()},
    ],
    ids=str,
)
def test_another_use_is_refused(changes):
    refuse(encryption.encrypt_array(KEY, PLAIN, "session"), **changes)


def test_array_does_not_pass_as_bytes_for_another_purpose():
    encrypted = encryption.encrypt_array(KEY, PLAIN, "session")
    for context in (b"compile|session", b"provision|session", b""):
        with pytest.raises(DecryptionError):
            encryption.decrypt_bytes(KEY, encrypted.tobytes(), context)


def test_array_in_foreign_byte_order_is_not_opened_as_native():
    plain = PLAIN.astype(">f4")
    encrypted = encryption.encrypt_array(KEY, plain, "session")
    opened = encryption.decrypt_array(KEY, encrypted, "session", (2, 3), np.dtype("float32"))
    np.testing.assert_array_equal(opened, PLAIN)


# Arrays in parts

BYTES = np.arange(100, dtype=np.uint8)
PART = 32 + encryption.OVERHEAD_BYTES


def in_parts(plain: np.ndarray = BYTES) -> np.ndarray:
    return encryption.encrypt_array(KEY, plain, "session", part_bytes=32)


def open_parts(encrypted: np.ndarray, shape: tuple[int, ...] = (100,), part_bytes: int = 32) -> Any:
    dtype = np.dtype("uint8")
    return encryption.decrypt_array(KEY, encrypted, "session", shape, dtype, part_bytes=part_bytes)


@pytest.mark.parametrize("part_bytes", [1, 5, 24, 95, 96, 97, 1000])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 6)], ids=str)
def test_parts_are_put_together(shape, part_bytes):
    plain = random_array(3, shape, np.dtype("float32"))
    encrypted = encryption.encrypt_array(KEY, plain, "session", part_bytes=part_bytes)
    assert encrypted.shape == (encryption.encrypted_bytes(plain.nbytes, part_bytes),)
    opened = encryption.decrypt_array(
        KEY, encrypted, "session", shape, plain.dtype, part_bytes=part_bytes
    )
    assert_same_bits(opened, plain)
    assert not opened.flags.writeable


def test_each_part_is_bound_to_its_number_the_count_and_the_first():
    encrypted = in_parts()
    context = encryption.array_context("session", (100,), np.dtype("uint8"))
    first = encrypted[:12].tobytes().hex()
    for number in range(4):
        part = encrypted[number * PART : (number + 1) * PART].tobytes()
        bound_to = f"part {number} of 4 {first if number else ''}|".encode() + context
        assert AESGCM(KEY).decrypt(part[:12], part[12:], bound_to) == bytes(
            BYTES[number * 32 : (number + 1) * 32]
        )


def test_parts_are_not_dropped_moved_repeated_or_truncated():
    encrypted = in_parts()
    parts = [encrypted[at : at + PART] for at in range(0, encrypted.size, PART)]
    assert len(parts) == 4
    for order in itertools.product(range(4), repeat=4):
        together = np.concatenate([parts[i] for i in order])
        if order == (0, 1, 2, 3):
            open_parts(together)
        else:
            with pytest.raises(DecryptionError):
                open_parts(together)
    for count in range(4):
        for size in (32 * count, 100):
            with pytest.raises(DecryptionError):
                open_parts(np.concatenate([*parts[:count], parts[0][:0]]), (size,))
    for size in range(0, encrypted.size, 7):
        with pytest.raises(DecryptionError):
            open_parts(encrypted[:size])
    with pytest.raises(DecryptionError):
        open_parts(np.append(encrypted, np.uint8(0)))


def test_parts_of_two_arrays_are_not_mixed():
    one, other = in_parts(), in_parts()
    for number in range(4):
        mixed = one.copy()
        mixed[number * PART : (number + 1) * PART] = other[number * PART : (number + 1) * PART]
        with pytest.raises(DecryptionError):
            open_parts(mixed)


def test_each_flipped_bit_of_a_part_is_refused():
    encrypted = in_parts()
    for position in range(encrypted.size):
        altered = encrypted.copy()
        altered[position] ^= 1 << position % 8
        with pytest.raises(DecryptionError):
            open_parts(altered)


def test_parts_of_another_size_are_not_opened():
    for part_bytes in (16, 33, 50, 100, encryption.PART_BYTES):
        with pytest.raises(DecryptionError):
            open_parts(in_parts(), part_bytes=part_bytes)
    whole = encryption.encrypt_array(KEY, BYTES, "session")
    with pytest.raises(DecryptionError):
        open_parts(whole)


def too_large_for_one_call() -> None:
    size = (1 << 31) + 12345  # 5.4 GB at most, all in all
    plain = np.zeros(size, np.uint8)
    plain[[0, encryption.PART_BYTES, -1]] = 1, 2, 3
    with pytest.raises(OverflowError):
        encryption.encrypt_bytes(KEY, plain.data, b"")
    encrypted = encryption.encrypt_array(KEY, plain, "session")
    assert encrypted.size == size + 3 * encryption.OVERHEAD_BYTES
    opened = encryption.decrypt_array(KEY, encrypted, "session", plain.shape, plain.dtype)
    np.testing.assert_array_equal(np.flatnonzero(opened), [0, encryption.PART_BYTES, size - 1])
    assert opened[[0, encryption.PART_BYTES, -1]].tolist() == [1, 2, 3]


@pytest.mark.slow
def test_an_array_that_is_too_large_for_one_call():
    # A process keeps the peak of its memory, and hands it on to the fuzzers that it starts.
    run_fresh(too_large_for_one_call)


# Bytes that are known again


@pytest.mark.parametrize("part_bytes", [1, 7, 24, encryption.PART_BYTES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bytes_are_authentic_and_others_are_not(shape, part_bytes):
    content = random_array(2, shape, np.dtype("float32"))
    tags = encryption.authenticate(KEY, content, part_bytes)
    encryption.check_authentic(KEY, content.copy(), tags, part_bytes)
    for position in range(content.nbytes):
        altered = content.copy().reshape(-1)
        altered.view(np.uint8)[position] ^= 1 << position % 8
        with pytest.raises(DecryptionError):
            encryption.check_authentic(KEY, altered.reshape(shape), tags, part_bytes)


def test_authentic_bytes_are_so_in_their_order_and_number():
    content = np.arange(64, dtype=np.uint8)
    tags = encryption.authenticate(KEY, content, 32)
    for other in (np.roll(content, 32), content[:32], np.append(content, content)):
        with pytest.raises(DecryptionError):
            encryption.check_authentic(KEY, other, tags, 32)


# Nonces and keys


def test_nonces_differ():
    encrypted = [encryption.encrypt_array(KEY, PLAIN, "session") for _ in range(1000)]
    assert len({e[: encryption.NONCE_BYTES].tobytes() for e in encrypted}) == 1000
    assert len({e[encryption.NONCE_BYTES :].tobytes() for e in encrypted}) == 1000


def test_nonces_come_from_the_operating_system(monkeypatch):
    # With a constant nonce the test above must fail, so that it tests something.
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    first, second = (encryption.encrypt_array(KEY, PLAIN, "session") for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_derived_keys_follow_rfc_5869():
    secret = os.urandom(32)
    extracted = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    for purpose in ("connection", "to enclave", "class/1/2"):
        info = b"tempo_jax/" + purpose.encode()
        expected = hmac.new(extracted, info + b"\1", hashlib.sha256).digest()
        assert encryption.derive_key(secret, purpose) == expected


def test_session_keys_are_separate_and_never_shown():
    secret = os.urandom(32)
    keys = encryption.session_keys(secret)
    assert len({*keys, secret}) == 4 and all(len(key) == 32 for key in keys)
    assert keys == encryption.session_keys(secret)
    assert not set(keys) & set(encryption.session_keys(os.urandom(32)))
    for text in (repr(keys), str(keys), f"{keys}", repr((keys,))):
        assert "SessionKeys(<secret>)" in text
        assert not any(key.hex() in text or repr(key)[2:-1] in text for key in keys)
