"""The checksums' arithmetic: honest devices pass, and every lie about a leaf is noticed.

It is tried on its own over hundreds of updates and thousands of lies.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enclave_runtime.protocol import updates
from enclave_runtime.protocol.descriptions import (
    DotGeneral,
    checksum_limit,
    checksum_resolution,
    checksum_width,
)
from enclave_runtime.protocol.updates import Update
from enclave_runtime.verifying import checksum
from enclave_runtime.verifying.checksum import (
    MAX_FAILURES,
    NotComparableError,
    Signs,
    Sketch,
    SpentSignsError,
    leaf_matches,
    leaf_use,
)
from enclave_runtime.verifying.follower import Follower
from enclave_runtime.verifying.integrity import WrongProductError
from tempo_jax.schemes import SignedPermutation
from tests.support.verification import (
    ERROR,
    FORWARD,
    TO_WEIGHT,
    array_type,
    one_element,
    planned_training,
    rms,
    stream,
)

RIGHT, LEFT = (1,), (0,)  # the projections of a matrix


def sketched(x: Any, axes: tuple[int, ...]) -> Sketch:
    x = np.asarray(x)
    return checksum.sketch(Signs(array_type(x), axes, stream()), x, axes)


class Device:
    """A weight with momentum on a device, in float32, beside the sketches that follow it."""

    def __init__(self, rate: float, seed: int = 0, shape: tuple[int, int] = (48, 40)):
        self.rng = np.random.default_rng(seed)
        self.rate = np.float32(rate)
        self.weight = self.rng.standard_normal(shape).astype(np.float32)
        self.momentum = np.zeros_like(self.weight)
        self.sketches = {axes: sketched(self.weight, axes) for axes in (RIGHT, LEFT)}
        self.moments = {
            axes: checksum.sketch(s.signs, self.momentum, axes) for axes, s in self.sketches.items()
        }

    def step(self, coherent: bool = False) -> None:
        rows, columns = self.weight.shape
        x = self.rng.standard_normal((16, rows)).astype(np.float32)
        g = self.rng.standard_normal((16, columns)).astype(np.float32)
        if coherent:
            x, g = np.abs(x), np.abs(g)
        decay, rate = np.float32(0.9), self.rate
        gradient = np.asarray(jnp.asarray(x).T @ jnp.asarray(g))
        self.momentum = decay * self.momentum + gradient
        self.weight = self.weight - rate * self.momentum
        product = update(updates.PRODUCT, (1, 2), self.weight.shape, product=TO_WEIGHT)
        for axes in (RIGHT, LEFT):
            signs = self.sketches[axes].signs
            made = checksum.product_sketch(signs, product, (jnp.asarray(x), jnp.asarray(g)), axes)
            kept = self.apply(updates.SCALE, [self.moments[axes]], axes, float(decay))
            moved = self.moments[axes] = self.apply(updates.ADD, [kept, made], axes)
            scaled = self.apply(updates.SCALE, [moved], axes, float(rate))
            self.sketches[axes] = self.apply(updates.SUB, [self.sketches[axes], scaled], axes)

    def apply(self, kind: str, operands: Any, axes: Any, factor: float = 1.0) -> Sketch:
        return checksum.apply(update(kind, (1,), self.weight.shape), operands, axes, factor)

    def passes(self) -> bool:
        kept = zip((self.sketches, self.moments), (self.weight, self.momentum), strict=True)
        return all(leaf_matches(s, x, axes) for held, x in kept for axes, s in held.items())

    def product_passes(self, error: float = 0.0) -> bool:
        x = self.rng.standard_normal((12, self.weight.shape[0])).astype(np.float32)
        return forward_passes(self.sketches[RIGHT], self.weight, x, error, self.rng)


def update(kind: str, operands: tuple[int, ...], shape: tuple[int, ...], **options: Any) -> Update:
    return Update(9, kind, operands, shape, "float32", **options)


def forward_passes(
    leaf: Sketch, weight: np.ndarray, x: np.ndarray, error: float, rng: np.random.Generator
) -> bool:
    """Whether ``x weight`` passes with one element wrong by so much of its row's RMS."""
    out = np.array(jnp.asarray(x) @ jnp.asarray(weight))
    row = rng.integers(0, out.shape[0])
    out[row, rng.integers(0, out.shape[1])] += error * rms(out[row])
    use = leaf_use(FORWARD, (2, 2), 1)
    leaf.signs.failures = 0  # each is tried as if it were the first
    try:
        checksum.check_product(use, leaf, weight.shape, jnp.asarray(x), jnp.asarray(out), "here")
    except WrongProductError:
        return False
    return True


