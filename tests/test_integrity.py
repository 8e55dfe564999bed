"""Checks of what devices return: every lie about a product is noticed, and no honest device is.

The check itself is tried on its own thousands of times, beside weak ones that a liar passes;
then each product of whole steps is altered in turn on its way to a real enclave.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import Mesh

import tempo_jax as tempo
from enclave_runtime import checksum, integrity
from enclave_runtime.encryption import session_keys
from enclave_runtime.executor import Executor
from enclave_runtime.integrity import Check, IntegrityError, Verifier, excess, matches, multiply
from enclave_runtime.keys import KeySchedule, KeyStream
from enclave_runtime.products import (
    ELEMENT_ROUNDING,
    RESOLUTION,
    VECTORS,
    Convolution,
    DotGeneral,
    Product,
    block_width,
    decode_product,
    resolution,
    rounding,
    unit_roundoff,
)
from enclave_runtime.program import ArrayType, Program, ProgramError
from enclave_runtime.run import Run, RunError
from enclave_runtime.schemes import make_scheme
from enclave_runtime.session import RequestError, Session
from enclave_runtime.wire import Frame, Kind
from tempo_jax import errors
from tempo_jax._plan import offloaded
from tempo_jax._products import description
from tempo_jax._runtime import Runtime
from tempo_jax._sealed import is_sealed
from tempo_jax.schemes import Mixing, Orthogonal, SignedPermutation, Tempo
from tests.interpreter import plan
from tests.steps import assert_close, comparable, shield_all, uniform

ERROR = 1e-3  # of a product's RMS: what is promised to be noticed
SCHEDULE = KeySchedule()
STREAMS = iter(range(1 << 30))

FORWARD = DotGeneral(((1,), (0,)), ((), ()))
TO_INPUT = DotGeneral(((1,), (1,)), ((), ()))
TO_WEIGHT = DotGeneral(((0,), (0,)), ((), ()))
SCORES = DotGeneral(((2,), (2,)), ((0,), (0,)))
NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # as axes: batch, feature, then space


def convolution(groups: int = 1, batch_groups: int = 1) -> Convolution:
    """A strided 3×3 convolution."""
    ones = (1, 1)
    return Convolution((2, 2), ((1, 1), (0, 1)), ones, ones, *NHWC, groups, batch_groups)


# The gradient of a kernel: batch and features change places.
KERNEL_GRADIENT = Convolution(
    *((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1)),
    *((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1), 1, 1),
)

CASES: dict[str, tuple[Product, tuple[int, ...], tuple[int, ...]]] = {
    "forward": (FORWARD, (48, 40), (40, 24)),
    "to input": (TO_INPUT, (48, 24), (40, 24)),
    "to weight": (TO_WEIGHT, (48, 40), (48, 24)),
    "batched": (SCORES, (3, 16, 8), (3, 20, 8)),
    "two batches": (DotGeneral(((1,), (3,)), ((0, 2), (0, 1))), (2, 5, 3, 7), (2, 3, 6, 5)),
    "several free axes": (FORWARD, (16, 12), (12, 3, 5)),
    "several contracted axes": (DotGeneral(((1, 2), (1, 0)), ((), ())), (9, 4, 5), (5, 4, 18)),
    "vector": (FORWARD, (12, 8), (8,)),
    "outer": (DotGeneral(((), ()), ((), ())), (6,), (7,)),
    "one element": (FORWARD, (1, 1), (1, 1)),
    "one column": (FORWARD, (9, 5), (5, 1)),
    "wide": (FORWARD, (64, 1024), (1024, 1024)),
    "long": (TO_WEIGHT, (8192, 32), (8192, 64)),
    "convolution": (convolution(), (4, 8, 8, 6), (3, 3, 6, 20)),
    "grouped": (convolution(groups=3), (4, 8, 8, 6), (3, 3, 2, 18)),
    "depthwise": (convolution(groups=6), (4, 8, 8, 6), (3, 3, 1, 6)),
    "batch groups": (convolution(batch_groups=2), (4, 8, 8, 6), (3, 3, 6, 20)),
    "kernel's gradient": (KERNEL_GRADIENT, (4, 8, 8, 6), (4, 8, 8, 20)),
}
DTYPES = ("float32", "float64", "bfloat16", "float16")


def stream() -> KeyStream:
    return SCHEDULE.stream("test", next(STREAMS))


def array_type(x: Any) -> ArrayType:
    return ArrayType(tuple(x.shape), np.dtype(x.dtype).name)


@dataclasses.dataclass(frozen=True)
class Returned:
    """A product as an honest device returns it, and its check."""

    check: Check
    lhs: jax.Array
    rhs: jax.Array
    out: jax.Array

    @property
    def rms(self) -> float:
        return float(np.sqrt(np.mean(np.square(np.asarray(self.out, np.float64)))))

    def matches(self, out: Any) -> bool | None:
        return matches(self.check, self.lhs, self.rhs, jnp.asarray(out), stream())

    def excess(self, out: Any, signs: np.ndarray) -> float:
        operands = (self.lhs, self.rhs, jnp.asarray(out), jnp.asarray(signs))
        return float(excess(self.check, *operands)[1])


def returned(product: Product, lhs: Any, rhs: Any) -> Returned:
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


def altered(out: Any, rng: np.random.Generator, error: float) -> np.ndarray:
    """One element, wherever it is, wrong by this much."""
    wrong = np.array(out)
    wrong[tuple(rng.integers(0, n) for n in wrong.shape)] += error
    return wrong


# The check on its own


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
    signs = integrity.draw_signs(case.check, stream())
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
    monkeypatch.setattr(integrity, "_compiled", lambda check: lambda *_: (True, 2.0))
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
        with pytest.raises(IntegrityError, match=r"product: dot_general .* at \w+\.py:\d+\."):
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


# What a program may say


def chain(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    """A product of a product."""
    return (x @ w) @ v


X, W, V = uniform(1, 18, 17), uniform(2, 17, 20), uniform(3, 20, 19)


def planned(function: Callable[..., Any], *arguments: Any, scheme: Any = None) -> Any:
    """The plan of a function that verifies."""
    return plan(function, *arguments, scheme=scheme or SignedPermutation(), verify=True).plan


@pytest.fixture
def fields() -> Any:
    """A description that verifies, as it crosses."""
    program = planned(chain, X, W, V).program
    named = tuple(dataclasses.replace(s, executable="0" * 64) for s in program.segments)
    program = dataclasses.replace(program, segments=named)
    assert Program.decode(json.loads(json.dumps(program.encode()))) == program
    return json.loads(json.dumps(program.encode()))


def first_upload(fields: Any) -> Any:
    return next(c for s in fields["segments"] for c in s["uploads"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: first_upload(f).update(product=None), "not a product that can be checked"),
        (lambda f: first_upload(f).update(operands=None), "not a product that can be checked"),
        (lambda f: first_upload(f).update(source="x" * 1001), "source is too long"),
        (lambda f: first_upload(f).update(source=3), "source is too long"),
        (
            lambda f: first_upload(f).update(layout={"classes": [None] * 2, "weights": [0, 0]}),
            "carries no key",
        ),
        (lambda f: f.update(verify=1), "verify is not a flag"),
        (lambda f: f["outputs"][0].update(place="device"), "stays where nothing checks it"),
        (lambda f: f["inputs"][0].update(place="device"), "."),
    ],
)
def test_program_that_cannot_be_verified(fields, change, message):
    change(fields)
    with pytest.raises(ProgramError, match=message):
        Program.decode(fields)


def test_narrow_results_are_refused(fields):
    for part in ("array", "blinded"):
        first_upload(fields)[part]["dtype"] = "bfloat16"
    with pytest.raises(ProgramError, match="too few digits"):
        Program.decode(fields)


@pytest.mark.parametrize("name", CASES)
def test_products_survive_encoding(name):
    product = CASES[name][0]
    assert decode_product(json.loads(json.dumps(dataclasses.asdict(product)))) == product


@pytest.mark.parametrize(
    "change",
    [
        lambda d, c: [],
        lambda d, c: {**d, "contract": [[1], [0], [2]]},
        lambda d, c: {**d, "contract": [[-1], [0]]},
        lambda d, c: {**d, "contract": [[True], [0]]},
        lambda d, c: {**d, "batch": [[32], [0]]},
        lambda d, c: {**d, "batch": [[0] * 40, [0]]},
        lambda d, c: {**d, "batch": None},
        lambda d, c: {**c, "strides": [0, 1]},
        lambda d, c: {**c, "strides": [1.5, 1]},
        lambda d, c: {**c, "padding": [[1, 1], [1, 1 << 40]]},
        lambda d, c: {**c, "padding": [1, 1]},
        lambda d, c: {**c, "lhs_dilation": [1] * 33},
        lambda d, c: {**c, "feature_groups": 0},
        lambda d, c: {**c, "batch_groups": None},
        lambda d, c: {**c, "lhs": [0]},
        lambda d, c: {**c, "rhs": [0, 1, 2]},
        lambda d, c: {**c, "out": [0, 1, 2, 2]},
    ],
)
def test_malformed_products_are_refused(change):
    dot = json.loads(json.dumps(dataclasses.asdict(FORWARD)))
    conv = json.loads(json.dumps(dataclasses.asdict(convolution())))
    with pytest.raises(ProgramError):
        decode_product(change(dot, conv))


@pytest.mark.parametrize(
    "product",
    [
        DotGeneral(((0,), (0,)), ((), ())),
        DotGeneral(((5,), (0,)), ((), ())),
        DotGeneral(((1,), (0,)), ((0,), (0,))),
        DotGeneral(((), ()), ((), ())),
        convolution(),
    ],
)
def test_products_that_do_not_fit_are_refused(product):
    program = planned(lambda x, w: jnp.tanh(x @ w), X, W).program
    segments = tuple(
        dataclasses.replace(
            s, uploads=tuple(dataclasses.replace(c, product=product) for c in s.uploads)
        )
        for s in program.segments
    )
    with pytest.raises(ProgramError, match="does not fit|result's type"):
        integrity.prepare(dataclasses.replace(program, segments=segments), Executor())


# What the planner makes of it


@pytest.mark.parametrize("scheme", [SignedPermutation(), Orthogonal(4), Tempo(), Mixing()])
def test_hosts_do_nothing_but_products_of_what_they_were_sent(scheme):
    size = 128 if isinstance(scheme, Mixing) else 16
    x, w, v = (uniform(i, size, size) for i in range(3))

    def step(state, x):
        w, v = state
        gradients = jax.grad(lambda s: jnp.sum(jnp.tanh(((x @ s[0]).T @ s[1]).T @ x) @ x))((w, v))
        tx = tempo.cheap_update(optax.sgd(0.1))
        return optax.apply_updates(state, tx.update(gradients, tx.init(state), state)[0]), x @ w

    request = plan(step, (w, v), x, stateful=False, scheme=scheme, verify=True)
    made = request.plan
    assert made.cut.host and not made.placement.resident
    sent = {v for s in made.cut.segments for v in s.downloads}
    for equation in made.cut.host:
        assert description(equation.eqn) and set(equation.eqn.invars) <= sent
    uploads = [c for s in made.program.segments for c in s.uploads]
    assert len(uploads) == len(made.cut.host) == len(offloaded(made))
    assert all(c.product and c.operands for c in uploads)
    assert all(port.place == "enclave" for port in made.program.outputs)
    # With a carried state, what stays there is followed; whatever comes back is a product.
    made = plan(step, (w, v), x, stateful=True, scheme=scheme, verify=True).plan
    assert all(c.product and c.operands for s in made.program.segments for c in s.uploads)
    followed = {p.value for p in made.program.inputs if p.place == "device"}
    followed |= {u.value for u in made.program.updates}
    kept = {p.value for p in made.program.outputs if p.place == "device"}
    assert kept <= followed and bool(kept) == bool(made.placement.resident)


def test_devices_are_asked_for_every_digit():
    for dtype, precision in (("float32", "HIGHEST"), ("bfloat16", None)):
        made = planned(lambda x, w: x @ w, X.astype(dtype), W.astype(dtype))
        ((_, eqn),) = offloaded(made)
        assert eqn.params["preferred_element_type"] == jnp.float32
        asked = eqn.params["precision"]
        assert (asked and {p.name for p in asked}) == (precision and {precision})
        assert made.jaxpr.outvars[0].aval.dtype == dtype


def test_checking_counts_when_products_are_placed(enclave):
    # Worth sending out, but not worth sending out and checking.
    x, w = jnp.zeros((2048, 256), jnp.float32), jnp.zeros((256, 256), jnp.float32)
    for verify, count in ((False, 1), (True, 0)):
        shielded = tempo.shield(
            lambda x, w: jnp.tanh(x @ w),
            enclave=enclave,
            scheme=SignedPermutation(),
            verify=verify,
        )
        assert len(offloaded(shielded.explain(x, w).plan)) == count


def test_explain_says_what_is_checked(enclave):
    state = {"w": uniform(1, 40, 30, dtype=jnp.float32)}
    x = uniform(2, 50, 40, dtype=jnp.float32)
    tx = tempo.cheap_update(optax.sgd(0.1))

    def step(state, x):
        gradient = jax.grad(lambda s: jnp.sum(jnp.tanh(x @ s["w"])))(state)
        return optax.apply_updates(state, tx.update(gradient, tx.init(state), state)[0])

    report = shield_all(step, enclave=enclave, verify=True).explain(state, x)
    # The gradient of the weight never comes back: its update on the devices is followed.
    assert len(report.checked) == 1 and "test_integrity" in report.checked[0][0]
    assert 0 < report.checked[0][1] < ERROR
    assert report.bytes_kept == 4 * (50 * 40 + 50 * 30)
    text = str(report)
    assert "verified: each of the 1 products" in text and "2^-16" in text
    assert "of its row's RMS" in text and "and by more than 0.0002 of itself" in text
    assert list(report.resident) == ["state['w']"] and not report.fallbacks
    assert "held to a secret checksum" in text
    assert report.checksum_runs == 16 and report.checksum_bytes == 8 * 40 * 17
    inside = shield_all(step, enclave=enclave, verify=True, donate=False)
    report = inside.explain(jax.tree.map(lambda v: v.astype(jnp.bfloat16), state), x)
    assert not report.resident and "16-bit formats round more" in str(report)
    gradient = shield_all(lambda x, w: jnp.tanh(x @ w), enclave=enclave, verify=True)
    report = gradient.explain(x, state["w"])
    assert all(0 < least <= RESOLUTION for _, least in report.checked)
    assert report.bytes_kept == 4 * (50 * 40 + 40 * 30) and not report.checksum_runs
    report = shield_all(step, enclave=enclave).explain(state, x)
    assert report.resident and not report.checked and report.bytes_kept == 0
    assert "not verified: a device that returns a wrong product is not noticed" in str(report)
    inside = tempo.shield(step, enclave=enclave, placement="enclave", verify=True)
    assert "verified: nothing comes back" in str(inside.explain(state, x))


# Whole steps


class MLP(nn.Module):
    """Two layers."""

    dtype: Any = jnp.float64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(20, dtype=self.dtype, param_dtype=self.dtype)(x))
        return nn.Dense(18, dtype=self.dtype, param_dtype=self.dtype)(x)


class ConvNet(nn.Module):
    """A convolution, a grouped one, and a last one."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Conv(8, (3, 3), param_dtype=float)(x))
        x = jnp.tanh(nn.Conv(8, (3, 3), feature_group_count=2, param_dtype=float)(x))
        return nn.Conv(6, (3, 3), (2, 2), param_dtype=float)(x)


