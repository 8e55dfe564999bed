"""Recorded traces: what the host saw of the library, with the keys that an evaluator derives."""

from typing import Any

import numpy as np
import pytest

from benchmarks.attacks import coordinates, recording, scoring
from benchmarks.attacks.blinding import DECOYS
from tempo_jax.schemes import Mixing, SignedPermutation, Tempo

INSIDE = {"mixing": {"head"}}
GRADIENTS = {("signed_permutation", f"dense{i}") for i in (1, 2)}


def test_keys_are_found_under_masks():
    trace = recording.record("mlp", Mixing(), 0, 1, cache=None)
    for name, seen in trace.views[0].items():
        view: Any = seen
        truth: Any = coordinates.evened_truth(trace.truth[0][name])
        for left, plain, right in (
            (np.linalg.inv(truth.a) @ view.x, truth.x, truth.b),
            (truth.b.T @ view.w, truth.w, truth.c),
        ):
            clear = left @ np.linalg.inv(right).T
            cosine = (clear * plain).sum() / np.linalg.norm(clear) / np.linalg.norm(plain)
            assert cosine > 8 / np.sqrt(plain.size)
            assert np.linalg.matrix_rank(clear) == min(plain.shape)


def test_keys_with_their_powers_of_two_steal_everything():
    trace = recording.record("mlp", Mixing(), 0, 1, cache=None)
    assert any((powers != 1).any() for powers in trace.truth[0]["dense1"].powers or ())
    first, second = (trace.truth[0][name] for name in ("dense1", "dense2"))
    assert first.c is not None and second.b is not None
    b = second.b
    into = np.linalg.inv(first.c).T / (first.scales[0] * first.scales[1])
    bias = trace.parameters["dense1.bias"]

    def right(rows):
        return second.scales[0] * np.maximum(rows @ into + bias, 0) @ b.T

    victim = trace.model.accuracy(trace.parameters)
    assert scoring.stolen(trace, 0, ("dense1", "dense2"), right) == pytest.approx(victim)


@pytest.mark.parametrize(
    "scheme",
    [Mixing(decoy_rows=32, mask_energy=0.0), SignedPermutation(), Tempo()],
    ids=lambda s: s.name,
)
def test_recorded_products_are_the_plain_ones_under_their_keys(scheme):
    trace = recording.record("mlp", scheme, 0, 2, batch=192, cache=None)
    outside = {"dense1", "dense2", "head"} - INSIDE.get(scheme.name, set())
    for views, truths in zip(trace.views, trace.truth, strict=True):
        assert set(views) == outside
        for name, seen in views.items():
            view: Any = seen
            truth: Any = truths[name]
            t_x, t_w, t_g = truth.scales
            rows = len(truth.x)
            assert (len(view.x) >= rows + DECOYS) == (scheme.name == "mixing")
            undo_b, undo_c = np.linalg.inv(truth.b), np.linalg.inv(truth.c)
            x = np.linalg.solve(truth.a, view.x) @ undo_b.T / t_x
            np.testing.assert_allclose(x[:rows], truth.x, atol=1e-9)
            w = truth.b.T @ view.w @ undo_c.T / t_w
            mask = np.linalg.svd(w - truth.w, compute_uv=False)
            assert (mask > 1e-9 * mask[0]).sum() <= 2 * getattr(scheme, "traded", 0) or (
                mask[0] < 1e-9
            )
            # The first layer needs no dX, which is what ties the columns' keys of G and W together,
            # and under two polarities nothing ties the rows' of G and X.
            if (scheme.name, name) in GRADIENTS:
                g = truth.a.T @ view.g @ truth.c / t_g
                sent = np.abs(g[:rows]).max(1) > 1e-12  # or would have drowned the others
                assert sent.mean() > 0.7
                np.testing.assert_allclose(g[:rows][sent], truth.g[sent], atol=1e-9)
            if scheme.name == "mixing" and name == "dense2":
                # For dW its columns are under a key of their own, whose rows one finds from them.
                g = truth.a.T @ view.g
                sent = np.abs(g[:rows]).max(1) > 1e-12  # or would have drowned the others
                assert sent.mean() > 0.7 and sent.sum() > g.shape[1]
                key = np.linalg.lstsq(truth.g[sent], g[:rows][sent])[0]
                np.testing.assert_allclose(truth.g[sent] @ key, g[:rows][sent], atol=1e-9)
                # For dX it is blinded again.
                assert view.g_of_dx.shape == view.g.shape and not np.any(view.g_of_dx == view.g)
                np.testing.assert_array_equal(view.dx, view.g_of_dx @ view.w.T)
            if scheme.name == "tempo":  # whose second versions bring dW into the layout of W
                dw = truth.b.T @ view.dw @ undo_c.T
                np.testing.assert_allclose(dw, truth.dw, atol=1e-9)
    first, second = (truths["dense2"].c for truths in trace.truth)
    assert first is not None and second is not None
    assert np.array_equal(first, second) == (scheme.name != "mixing")
