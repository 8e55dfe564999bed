"""Schemes that keep the keys of weights: for how long, and what is drawn anew all the same."""

import itertools
from typing import Any

import jax
import numpy as np
import optax
import pytest

import tempo_jax as tempo
from tempo_jax.schemes import Orthogonal, Tempo
from tests.support.steps import assert_close
from tests.support.two_layers import small, two_layers


@pytest.mark.parametrize("scheme", [Tempo(), Orthogonal(5)], ids=lambda s: s.name)
def test_rows_have_fresh_keys_while_weights_keep_theirs(scheme, enclave):
    p, x = small()
    tx = tempo.cheap_update(optax.sgd(0.0))

    def step(state, x):
        grads = jax.grad(two_layers)(state, x)
        return optax.apply_updates(state, tx.update(grads, tx.init(state), state)[0])

    shielded: Any = tempo.shield(step, enclave=enclave, scheme=scheme, offload="all")
    state, views = shielded(p, x), []
    for _ in range(3):
        with tempo.testing.host_view() as view:
            state = shielded(state, x)
        views.append(view)
    checked = 0
    for first, second in itertools.combinations(views, 2):
        for (_, a), (_, b) in zip(first.leaves, second.leaves, strict=True):
            assert np.array_equal(a, b)
        for one, other in zip(first.products, second.products, strict=True):
            for a, b in zip(one.operands, other.operands, strict=True):
                if len(x) in a.shape:
                    # With one row key for both these would be equal: all else is.
                    cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
                    assert abs(cosine) < 0.3
                    checked += 1
    assert checked == 3 * (3 + 2 + 6)  # X of 3 products, G of 2, and X and G of 3


def test_cheap_update_saves_encryptions(enclave):
    p, x = small()
    counts = {}
    for name, mark in (("kept", tempo.cheap_update), ("anew", lambda tx: tx)):
        tx = mark(optax.sgd(0.1))

        def step(state, x, tx=tx):
            grads = jax.grad(two_layers)(state, x)
            return optax.apply_updates(state, tx.update(grads, tx.init(state), state)[0])

        shielded = tempo.shield(step, enclave=enclave, scheme=Tempo(), offload="all")
        saved = shielded.explain(p, x).encryptions_saved
        state = shielded(p, x)
        before = enclave.statistics()["blindings"]
        shielded(state, x)
        counts[name] = saved, enclave.statistics()["blindings"] - before
    assert counts["kept"][0] == 3 and counts["anew"][0] == 0
    # Each weight is blinded for its products; the copies for its gradient come on top.
    assert counts["anew"][1] + 2 * 3 - counts["kept"][1] >= 3


def test_budget_of_orthogonal_keys(enclave):
    p, x = small()
    tx = tempo.cheap_update(optax.sgd(0.0))

    def step(state, x):
        grads = jax.grad(two_layers)(state, x)
        return optax.apply_updates(state, tx.update(grads, tx.init(state), state)[0])

    shielded = tempo.shield(step, enclave=enclave, scheme=Orthogonal(budget=2), offload="all")
    state, leaves = p, []
    for _ in range(5):
        with tempo.testing.host_view() as view:
            state = shielded(state, x)
        leaves.append(np.asarray(view.leaves[0][1]))
    # A learning rate of zero: what lies on the devices changes with its keys alone.
    changed = [not np.allclose(a, b) for a, b in zip(leaves, leaves[1:], strict=False)]
    assert changed == [False, True, False, True]
    assert_close(enclave.open(state), p)


def test_budget_runs_out_inside_jit(enclave):
    p, x = small()
    tx = tempo.cheap_update(optax.sgd(0.1))

    def step(state, x):
        grads = jax.grad(two_layers)(state, x)
        return optax.apply_updates(state, tx.update(grads, tx.init(state), state)[0])

    shielded = tempo.shield(step, enclave=enclave, scheme=Orthogonal(budget=1), offload="all")
    jitted = jax.jit(shielded)
    sealed = shielded(enclave.seal(p), x)
    x_sealed = enclave.seal(x)
    p = step(p, x)
    for _ in range(3):
        sealed, p = jitted(sealed, x_sealed), step(p, x)
    assert_close(enclave.open(sealed), p)


def test_budget_counts_runs_that_return_no_weights(enclave):
    p, x = small()
    tx = tempo.cheap_update(optax.sgd(0.0))

    def step(state, x):
        grads = jax.grad(two_layers)(state, x)
        return optax.apply_updates(state, tx.update(grads, tx.init(state), state)[0])

    scheme = Orthogonal(budget=3)
    train = tempo.shield(step, enclave=enclave, scheme=scheme, offload="all", donate=False)
    evaluate = tempo.shield(
        lambda state, x: tempo.reveal(two_layers(state, x)),
        enclave=enclave,
        scheme=scheme,
        offload="all",
        donate=False,
    )
    state = train(p, x)
    leaves = []
    for _ in range(4):
        with tempo.testing.host_view() as view:
            evaluate(state, x)
        leaves.append(np.asarray(view.leaves[0][1]))
    assert np.array_equal(leaves[0], leaves[1])
    assert not np.allclose(leaves[1], leaves[2])