class Attention(nn.Module):
    """Heads without biases, so that products follow products with nothing between."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.MultiHeadDotProductAttention(2, use_bias=False, param_dtype=float)(x, x)


class Wide(nn.Module):
    """Wide enough for `Mixing`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(64, param_dtype=jnp.float32)(x))
        return nn.Dense(5, param_dtype=jnp.float32)(jnp.tanh(nn.Dense(64)(x)))


@dataclasses.dataclass(frozen=True)
class Task:
    """A training step with what it starts from, and the scheme to shield it with."""

    step: Callable[..., Any]
    state: Any
    batch: Any
    scheme: Any
    tolerance: float

    def shield(self, enclave: tempo.Enclave, **options: Any) -> Any:
        options = {"offload": "all", "verify": True, **options}
        return tempo.shield(self.step, enclave=enclave, scheme=self.scheme, **options)


def make_task(
    model: nn.Module,
    shape: tuple[int, ...],
    scheme: Any,
    dtype: str = "float64",
    tolerance: float = 1e-9,
) -> Task:
    x = uniform(1, *shape, dtype=dtype)
    params = jax.tree.map(
        lambda leaf: leaf.astype(dtype), jax.jit(model.init)(jax.random.key(0), x)
    )
    tx = tempo.cheap_update(optax.sgd(0.1, momentum=0.9))

    def step(state, x):
        def loss_of(params):
            out: Any = model.apply(params, x)
            return jnp.mean(jnp.square(out.astype(jnp.float32)))

        loss, gradients = jax.value_and_grad(loss_of)(state[0])
        updates, momentum = tx.update(gradients, state[1], state[0])
        return (optax.apply_updates(state[0], updates), momentum), tempo.reveal(loss)

    return Task(step, (params, tx.init(params)), x, scheme, tolerance)


