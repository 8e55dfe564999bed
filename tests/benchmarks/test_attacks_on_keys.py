"""The attacks of `benchmarks.attacks` that look at one product: they work where they must.

Each is run on a weak control, where it has to succeed, and on the default scheme, where it has to
fail. Attacks on keys that the default no longer draws get their controls built here.
"""

import dataclasses
import functools

import numpy as np
import pytest
from scipy.linalg import hadamard

from benchmarks.attacks import checkpoint, information, inputs, plaintext, steps, structure, theft
from benchmarks.attacks.blinding import BLOCK, Key, Stage, channel_key, invertible_key
from benchmarks.attacks.results import Measurement
from benchmarks.attacks.traces import History, ProductView, Trace, blind_history, train
from benchmarks.attacks.victims import VICTIMS

pytestmark = pytest.mark.slow


@functools.cache
def history(victim: str, count: int, repeat: bool) -> History:
    return train(VICTIMS[victim], 0, count, repeat=repeat)


@functools.cache
def trace(scheme: str, victim: str = "mlp", count: int = 4, repeat: bool = False) -> Trace:
    return blind_history(history(victim, count, repeat), VICTIMS[victim], scheme, 0)


def run(module, *arguments, **options) -> dict[str, Measurement]:
    found = module.attack(trace(*arguments, **options), np.random.default_rng(0))
    return {m.metric: m for m in found}


def two_round_key(rng: np.random.Generator, size: int, condition: float = 4.0) -> Key:
    mixing = hadamard(BLOCK) / np.sqrt(BLOCK)
    scales = np.exp(rng.uniform(-0.5, 0.5, size) * np.log(condition))
    factors = [np.ones(size), scales, np.ones(size)]
    signs = rng.choice([-1.0, 1.0], (3, size))
    return Key(
        size,
        tuple(
            Stage(rng.permutation(size), s * f, m)
            for s, f, m in zip(signs, factors, [mixing, mixing, None], strict=True)
        ),
    )


def test_links_counts_equal_directions_by_rank_and_by_oracle():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 20)))[0]
    turned = basis[:, [1, 0, *range(2, 20)]] * -3.0
    assert steps.links(basis, turned, 10) == (8, 10)
    assert steps.overlap(basis, turned, 12) == pytest.approx(1)


def test_fresh_orthogonal_keys_link_every_step():
    found = run(steps, "fresh_orthogonal")
    assert found["w directions linked by rank"].value >= 30
    assert found["w subspace"].value > 0.99


def test_without_decoys_a_repeated_batch_links_steps():
    found = run(steps, "mixing_without_decoys", "mlp_large", 2, repeat=True)
    assert found["eig directions linked by oracle"].value >= 15
    assert found["dual subspace"].value >= 0.93


@pytest.mark.parametrize(("victim", "count"), [("mlp", 4), ("mlp_large", 2)])
def test_mixing_links_no_directions(victim, count):
    found = run(steps, "mixing", victim, count, repeat=victim == "mlp_large")
    for metric, m in found.items():
        if "linked" in metric or metric == "dual subspace":
            assert m.passed, m


@pytest.mark.parametrize("scheme", ["signed_permutation", "tempo"])
def test_a_checkpoint_names_rows_and_columns(scheme):
    found = run(checkpoint, scheme)
    for drift in ("0%", "1%", "5%"):
        assert found[f"key rows and columns, {drift} drift"].value >= 0.99


def test_a_checkpoint_opens_orthogonal_keys_with_signs():
    found = run(checkpoint, "fresh_orthogonal")
    assert found["w directions by rank, 5% drift"].value >= 30
    assert found["key directions with signs, 0% drift"].value == 128


def test_a_checkpoint_does_not_open_mixing():
    assert all(m.passed for m in run(checkpoint, "mixing").values())


@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_taps_that_share_keys_give_them_away(drift):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(9 * BLOCK, BLOCK))
    b, c = channel_key(rng, 9 * BLOCK), invertible_key(rng, BLOCK)
    np.testing.assert_allclose(
        b.matrix, np.kron(np.eye(9), b.matrix[:BLOCK, :BLOCK]), rtol=0, atol=1e-12
    )
    seen = c.apply(b.apply(w, polar=True).T).T.reshape(9, BLOCK, BLOCK)
    public = checkpoint.drifted(w.reshape(9, BLOCK, BLOCK), drift, rng)
    found, _ = checkpoint.solve_taps(seen, public)
    assert checkpoint.key_rows_found(found, b.matrix[:BLOCK, :BLOCK]) >= 0.95


def test_taps_of_patches_give_nothing_away():
    rng = np.random.default_rng(1)
    w = rng.normal(size=(9 * BLOCK, BLOCK))
    b, c = two_round_key(rng, 9 * BLOCK), two_round_key(rng, BLOCK)
    seen = c.apply(b.apply(w, polar=True).T).T
    found, _ = checkpoint.solve_taps(seen.reshape(9, BLOCK, BLOCK), w.reshape(9, BLOCK, BLOCK))
    assert checkpoint.key_rows_found(found, b.matrix[:BLOCK, :BLOCK]) == 0


def test_permutations_do_not_hide_inputs():
    found = run(inputs, "signed_permutation")
    assert found["columns matched, dense1"].value >= 0.9
    assert found["images by matching, dense1"].value >= 0.95
    assert found["labels by nearest image"].value >= 0.9


