"""Secret shares: what the pools compute adds up to the product, and nothing overflows silently."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import ArrayType, Layout
from enclave_runtime.schemes import SecretShares
from enclave_runtime.schemes.contract import UnblindingError
from enclave_runtime.schemes.kernels.residues import MOST_TERMS

SCHEME = SecretShares()
SCHEDULE = KeySchedule()
ERROR = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 2e-6, "float64": 1e-12}


def type_of(x: Any) -> ArrayType:
    return ArrayType(x.shape, x.dtype.name)


def blinded(x: Any, use: int, scheme: SecretShares = SCHEME) -> tuple[np.ndarray, Any]:
    held = scheme.representation(type_of(x), product=False)
    out = np.empty(held.shape, held.dtype)
    stream = functools.partial(SCHEDULE.stream, "test", use)
    return out, scheme.blind(x, Layout.clear(x.ndim), {}, out, stream)


def outside(
    product: Callable[..., Any], lhs: Any, rhs: Any, scheme: SecretShares = SCHEME
) -> jax.Array:
    """A product as the enclave gets it, each pool alone."""
    (x, first), (w, second) = blinded(lhs, 1, scheme), blinded(rhs, 2, scheme)
    pools = [pools_part(product, x[i : i + 1], w[i : i + 1]) for i in range(scheme.pools)]
    back = np.concatenate([np.asarray(p) for p in pools])
    return scheme.unblind(back, Layout.clear(back.ndim - 2), {}, (first, second))


@functools.partial(jax.jit, static_argnums=0)
def pools_part(product: Callable[..., Any], lhs: Any, rhs: Any) -> Any:
    return SCHEME.device_product(functools.partial(product, dtype=jnp.int32), lhs, rhs)


def matmul(x: Any, w: Any, dtype: Any = None) -> Any:
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=dtype)


def batched(x: Any, w: Any, dtype: Any = None) -> Any:
    return lax.dot_general(x, w, (((2,), (1,)), ((0,), (0,))), preferred_element_type=dtype)


def strided(x: Any, w: Any, dtype: Any = None) -> Any:
    return lax.conv_general_dilated(
        x,
        w,
        (2, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
        preferred_element_type=dtype,
    )


PRODUCTS = {
    "matrices": (matmul, (33, 70), (70, 9)),
    "batched": (batched, (3, 5, 7), (3, 7, 2)),
    "convolution": (strided, (2, 6, 5, 4), (3, 3, 2, 6)),
    "one element": (matmul, (1, 1), (1, 1)),
    "nothing": (matmul, (0, 4), (4, 3)),
}


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("name", PRODUCTS)
def test_pools_parts_add_up_to_the_product(name, dtype):
    product, *shapes = PRODUCTS[name]
    rng = np.random.default_rng(3)
    x, w = (jnp.asarray(rng.normal(size=s) * 30, dtype) for s in shapes)
    exact = product(x.astype(float), w.astype(float))
    found = outside(product, x, w)
    assert found.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    scale = float(jnp.abs(exact).max(initial=0)) or 1.0
    np.testing.assert_allclose(found / scale, exact / scale, atol=ERROR[dtype])


@given(seed=st.integers(0, 2**32 - 1), size=st.floats(-30, 30))
def test_integers_are_multiplied_exactly(seed, size):
    rows, inner, rng = 3, 7, np.random.default_rng(seed)
    scale = np.float32(2.0 ** round(size))
    x = rng.integers(-(2**20), 2**20, (rows, inner)).astype(np.float32)
    w = rng.integers(-(2**4), 2**4, (inner, 3)).astype(np.float32)
    expected = (x.astype(float) @ w.astype(float)).astype(np.float32) * scale
    np.testing.assert_array_equal(outside(matmul, x * scale, w), expected)


def test_zero_and_the_smallest_and_largest_floats():
    zero = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(outside(matmul, zero, zero.T), np.zeros((2, 2)))
    tiny, huge = np.float32(1e-44), np.float32(3e38)
    x, w = np.full((2, 3), tiny), np.full((3, 2), huge)
    np.testing.assert_allclose(outside(matmul, x, w), np.full((2, 2), 3.0) * tiny * huge, rtol=1e-6)
    least, most = np.full((2, 3), 5e-324), np.full((3, 2), 1.7e308)
    assert np.isinf(outside(matmul, most, most.T)).all()  # as in float64 itself
    assert not np.asarray(outside(matmul, least, most)).any()  # too far below 1 to be told from 0


def test_longest_sum_does_not_wrap():
    """The largest operands in the longest sums that are let out, where a sum is largest."""
    x = np.full((1, MOST_TERMS), 1, np.float32)
    w = np.full((MOST_TERMS, 1), -1, np.float32)
    np.testing.assert_array_equal(outside(matmul, x, w), [[-MOST_TERMS]])


@pytest.mark.parametrize("bits", [8, 14, 18, 22, 26, 28])
def test_error_is_that_of_the_fraction_bits(bits):
    rng = np.random.default_rng(4)
    x, w = rng.uniform(-1, 1, (64, 300)), rng.uniform(-1, 1, (300, 32))
    found = outside(matmul, x.astype(np.float32), w.astype(np.float32), SecretShares(3, bits))
    off = np.abs(found - x @ w).max() / np.sqrt(300)
    assert 2.0 ** -(bits + 3) * (bits < 22) < off < 2.0 ** -(bits - 2) + 1e-6


# Refusals


def test_sums_that_may_overflow_are_refused():
    array = ArrayType((2, 2), "float32")
    assert SCHEME.refuses(array, array, array, MOST_TERMS) is None
    why = SCHEME.refuses(array, array, array, MOST_TERMS + 1)
    assert why is not None and "may overflow" in why


def test_formats_of_two_rings_are_refused():
    single, double = ArrayType((2, 2), "float32"), ArrayType((2, 2), "float64")
    why = SCHEME.refuses(single, double, double, 2)
    assert why is not None and "ring of its own" in why
    assert SCHEME.refuses(ArrayType((2, 2), "bfloat16"), single, single, 2) is None


def test_result_outside_of_the_range_is_an_error():
    _, first = blinded(np.ones((2, 2), np.float32), 1)
    # Half of the ring's modulus: the residues of 1/2.
    wrong = np.zeros((3, 8, 2, 2), np.int8)
    for number, prime in enumerate(SCHEME.fields("float32")):
        wrong[0, number] = (prime + 1) // 2 - prime
    with pytest.raises(UnblindingError, match="larger than its operands allow"):
        SCHEME.unblind(wrong, Layout.clear(2), {}, (first, first))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_operands_that_are_not_finite_are_left_to_the_enclave(value):
    x = np.ones((2, 3), np.float32)
    y = x.copy()
    y[1, 2] = value
    (_, first), (shares, second) = blinded(x, 1), blinded(y, 2)
    assert SCHEME.inside((first, first)) is None
    inside = SCHEME.inside((first, second))
    assert inside is not None and inside[1] is y
    assert SCHEME.let_go(second).plain is None
    assert not shares[:, 0].sum(0, dtype=int).any() or shares.any()  # shares of nothing


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"pools": 2}, "pools is 3"),
        ({"pools": 3.0}, "pools is 3"),
        ({"fraction_bits": 7}, "between 8 and 28"),
        ({"fraction_bits": 29}, "between 8 and 28"),
        ({"fraction_bits": True}, "between 8 and 28"),
        ({"insecure_one_pool": 1}, "True or False"),
    ],
)
def test_parameters_out_of_range_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        SecretShares(**fields)