TASKS: dict[str, Callable[[], Task]] = {
    "mlp": lambda: make_task(MLP(), (22, 19), SignedPermutation()),
    "mlp, float32": lambda: make_task(MLP(jnp.float32), (22, 19), Orthogonal(3), "float32", 1e-5),
    "mlp, bfloat16": lambda: make_task(
        MLP(jnp.bfloat16), (22, 19), SignedPermutation(), "bfloat16", 2e-2
    ),
    "mlp, tempo": lambda: make_task(MLP(), (22, 19), Tempo()),
    "convolutions": lambda: make_task(ConvNet(), (3, 6, 6, 4), SignedPermutation()),
    "attention": lambda: make_task(Attention(), (3, 6, 8), SignedPermutation()),
    "mixing": lambda: make_task(Wide(), (128, 64), Mixing(), "float32", 2e-4),
}


@pytest.fixture(scope="module", params=TASKS)
def task(request) -> Task:
    return TASKS[request.param]()


@pytest.fixture(scope="module")
def watchful() -> Iterator[tempo.Enclave]:
    """An enclave of this module's own: it counts the lies it was told."""
    with tempo.Enclave.launch() as running:
        yield running


Alter = Callable[[np.ndarray], np.ndarray]


@contextlib.contextmanager
def lying(alter: Alter, segment: int, upload: int = 0, worker: int = 0) -> Iterator[None]:
    """A device that alters one of the products on its way to shared memory."""
    visit = Runtime._visit

    def dishonest(self: Any, run: Any, number: int, index: int, uploads: Any) -> Any:
        uploads = list(uploads)
        if (number, index) == (worker, segment):
            uploads[upload] = alter(np.array(uploads[upload]))
        return visit(self, run, number, index, uploads)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Runtime, "_visit", dishonest)
        yield