@pytest.mark.parametrize("coherent", [False, True])
@pytest.mark.parametrize("rate", [1e-1, 1e-3, 1e-6, 1e-8, 1e-10])
def test_honest_devices_pass_over_hundreds_of_updates(rate, coherent):
    # The smallest rates change less than the last place, so that whole updates get lost.
    device = Device(rate)
    for number in range(300):
        device.step(coherent)
        if number % 10 == 0:
            assert device.passes() and device.product_passes()
    assert device.passes() and device.product_passes()


def test_lost_updates_are_noticed_as_long_as_they_exceed_rounding():
    """The control: the same tolerance refuses a device that leaves one update out."""
    device = Device(1e-3)
    for _ in range(7):
        device.step()
    before = device.weight
    device.step()
    assert device.passes()
    device.weight = before
    assert not device.passes()


@pytest.mark.parametrize("side", [RIGHT, LEFT])
def test_wrong_elements_escape_with_the_stated_probability(side):
    rng = np.random.default_rng(1)
    missed, trials = 0, 3000
    weight = rng.standard_normal((64, 48)).astype(np.float32)
    for trial in range(trials):
        if trial % 10 == 0:
            leaf = sketched(weight, side)
        wrong = weight.copy()
        row, (i, j) = rng.integers(0, 48), rng.choice(48, 2, replace=False)
        wrong[row, i] += ERROR * rms(weight)
        if trial % 2:  # the hardest pattern for signs: two errors that cancel in half of them
            wrong[row, j] -= ERROR * rms(weight)
        missed += leaf_matches(leaf, wrong, side)
    assert missed <= trials * 1e-3


def test_wrong_products_escape_with_the_stated_probability():
    rng = np.random.default_rng(2)
    device = Device(1e-3, shape=(256, 128))
    signs = device.sketches[RIGHT].signs
    for _ in range(signs.limit - 1):  # as far as it may drift
        device.step()
    x = rng.standard_normal((8, 256)).astype(np.float32)
    leaf = device.sketches[RIGHT]
    assert all(forward_passes(leaf, device.weight, x, 0.0, rng) for _ in range(20))
    missed = sum(forward_passes(leaf, device.weight, x, ERROR, rng) for _ in range(1000))
    assert missed <= 1
    assert checksum_resolution(256, signs.width, 2.0**-24) < ERROR


def test_known_signs_would_miss_what_secret_ones_notice():
    weight = np.random.default_rng(3).standard_normal((8, 6)).astype(np.float32)
    signs = Signs(array_type(weight), RIGHT, stream())
    wrong = weight.copy()
    wrong[2, 1] += 1
    wrong[2, 4] -= 1
    assert not leaf_matches(checksum.sketch(signs, weight, RIGHT), wrong, RIGHT)
    signs.matrix = np.abs(signs.matrix)
    assert leaf_matches(checksum.sketch(signs, weight, RIGHT), wrong, RIGHT)


@pytest.mark.parametrize("terms", [1, 16, 256, 1024, 4096, 1 << 16])
@pytest.mark.parametrize("columns", [1, 16, 100, 1024])
def test_tolerance_stays_below_what_is_promised(terms, columns):
    for unit in (2.0**-24, 2.0**-53):
        width = checksum_width(terms, columns, unit)
        assert 1 <= width <= min(columns, 128)
        assert 1 <= checksum_limit(terms, width, unit) <= 16
        assert checksum_resolution(terms, width, unit) < ERROR or width == 1
    assert checksum_limit(256, 128, 2.0**-24) == 8
    assert checksum_limit(1024, 128, 2.0**-24) == 4
    assert checksum_limit(1024, 128, 2.0**-53) == 16


@pytest.mark.parametrize(
    ("product", "lhs", "rhs"),
    [
        (FORWARD, (9, 7), (7, 6)),
        (TO_WEIGHT, (9, 7), (9, 6)),
        (DotGeneral(((1,), (1,)), ((0,), (0,))), (2, 9, 7), (2, 9, 6)),
        (DotGeneral(((0, 1), (0, 1)), ((), ())), (3, 4, 5), (3, 4, 2, 6)),
    ],
)
def test_sketch_of_a_product_is_the_products(product, lhs, rhs):
    rng = np.random.default_rng(4)
    left, right = (jnp.asarray(rng.standard_normal(s)) for s in (lhs, rhs))
    numbers = (product.contract, product.batch)
    out = np.asarray(jax.lax.dot_general(left, right, numbers))
    for which in (0, 1):
        axes, _ = updates.free_axes(product, (left.ndim, right.ndim), which)
        for chosen in (axes, axes[:1]):
            signs = Signs(array_type(out), chosen, stream())
            made = dataclasses.replace(
                update(updates.PRODUCT, (1, 2), out.shape, product=product), dtype="float64"
            )
            sketch = checksum.product_sketch(signs, made, (left, right), chosen)
            expected = checksum.sketch(signs, out, chosen)
            np.testing.assert_allclose(sketch.values, expected.values, atol=1e-12)
            assert leaf_matches(sketch, out, chosen)


