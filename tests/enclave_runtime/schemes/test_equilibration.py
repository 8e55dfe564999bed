"""Rows and columns of any scale keep their digits under `Mixing`; NaN and infinity stay inside."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tempo_jax as tempo
from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import KeyClass, Layout
from enclave_runtime.schemes import equilibration
from enclave_runtime.schemes.equilibration import AxisScales, equilibrate
from enclave_runtime.schemes.mixing import Mixing
from tests.support.fresh import run_fresh

ROWS, INNER, COLUMNS = 256, 96, 80
MASKS, DECOYS = Mixing(), Mixing(decoy_rows=32, mask_energy=0.0)
BARE = Mixing(mask_energy=0.0)
SCHEMES = pytest.mark.parametrize(
    "scheme", [MASKS, DECOYS, BARE], ids=["masks", "decoys", "neither"]
)
# Classes and parities of what is blinded, G for each of its two products, and of the three products
# of a family.
LAYOUTS = {
    "x": Layout((0, 1), (1, 1)),
    "w": Layout((1, 2), (0, 1)),
    "g": Layout((3, 2), (1, 0)),
    "h": Layout((0, 4), (0, 1)),
    "y": Layout((0, 2), (1, 1)),
    "dx": Layout((3, 1), (1, 0)),
    "dw": Layout((1, 4), (1, 1)),
}


def family(
    scheme: Mixing, x: np.ndarray, w: np.ndarray, g: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Y, dX and dW as they come out of the scheme, and what the host saw."""
    *batch, rows, inner = x.shape
    copies = batch[0] if batch else 1
    of_rows = KeyClass(rows, decoys=scheme.decoys(rows), copies=copies)
    across, along = (KeyClass(n, copies=copies) for n in (inner, w.shape[-1]))
    classes = [of_rows, across, along, of_rows, along]
    schedule = KeySchedule()
    keys = {i: scheme.draw(c, schedule.stream("key", i)) for i, c in enumerate(classes)}
    layouts = {
        name: Layout((None,) * len(batch) + at.classes, (0,) * len(batch) + at.parities)
        for name, at in LAYOUTS.items()
    }
    secrets, seen = {}, {}
    for name, plain in (("x", x), ("w", w), ("g", g), ("h", g)):
        below = [classes[c].decoys for c in LAYOUTS[name].classes if c is not None]
        shape = (*batch, *(n + d for n, d in zip(plain.shape[-2:], below, strict=True)))
        seen[name] = np.empty(shape, plain.dtype)
        stream = schedule.stream("tensor", "xwgh".index(name))
        secrets[name] = scheme.blind(
            plain, layouts[name], keys, seen[name], lambda stream=stream: stream
        )
    found = {}
    blinded, of_weight = (products(seen["x"], seen["w"], seen[g], wide=False) for g in "gh")
    for name, product in (blinded | {"dw": of_weight["dw"]}).items():
        a, b = {"y": "xw", "dx": "gw", "dw": "xh"}[name]
        found[name] = np.asarray(
            scheme.unblind(product, layouts[name], keys, (secrets[a], secrets[b]))
        )
    return found, seen


def products(x: Any, w: Any, g: Any, wide: bool = True) -> dict[str, np.ndarray]:
    if wide:
        x, w, g = (np.asarray(v, np.float64) for v in (x, w, g))
    with np.errstate(all="ignore"):
        return {
            "y": x @ w,
            "dx": g @ w.swapaxes(-1, -2),
            "dw": x.swapaxes(-1, -2) @ g,
        }