def one_element(seed: int) -> Alter:
    """Makes one element wrong by `ERROR` of the RMS."""

    def alter(product: np.ndarray) -> np.ndarray:
        rms = np.sqrt(np.mean(np.square(product.astype(np.float64))))
        return altered(product, np.random.default_rng(seed), ERROR * rms)

    return alter


def plain_steps(task: Task, steps: int) -> Any:
    state, step, losses = task.state, jax.jit(task.step), []
    for _ in range(steps):
        state, loss = step(state, task.batch)
        losses.append(loss)
    return state, losses


def test_every_wrong_product_stops_the_step(watchful, task):
    shielded = task.shield(watchful)
    state, _ = shielded(task.state, task.batch)
    before = comparable(watchful.open(state))
    program = shielded.explain(task.state, task.batch).plan.program
    uploads = [(i, n, c) for i, s in enumerate(program.segments) for n, c in enumerate(s.uploads)]
    assert len(uploads) >= 3
    lies = watchful.statistics()["wrong_products"]
    for index, number, crossing in uploads:
        with lying(one_element(number), index, number):
            with pytest.raises(errors.IntegrityError) as caught:
                shielded(state, task.batch)
        assert f"wrong product: {crossing.source}." in str(caught.value)
        assert "the last committed state stands" in str(caught.value)
    statistics = watchful.statistics()
    assert statistics["wrong_products"] == lies + len(uploads) and statistics["runs"] == 0
    jax.tree.map(np.testing.assert_array_equal, comparable(watchful.open(state)), before)
    state, loss = shielded(state, task.batch)  # the next honest call goes on from there
    assert_close((watchful.open(state), [loss]), after(task, 2), task.tolerance)


