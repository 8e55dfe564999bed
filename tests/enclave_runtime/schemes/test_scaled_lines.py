"""Lengths and factors of rows and columns, in one pass over memory."""

import numpy as np
import pytest

from enclave_runtime.schemes.kernels.lines import Factors, lengths, scaled

SHAPES = [(1, 1), (5, 7), (3, 130, 67), (1, 0, 4), (2, 16, 8), (700, 1100)]


def drawn(shape, dtype, copies, largest):
    rng = np.random.default_rng(len(shape) + shape[-1])
    powers = [rng.integers(-largest, largest + 1, (copies, n)) for n in shape[-2:]]
    factors = Factors(*(np.ldexp(1.0, p) for p in powers))
    return rng.standard_normal(shape).astype(dtype), factors


def expected(x, factors):
    rows, columns = (f if x.ndim > 2 else f[0] for f in factors)
    return x.astype(np.float64) * (rows[..., :, None] * columns[..., None, :])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alike", [True, False])
def test_factors_are_exact_and_lengths_are_those_of_the_result(shape, dtype, alike):
    copies = 1 if alike or len(shape) == 2 else shape[0]
    x, factors = drawn(shape, dtype, copies, 60)
    before, wide = x.copy(), expected(x, factors)
    result, found = scaled(x, factors)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, wide.astype(dtype))
    np.testing.assert_array_equal(x, before)
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    for each in (found, lengths(x, factors)):
        np.testing.assert_allclose(each.rows, np.sqrt(np.square(wide).sum(-1)), rtol=tolerance)
        np.testing.assert_allclose(each.columns, np.sqrt(np.square(wide).sum(-2)), rtol=tolerance)


def test_lengths_that_float32_has_no_squares_for():
    x = np.ones((40, 24), np.float32)
    x[3], x[:, 5] = 1e-30, 1e25
    wide = x.astype(np.float64)
    found = lengths(x)
    np.testing.assert_allclose(found.rows, np.sqrt(np.square(wide).sum(1)), rtol=1e-6)
    np.testing.assert_allclose(found.columns, np.sqrt(np.square(wide).sum(0)), rtol=1e-6)
    x = np.zeros((3, 4), np.float32)
    x[1] = 1e-30
    assert (lengths(x).rows > 0).tolist() == [False, True, False]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_lengths_of_lines_that_are_not_finite(value):
    x = np.ones((300, 20), np.float32)
    x[7, 19] = value
    found = lengths(x)
    assert (~np.isfinite(found.rows)).nonzero()[0].tolist() == [7]
    assert (~np.isfinite(found.columns)).nonzero()[0].tolist() == [19]


def test_many_rows_add_up_as_in_float64():
    x = np.full((200_000, 9), 0.1, np.float32)
    np.testing.assert_allclose(lengths(x).columns, np.sqrt(2000) * np.ones(9), rtol=1e-6)


def test_read_only_arrays_are_taken():
    x = np.ones((4, 4))
    x.flags.writeable = False
    np.testing.assert_array_equal(
        scaled(x, Factors(np.ones((1, 4)), 2 * np.ones((1, 4))))[0], 2 * x
    )
