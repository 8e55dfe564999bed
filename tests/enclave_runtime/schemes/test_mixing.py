"""Mixing through a real enclave: exact, its keys fresh, nothing in the clear."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from scipy.spatial.distance import cdist

import tempo_jax as tempo
from benchmarks.attacks import structure
from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import KeyClass, Layout
from enclave_runtime.schemes.kernels import hadamard
from enclave_runtime.sessions.run import _last_uses
from tempo_jax.schemes import Mixing
from tests.support.steps import assert_close, uniform
from tests.support.two_layers import DECOYS, TOLERANCE, small, two_layers


def test_runs_under_jit_and_on_a_mesh(enclave):
    arguments = small()
    expected = jax.grad(two_layers)(*arguments)
    mesh = Mesh(np.array(jax.devices()[:2]), ("workers",))
    options: dict[str, Any]
    for options in ({}, {"mesh": mesh}):
        shielded = tempo.shield(jax.grad(two_layers), enclave=enclave, offload="all", **options)
        if options:
            assert shielded.explain(*arguments).plan.sharded
        result = enclave.open(shielded(*arguments))
        assert_close(result, expected, tolerance=TOLERANCE)
    shielded = tempo.shield(jax.grad(two_layers), enclave=enclave, offload="all")
    result = enclave.open(jax.jit(shielded)(*map(enclave.seal, arguments)))
    assert_close(result, expected, tolerance=TOLERANCE)


def test_product_that_is_an_output_can_be_opened(enclave):
    x, w = uniform(1, 128, 64), uniform(2, 64, 64)
    shielded = tempo.shield(lambda x, w: x @ w, enclave=enclave, offload="all", donate=False)
    assert_close(enclave.open(shielded(x, w)), x @ w, tolerance=TOLERANCE)


def views_of(enclave: tempo.Enclave, calls: int, scheme: Any = None) -> list[Any]:
    arguments = small()
    shielded = tempo.shield(
        jax.grad(two_layers), enclave=enclave, scheme=scheme, offload="all", donate=False
    )
    views = []
    for _ in range(calls):
        with tempo.testing.host_view() as view:
            shielded(*arguments)
        views.append(view)
    return views


def shows(plain: np.ndarray, seen: np.ndarray) -> bool:
    """Whether any row or column of the one stands in the other, in any order, sign and scale."""
    if plain.ndim != 2 or seen.ndim != 2:
        return False
    for a, b in ((plain, seen), (plain.T, seen.T)):
        if a.shape[1] == b.shape[1] > 1:
            profiles = [np.sort(np.abs(v), axis=1) for v in (a, b)]
            profiles = [v / (np.linalg.norm(v, axis=1, keepdims=True) + 1e-300) for v in profiles]
            if cdist(*profiles).min() < 1e-6:
                return True
    return False


def test_every_step_has_keys_of_its_own(enclave):
    first, second = views_of(enclave, 2)
    for one, other in zip(first.products, second.products, strict=True):
        for a, b in zip(one.operands, other.operands, strict=True):
            cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
            assert abs(cosine) < 0.1
            # Not even the singular values repeat, as they would under orthogonal keys.
            s, t = (np.linalg.svd(v, compute_uv=False) for v in (a, b))
            assert np.abs(s / s[0] - t / t[0]).max() > 1e-3


@pytest.mark.parametrize("scheme", [Mixing(), DECOYS], ids=["masks", "decoys"])
def test_rows_have_decoys_and_norms_are_hidden(scheme, enclave):
    (view,) = views_of(enclave, 1, scheme)
    p, x = small()
    rows = {n for product in view.products for v in product.operands for n in v.shape if n > 64}
    assert rows == {192 if scheme.decoy_rows else 128}
    norms = {
        round(float(np.sqrt(np.mean(v**2))), 6)
        for product in view.products
        for v in product.operands
    }
    plain = {round(float(np.sqrt(np.mean(np.square(v)))), 6) for v in (x, *p.values())}
    assert not norms & plain


@pytest.mark.parametrize(("decoy_rows", "hidden"), [(32, True), (0, False)])
def test_decoys_hide_the_rank_of_rows(enclave, decoy_rows, hidden):
    # A key is invertible and keeps the rank; only decoys, in a basis of their own, raise it.
    scheme = Mixing(decoy_rows=decoy_rows, mask_energy=0)
    multiply = tempo.shield(lambda w, x: x @ w, enclave=enclave, scheme=scheme, offload="all")
    x = np.outer(uniform(1, 128), uniform(2, 64))
    with tempo.testing.host_view() as view:
        multiply(enclave.seal(uniform(3, 64, 64)), x)
    ((rows, _),) = [product.operands for product in view.products]
    values = np.linalg.svd(rows, compute_uv=False)
    assert (values[1] > 0.1 * values[0]) == hidden


def test_host_sees_no_plain_row_or_column(enclave):
    (view,) = views_of(enclave, 1)
    p, x = small()
    h = np.tanh(np.asarray(x @ p["a"]))
    for plain in map(np.asarray, (x, h, *p.values())):
        assert not any(shows(plain, seen) for seen in view.arrays())
        # Decoys below a tensor in the clear would not hide it.
        assert shows(plain, np.concatenate([uniform(9, 64, plain.shape[1]), plain]))


def test_host_sees_every_row_and_column_under_permutations(enclave):
    """The weak control of the test above."""
    (view,) = views_of(enclave, 1, tempo.schemes.SignedPermutation())
    p, x = small()
    for plain in map(np.asarray, (x, *p.values())):
        assert any(shows(plain, seen) for seen in view.arrays())


def test_zero_gradient_comes_back_as_zero(enclave):
    p, x = small()

    def loss(p, x):
        return two_layers(p, x) * 0.0

    shielded = tempo.shield(jax.grad(loss), enclave=enclave, offload="all")
    assert_close(enclave.open(shielded(p, x)), jax.tree.map(jnp.zeros_like, p), tolerance=0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_narrow_formats(dtype, enclave):
    x, w = (uniform(i, *s, dtype=dtype) for i, s in ((1, (128, 64)), (2, (64, 64))))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    shielded = tempo.shield(lambda x, w: x @ w, enclave=enclave, offload="all", donate=False)
    blinded = np.asarray(enclave.open(shielded(x, w)), np.float64)
    plain = np.asarray(x @ w, np.float64)
    # SECURITY.md: 15 to 25 times plain's rounding; the bound leaves room for one draw's luck.
    error, usual = (np.linalg.norm(v - exact) for v in (blinded, plain))
    assert error < 40 * usual


@pytest.mark.parametrize(("rounds", "found"), [(2, True), (3, False)])
def test_blocks_of_a_key_show_under_two_rounds_only(rounds, found):
    """The Gram matrix of a blinded tensor must not show which rows share a Hadamard block."""
    key = hadamard.draw(KeySchedule().stream("test"), 256, condition=4.0, rounds=rounds)
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 256, 256))
    seen = hadamard.mix(x, {0: key}), hadamard.mix(g, {0: key.inverse_transpose()})
    blocks = structure.find_blocks(seen[:1], seen[1:], rng)
    share = structure.share_right(blocks, key.order[0, -1] // 64)
    assert share > 0.95 if found else share < 0.45


def leading(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix)[0][:, :4]


def blinded_weight(scheme: Mixing, w: np.ndarray) -> tuple[Any, Any, np.ndarray]:
    """What `blind` tells of a weight, its layout, and what is left when the keys are taken off."""
    schedule = KeySchedule()
    keys = {i: scheme.draw(KeyClass(n), schedule.stream("key", i)) for i, n in enumerate(w.shape)}
    layout, out = Layout((0, 1), (0, 1)), np.empty_like(w)
    secret = scheme.blind(w, layout, keys, out, lambda: schedule.stream("tensor"))
    maps = {0: keys[0].element.transpose(), 1: keys[1].element.inverse()}
    return secret, layout, hadamard.unmix(out, maps) / secret.scalars


@pytest.mark.parametrize(("traded", "shown"), [(0, True), (8, False)])
def test_strongest_directions_of_a_weight_are_traded_for_random_ones(traded, shown):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(96, 64)) + 4 * rng.normal(size=(96, 4)) @ rng.normal(size=(4, 64))
    scheme = Mixing(decoy_rows=32, traded=traded, mask_energy=0.0)
    secret, _, seen = blinded_weight(scheme, w)
    assert (secret.trade is None) == shown
    w = secret.tensor.scaled
    for a, b in ((w, seen), (w.T, seen.T)):
        overlap = np.square(leading(a).T @ leading(b)).sum() / 4
        assert overlap > 0.999 if shown else overlap < 0.5
    # Rounding does not grow: the mask takes away about as much as it adds.
    assert 0.5 < np.linalg.norm(seen) / np.linalg.norm(w) < 1.5


@pytest.mark.parametrize("scheme", [Mixing(), DECOYS], ids=["masks", "decoys"])
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e35, np.inf, np.nan])
def test_masks_take_any_weight(value, scheme):
    w = np.full((64, 64), value, np.float32)
    _, _, seen = blinded_weight(scheme, w)
    assert np.isfinite(seen).all() and np.abs(seen).max() > 0


def test_operands_are_kept_until_their_last_product(enclave):
    program = tempo.shield(jax.grad(two_layers), enclave=enclave).explain(*small()).plan.program
    assert not _last_uses(program), "everything stays inside"
    plan = tempo.shield(jax.grad(two_layers), enclave=enclave, offload="all").explain(*small()).plan
    uploads = [(i, c) for i, s in enumerate(plan.program.segments) for c in s.uploads]
    last = _last_uses(plan.program)
    for index, crossing in uploads:
        assert all(last[operand] >= index for operand in crossing.operands or ())
    assert len(set(last.values())) > 1, "what is used early is let go early"
    w = uniform(1, 64, 64, dtype="float32")
    for scheme in (Mixing(), DECOYS):
        secret, _, _ = blinded_weight(scheme, np.asarray(w))
        left = scheme.let_go(secret)
        assert left.masked is None and left.trade is None and left.tensor is None
        assert left.scalars is secret.scalars


def test_gradients_through_a_frozen_weight_have_decoys(enclave):
    """No gradient of the weight ties the rows of X and G together, as in low-rank adaptation."""
    p, x = small()

    def loss(x):
        return two_layers(p, x)

    shielded = tempo.shield(
        jax.grad(loss), enclave=enclave, scheme=DECOYS, offload="all", donate=False
    )
    with tempo.testing.host_view() as view:
        result = shielded(x)
    assert_close(enclave.open(result), jax.grad(loss)(x), tolerance=TOLERANCE)
    for product in view.products:
        rows = product.operands[0].shape[-2]
        assert rows == 192, "rows of every first operand have decoys below them"


def test_mixing_uses_three_rounds():
    key = Mixing().draw(KeyClass(64, decoys=64), KeySchedule().stream("test"))
    assert key.element.order.shape == (1, 4, 128)


def test_default_is_mixing(enclave):
    report = tempo.shield(jax.grad(two_layers), enclave=enclave).explain(*small())
    assert report.plan.request.scheme == Mixing()