def test_layouts_are_followed():
    x = np.random.default_rng(5).standard_normal((3, 4, 5))
    for axes in ((0,), (1,), (2,), (0, 2), (2, 1)):
        turned = update(updates.TRANSPOSE, (1,), (5, 3, 4), axes=(2, 0, 1))
        sketch = sketched(x, updates.before(turned, axes))
        out = checksum.apply(turned, [sketch], axes, 1.0)
        expected = checksum.sketch(sketch.signs, np.transpose(x, (2, 0, 1)), axes)
        np.testing.assert_allclose(out.values, expected.values, atol=1e-12)
    reversed_ = update(updates.REVERSE, (1,), x.shape, axes=(0, 2))
    sketch = sketched(x, RIGHT)
    out = checksum.apply(reversed_, [sketch], RIGHT, 1.0)
    expected = checksum.sketch(sketch.signs, np.flip(x, (0, 2)), RIGHT)
    np.testing.assert_allclose(out.values, expected.values, atol=1e-12)


def test_nothing_secret_shows():
    sketch = sketched(np.ones((3, 2)), RIGHT)
    assert repr(sketch) == "Sketch([3, 16], <secret>)" and repr(sketch.signs) == "Signs(<secret>)"
    program = planned_training(SignedPermutation()).program
    assert repr(Follower(program)) == f"Follower({len(program.updates)} updates, <secret>)"


def test_a_leaf_is_given_up_after_too_many_lies():
    held = {RIGHT: sketched(np.ones((3, 2), np.float32), RIGHT)}
    checksum.check_leaf(held, np.ones((3, 2), np.float32), "here")
    for _ in range(MAX_FAILURES):
        with pytest.raises(WrongProductError, match="wrong leaf: here"):
            checksum.check_leaf(held, np.zeros((3, 2), np.float32), "here")
    assert held[RIGHT].signs.spent
    with pytest.raises(WrongProductError, match="8 wrong values .* here. It is given up"):
        checksum.check_leaf(held, np.ones((3, 2), np.float32), "here")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e38])
def test_values_that_are_not_finite_stop_the_run_and_are_no_lie(value):
    # 1e38 itself is finite, and what an honest device makes of it is not.
    weight = np.full((4, 3), 8, np.float32)
    x = np.ones((2, 4), np.float32)
    x[1, 1] = value
    leaf, use = sketched(weight, RIGHT), leaf_use(FORWARD, (2, 2), 1)
    with np.errstate(over="ignore", invalid="ignore"):
        honest = x @ weight
    assert not np.isfinite(honest).all()
    # The answer depends on nothing that came back, so it tells nothing of the signs.
    for out in (honest, np.zeros_like(honest), np.full_like(honest, np.nan)):
        with pytest.raises(NotComparableError, match="an operand is not finite.*: here"):
            checksum.check_product(use, leaf, (4, 3), jnp.asarray(x), jnp.asarray(out), "here")
    assert leaf.signs.failures == 0
    clean = jnp.ones((2, 4), jnp.float32)
    checksum.check_product(use, leaf, (4, 3), clean, clean @ weight, "here")


@pytest.mark.parametrize("factor", [np.inf, np.nan, 1e39])
def test_a_leaf_that_an_honest_device_cannot_keep_finite_is_no_lie(factor):
    # In float32 the leaf is not finite; its sketch, in float64, need not show it.
    weight = np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32)
    leaf = sketched(weight, RIGHT).rounded(2.0**-24)
    scaled = checksum.apply(update(updates.SCALE, (1,), (24, 16)), [leaf], RIGHT, factor)
    with np.errstate(over="ignore"):
        honest = (weight * factor).astype(np.float32)
    assert not np.isfinite(honest).any()
    for content in (honest, weight, np.zeros_like(weight)):
        with pytest.raises(NotComparableError, match="a leaf is not finite.*: here"):
            checksum.check_leaf({RIGHT: scaled}, content, "here")
    assert scaled.signs.failures == 0
    checksum.check_leaf({RIGHT: leaf}, weight, "here")


