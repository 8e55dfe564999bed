"""Checksums of leaves on the devices: honest devices pass, and every lie about a leaf is noticed.

The arithmetic is tried on its own over hundreds of updates and thousands of lies; then whole
steps run against a real enclave, with devices that leave updates out, falsify or repeat them.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tempo_jax as tempo
from enclave_runtime import checksum, updates
from enclave_runtime.checksum import (
    MAX_FAILURES,
    Signs,
    Sketch,
    SpentSignsError,
    leaf_matches,
    leaf_use,
)
from enclave_runtime.following import Follower, check_program
from enclave_runtime.integrity import IntegrityError
from enclave_runtime.keys import KeySchedule, KeyStream
from enclave_runtime.products import (
    DotGeneral,
    checksum_limit,
    checksum_resolution,
    checksum_width,
)
from enclave_runtime.program import ArrayType, Program, ProgramError
from enclave_runtime.updates import Update
from tempo_jax import errors
from tempo_jax._runtime import Runtime
from tempo_jax._sealed import SealedArray, is_sealed
from tempo_jax.schemes import Orthogonal, SignedPermutation, Tempo
from tests.interpreter import plan
from tests.steps import assert_close, comparable, uniform

ERROR = 1e-3  # of an RMS: what is promised to be noticed
SCHEDULE = KeySchedule()
STREAMS = iter(range(1 << 30))
RIGHT, LEFT = (1,), (0,)  # the projections of a matrix
FORWARD = DotGeneral(((1,), (0,)), ((), ()))
TO_INPUT = DotGeneral(((1,), (1,)), ((), ()))
TO_WEIGHT = DotGeneral(((0,), (0,)), ((), ()))


def stream() -> KeyStream:
    return SCHEDULE.stream("test", next(STREAMS))


def array_type(x: Any) -> ArrayType:
    return ArrayType(tuple(x.shape), np.dtype(x.dtype).name)


def rms(x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def sketched(x: Any, axes: tuple[int, ...]) -> Sketch:
    x = np.asarray(x)
    return checksum.sketch(Signs(array_type(x), axes, stream()), x, axes)


# The arithmetic on its own


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
    except IntegrityError:
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
    program = planned(SignedPermutation()).program
    assert repr(Follower(program)) == f"Follower({len(program.updates)} updates, <secret>)"


def test_a_leaf_is_given_up_after_too_many_lies():
    held = {RIGHT: sketched(np.ones((3, 2), np.float32), RIGHT)}
    checksum.check_leaf(held, np.ones((3, 2), np.float32), "here")
    for _ in range(MAX_FAILURES):
        with pytest.raises(IntegrityError, match="wrong leaf: here"):
            checksum.check_leaf(held, np.zeros((3, 2), np.float32), "here")
    assert held[RIGHT].signs.spent
    with pytest.raises(IntegrityError, match="8 wrong values .* here. It is given up"):
        checksum.check_leaf(held, np.ones((3, 2), np.float32), "here")


def test_values_that_are_not_finite_stop_the_run():
    weight = np.ones((4, 3), np.float32)
    x = jnp.ones((2, 4), jnp.float32).at[1, 1].set(jnp.inf)
    with pytest.raises(IntegrityError, match="an operand is not finite.*: here"):
        checksum.check_product(
            *(leaf_use(FORWARD, (2, 2), 1), sketched(weight, RIGHT), (4, 3), x, x @ weight, "here")
        )


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
        with pytest.raises(IntegrityError, match="wrong product: here"):
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
    with pytest.raises(IntegrityError, match="wrong product: here"):
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
    with pytest.raises(IntegrityError, match="too large, so that nothing can be checked: here"):
        checksum.check_product(leaf_use(FORWARD, (2, 2), 1), leaf, *arguments)


def test_a_division_by_a_zero_that_was_sent_is_refused_as_not_finite():
    leaf, weight, x = float64_leaf()
    leaf = leaf.rounded(2.0**-53)
    divided = checksum.apply(update(updates.DIVIDE, (1, 2), (24, 16)), [leaf], RIGHT, 0.0)
    with np.errstate(divide="ignore"):
        content = weight / 0.0
    assert not leaf_matches(divided, content, RIGHT)
    with pytest.raises(IntegrityError, match="an operand is not finite"):
        checksum.check_product(
            *(leaf_use(FORWARD, (2, 2), 1), divided, weight.shape),
            *(jnp.asarray(x), jnp.asarray(x @ weight), "here"),
        )


def test_the_first_failure_spends_signs_for_products():
    leaf, weight, x = float64_leaf()
    use, operand, out = leaf_use(FORWARD, (2, 2), 1), jnp.asarray(x), jnp.asarray(x @ weight)
    checksum.check_product(use, leaf, weight.shape, operand, out, "here")
    with pytest.raises(IntegrityError, match="wrong product: here"):
        checksum.check_product(use, leaf, weight.shape, operand, 2 * out, "here")
    for tried in (out, 2 * out):
        with pytest.raises(SpentSignsError, match="came back before: here.* Call again"):
            checksum.check_product(use, leaf, weight.shape, operand, tried, "here")
    assert leaf.signs.failures == 1
    checksum.check_leaf({RIGHT: leaf}, weight, "here")  # it can still be brought in


# What a program may say


def training(tx: optax.GradientTransformation) -> tuple[Callable[..., Any], Any, Any]:
    """A step of a small MLP, its state and a batch."""
    tx = tempo.cheap_update(tx)

    def step(state: Any, x: Any) -> Any:
        params, optimizer = state

        def loss_of(params: Any) -> Any:
            hidden = jnp.tanh(x @ params["first"] + params["bias"])
            return jnp.mean((jnp.tanh(hidden @ params["second"])) ** 2)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        changes, optimizer = tx.update(gradients, optimizer, params)
        return (optax.apply_updates(params, changes), optimizer), tempo.reveal(loss)

    params = {"first": uniform(1, 12, 10), "bias": uniform(2, 10), "second": uniform(3, 10, 8)}
    return step, (params, tx.init(params)), uniform(4, 14, 12)


MOMENTUM = optax.sgd(0.1, momentum=0.9)


def planned(scheme: Any, tx: Any = MOMENTUM) -> Any:
    step, state, x = training(tx)
    return plan(step, state, x, stateful=True, scheme=scheme, verify=True).plan


@pytest.fixture
def fields() -> Any:
    """A description that follows leaves, as it crosses."""
    program = planned(SignedPermutation()).program
    named = tuple(dataclasses.replace(s, executable="0" * 64) for s in program.segments)
    program = dataclasses.replace(program, segments=named)
    decoded = json.loads(json.dumps(program.encode()))
    assert Program.decode(decoded) == program
    check_program(program)
    return json.loads(json.dumps(program.encode()))


def first(fields: Any, kind: str) -> Any:
    return next(u for u in fields["updates"] if u["kind"] == kind)


def leaf_port(fields: Any, ports: str = "inputs") -> Any:
    return next(p for p in fields[ports] if p["place"] == "device")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: first(f, "add").update(kind="max"), "unknown kind"),
        (lambda f: first(f, "add").update(operands=[1]), "another number of operands"),
        (lambda f: first(f, "add").update(operands=[1 << 20] * 2), "cannot be followed"),
        (lambda f: first(f, "add").update(shape=[2, 2]), "operands' shape"),
        (lambda f: first(f, "add").update(dtype="bfloat16"), "too few digits"),
        (lambda f: first(f, "add").update(product={}), "do not agree"),
        (lambda f: first(f, "product").update(product=None), "do not agree"),
        (lambda f: first(f, "product").update(operands=[0, 0]), "what was not sent"),
        (lambda f: first(f, "product").update(source="x" * 1001), "source is too long"),
        (lambda f: first(f, "scale").update(factor=float("nan")), "not finite"),
        (lambda f: first(f, "scale").update(factor="2"), "not a number"),
        (
            lambda f: first(f, "scale").update(
                factor=None, operands=[first(f, "scale")["operands"][0], 1 << 20]
            ),
            "does not send",
        ),
        (lambda f: first(f, "scale").update(kind="divide", factor=0.0), "divides by zero"),
        (lambda f: first(f, "transpose").update(axes=[0, 0]), "are not an order"),
        (lambda f: first(f, "transpose").update(kind="reverse", axes=[0, 5]), "not there"),
        (lambda f: f["updates"].reverse(), "cannot be followed"),
        (lambda f: f["updates"].append(f["updates"][-1]), "makes what is there"),
        (lambda f: f.update(updates=f["updates"] * 70000), "too many updates"),
        (lambda f: f.update(updates=None), "updates"),
        (lambda f: leaf_port(f).update(projections=[]), "nothing checks it"),
        (lambda f: leaf_port(f).update(projections=[[0]]), "lacks a projection"),
        (lambda f: leaf_port(f).update(projections=[[0, 0]]), "names an axis twice"),
        (lambda f: leaf_port(f).update(projections=[[]]), "has no axis"),
        (lambda f: leaf_port(f).update(projections=[[0], [0]]), "a projection twice"),
        (lambda f: leaf_port(f).update(projections=[[2]]), "an axis"),
        (lambda f: leaf_port(f).update(projections=[[0]] * 9), "too many projections"),
        (lambda f: leaf_port(f, "outputs").update(value=1 << 20), "is not followed"),
        (lambda f: leaf_port(f, "outputs").update(projections=[[0, 1]]), "crosses a product"),
        (lambda f: f.update(verify=False), "does not verify"),
    ],
)
def test_malformed_updates_are_refused(fields, change, message):
    change(fields)
    with pytest.raises(ProgramError, match=message):
        Program.decode(fields)


def test_products_that_do_not_fit_are_refused(fields):
    first(fields, "product")["product"]["contract"] = [[1], [1]]
    with pytest.raises(ProgramError, match="does not fit|result's type"):
        check_program(Program.decode(fields))


@pytest.mark.parametrize("scheme", [SignedPermutation(), Orthogonal(4), Tempo()])
def test_leaves_stay_on_the_devices(scheme):
    made = planned(scheme)
    matrices = {i for i, v in enumerate(made.jaxpr.invars[:-1]) if v.aval.ndim == 2}
    assert made.placement.resident == matrices and len(matrices) == 4
    sent = {v for s in made.cut.segments for v in s.downloads}
    products = {u.source for u in made.program.updates if u.product}
    assert len(products) == 2 and all("dot_general" in s for s in products)
    assert sent and made.program.needs()


@pytest.mark.parametrize(
    ("tx", "reason"),
    [
        (optax.adam(0.1), "integer_pow: verify=True follows linear updates"),
        (optax.chain(optax.clip(1.0), optax.sgd(0.1)), "verify=True follows linear updates"),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "square: verify=True"),
    ],
)
def test_what_cannot_be_followed_stays_inside(tx, reason):
    made = planned(SignedPermutation(), tx)
    assert not made.placement.resident and not made.program.updates
    first, second = made.placement.reasons[1], made.placement.reasons[2]
    assert reason in first and reason in second


def test_narrow_leaves_stay_inside():
    step, state, x = training(optax.sgd(0.1))
    narrow = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (state, x))
    made = plan(step, *narrow, stateful=True, scheme=SignedPermutation(), verify=True).plan
    assert not made.placement.resident
    assert "16-bit formats round more" in made.placement.reasons[1]


# Whole steps


@pytest.fixture(scope="module")
def watchful() -> Iterator[tempo.Enclave]:
    """An enclave of this module's own: it counts the lies it was told."""
    key = tempo.CheckpointKey.generate()
    with tempo.Enclave.launch(checkpoint_key=key) as running:
        yield running