def after(task: Task, steps: int) -> Any:
    """The plain state after so many steps, and the last loss."""
    state, losses = plain_steps(task, steps)
    return state, losses[-1:]


def test_honest_devices_are_believed(watchful, task):
    lies = watchful.statistics()["wrong_products"]
    shielded = task.shield(watchful)
    state, steps = task.state, 12
    for _ in range(steps):
        state, loss = shielded(state, task.batch)
    assert watchful.statistics()["wrong_products"] == lies
    assert_close((watchful.open(state), [loss]), after(task, steps), 4 * task.tolerance)


@pytest.fixture(scope="module")
def mlp() -> Task:
    return TASKS["mlp"]()


@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(lambda y: np.zeros_like(y), id="zeros"),
        pytest.param(lambda y: y[::-1], id="rows in another order"),
        pytest.param(lambda y: -y, id="signs"),
        pytest.param(lambda y: y * 1.001, id="scale"),
        pytest.param(lambda y: y.astype(np.float32).astype(y.dtype), id="fewer digits"),
        pytest.param(lambda y: np.full_like(y, np.nan), id="NaN"),
        pytest.param(lambda y: np.where(y == y.max(), np.inf, y), id="infinity"),
        pytest.param(
            lambda y: y + 1e-3 * (-1.0) ** np.arange(y.size).reshape(y.shape),
            id="a pattern that cancels in sums",
        ),
    ],
)
def test_other_lies(watchful, mlp, alter):
    shielded = mlp.shield(watchful, donate=False)
    with lying(alter, 2), pytest.raises(errors.IntegrityError, match="wrong product"):
        shielded(mlp.state, mlp.batch)