def test_mixing_hides_inputs():
    assert all(m.passed for m in run(inputs, "mixing").values())


def test_ica_separates_features_of_permuted_rows():
    rng = np.random.default_rng(0)
    x = rng.exponential(size=(1000, 64))
    key = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    assert inputs.features_separated(rng.permutation(x @ key.T), key, rng) >= 0.9
    rows = np.linalg.qr(rng.normal(size=(1000, 1000)))[0]
    assert inputs.features_separated(rows @ x @ key.T, key, rng) <= 0.05


def test_known_rows_open_orthogonal_keys():
    found = run(plaintext, "fresh_orthogonal")
    assert found["key directions, 127 of 128 rows known"].value >= 26
    assert found["missing row"].value >= 0.8
    assert found["membership"].value == 1


def test_known_rows_do_not_open_mixing_and_masks_hide_a_whole_batch():
    found = run(plaintext, "mixing")
    assert all(m.passed for m in found.values())
    told = "batch told by likelihood, all rows known"
    assert found[told].value < 0.8 < run(plaintext, "mixing_decoys")[told].value


def test_a_batch_that_is_no_candidate_is_not_told():
    whole = trace("mixing_decoys", count=8)  # under masks no batch is told
    rng = np.random.default_rng(0)
    strangers = [
        {**views, "dense2": ProductView(**{**vars(views["dense2"]), "g": other["dense2"].g})}
        for views, other in zip(whole.views, whole.views[::-1], strict=True)
    ]
    swapped = dataclasses.replace(whole, views=strangers)
    assert np.mean(plaintext.likelihood(whole, "dense2", rng)) > 0.8
    assert np.mean(plaintext.likelihood(swapped, "dense2", rng)) < 0.75


@pytest.mark.parametrize("size", [128, 512])
def test_blocks_of_two_round_keys_are_found(size):
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(size, size)), rng.normal(size=(2 * size, size))
    b, c = two_round_key(rng, size), two_round_key(rng, size)
    seen_w = c.apply(b.apply(w, polar=True).T).T
    found = structure.find_blocks([b.apply(x.T)], [seen_w], rng)
    truth = structure.outer_blocks(b)
    assert truth is not None
    assert structure.share_right(found, truth) >= 0.95


def test_blocks_are_not_found_behind_another_round():
    rng = np.random.default_rng(0)
    size = 512
    outer, inner, c = (two_round_key(rng, size, condition) for condition in (1.0, 4.0, 4.0))
    # The inner key's last stage and the outer key's first make one: permutation after permutation.
    key = Key(size, (*inner.stages, *outer.stages[1:]))
    w, x = rng.normal(size=(size, size)), rng.normal(size=(2 * size, size))
    seen_w = c.apply(key.apply(w, polar=True).T).T
    found = structure.find_blocks([key.apply(x.T)], [seen_w], rng)
    truth = structure.outer_blocks(key)
    assert truth is not None and structure.share_right(found, truth) <= 0.25


def test_a_substitute_of_signed_permutations_is_the_victim():
    found = run(theft, "signed_permutation")["substitute's accuracy"]
    assert found.value >= found.best - 0.02


def test_a_substitute_of_convolutions_starts_from_what_was_seen(monkeypatch):
    monkeypatch.setattr(theft, "DRAWS", 1)
    monkeypatch.setattr(theft, "STEPS", 10)
    weak = run(theft, "plain_features", "cnn", 2)["substitute's accuracy"]
    assert weak.value >= 0.85 and not weak.passed
    assert run(theft, "mixing", "cnn", 2)["substitute's accuracy"].passed


def test_the_thief_of_a_transformer_has_its_embeddings(monkeypatch):
    monkeypatch.setattr(theft, "DRAWS", 1)
    starts = []
    monkeypatch.setattr(theft, "train_substitute", lambda _, start, *__: starts.append(start) or 0)
    victim = dataclasses.replace(VICTIMS["transformer"], warm_up=0, batch=1)
    made = blind_history(train(victim, 0, 1), victim, "plain_features", 0)
    theft.attack(made, np.random.default_rng(0))
    black_box, as_seen = starts
    for start in starts:
        np.testing.assert_array_equal(start["tokens"], made.parameters["tokens"])
    plain = made.parameters["up"]
    cosine = np.vdot(as_seen["up"], plain) / np.linalg.norm(as_seen["up"]) / np.linalg.norm(plain)
    assert cosine > 0.999 and not np.allclose(black_box["up"], as_seen["up"])


def test_a_substitute_of_mixing_is_no_better_than_black_box():
    assert run(theft, "mixing")["substitute's accuracy"].passed


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_information_of_gaussians_is_known(correlation):
    rng = np.random.default_rng(0)
    x = rng.normal(size=20_000)
    y = correlation * x + np.sqrt(1 - correlation**2) * rng.normal(size=len(x))
    expected = -0.5 * np.log2(1 - correlation**2)
    assert information.binned(x, y) == pytest.approx(expected, abs=0.12)  # bins lose some
    # An increasing function of one side changes nothing.
    assert information.information(np.exp(x), y, rng) == pytest.approx(expected, abs=0.1)


def test_information_between_matched_columns_shows_what_entries_hide():
    found = run(information, "signed_permutation")
    assert found["bits, entries at equal places"].value < 0.1
    assert found["bits, sorted columns"].value > 3
    assert all(m.passed for m in run(information, "mixing").values())