def shielded(enclave: tempo.Enclave, step: Any, scheme: Any = None, **options: Any) -> Any:
    options = {"verify": True, "offload": "all", **options}
    return tempo.shield(step, enclave=enclave, scheme=scheme or SignedPermutation(), **options)


def on_devices(state: Any) -> int:
    leaves = jax.tree.leaves(state, is_leaf=is_sealed)
    return sum(leaf.form == "blinded" for leaf in leaves)


@pytest.mark.parametrize("scheme", [SignedPermutation(), Tempo(), Orthogonal(5)])
@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(optax.sgd(0.1), id="sgd"),
        pytest.param(
            optax.chain(
                optax.add_decayed_weights(0.01),
                optax.sgd(optax.linear_schedule(0.1, 0.01, 10), 0.9, nesterov=True),
            ),
            id="decay, schedule and momentum",
        ),
    ],
)
def test_training_equals_the_plain_step(watchful, scheme, tx):
    # 20 steps: signs last for 16 in float64, Orthogonal's keys for 5.
    step, state, x = training(tx)
    function, plain = shielded(watchful, step, scheme), jax.jit(step)
    lies = watchful.statistics()["wrong_products"]
    expected = state
    for _ in range(20):
        state, loss = function(state, x)
        expected, expected_loss = plain(expected, x)
        assert on_devices(state) == on_devices_of(function, state, x) >= 2
        assert_close(loss, expected_loss)
    assert_close(watchful.open(state), expected)
    assert watchful.statistics()["wrong_products"] == lies