def test_a_product_of_other_operands_is_noticed(watchful, mlp, monkeypatch):
    # What the host changes in shared memory after it was sent must not count as an operand.
    visit = Runtime._visit

    def changing(self: Any, run: Any, worker: int, index: int, uploads: Any) -> Any:
        downloads = visit(self, run, worker, index, uploads)
        for crossing in self._program.segments[index].downloads:
            run.arena.view(crossing.blinded, crossing.offset)[...] *= 1.5
        return downloads

    monkeypatch.setattr(Runtime, "_visit", changing)
    with pytest.raises(errors.IntegrityError, match="wrong product"):
        mlp.shield(watchful, donate=False)(mlp.state, mlp.batch)


def test_without_verification_a_lie_passes(watchful, mlp):
    """The control: the same lies are believed, and the step's result is wrong."""
    shielded = mlp.shield(watchful, verify=False, donate=False)
    with lying(lambda y: 2 * y, 1):
        _, loss = shielded(mlp.state, mlp.batch)
    _, (right,) = plain_steps(mlp, 1)
    assert abs(loss - right) > 1e-3 * right


def test_diverged_values_are_computed_inside(watchful):
    @jax.jit
    def step(x, w):
        return jnp.tanh(x @ w) @ w.T

    x = X.at[2, 3].set(jnp.nan).at[4, 4].set(jnp.inf)
    shielded = shield_all(step, enclave=watchful, verify=True, donate=False)
    honest = watchful.open(shielded(x, W))
    np.testing.assert_array_equal(np.isnan(honest), np.isnan(step(x, W)))
    with lying(lambda y: np.zeros_like(y), 1):  # what the device says then does not matter
        np.testing.assert_allclose(watchful.open(shielded(x, W)), honest, rtol=1e-12)


def test_zeros_through_an_enclave(watchful):
    shielded = shield_all(chain, enclave=watchful, verify=True, donate=False)
    assert_close(watchful.open(shielded(0 * X, W, V)), jnp.zeros((18, 19)), 0.0)
    with lying(lambda y: y + 1e-9, 1), pytest.raises(errors.IntegrityError):
        shielded(0 * X, W, V)


def test_products_of_products_are_each_checked(watchful):
    shielded = shield_all(chain, enclave=watchful, verify=True, donate=False)
    assert len(shielded.explain(X, W, V).checked) == 2
    assert_close(watchful.open(shielded(X, W, V)), chain(X, W, V))
    for segment in (1, 2):
        with lying(one_element(0), segment), pytest.raises(errors.IntegrityError):
            shielded(X, W, V)


def test_lie_inside_jit(watchful, mlp):
    shielded = jax.jit(mlp.shield(watchful))
    state, batch = watchful.seal((mlp.state, mlp.batch))
    with lying(one_element(0), 1):
        with pytest.raises(jax.errors.JaxRuntimeError, match="wrong product: dot_general"):
            jax.block_until_ready(shielded(state, batch))
    state, loss = shielded(state, batch)
    assert_close((watchful.open(state), [loss]), after(mlp, 1))


@pytest.mark.parametrize("worker", [0, 3])
def test_lying_worker_of_a_mesh(watchful, worker):
    task = make_task(MLP(), (24, 19), SignedPermutation())
    mesh = Mesh(np.array(jax.devices()[:4]), ("workers",))
    shielded = task.shield(watchful, mesh=mesh)
    program = shielded.explain(task.state, task.batch).plan.program
    state, _ = shielded(task.state, task.batch)
    lies = watchful.statistics()["wrong_products"]
    split = 0
    for index, segment in enumerate(program.segments):
        for number, crossing in enumerate(segment.uploads):
            shared = (
                set(crossing.layout.classes) & shielded.explain(task.state, task.batch).plan.sharded
            )
            if worker and not shared:
                continue  # the first worker brings what all of them have
            split += 1
            with lying(one_element(number), index, number, worker):
                with pytest.raises(errors.IntegrityError, match="wrong product"):
                    shielded(state, task.batch)
    assert split and watchful.statistics()["wrong_products"] == lies + split
    state, loss = shielded(state, task.batch)
    assert_close((watchful.open(state), [loss]), after(task, 2))