def operands(seed: int, dtype: Any = np.float32, *batch: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = (ROWS, INNER), (INNER, COLUMNS), (ROWS, COLUMNS)
    return [rng.normal(size=(*batch, *s)).astype(dtype) for s in shapes]


def off(found: np.ndarray, x: np.ndarray, w: np.ndarray) -> float:
    """The worst row's or column's error of x @ w, over what its terms add up to."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    # Scales do not change it: each element is divided by the size of its own terms.
    ratio = (found - x @ w) / np.sqrt(np.square(x) @ np.square(w))
    return float(np.sqrt(max(np.square(ratio).mean(0).max(), np.square(ratio).mean(1).max())))


def all_off(found: dict[str, np.ndarray], x: np.ndarray, w: np.ndarray, g: np.ndarray) -> dict:
    pairs = {"y": (x, w), "dx": (g, w.T), "dw": (x.T, g)}
    return {name: off(found[name], *pair) for name, pair in pairs.items()}


def scales(rng: np.random.Generator, size: int, kind: str) -> np.ndarray:
    if kind == "even":
        return np.ones(size)
    if kind == "one":
        return np.where(np.arange(size) == size // 3, 10.0 ** rng.uniform(-8, 8), 1.0)
    return 10.0 ** rng.uniform(-8, 8, size)


KINDS = st.tuples(*[st.sampled_from(["even", "one", "all"])] * 6)
FITTING = st.sampled_from(["all", "inner", "none"])


@SCHEMES
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), kinds=KINDS, fitting=FITTING)
def test_scales_cost_no_digits(scheme, seed, kinds, fitting):
    """Errors of all three products stay within 10 times those at even scales, line by line."""
    x, w, g = operands(seed)
    even = all_off(family(scheme, x, w, g)[0], x, w, g)
    rng = np.random.default_rng(seed)
    sizes = (ROWS, INNER, INNER, COLUMNS, ROWS, COLUMNS)
    a, b, c, d, e, f = (scales(rng, n, kind) for n, kind in zip(sizes, kinds, strict=True))
    if fitting != "none":
        c = 1 / b
    if fitting == "all":
        e, f = 1 / a, 1 / d
    x = (x * a[:, None] * b).astype(np.float32)
    w = (w * c[:, None] * d).astype(np.float32)
    g = (g * e[:, None] * f).astype(np.float32)
    spread = all_off(family(scheme, x, w, g)[0], x, w, g)
    for name, error in spread.items():
        assert error < 10 * even[name], name


@pytest.mark.parametrize(("scheme", "times"), [(MASKS, 80), (DECOYS, 25), (BARE, 5)])
def test_even_scales_round_as_stated(scheme, times):
    """What the test above compares with, over plain's; masks of narrow operands are the largest."""
    x, w, g = operands(0)
    plain = all_off(products(x, w, g, wide=False), x, w, g)
    for name, error in all_off(family(scheme, x, w, g)[0], x, w, g).items():
        assert error < times * plain[name], name


@SCHEMES
@pytest.mark.parametrize("factor", [1e3, 1e4, 1e6, 1e12])
def test_one_large_row_costs_the_others_nothing(scheme, factor):
    x, w, g = operands(1)
    even = all_off(family(scheme, x, w, g)[0], x, w, g)
    x[5] *= factor
    found, _ = family(scheme, x, w, g)
    assert off(found["y"], x, w) < 3 * even["y"]
    assert off(found["dx"], g, w.T) < 3 * even["dx"]


def test_without_scales_one_large_row_costs_digits(monkeypatch):
    """The control of the test above."""
    monkeypatch.setattr(equilibration, "LEAST_SCALE", 100)
    monkeypatch.setattr(equilibration, "REMOVED", 100)
    monkeypatch.setattr(equilibration, "DROWNED", np.inf)
    x, w, g = operands(1)
    even = off(family(BARE, x, w, g)[0]["y"], x, w)
    x[5] *= 1e6
    assert off(family(BARE, x, w, g)[0]["y"], x, w) > 100 * even


@SCHEMES
@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
def test_examples_that_count_little_cost_no_work(scheme, share, monkeypatch):
    """What is well learned has gradients a million times smaller, and no product is made inside."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a product was computed inside")

    monkeypatch.setattr(equilibration, "_product", refuse)
    x, w, g = operands(8)
    g[np.random.default_rng(0).random(ROWS) < share] *= np.float32(1e-6)
    even = all_off(family(scheme, *operands(8))[0], *operands(8))
    found, _ = family(scheme, x, w, g)
    for name, error in all_off(found, x, w, g).items():
        assert error < 10 * even[name], name


def test_float64_keeps_its_digits():
    rng = np.random.default_rng(0)
    x, w, g = operands(3, np.float64)
    x *= 10 ** rng.uniform(-8, 8, (ROWS, 1))
    assert max(all_off(family(MASKS, x, w, g)[0], x, w, g).values()) < 1e-12


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_formats(dtype):
    def error(factor: float) -> float:
        x, w, _ = operands(4)
        x[5] *= factor
        x, w = (np.asarray(jnp.asarray(v, dtype)) for v in (x, w))
        schedule = KeySchedule()
        sizes = (ROWS, INNER, COLUMNS)
        keys = {i: BARE.draw(KeyClass(n), schedule.stream("key", i)) for i, n in enumerate(sizes)}
        seen, secrets = [], []
        for name, plain in (("x", x), ("w", w)):
            out, stream = np.empty(plain.shape, plain.dtype), schedule.stream(name)
            secrets.append(BARE.blind(plain, LAYOUTS[name], keys, out, lambda s=stream: s))
            seen.append(out.astype(np.float32))
        # Products of 16-bit operands come back in float32.
        found = BARE.unblind(seen[0] @ seen[1], LAYOUTS["y"], keys, (secrets[0], secrets[1]))
        return off(np.asarray(found), x, w)

    assert error(1e3) < 3 * error(1.0)


def spoilt(seed: int, *batch: int) -> list[np.ndarray]:
    x, w, g = operands(seed, np.float32, *batch)
    x[..., 3, :] = np.nan
    x[..., 7, 2] = np.inf
    x[..., 11, :] = 0
    w[..., 4, 5] = np.inf
    g[..., 9, 1] = -np.inf
    g[..., 20:30, :] = 0
    return [x, w, g]


def assert_exact_where_plain_is(found: np.ndarray, plain: np.ndarray) -> None:
    finite = np.isfinite(plain)
    np.testing.assert_array_equal(found[~finite], plain[~finite])
    assert (found[plain == 0] == 0).all()
    np.testing.assert_allclose(found[finite], plain[finite], atol=2e-3)


@SCHEMES
@pytest.mark.parametrize("batch", [(), (3,)])
def test_what_is_not_finite_stays_where_plain_has_it(scheme, batch):
    x, w, g = spoilt(5, *batch)
    found, seen = family(scheme, x, w, g)
    for name, plain in products(x, w, g, wide=False).items():
        assert_exact_where_plain_is(found[name], plain)
    # What the host gets looks as ever: without a gap, and of the usual size.
    for name, array in seen.items():
        assert np.isfinite(array).all(), name
        rows = np.linalg.norm(array, axis=-1)
        assert rows.max() < 20 * rows.min(), name


@SCHEMES
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_operands_that_are_nowhere_finite(scheme, value, monkeypatch):
    # The same keys each time: an element of what is blinded may be 0 by chance.
    monkeypatch.setattr(os, "urandom", bytes)
    x, w, g = operands(6)
    w[:] = value
    found, seen = family(scheme, x, w, g)
    for name, plain in products(x, w, g, wide=False).items():
        np.testing.assert_allclose(found[name], plain, rtol=1e-3, atol=2e-3)
    assert all(np.isfinite(v).all() and np.abs(v).min(initial=1) > 0 for v in seen.values())


@given(seed=st.integers(0, 2**32 - 1), order=st.sampled_from([-44, -38, -30, 0, 30, 37]))
def test_a_repeat_has_the_same_bits(seed, order):
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        x = (rng.normal(size=(64, 48)) * 10.0 ** rng.uniform(-9, 9, (64, 1))).astype(np.float32)
        x = x * np.float32(10.0) ** np.float32(order)
    scales = AxisScales(1), AxisScales(1)
    first, again = (equilibrate(x, scales, (1, 0)) for _ in range(2))
    np.testing.assert_array_equal(first.scaled, again.scaled)
    for one, other in ((first.rows, again.rows), (first.columns, again.columns)):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert np.isfinite(first.scaled).all()


def test_even_tensors_are_not_copied():
    x = operands(7)[0]
    assert equilibrate(x, (AxisScales(1), AxisScales(1)), (1, 1)).scaled is x


def outliers_features_and_masks() -> None:
    """The issue's programs: an outlier, unscaled features, and a mask over what is not finite."""
    enclave = tempo.Enclave.launch()
    x, w, _ = operands(8)
    multiply = tempo.shield(lambda x, w: x @ w, enclave=enclave, offload="all", donate=False)
    usual = off(enclave.open(multiply(x, w)), x, w)
    for factor in (1e3, 1e4, 1e6):
        large = x.copy()
        large[5] *= factor
        assert off(enclave.open(multiply(large, w)), large, w) < 3 * usual
    features = np.geomspace(1, 1e6, INNER).astype(np.float32)
    a, b = x * features, w / features[:, None]
    assert off(enclave.open(multiply(a, b)), a, b) < 3 * usual

    def loss(w: Any, x: Any, mask: Any) -> Any:
        return jnp.where(mask[:, None], x @ w, 0).mean()

    masked = x.copy()
    masked[40:50] = np.nan
    mask = ~np.isnan(masked).any(-1)
    shielded = tempo.shield(loss, enclave=enclave, offload="all", donate=False)
    with tempo.testing.host_view() as view:
        found = float(enclave.open(shielded(w, masked, mask)))
    assert abs(found - float(loss(w, masked, mask))) < 1e-4
    assert view.products and all(np.isfinite(np.asarray(seen)).all() for seen in view.arrays())
    said = str(multiply.explain(x, w))
    assert "whatever they are" in said and "computed inside, because it was not finite" in said


def forward_and_backward() -> None:
    """NaN and infinity are where plain JAX has them, in results and in gradients.

    Nothing of that shows in what the host sees, nor in the enclave's log, its standard error.
    """
    log, own = tempfile.TemporaryFile(), os.dup(2)
    os.dup2(log.fileno(), 2)
    enclave = tempo.Enclave.launch()
    os.dup2(own, 2)

    def loss(params: Any, x: Any, mask: Any) -> Any:
        hidden = jnp.where(mask[:, None], jnp.tanh(x @ params["first"]), 0)
        out = hidden @ params["second"]
        return jnp.where(jnp.isfinite(out), out, 0).sum(), out

    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    shielded = tempo.shield(step, enclave=enclave, offload="all", donate=False)
    rng = np.random.default_rng(9)
    plain_x = rng.normal(size=(512, 128)).astype(np.float32)
    plain = {
        name: (rng.normal(size=size) / 12).astype(np.float32)
        for name, size in (("first", (128, 256)), ("second", (256, 96)))
    }
    for broken in ("input", "first", "second", "all"):
        x, params = plain_x.copy(), {name: w.copy() for name, w in plain.items()}
        mask = np.ones(len(x), bool)
        if broken in ("input", "all"):
            x[100:130], x[140, 7] = np.nan, np.inf
            mask[100:130] = False
        if broken in ("first", "second"):
            params[broken][5, 9], params[broken][6, 11] = np.nan, -np.inf
        if broken == "all":
            params["second"][:] = np.nan
        found = enclave.open(shielded(params, x, mask))
        for a, b in zip(
            jax.tree.leaves(found), jax.tree.leaves(step(params, x, mask)), strict=True
        ):
            a, b = np.asarray(a), np.asarray(b)
            finite = np.isfinite(b)
            np.testing.assert_array_equal(a[~finite], b[~finite])
            np.testing.assert_allclose(a[finite], b[finite], rtol=1e-3, atol=3e-3)
    enclave.close()
    log.seek(0)
    assert log.read() == b""


def test_users_programs():
    run_fresh(outliers_features_and_masks, forward_and_backward)
