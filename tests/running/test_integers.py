"""Exact products of 8-bit integers: long sums, and every kind of convolution."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tempo_jax.jaxprs import equations
from tempo_jax.running.integers import LARGEST, TERMS, multiply


def conv(strides: Any = (1, 1), padding: Any = "SAME", **options: Any) -> Any:
    numbers = options.pop("numbers", ("NHWC", "HWIO", "NHWC"))
    return lambda x, w: lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=numbers, **options
    )


def dot(contract: Any, batch: Any = ((), ())) -> Any:
    return lambda x, w: lax.dot_general(x, w, (contract, batch))


# A weight's gradient sums over the batch, which then counts as the features.
GRADIENT = lax.ConvDimensionNumbers((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1))
CASES = {
    "matrices": (dot(((1,), (0,))), (5, 70), (70, 4)),
    "long sums": (dot(((1,), (0,))), (3, 2 * TERMS + 5), (2 * TERMS + 5, 4)),
    "long, transposed": (dot(((0,), (1,))), (TERMS + 1, 3), (4, TERMS + 1)),
    "two axes, batched": (
        dot(((1, 3), (3, 0)), ((0,), (2,))),
        (2, 40, 3, 50),
        (50, 4, 2, 40),
    ),
    "convolution": (conv((2, 1)), (2, 5, 6, 3), (3, 3, 3, 4)),
    "many features": (conv(), (2, 4, 4, 150), (3, 3, 150, 4)),
    "many features in groups": (
        conv(feature_group_count=2),
        (1, 3, 3, 300),
        (3, 3, 150, 4),
    ),
    "dilated": (
        conv((1, 2), ((2, -1), (0, 3)), lhs_dilation=(2, 1), rhs_dilation=(1, 2)),
        (2, 5, 6, 130),
        (3, 3, 130, 4),
    ),
    "a weight's gradient": (
        conv(padding=((1, 1), (1, 1)), numbers=GRADIENT),
        (9, 16, 16, 3),
        (9, 16, 16, 4),
    ),
    "a window too large for float32": (
        conv(padding=((1, 1), (1, 1)), numbers=GRADIENT),
        (2, 36, 36, 2),
        (2, 36, 36, 3),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_product_is_exact(name):
    product, *shapes = CASES[name]
    rng = np.random.default_rng(2)
    # All of one sign and large, so that every sum is as large as it can be.
    x, w = (rng.integers(LARGEST - 1, LARGEST + 1, s) for s in shapes)
    structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    jaxpr = jax.make_jaxpr(product)(*structs).jaxpr
    (eqn,) = equations.equations(jaxpr)
    expected = product(jnp.asarray(x, jnp.float64), jnp.asarray(w, jnp.float64))
    found = jax.jit(lambda x, w: multiply(eqn, x, w))(jnp.int8(x), jnp.int8(w))
    assert found.dtype == jnp.int32 and found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


def test_float32_would_not_do_for_longer_sums():
    exact = LARGEST**2 * (TERMS // 2 * 2 + 3)  # odd
    assert exact > 2**24 and int(np.float32(exact)) != exact
    assert LARGEST**2 * TERMS < 2**24
