"""Attacks on evened-out operands: noise is no leak in plain coordinates, and a leak is no noise."""

import dataclasses
import functools

import numpy as np
import pytest

from benchmarks.attacks import coordinates, inputs, steps
from benchmarks.attacks.blinding import DenseKey
from benchmarks.attacks.traces import ProductTruth, Trace
from tests.support.traces import trace

pytestmark = pytest.mark.slow

FAINT = 4, 2.0**7  # columns of X that are smaller, and by how much


@functools.cache
def uneven(scheme: str) -> Trace:
    """A trace whose X had columns that were evened out before its keys went on."""
    whole = trace(scheme)
    truth = [
        {name: t if t.keys is None else with_faint_columns(t) for name, t in step.items()}
        for step in whole.truth[:2]
    ]
    return dataclasses.replace(whole, views=whole.views[:2], truth=truth)


def with_faint_columns(truth: ProductTruth) -> ProductTruth:
    """The same product, if its plain operands had been uneven."""
    assert truth.keys is not None
    a, b, c = truth.keys
    powers = np.ones(b.size)
    powers[: FAINT[0]] = FAINT[1]
    return dataclasses.replace(
        truth,
        x=truth.x / powers,
        w=truth.w * powers[:, None],
        keys=(a, DenseKey(b.matrix * powers), c),
        powers=(np.ones(len(truth.x)), powers, np.ones(c.size)),
    )


def test_evened_operands_have_the_keys_without_powers():
    plain, again = trace("mixing"), coordinates.evened(uneven("mixing"))
    for name, t in again.truth[1].items():
        first = plain.truth[1][name]
        np.testing.assert_allclose(t.x, first.x, rtol=1e-12)
        if t.b is not None and first.b is not None:
            np.testing.assert_allclose(t.b, first.b, rtol=1e-12)


@pytest.mark.parametrize(
    ("attack", "metric"),
    [(steps.attack, "w directions linked by oracle"), (inputs.attack, "columns separated, dense2")],
)
def test_noise_links_as_much_in_plain_coordinates_as_what_the_host_saw(attack, metric):
    def found(run, of):
        return {m.metric: m for m in run(of, np.random.default_rng(0))}

    made, rng = uneven("mixing"), np.random.default_rng(1)
    naive = found(attack, made)[metric]
    assert not naive.passed, "or nothing is shown here"
    assert not found(attack, coordinates.noise(made, rng))[metric].passed
    twice = found(coordinates.scored_twice(attack), made)
    assert twice[metric].passed and twice[metric].value < naive.value
    assert twice[f"{metric}, plain coordinates"].chance > twice[metric].threshold
    assert all(m.passed for m in twice.values())


def test_what_does_leak_is_above_noise():
    run = coordinates.scored_twice(steps.attack)
    twice = {m.metric: m for m in run(uneven("fresh_orthogonal"), np.random.default_rng(0))}
    for metric in ("w directions linked by oracle", "w subspace"):
        assert not twice[metric].passed
        assert not twice[f"{metric}, plain coordinates"].passed


def test_even_operands_are_scored_once():
    once = coordinates.scored_twice(steps.attack)(trace("mixing"), np.random.default_rng(0))
    assert not any("plain coordinates" in m.metric for m in once)