def on_devices_of(function: Any, state: Any, x: Any) -> int:
    return len(function.explain(state, x).resident)


Alter = Callable[[np.ndarray], np.ndarray]


@contextlib.contextmanager
def lying(alter: Alter, segment: int, upload: int) -> Iterator[None]:
    """A device that alters one of the products on its way to shared memory."""
    visit = Runtime._visit

    def dishonest(self: Any, run: Any, number: int, index: int, uploads: Any) -> Any:
        uploads = list(uploads)
        if index == segment:
            uploads[upload] = alter(np.array(uploads[upload]))
        return visit(self, run, number, index, uploads)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Runtime, "_visit", dishonest)
        yield


def one_element(x: np.ndarray) -> np.ndarray:
    """Makes one element wrong by `ERROR` of the RMS."""
    x = np.array(x)
    x.reshape(-1)[x.size // 2] += ERROR * rms(x)
    return x


def with_content(sealed: Any, content: Any) -> SealedArray:
    """What a device has put in the place of a leaf."""
    return SealedArray(
        *((jnp.asarray(content), sealed.handle), sealed.form, sealed.shape, sealed.dtype),
        *(sealed.weak_type, sealed.session),
    )


@dataclasses.dataclass
class Trained:
    """A state after a few steps, with the one before."""

    function: Any
    before: Any
    state: Any
    x: Any


@pytest.fixture
def trained(watchful) -> Trained:
    step, state, x = training(MOMENTUM)
    function = shielded(watchful, step, donate=False)
    for _ in range(3):
        before = state
        state, _ = function(state, x)
    return Trained(function, before, state, x)


def test_every_wrong_product_is_noticed(watchful, trained):
    program = trained.function.explain(trained.state, trained.x).plan.program
    uploads = [(i, n, c) for i, s in enumerate(program.segments) for n, c in enumerate(s.uploads)]
    assert len(uploads) == 3  # both forward, and back to the hidden layer; updates stay there
    expected = comparable(watchful.open(trained.function(trained.state, trained.x)[0]))
    for index, number, crossing in uploads:
        with lying(one_element, index, number):
            with pytest.raises(errors.IntegrityError) as caught:
                trained.function(trained.state, trained.x)
        assert f"wrong product: {crossing.source}." in str(caught.value)
        # The next honest call brings the leaf in, since its signs are spent, and goes on.
        state, _ = trained.function(trained.state, trained.x)
        assert_close(comparable(watchful.open(state)), expected)


def replaced(state: Any, position: int, content: Alter, source: Any = None) -> Any:
    """The state with one blinded leaf's content replaced by one made from `source`."""
    leaves, structure = jax.tree.flatten(state, is_leaf=is_sealed)
    given = jax.tree.leaves(source if source is not None else state, is_leaf=is_sealed)
    blinded = [i for i, leaf in enumerate(leaves) if leaf.form == "blinded"]
    chosen = blinded[position]
    leaves[chosen] = with_content(leaves[chosen], content(np.asarray(given[chosen].content)))
    return jax.tree.unflatten(structure, leaves)


LIES: dict[str, Alter] = {
    "one element": one_element,
    "scaled": lambda w: w * (1 + 1e-5),
    "zeros": np.zeros_like,
    "NaN": lambda w: np.full_like(w, np.nan),
    "rows in another order": lambda w: w[::-1],
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("position", [0, 1])
def test_a_wrong_weight_is_noticed_when_it_is_used(trained, lie, position):
    wrong = replaced(trained.state, position, LIES[lie])
    with pytest.raises(errors.IntegrityError, match="wrong product: dot_general"):
        trained.function(wrong, trained.x)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_a_wrong_leaf_is_noticed_when_it_is_opened(watchful, trained, lie, position):
    wrong = replaced(trained.state, position, LIES[lie])
    with pytest.raises(errors.IntegrityError, match="wrong leaf: float64.*updated by dot_general"):
        watchful.open(wrong)


@pytest.mark.parametrize("position", [0, 1])
def test_a_skipped_update_is_noticed(watchful, trained, position):
    stale = replaced(trained.state, position, lambda w: w, trained.before)
    with pytest.raises(errors.IntegrityError, match="wrong product: dot_general"):
        trained.function(stale, trained.x)
    with pytest.raises(errors.IntegrityError, match="wrong leaf"):
        watchful.open(stale)


def test_an_update_of_another_step_is_noticed(watchful, trained):
    # The device applies the last momentum once more than it was asked to.
    leaves = jax.tree.leaves(trained.state, is_leaf=is_sealed)
    blinded = [leaf for leaf in leaves if leaf.form == "blinded"]
    twice = replaced(trained.state, 0, lambda w: w - 0.1 * np.asarray(blinded[2].content))
    with pytest.raises(errors.IntegrityError, match="wrong product: dot_general"):
        trained.function(twice, trained.x)


def test_a_wrong_momentum_is_noticed_at_the_latest_when_it_comes_back(watchful, trained):
    wrong = replaced(trained.state, 2, one_element)
    with pytest.raises(errors.IntegrityError, match="wrong product|wrong leaf"):
        state = wrong
        for _ in range(20):
            state, _ = trained.function(state, trained.x)


def test_a_leaf_is_held_to_its_checksum_when_it_is_blinded_anew(watchful):
    step, state, x = training(MOMENTUM)
    function = shielded(watchful, step, Orthogonal(1), donate=False)
    state, _ = function(state, x)
    function(state, x)
    with pytest.raises(errors.IntegrityError, match="wrong leaf: float64"):
        function(replaced(state, 1, one_element), x)


def test_without_verification_the_same_lie_passes(watchful):
    """The control."""
    step, state, x = training(MOMENTUM)
    function = shielded(watchful, step, verify=False, donate=False)
    state, _ = function(state, x)
    _, honest = function(state, x)
    _, loss = function(replaced(state, 0, lambda w: 2 * w), x)
    assert abs(loss - honest) > 1e-3


def convolutional() -> tuple[Callable[..., Any], Any, Any]:
    """A step of two convolutions, one of them strided, with momentum."""
    tx = tempo.cheap_update(MOMENTUM)
    numbers = ("NHWC", "HWIO", "NHWC")

    def convolve(x: Any, kernel: Any, stride: int) -> Any:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=numbers
        )

    def step(state: Any, x: Any) -> Any:
        params, optimizer = state

        def loss_of(params: Any) -> Any:
            hidden = jnp.tanh(convolve(x, params["first"], 2))
            return jnp.mean(jnp.tanh(convolve(hidden, params["second"], 1)) ** 2)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        changes, optimizer = tx.update(gradients, optimizer, params)
        return (optax.apply_updates(params, changes), optimizer), tempo.reveal(loss)

    params = {"first": uniform(1, 3, 3, 4, 6), "second": uniform(2, 3, 3, 6, 5)}
    return step, (params, tx.init(params)), uniform(3, 3, 8, 8, 4)


@pytest.mark.parametrize("scheme", [SignedPermutation(), Tempo(), Orthogonal(5)])
def test_kernels_of_convolutions_are_followed(watchful, scheme):
    step, state, x = convolutional()
    function, expected = shielded(watchful, step, scheme), state
    for _ in range(18):
        state, _ = function(state, x)
        expected, _ = jax.jit(step)(expected, x)
    assert on_devices(state) == 4
    assert_close(watchful.open(state), expected)


def test_lies_about_kernels_are_noticed(watchful):
    step, state, x = convolutional()
    function = shielded(watchful, step, donate=False)
    before, _ = function(state, x)
    state, _ = function(before, x)
    program = function.explain(state, x).plan.program
    lied = 0
    for index, segment in enumerate(program.segments):
        for number in range(len(segment.uploads)):
            lied += 1
            with lying(one_element, index, number):
                with pytest.raises(errors.IntegrityError, match="wrong product: conv_general_dila"):
                    function(state, x)
    assert lied == 3
    for position in range(4):
        for source in (None, before):
            alter = one_element if source is None else lambda w: w
            with pytest.raises(errors.IntegrityError, match="wrong leaf: float64.*conv_general_d"):
                watchful.open(replaced(state, position, alter, source))


def test_grouped_kernels_stay_inside():
    def step(kernel: Any, x: Any) -> Any:
        def loss_of(kernel: Any) -> Any:
            numbers = ("NHWC", "HWIO", "NHWC")
            out = jax.lax.conv_general_dilated(
                *(x, kernel, (1, 1), "SAME"), dimension_numbers=numbers, feature_group_count=2
            )
            return jnp.mean(jnp.tanh(out) ** 2)

        tx = tempo.cheap_update(optax.sgd(0.1))
        gradient = jax.grad(loss_of)(kernel)
        return optax.apply_updates(kernel, tx.update(gradient, tx.init(kernel), kernel)[0])

    kernel, x = uniform(1, 3, 3, 4, 6), uniform(2, 2, 5, 5, 8)
    made = plan(step, kernel, x, stateful=True, scheme=SignedPermutation(), verify=True).plan
    assert not made.placement.resident
    assert "grouped convolution" in made.placement.reasons[0]


def test_a_weight_that_is_used_twice(watchful):
    tx = tempo.cheap_update(optax.sgd(0.1))

    def step(w: Any, x: Any) -> Any:
        gradient = jax.grad(lambda w: jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2))(w)
        return optax.apply_updates(w, tx.update(gradient, tx.init(w), w)[0])

    state = expected = uniform(1, 9, 9)
    x = uniform(2, 7, 9)
    function = shielded(watchful, step)
    for _ in range(4):
        state, expected = function(state, x), jax.jit(step)(expected, x)
    # Inside with and without checks: its gradient is a sum that the enclave takes.
    plain = shielded(watchful, step, verify=False)(uniform(1, 9, 9), x)
    assert on_devices(state) == on_devices(plain) == 0
    assert_close(watchful.open(state), expected)


