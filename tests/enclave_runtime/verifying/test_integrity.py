"""The check of a product on its own: every lie is noticed, and no honest device is.

It is tried thousands of times, beside weak ones that a liar passes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.protocol.descriptions import (
    ELEMENT_ROUNDING,
    RESOLUTION,
    VECTORS,
    ProductDescription,
    block_width,
    resolution,
    rounding,
    unit_roundoff,
)
from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.verifying import integrity
from enclave_runtime.verifying.integrity import (
    Check,
    Verifier,
    WrongProductError,
    deviations,
    matches,
    multiply,
)
from tests.support.verification import (
    CASES,
    ERROR,
    FORWARD,
    V,
    W,
    X,
    altered,
    array_type,
    chain,
    planned,
    rms,
    stream,
)

DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Returned:
    """A product as an honest device returns it, and its check."""

    check: Check
    lhs: jax.Array
    rhs: jax.Array
    out: jax.Array

    @property
    def rms(self) -> float:
        return rms(self.out)

    def matches(self, out: Any) -> bool | None:
        return matches(self.check, self.lhs, self.rhs, jnp.asarray(out), stream())

    def excess(self, out: Any, signs: np.ndarray) -> float:
        operands = (self.lhs, self.rhs, jnp.asarray(out), jnp.asarray(signs))
        return float(np.max(deviations(self.check, *operands)[1]))


def returned(product: ProductDescription, lhs: Any, rhs: Any) -> Returned:
    """Multiplies honestly, in float32 at least."""
    wide = jnp.promote_types(jnp.promote_types(lhs.dtype, rhs.dtype), jnp.float32)
    types = array_type(lhs), array_type(rhs)
    untyped = Check(product, *types, ArrayType((), np.dtype(wide).name))
    out = jax.jit(lambda x, y: multiply(untyped, x, y))(lhs, rhs)
    return Returned(Check(product, *types, array_type(out)), lhs, rhs, out)


def random_case(name: str, dtype: str, seed: int = 0) -> Returned:
    product, *shapes = CASES[name]
    rng = np.random.default_rng(seed)
    lhs, rhs = (jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)
    return returned(product, lhs, rhs)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in CASES for dtype in ("float32", "float64")),
        *((name, dtype) for name in ("forward", "convolution") for dtype in DTYPES[2:]),
    ],
)
def test_one_wrong_element_is_noticed_and_none_is_not(name, dtype):
    case = random_case(name, dtype)
    rng = np.random.default_rng(1)
    for _ in range(5):
        assert case.matches(case.out) is True
        assert case.matches(altered(case.out, rng, ERROR * case.rms)) is False
        assert case.matches(altered(case.out, rng, -ERROR * case.rms)) is False


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_an_error_is_noticed_with_the_stated_probability(dtype):
    rng = np.random.default_rng(2)
    trials, missed = 3000, 0
    cases = [random_case("forward", dtype, seed) for seed in range(10)]
    for trial in range(trials):
        case = cases[trial % len(cases)]
        if trial % 2:
            wrong = altered(case.out, rng, ERROR * case.rms)
        else:  # the hardest pattern for signs: two errors that one in two vectors cancels
            wrong = np.array(case.out)
            row, (i, j) = rng.integers(0, 48), rng.choice(24, 2, replace=False)
            wrong[row, i] += ERROR * case.rms
            wrong[row, j] -= ERROR * case.rms
        missed += case.matches(wrong) is not False
    assert missed <= trials * 1e-3


def test_fewer_or_known_vectors_miss_what_the_check_notices():
    """The controls: with one vector half of the pairs pass, with known ones all do."""
    case = random_case("forward", "float32")
    rng = np.random.default_rng(3)
    wrong = np.array(case.out)
    wrong[5, 3] += case.rms
    wrong[5, 8] -= case.rms
    passed = [
        case.excess(wrong, rng.choice([-1, 1], (24, 1, 1)).astype(np.int8)) <= 1 for _ in range(200)
    ]
    assert 60 < sum(passed) < 140
    known = np.ones((24, 1, VECTORS), np.int8)
    assert case.excess(wrong, known) <= 1 and case.matches(wrong) is False


def test_signs_are_drawn_anew_and_fill_their_blocks():
    case = random_case("wide", "float32")
    first, second = (integrity.draw_signs(case.check, stream()) for _ in range(2))
    columns, blocks, vectors = first.shape
    assert columns == 1024 and vectors == VECTORS
    assert blocks == -(-1024 // case.check.width) > 1
    # Each column is in one block, with signs that differ from draw to draw.
    np.testing.assert_array_equal(np.abs(first).sum(1), 1)
    np.testing.assert_array_equal(np.abs(first[..., 0]).argmax(1), np.arange(1024) // 512)
    assert 0.45 < (first != second)[first != 0].mean() < 0.55
    assert abs(first.astype(int).sum()) < 6 * np.sqrt(1024 * VECTORS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("terms", [1, 64, 1024, 4096, 1 << 17])
def test_blocks_keep_the_resolution(terms, dtype):
    unit = unit_roundoff(dtype)
    for columns in (1, 2, 64, 1000, 4096):
        width = block_width(terms, columns, unit)
        assert 1 <= width <= columns
        assert resolution(terms, width, unit) <= RESOLUTION or width == 1
        assert width == columns or resolution(terms, 2 * width, unit) > RESOLUTION
    assert unit_roundoff("bfloat16", "float32") == unit_roundoff("float32") == 2.0**-24


def test_zeros():
    case = random_case("forward", "float32")
    zero = returned(FORWARD, 0 * case.lhs, case.rhs)
    assert zero.matches(zero.out) is True
    assert zero.matches(altered(zero.out, np.random.default_rng(0), 1e-20)) is False
    both = returned(FORWARD, 0 * case.lhs, 0 * case.rhs)
    assert both.matches(both.out) is True
    assert both.matches(altered(both.out, np.random.default_rng(0), 1e-30)) is False


@pytest.mark.parametrize("scale", [1e-14, 1e12])
def test_scale_does_not_matter(scale):
    # Squares of such values leave float32's range.
    case = random_case("forward", "float32")
    scaled = returned(FORWARD, case.lhs * scale, case.rhs * scale)
    rng = np.random.default_rng(4)
    for _ in range(20):
        assert scaled.matches(scaled.out) is True
        assert scaled.matches(altered(scaled.out, rng, ERROR * scaled.rms)) is False


def test_faint_rows_beside_strong_ones():
    case = random_case("forward", "float32")
    lhs = case.lhs * jnp.logspace(-30, 0, 48, dtype=jnp.float32)[:, None]
    faint = returned(FORWARD, lhs, case.rhs)
    assert faint.matches(faint.out) is True
    assert faint.matches(np.asarray(faint.out) * np.float32(1.01)) is False


@pytest.mark.parametrize("name", ["forward", "convolution"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(name, value):
    case = random_case(name, "float32")
    wrong = np.array(case.out)
    wrong.flat[7] = value
    assert case.matches(wrong) is False
    first = (0,) * case.lhs.ndim
    broken = returned(case.check.product, case.lhs.at[first].set(value), case.rhs)
    assert broken.matches(broken.out) is None  # nothing to compare: it is computed inside


def test_products_that_may_overflow_are_not_compared():
    case = random_case("forward", "float32")
    large = returned(FORWARD, case.lhs * 1e20, case.rhs * 1e20)
    assert large.matches(large.out) is None


@pytest.mark.parametrize("shapes", [((0, 4), (4, 3)), ((5, 0), (0, 3)), ((5, 4), (4, 0))])
def test_empty_operands_are_not_compared(shapes):
    case = returned(FORWARD, *(jnp.zeros(s, jnp.float32) for s in shapes))
    assert case.matches(case.out) is None


def test_equal_terms_round_alike_and_still_pass():
    # Each of the 1024 additions errs the same way, far beyond a random walk.
    lhs, rhs = jnp.full((8, 1024), 0.1, jnp.float32), jnp.full((1024, 512), 0.3, jnp.float32)
    exact = 1024 * np.float64(np.float32(0.1)) * np.float64(np.float32(0.3))
    partial = np.float32(0)
    for _ in range(1024):  # a device that adds up one term after another
        partial += np.float32(0.1) * np.float32(0.3)
    assert abs(partial - exact) > 1e-6 * exact
    case = dataclasses.replace(
        returned(FORWARD, lhs, rhs), out=jnp.full((8, 512), partial, jnp.float32)
    )
    # Of a fixed key: signs may cancel what is the same in every column.
    signs = integrity.draw_signs(case.check, KeyStream(bytes(32)))
    assert case.excess(case.out, signs) > 1  # suspicious, so the enclave looks closer
    assert case.matches(case.out) is True
    assert case.matches(altered(case.out, np.random.default_rng(5), ERROR * case.rms)) is False


def test_tolerance_in_a_row_that_one_element_dominates():
    """Documents what is accepted: an element's tolerance is the larger of its own and its row's."""
    plain = random_case("forward", "float32")
    case = returned(FORWARD, plain.lhs, plain.rhs.at[:, 0].multiply(1e4))
    exact = np.asarray(case.lhs, np.float64) @ np.asarray(case.rhs, np.float64)
    terms = np.square(case.lhs, dtype=np.float64) @ np.square(case.rhs, dtype=np.float64)
    energy = terms + np.square(exact)
    own = ELEMENT_ROUNDING * 2.0**-24 * np.sqrt(energy)
    (count, width), row = case.check.sizes, 5
    whole = rounding(count, width, 2.0**-24) * np.sqrt(energy[row].sum())
    large, small = 0, 7
    assert 20 * whole < own[row, large] and 20 * own[row, small] < whole

    def wrong(column: int, error: float) -> np.ndarray:
        out = np.array(case.out)
        out[row, column] += error
        return out

    rms = np.sqrt(np.mean(np.square(exact[row])))
    for sign in (-1, 1):
        for _ in range(5):
            # The element that dominates: seen by the signs, and let pass by the closer look.
            much = wrong(large, sign * 0.9 * own[row, large])
            assert case.excess(much, integrity.draw_signs(case.check, stream())) > 10
            assert case.matches(much) is True
            assert case.matches(wrong(large, sign * 1.1 * own[row, large])) is False
            # One beside it: below the row's tolerance, not seen even if it is wrong altogether.
            assert case.matches(wrong(small, sign * 0.5 * whole)) is True
            assert case.matches(wrong(small, sign * 2 * whole)) is False
    assert 0.9 * own[row, large] > RESOLUTION * rms  # so the row's RMS alone bounds nothing


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", ["wide", "grouped", "kernel's gradient"])
def test_a_closer_look_decides_like_the_check(monkeypatch, name, dtype):
    monkeypatch.setattr(integrity, "_compiled", lambda check: lambda *_: (True, False))
    case = random_case(name, dtype)
    rng = np.random.default_rng(6)
    assert case.matches(case.out) is True
    for _ in range(5):
        assert case.matches(altered(case.out, rng, ERROR * case.rms)) is False


def test_verifier_keeps_copies_until_the_last_use():
    program = planned(chain, X, W, V).program
    verifier = Verifier(program)
    sent = {c.value: c for s in program.segments for c in s.downloads if c.layout.keyed}
    uploads = [(i, c) for i, s in enumerate(program.segments) for c in s.uploads]
    for crossing in sent.values():
        out = integrity.private(crossing.blinded)
        assert out.ctypes.data % 64 == 0 and array_type(out) == crossing.blinded
        out[...] = 1
        verifier.keep(crossing, out)
    assert repr(verifier) == "Verifier(2 products, <secret>)"
    for index, crossing in uploads:
        verifier.forget(index)
        operands = [np.ones(sent[v].blinded.shape) for v in crossing.operands or ()]
        right = operands[0] @ operands[1]
        assert verifier.checked(crossing, right, stream) is right
        with pytest.raises(WrongProductError, match=r"product: dot_general .* at \w+\.py:\d+\."):
            verifier.checked(crossing, 1.01 * right, stream)
    verifier.forget(len(program.segments))
    with pytest.raises(KeyError):
        verifier.checked(uploads[0][1], right, stream)


@pytest.mark.parametrize("name", ["forward", "batched", "convolution"])
@pytest.mark.parametrize("value", [1e100, 1e155, 1e200, 1e307])
def test_nothing_passes_by_its_size(name, value):
    # What comes back counts for the tolerance, so that its squares must not overflow.
    case = random_case(name, "float64")
    assert case.matches(np.full_like(case.out, value)) is False
    assert case.matches(altered(case.out, np.random.default_rng(0), value)) is False


@pytest.mark.parametrize("scales", [(1e100, 1e100), (1e200, 1e-150), (1e-100, 1e-100)])
def test_squares_that_leave_float64_do_not_matter(scales):
    case = random_case("forward", "float64")
    scaled = returned(FORWARD, case.lhs * scales[0], case.rhs * scales[1])
    rng = np.random.default_rng(8)
    for _ in range(20):
        assert scaled.matches(scaled.out) is True
        error = ERROR * case.rms * scales[0] * scales[1]
        assert scaled.matches(altered(scaled.out, rng, error)) is False