def test_same_segment_again_is_checked_again(watchful, mlp, monkeypatch):
    # A worker may ask again for the segment that just ran; other bytes end the run.
    visit = Runtime._visit

    def twice(self: Any, *arguments: Any) -> Any:
        visit(self, *arguments)
        return visit(self, *arguments)

    monkeypatch.setattr(Runtime, "_visit", twice)
    state, loss = mlp.shield(watchful, donate=False)(mlp.state, mlp.batch)
    assert_close((watchful.open(state), [loss]), after(mlp, 1))


# What nothing checked


def test_leaves_on_the_devices_are_refused(watchful, mlp):
    unverified, verified = (mlp.shield(watchful, verify=v, donate=False) for v in (False, True))
    state, _ = unverified(mlp.state, mlp.batch)
    refused = "lies blinded on the devices, where nothing checks"
    with pytest.raises(errors.IntegrityError, match=refused):
        verified(state, mlp.batch)
    state, loss = verified(watchful.seal(watchful.open(state)), mlp.batch)  # as the error says
    assert_close((watchful.open(state), [loss]), after(mlp, 2))


def test_enclave_refuses_leaves_on_the_devices(watchful, mlp):
    # A host that does not ask the client.
    state, _ = mlp.shield(watchful, verify=False, donate=False)(mlp.state, mlp.batch)
    verified = mlp.shield(watchful, donate=False)
    runtime = verified._runtime(verified._program(verified._signature((mlp.state, mlp.batch), {})))
    inputs = [*jax.tree.leaves(state, is_leaf=is_sealed), watchful.seal(mlp.batch)]
    with watchful.arena(runtime._program.arena_bytes) as (name, arena):
        with pytest.raises(
            errors.IntegrityError, match="lies blinded on the devices, where nothing"
        ):
            runtime._begin(name, arena, inputs, raises=False)


class Zeros:
    """In place of shared memory."""

    def view(self, array: ArrayType, _: int) -> np.ndarray:
        return np.zeros(array.shape, array.dtype)


def opened(session: Session, workers: int = 1) -> tuple[int, Run]:
    """A run that verifies and awaits the products of `chain`'s first segment."""
    program = planned(chain, X, W, V).program
    scheme = make_scheme(program.scheme, program.parameters)
    memory: Any = Zeros()
    run = Run(program, scheme, {}, memory, workers, 1, SCHEDULE, Executor())
    run._next, run._tensors = 1, collections.defaultdict(lambda: None)
    number = next(session._run_numbers)
    session._admit(number, run)
    return number, run


def bring(session: Session, number: int, worker: int = 0) -> Any:
    """Asks for the segment after the first product."""
    return session.handle(Frame(Kind.SEGMENT, 1, {"run": number, "segment": 1, "worker": worker}))


def abort(session: Session, number: int) -> Any:
    return session.handle(Frame(Kind.ABORT, 2, {"run": number}))


@pytest.fixture
def session() -> Session:
    """A session without a process or a port."""
    return Session(session_keys(bytes(32)), "00" * 16)


def test_too_many_lies_end_what_verifies(session):
    refused = "256 wrong products .* launch a new enclave"
    number, run = opened(session)
    session._wrong_products = integrity.MAX_WRONG_PRODUCTS - 1
    session._refuse_after_lies(run.program)
    session._wrong_products += 1
    for request in (
        lambda: session._refuse_after_lies(run.program),
        lambda: opened(session),
        lambda: session.handle(Frame(Kind.COMMIT, 1, {"run": number, "donate": []})),
        lambda: bring(session, number),
    ):
        with pytest.raises(IntegrityError, match=refused):
            request()
    # What was refused is not a wrong product, and the run has ended.
    assert session._wrong_products == integrity.MAX_WRONG_PRODUCTS and not session._runs
    unverified = dataclasses.replace(run.program, verify=False)
    session._refuse_after_lies(unverified)
    run.program = unverified
    session._admit(number, run)


def test_open_runs_are_no_more_than_lies_that_are_left(session):
    # Else a host could try in a thousand runs at once before any of them has been counted.
    session._wrong_products = integrity.MAX_WRONG_PRODUCTS - 3
    numbers = [opened(session)[0] for _ in range(3)]
    with pytest.raises(RequestError, match="3 runs that verify are open and 253 wrong products"):
        opened(session)
    abort(session, numbers[0])
    opened(session)
    with pytest.raises(RequestError, match="commit or abort a run first"):
        opened(session)