def test_a_restored_leaf_is_followed_again(watchful):
    step, state, x = training(MOMENTUM)
    function = shielded(watchful, step)
    for _ in range(2):
        state, _ = function(state, x)
    restored = watchful.restore(watchful.checkpoint(state), like=state)
    assert on_devices(restored) == 0
    expected = watchful.open(state)
    for _ in range(2):
        restored, _ = function(restored, x)
        expected, _ = jax.jit(step)(expected, x)
    assert on_devices(restored) == 4
    assert_close(watchful.open(restored), expected)


def test_a_wrong_leaf_is_not_saved(watchful, trained):
    with pytest.raises(errors.IntegrityError, match="wrong leaf"):
        watchful.checkpoint(replaced(trained.state, 3, one_element))


def test_float32_over_several_lives_of_the_signs(watchful):
    step, state, x = training(MOMENTUM)
    state, x = jax.tree.map(lambda v: v.astype(jnp.float32), (state, x))
    function, expected = shielded(watchful, step), state
    for _ in range(20):
        state, _ = function(state, x)
        expected, _ = jax.jit(step)(expected, x)
    assert on_devices(state) == 4
    assert_close(watchful.open(state), expected, 1e-4)


def test_evaluation_uses_checked_leaves(watchful, trained):
    def predict(params: Any, x: Any) -> Any:
        return tempo.reveal(jnp.tanh(x @ params["first"]) @ params["second"])

    evaluate = shielded(watchful, predict, donate=False)
    params = trained.state[0]
    expected = predict(watchful.open(params), trained.x)
    assert_close(evaluate(params, trained.x), expected)
    wrong = replaced(trained.state, 0, one_element)[0]
    with pytest.raises(errors.IntegrityError, match="wrong product|wrong leaf"):
        evaluate(wrong, trained.x)


