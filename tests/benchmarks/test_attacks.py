"""The attack suite: every attack succeeds on its weak control and fails on the default scheme.

Traces are simulated and short. The library itself is attacked by `python -m benchmarks.attacks`.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.attacks import (
    blinding,
    candidates,
    congruence,
    exactness,
    few_shot,
    inputs,
    labels,
    linkage,
    rows,
    scales,
    scoring,
    spectra,
    store,
    structure,
    traces,
    victims,
)
from enclave_runtime.crypto.keys import KeySchedule
from tempo_jax.families import convolutions
from tests.support.traces import STEPS, history, trace

pytestmark = pytest.mark.slow


def strongest(attack, scheme, metric):
    """The measurement with this name."""
    found = attack(trace(scheme), np.random.default_rng(0))
    return next(m for m in found if m.metric == metric)


# Traces


def relative_error(actual, expected):
    """Largest difference over the largest value."""
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("scheme", [n for n, how in blinding.BLINDINGS.items() if not how.shares])
def test_blinded_products_are_the_plain_ones_under_their_keys(scheme):
    for name, view in trace(scheme).views[-1].items():
        truth = trace(scheme).truth[-1][name]
        rows, (t_x, t_w, t_g) = len(truth.x), truth.scales
        undo_c = np.linalg.inv(truth.c)
        mask = np.zeros_like(truth.w) if truth.mask is None else truth.mask
        mask_x = np.zeros_like(truth.x) if truth.mask_x is None else truth.mask_x
        mask_g = np.zeros_like(truth.g) if truth.mask_g is None else truth.mask_g
        x, w, g = truth.x + mask_x, truth.w + mask, truth.g + mask_g
        y = np.linalg.solve(truth.a, view.y) @ undo_c.T / (t_x * t_w)
        assert relative_error(y[:rows] - mask_x @ w - truth.x @ mask, truth.y) < 1e-10
        dx = truth.a.T @ view.dx @ truth.b / (t_g * t_w)
        assert relative_error(dx[:rows] - mask_g @ w.T - truth.g @ mask.T, truth.dx) < 1e-10
        if view.x_dual is None:
            dw = np.linalg.solve(truth.b, view.dw) @ truth.c / (t_x * t_g)
            if truth.decoys_x is not None:
                dw -= truth.decoys_x.T @ truth.decoys_g
            dw -= x.T @ g - truth.x.T @ truth.g
        else:
            dw = truth.b.T @ view.dw @ undo_c.T  # the layout of w
        assert relative_error(dw, truth.dw) < 1e-10


def test_three_shares_are_the_tensor_and_one_is_none_of_it():
    x = np.random.default_rng(0).normal(size=(40, 50))
    share = blinding.draw_share(np.random.default_rng(1), x)
    again = np.random.default_rng(1)
    others = [again.integers(0, blinding.RING, x.shape) / blinding.RING for _ in range(2)]
    whole = (share + others[0] + others[1] + 0.5) % 1 - 0.5
    whole *= blinding.RING / 2.0**blinding.FRACTION_BITS * np.abs(x).max()
    assert relative_error(whole, x) < 2.0**-blinding.FRACTION_BITS
    assert abs(np.corrcoef(share.ravel(), x.ravel())[0, 1]) < 5 / np.sqrt(x.size)
    assert abs(share.mean()) < 0.05 and abs(share.std() - 12**-0.5) < 0.02


def test_mixing_has_the_shape_that_was_studied():
    view, truth = (side[-1]["dense2"] for side in (trace("mixing").views, trace("mixing").truth))
    assert len(view.x) == len(truth.x)
    assert max(np.linalg.cond(k) for k in (truth.a, truth.b, truth.c)) <= blinding.MASKED_CONDITION
    assert not trace("mixing").outside("head")
    most = np.sqrt(1 + blinding.NARROW_FACTOR * blinding.MASK_ENERGY)
    directions = blinding.STRONGEST * blinding.MOST_WIDTHS
    for mask, signal in ((truth.mask_x, truth.x), (truth.mask, truth.w), (truth.mask_g, truth.g)):
        # What it takes down of the signal is at most all of its strongest directions.
        sizes = np.linalg.svd(signal, compute_uv=False)
        left = np.linalg.norm(sizes[directions:]) / np.linalg.norm(sizes)
        ratio = np.linalg.norm(signal + mask) / np.linalg.norm(signal)
        assert most * left < ratio < most + 0.2
        assert np.linalg.matrix_rank(mask) == min(mask.shape)


def test_what_mixing_was_without_masks_has_the_shape_that_was_studied():
    old = trace("mixing_decoys")
    view, truth = old.views[-1]["dense2"], old.truth[-1]["dense2"]
    assert len(view.x) % blinding.BLOCK == 0 and len(view.x) >= len(truth.x) + blinding.DECOYS
    for decoys, signal in ((truth.decoys_x, truth.x), (truth.decoys_g, truth.g)):
        assert (decoys**2).sum() / (signal**2).sum() == pytest.approx(blinding.DECOY_ENERGY)


def test_low_rank_masks_and_decoys_have_a_basis_of_their_own():
    truth = trace("mixing_decoys").truth[-1]["dense2"]
    mask = truth.mask
    assert np.linalg.matrix_rank(mask) == 2 * blinding.STRONGEST
    decoys = truth.decoys_x
    own = np.linalg.svd(truth.x, full_matrices=False)[2][0]
    matched = blinding.matched_decoys(np.random.default_rng(0), truth.x, 32)
    share, usual = (np.square(d @ own).sum() / np.square(d).sum() for d in (decoys, matched))
    assert share < 0.1 < usual


def test_the_scheme_is_exact_and_rounds_as_little_as_it_says(monkeypatch):
    class Schedule(KeySchedule):
        """Always the same keys, so that rounding is the same in every run."""

        def __init__(self) -> None:
            self._root = bytes(32)

    monkeypatch.setattr(exactness, "KeySchedule", Schedule)
    costs = {"mixing": 3.0, "signed_permutation": 1.0}
    monkeypatch.setattr(exactness, "blinding_costs", lambda: costs)
    found = exactness.attack(trace("mixing"), np.random.default_rng(0))
    assert [m.metric for m in found if not m.passed] == []
    expected = {"deviation in float64", "float32 error of dw", "bfloat16 error of y", "cost"}
    expected |= {"float16 error of dx", "float32 error of y, x after ReLU", "cost of a family"}
    assert expected <= {m.metric for m in found}
    assert exactness.attack(trace("kept_orthogonal"), np.random.default_rng(0)) == []


def test_keys_live_as_long_as_the_scheme_says():
    def same(scheme):
        first, second = (trace(scheme).truth[t]["dense1"].c for t in (0, 1))
        return np.array_equal(first, second)

    assert same("signed_permutation") and same("kept_orthogonal")
    assert not same("mixing") and not same("fresh_orthogonal")
    rows = [trace("signed_permutation").truth[t]["dense1"].a for t in (0, 1)]
    assert not np.array_equal(*rows)


@pytest.mark.parametrize("form", ["patches", "rows"])
def test_convolutions_are_attacked_as_the_library_sends_them(form):
    """The suite's matrices are the planner's."""
    rng = np.random.default_rng(0)
    x, w, g = (
        jax.numpy.asarray(rng.normal(size=s)) for s in ((2, 7, 6, 3), (3, 3, 3, 7), (2, 7, 6, 7))
    )
    (eqn,) = jax.make_jaxpr(functools.partial(traces.Plain().convolve, ""))(x, w).eqns
    window = convolutions.Window(eqn)
    if form == "patches":
        forms, multiply = window.forms(frozenset()), victims.Patched().convolve
        y = multiply("", x, w)
        ((_, matrices),) = traces.unfold("", *map(np.asarray, (x, w, g))).items()
    else:
        forms = window.forms(frozenset({0}))
        tape: list[Any] = []

        class Kept(traces.Plain):
            def dense(self, name, x, w):
                tape.append((x, w))
                return x @ w + tape[0]

        def product(probe):
            tape.append(probe)
            return victims.InRows(Kept()).convolve("", x, w)

        y, pullback = jax.vjp(product, jax.numpy.zeros((forms.x.rows, forms.w.columns)))
        matrices = (*tape[1], *pullback(g))
    np.testing.assert_allclose(y, traces.Plain().convolve("", x, w), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(
        matrices, (forms.x.matrix(x), forms.w.matrix(w), forms.out.matrix(g)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_recorded_operands_give_the_weights_gradients():
    victim, plain = traces.VICTIMS["mlp"], history()
    gradients = jax.grad(victim.loss)(
        plain.parameters, plain.inputs[-1], plain.labels[-1], traces.Plain()
    )
    for name, (x, w, g) in plain.steps[-1].items():
        np.testing.assert_array_equal(w, plain.parameters[name])
        np.testing.assert_allclose(x.T @ g, gradients[name], rtol=1e-9, atol=1e-14)


def test_a_plain_history_is_read_back_from_the_cache(tmp_path, monkeypatch):
    victim, trained = traces.VICTIMS["mlp"], history()
    monkeypatch.setattr(traces, "train", lambda *_, **__: trained)
    first = traces.cached_train(victim, 0, STEPS, cache=tmp_path)
    monkeypatch.setattr(traces, "train", None)
    second = traces.cached_train(victim, 0, STEPS, cache=tmp_path)
    assert first.names == second.names
    for a, b in zip(first.steps, second.steps, strict=True):
        for name in first.names:
            for before, after in zip(a[name], b[name], strict=True):
                np.testing.assert_array_equal(before, after)


def test_a_recorded_trace_is_read_back_with_its_keys(tmp_path):
    store.save(trace("mixing"), tmp_path / "trace.npz")
    read = store.load(tmp_path / "trace.npz")
    for name, truth in trace("mixing").truth[2].items():
        again = read.truth[2][name]
        np.testing.assert_array_equal(again.x, truth.x)
        assert again.scales == truth.scales
        if truth.keys is not None:
            np.testing.assert_array_equal(again.b, truth.b)
            np.testing.assert_array_equal(read.views[2][name].dw, trace("mixing").views[2][name].dw)


# Attacks


CASES = [
    (linkage.attack, "signed_permutation", "columns linked", 0.85),
    (rows.attack, "permuted_rows", "stolen", 0.9),
    (rows.attack, "shared_rows", "stolen", 0.9),
    (inputs.attack, "permuted_rows", "labels by nearest image", 0.9),
    (labels.attack, "signed_permutation", "labels", 0.9),
    (
        functools.partial(congruence.attack, lengths=(4,), restarts=2, singles=0),
        "kept_orthogonal",
        "stolen, max",
        0.85,
    ),
    (functools.partial(few_shot.attack, restarts=2, steps=1), "fresh_orthogonal", "stolen", 0.8),
]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("attack", "control", "metric", "reach"), CASES)
def test_an_attack_succeeds_on_its_control_and_fails_on_mixing(attack, control, metric, reach):
    weak = strongest(attack, control, metric)
    assert weak.value >= reach and not weak.passed
    strong = strongest(attack, "mixing", metric)
    # A single step is luckier than the mean that the suite judges. Under masks random frames alone
    # explain most of what S9 steals, which leaves less room above them.
    room = 0.3 if strong.chance < 0.6 else 0.1
    assert strong.value < strong.chance + room < weak.value


TOLD = {
    "batch from G, T = 1": functools.partial(candidates.attack, draws=30, products=1),
    "ranks told: rows in the loss": functools.partial(candidates.attack_ranks, trials=4),
    "ranks told: columns that are not pruned": functools.partial(candidates.attack_ranks, trials=4),
    "weights told from a tenth off, T = 100": functools.partial(
        candidates.attack_weights, draws=60, products=1
    ),
}


@pytest.mark.parametrize("metric", TOLD)
def test_what_is_guessed_is_told_without_masks_and_not_with_them(metric):
    reach = 0.4 if "ranks" in metric else 0.95  # of four trials; luck tells none in a hundred
    weak = strongest(TOLD[metric], "fresh_orthogonal", metric)
    assert weak.value > reach and not weak.passed
    if "weights" not in metric:
        weak = strongest(TOLD[metric], "mixing_decoys", metric)
        assert weak.value > reach and not weak.passed
    assert strongest(TOLD[metric], "mixing", metric).passed


def test_the_librarys_own_masks_hide_what_was_guessed():
    recorded = dataclasses.replace(trace("mixing"), recorded=True)
    for metric, attack in TOLD.items():
        found = attack(recorded, np.random.default_rng(0))
        assert next(m for m in found if m.metric == metric).passed


def test_spectra_that_differ_by_luck_alone_are_not_told():
    rng = np.random.default_rng(0)
    same = rng.normal(size=(4, 400, 12))
    assert abs(np.mean(candidates.separation(same))) < 0.15
    shifted = same + np.arange(4)[:, None, None] * np.eye(12)[3]
    apart = candidates.separation(shifted)
    np.testing.assert_allclose(apart, [1, 2, 3, 1, 2, 1], rtol=0.25)
    told = candidates.judge("S11", "x", apart, 200, candidates.LIMITS, "")
    assert not any(m.passed for m in told) and told[0].value < told[1].value


@pytest.mark.parametrize("way", [1, -1])
def test_rows_that_are_only_permuted_come_back_from_an_orthogonal_key(monkeypatch, way):
    # Signs of rows are undone up to one for all.
    monkeypatch.setattr(inputs, "fix_signs", lambda x: way * linkage.fix_signs(x))
    truth, data = trace("permuted_rows").truth[0]["dense1"], traces.VICTIMS["mlp"].data()
    seen = [view["dense1"].x for view in trace("permuted_rows").views]
    aligned = inputs.align_by_pca(np.concatenate(seen), data.test_inputs)[: len(truth.x)]
    plain = truth.x[truth.a.argmax(1)]
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(aligned, plain, strict=True)]
    assert np.mean(correlations) > 0.9


def test_the_right_link_steals_everything_and_a_wrong_one_nothing():
    step, link = STEPS - 1, ("dense1", "dense2")
    first, second = (trace("mixing").truth[step][name] for name in link)
    bias = trace("mixing").parameters["dense1.bias"]
    into = np.linalg.inv(first.c).T / (first.scales[0] * first.scales[1])

    def right(rows):
        return second.scales[0] * np.maximum(rows @ into + bias, 0) @ second.b.T

    victim = trace("mixing").model.accuracy(trace("mixing").parameters)
    assert scoring.stolen(trace("mixing"), step, link, right) == pytest.approx(victim)
    assert scoring.stolen(trace("mixing"), step, link, lambda rows: 0 * rows) < 0.3


def test_the_right_columns_and_directions_count():
    kept, link = trace("signed_permutation"), ("dense1", "dense2")
    c, b = scoring.frames(kept, 0, link)
    pairs = np.arange(128), (np.abs(b) @ np.abs(c.T)).argmax(0)
    assert scoring.columns_linked(kept, 0, link, pairs) == 1
    assert scoring.directions_linked(kept, 0, link, c, b) == 128
    assert scoring.directions_linked(kept, 0, link, c, np.roll(b, 1, axis=1)) == 0


@functools.cache
def wider(scheme: str) -> Any:
    """The convolutional network under one of the schemes, for the attacks on its one link."""
    victim = traces.VICTIMS["cnn"]
    return traces.blind_history(traces.train(victim, 0, 2), victim, scheme, 0)


def test_a_convolution_matters_to_the_accuracy_that_is_stolen():
    link = ("conv1", "conv2")
    assert scoring.convolves(wider("shared_rows"), link)
    assert scoring.left_out(wider("shared_rows"), 1, link) < 0.2


def test_a_convolution_is_replaced_by_the_right_rows():
    link, plain = ("conv1", "conv2"), wider("shared_rows")
    c, _ = scoring.frames(plain, 1, link)
    width = plain.truth[1]["conv2"].w.shape[1]
    seen = []

    def predict(rows):
        seen.append(np.asarray(rows))
        return np.zeros((len(rows), width))

    inputs = np.asarray(plain.inputs[1])
    products = scoring.Replaced(plain, 1, link, predict)
    plain.model.apply(plain.parameters, jax.numpy.asarray(inputs), products)
    np.testing.assert_allclose(seen[0], plain.truth[1]["conv1"].y @ c.T, rtol=1e-9, atol=1e-9)


def test_a_residual_model_is_judged_by_what_the_link_adds():
    accuracy = trace("mixing").model.accuracy(trace("mixing").parameters)
    assert scoring.margin(trace("mixing"), 0.1, 0.05, 0.25) == 0.05
    margin = scoring.margin(trace("mixing"), accuracy - 0.08, 0.05, 0.25)
    assert margin == pytest.approx(0.02)


def test_attention_heads_have_no_weights_to_steal():
    made = trace("mixing")
    heads = dataclasses.replace(made, names=("qk.0.0", "pv.0.0"))
    assert scoring.stealable(made) == [("dense1", "dense2")]
    assert scoring.stealable(heads) == []


@pytest.mark.parametrize(("rounds", "found"), [(2, True), (3, False)])
def test_blocks_of_the_librarys_keys_show_under_two_rounds_alone(rounds, found):
    for size in (160, 192):
        value, chance = structure.find_library_blocks(size, rounds, np.random.default_rng(0))
        assert (value > chance + 0.2) == found
        assert abs(value - chance) <= structure.MARGIN or found


def test_blocks_of_mixing_are_measured_and_not_taken_for_chance():
    found = structure.attack_library(trace("mixing"), np.random.default_rng(0), sizes=(96,))
    found += structure.attack(trace("mixing"), np.random.default_rng(0))
    assert len(found) == 4 and all(m.passed for m in found)
    assert any(m.value != m.chance for m in found)


def test_a_second_polarity_gives_the_scales_of_columns_away():
    (found,) = scales.attack(trace("tempo"), np.random.default_rng(0))
    assert found.value >= 0.85 and not found.passed
    assert scales.attack(trace("mixing"), np.random.default_rng(0)) == []


def test_spectra_name_the_model_where_keys_do_not_blur_them():
    found = spectra.attack(trace("fresh_orthogonal"), np.random.default_rng(0), others=1, draws=2)
    assert [m.value >= 0.9 for m in found] == [True, True]
    blurred = spectra.attack(trace("mixing"), np.random.default_rng(0), others=1, draws=4)
    assert blurred[0].value < found[0].value