def test_a_lie_counts_once_for_all_workers(session, monkeypatch):
    def wrong(*_: Any) -> np.ndarray:
        raise IntegrityError("wrong")

    monkeypatch.setattr(Verifier, "checked", wrong)
    number, _ = opened(session, workers=2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for request in [pool.submit(bring, session, number, worker) for worker in range(2)]:
            with pytest.raises(IntegrityError, match="wrong"):
                request.result(30)
    assert session._wrong_products == 1 and not session._runs


def test_an_abort_does_not_hide_a_lie(session, monkeypatch):
    checking, aborting = threading.Event(), threading.Event()

    def wrong(*_: Any) -> np.ndarray:
        checking.set()
        assert aborting.wait(30)
        raise IntegrityError("wrong")

    def fail(run: Run, failure: BaseException) -> None:
        aborting.set()
        ended(run, failure)

    ended = Run.fail
    monkeypatch.setattr(Verifier, "checked", wrong)
    monkeypatch.setattr(Run, "fail", fail)
    number, _ = opened(session)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        lie = pool.submit(bring, session, number)
        assert checking.wait(30)
        pool.submit(abort, session, number).result(30)
        with pytest.raises(IntegrityError, match="wrong"):
            lie.result(30)
    assert session._wrong_products == 1 and not session._runs


def test_a_wrong_repeat_counts_and_ends_the_run(session, monkeypatch):
    def wrong(*_: Any) -> np.ndarray:
        raise IntegrityError("wrong")

    number, run = opened(session)
    run._next, run._last_uploads = 2, [jnp.zeros((18, 20))]
    monkeypatch.setattr(Verifier, "checked", wrong)
    with pytest.raises(IntegrityError, match="wrong"):
        run.segment(1, 0)
    with pytest.raises(IntegrityError, match="wrong"):
        run.segment(1, 0)  # the run itself refuses, before the session forgets it
    abort(session, number)
    assert session._wrong_products == 1 and not session._runs


def leaf_with_a_checksum() -> Any:
    """In place of a stored leaf, for what is asked of it before it is unblinded."""
    return types.SimpleNamespace(checksum={}, source="here")


def test_leaves_that_come_back_are_no_more_tries_than_are_left(session, monkeypatch):
    # Else a host could bring a thousand wrong leaves at once before any of them has been counted.
    entry, content = leaf_with_a_checksum(), np.zeros(0)
    comparing, going_on, tries = threading.Event(), threading.Event(), []

    def wrong(*_: Any) -> None:
        tries.append(1)
        comparing.set()
        assert going_on.wait(30)
        raise IntegrityError("wrong leaf")

    monkeypatch.setattr(checksum, "check_leaf", wrong)
    session._wrong_products = integrity.MAX_WRONG_PRODUCTS - 2
    number, _ = opened(session)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(session._unblinded, entry, content)
        assert comparing.wait(30)
        for request in (lambda: session._unblinded(entry, content), lambda: opened(session)):
            with pytest.raises(RequestError, match="1 leaves are being compared, together at most"):
                request()
        going_on.set()
        with pytest.raises(IntegrityError, match="wrong leaf"):
            first.result(30)
    assert len(tries) == 1 and session._wrong_products == integrity.MAX_WRONG_PRODUCTS - 1
    with pytest.raises(RequestError, match="commit or abort a run first"):
        session._unblinded(entry, content)
    abort(session, number)
    with pytest.raises(IntegrityError, match="wrong leaf"):
        session._unblinded(entry, content)
    with pytest.raises(IntegrityError, match="256 wrong products"):
        session._unblinded(entry, content)
    assert len(tries) == 2


def test_a_leaf_that_is_right_is_no_try(session, monkeypatch):
    entry = leaf_with_a_checksum()
    monkeypatch.setattr(checksum, "check_leaf", lambda *_: None)
    session._wrong_products = integrity.MAX_WRONG_PRODUCTS - 1
    for _ in range(3):
        with pytest.raises(AttributeError):  # only after the comparison: there is no scheme
            session._unblinded(entry, np.zeros(0))
    assert session._wrong_products == integrity.MAX_WRONG_PRODUCTS - 1
    opened(session)


def test_a_wrong_leaf_ends_the_run_that_it_was_brought_for(session):
    number, run = opened(session)
    run.awaiting = {0}
    with pytest.raises(RequestError, match="does not lie on the devices"):
        session.handle(Frame(Kind.SETTLE, 1, {"run": number, "offsets": {"0": 0}, "blind_at": {}}))
    assert not session._runs
    with pytest.raises(RunError, match="has failed"):
        run.segment(1, 0)