def test_checked_leaves_inside_jit(watchful):
    step, state, x = training(MOMENTUM)
    function = shielded(watchful, step)
    expected = state
    state, x = watchful.seal((state, x))
    state, _ = function(state, x)
    compiled = jax.jit(function)
    for _ in range(18):
        state, _ = compiled(state, x)
    for _ in range(19):
        expected, _ = jax.jit(step)(expected, watchful.open(x))
    assert_close(watchful.open(state), expected)


def test_a_wrong_product_spends_the_signs_in_runs_that_are_open(watchful, trained):
    step, *_ = training(MOMENTUM)
    function, arguments = trained.function, (trained.state, trained.x)
    liar = shielded(watchful, step, donate=False)
    expected = comparable(watchful.open(liar(*arguments)[0]))
    waiting = function._runtime(function._program(function._signature(arguments, {})))
    visit, begun, lied = Runtime._visit, threading.Event(), threading.Event()

    def intercepted(self: Any, run: Any, number: int, index: int, uploads: Any) -> Any:
        if self is not waiting:
            uploads = [one_element(np.array(x)) for x in uploads]
        elif index == 0:
            begun.set()
            assert lied.wait(60)
        return visit(self, run, number, index, uploads)

    lies = watchful.statistics()["wrong_products"]
    with pytest.MonkeyPatch.context() as patched, concurrent.futures.ThreadPoolExecutor() as pool:
        patched.setattr(Runtime, "_visit", intercepted)
        honest = pool.submit(function, *arguments)
        try:
            assert begun.wait(60)
            with pytest.raises(errors.IntegrityError, match="wrong product: dot_general"):
                liar(*arguments)
        finally:
            lied.set()
        with pytest.raises(errors.EnclaveError, match="came back before: dot_general.* Call again"):
            honest.result(60)
    # What was not compared is no lie; the next call brings the leaf in and goes on.
    assert watchful.statistics()["wrong_products"] == lies + 1
    assert_close(comparable(watchful.open(function(*arguments)[0])), expected)