def float64_leaf(scale: float = 1.0) -> tuple[Sketch, np.ndarray, np.ndarray]:
    """The sketch of a leaf, the leaf, and an operand of a product with it."""
    rng = np.random.default_rng(6)
    weight = scale * rng.standard_normal((24, 16))
    return sketched(weight, RIGHT), weight, scale * rng.standard_normal((8, 24))


@pytest.mark.parametrize("value", [1e100, 1e155, 1e200, 1e307, np.inf, -np.inf, np.nan])
def test_nothing_passes_by_its_size(value):
    # What comes back counts for the tolerance, so that its squares must not overflow.
    leaf, weight, x = float64_leaf()
    wrong = weight.copy()
    wrong[3] = value
    assert not leaf_matches(leaf, np.full_like(weight, value), RIGHT)
    assert not leaf_matches(leaf, wrong, RIGHT)
    use = leaf_use(FORWARD, (2, 2), 1)
    for out in (np.full((8, 16), value), np.where(np.arange(16) == 3, value, x @ weight)):
        leaf.signs.failures = 0
        with pytest.raises(WrongProductError, match="wrong product: here"):
            checksum.check_product(
                *(use, leaf, weight.shape, jnp.asarray(x), jnp.asarray(out), "here")
            )
        assert leaf.signs.failures == 1


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_large_and_small_leaves_are_held_to_the_same(scale):
    # Squares of such products leave float64's range.
    leaf, weight, x = float64_leaf(scale)
    assert leaf_matches(leaf, weight, RIGHT)
    assert not leaf_matches(leaf, scale * one_element(weight / scale), RIGHT)
    use, operand, out = leaf_use(FORWARD, (2, 2), 1), jnp.asarray(x), x @ weight
    checksum.check_product(use, leaf, weight.shape, operand, jnp.asarray(out), "here")
    out[5, 7] += ERROR * rms(out / scale**2) * scale**2
    with pytest.raises(WrongProductError, match="wrong product: here"):
        checksum.check_product(use, leaf, weight.shape, operand, jnp.asarray(out), "here")


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_leaf_that_was_never_finite_is_not_taken(value):
    leaf, weight, x = float64_leaf()
    rounded = leaf.rounded(2.0**-53)
    scaled = checksum.apply(update(updates.SCALE, (1,), (24, 16)), [rounded], RIGHT, value)
    assert not np.isfinite(scaled.drift).any()
    for content in (weight, value * weight, np.full_like(weight, value)):
        assert not leaf_matches(scaled, content, RIGHT)


def test_products_whose_tolerance_overflows_are_not_taken():
    leaf, weight, x = float64_leaf()
    leaf = leaf._replace(drift=np.full_like(leaf.drift, 1e308))
    arguments = (weight.shape, jnp.asarray(1e3 * x), jnp.asarray(1e3 * x @ weight), "here")
    with pytest.raises(WrongProductError, match="too large, so that nothing can be checked: here"):
        checksum.check_product(leaf_use(FORWARD, (2, 2), 1), leaf, *arguments)


def test_a_division_by_a_zero_that_was_sent_is_refused_as_not_finite():
    leaf, weight, x = float64_leaf()
    leaf = leaf.rounded(2.0**-53)
    divided = checksum.apply(update(updates.DIVIDE, (1, 2), (24, 16)), [leaf], RIGHT, 0.0)
    with np.errstate(divide="ignore"):
        content = weight / 0.0
    assert not leaf_matches(divided, content, RIGHT)
    with pytest.raises(WrongProductError, match="an operand is not finite"):
        checksum.check_product(
            *(leaf_use(FORWARD, (2, 2), 1), divided, weight.shape),
            *(jnp.asarray(x), jnp.asarray(x @ weight), "here"),
        )


def test_the_first_failure_spends_signs_for_products():
    leaf, weight, x = float64_leaf()
    use, operand, out = leaf_use(FORWARD, (2, 2), 1), jnp.asarray(x), jnp.asarray(x @ weight)
    checksum.check_product(use, leaf, weight.shape, operand, out, "here")
    with pytest.raises(WrongProductError, match="wrong product: here"):
        checksum.check_product(use, leaf, weight.shape, operand, 2 * out, "here")
    for tried in (out, 2 * out):
        with pytest.raises(SpentSignsError, match="came back before: here.* Call again"):
            checksum.check_product(use, leaf, weight.shape, operand, tried, "here")
    assert leaf.signs.failures == 1
    checksum.check_leaf({RIGHT: leaf}, weight, "here")  # it can still be brought in
