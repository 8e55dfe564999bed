"""The suite judges attacks by their controls: what could not succeed is no evidence."""

import dataclasses
import json
import math

import numpy as np
import pytest

from benchmarks.attacks import (
    __main__,
    few_shot,
    inputs,
    plans,
    results,
    rows,
    scoring,
    suite,
)
from benchmarks.attacks.results import Control, Row, measure
from tests.support.traces import STEPS, trace

pytestmark = pytest.mark.slow


def row(value, threshold, seed=0, scheme="mixing"):
    """A made-up measurement."""
    made = measure("S1", "columns linked", value, chance=0.1, threshold=threshold)
    return Row(scheme, "mlp", seed, made)


def test_the_worst_seed_is_reported():
    found = results.worst([row(0.1, 0.5), row(0.6, 0.5, seed=1), row(0.2, 0.5, seed=2)])
    assert [(r.seed, r.measurement.passed) for r in found] == [(1, False)]


def test_what_is_not_a_number_does_not_pass():
    assert not row(math.nan, 0.5).measurement.passed
    assert not Control("S1", "signed_permutation", "mlp", "columns linked", 0.9).reached


def test_an_attack_that_could_not_succeed_is_no_evidence():
    def made(value, attainable):
        threshold = np.float64(0.3)
        return measure(
            "S1", "linked", value, chance=0.1, threshold=threshold, attainable=attainable
        )

    assert made(0.1, None).applies and made(0.1, 0.5).applies
    assert not made(0.1, 0.2).applies and made(0.1, 0.2).leak == 0
    assert made(0.4, 0.2).applies, "what succeeded did apply"
    text = results.table([Row("mixing", "mlp", 0, made(0.1, 0.2))], [])
    assert "cannot apply: 0.2 with keys known" in text and "passes |" not in text
    numpys = Row("mixing", "mlp", 0, made(np.float64(0.1), np.float64(0.2)))
    assert json.loads(results.to_json([numpys], [], {}))["rows"][0]["applies"] is False


def test_a_missed_control_makes_the_run_void():
    def control(value):
        return Control("S1", "signed_permutation", "mlp", "columns linked", 0.9, value)

    assert __main__.status([row(0.1, 0.5)], [control(0.95)]) == 0
    assert __main__.status([row(0.6, 0.5)], [control(0.95)]) == 1
    assert __main__.status([row(0.6, 0.5, scheme="tempo")], [control(0.95)]) == 0
    assert __main__.status([row(0.1, 0.5)], [control(0.5)]) == 2
    assert "VOID: S1" in results.table([row(0.1, 0.5)], [control(0.5)])
    assert "VOID" not in results.table([row(0.1, 0.5)], [control(0.95)])
    assert json.loads(results.to_json([row(0.1, 0.5)], [control(0.5)], {}))["void"]


def test_controls_are_run_and_judged(monkeypatch, tmp_path):
    def attack(made, _):
        return [
            measure("S1", "linked", {"mixing": 0.1}.get(made.scheme, 0.8), chance=0, threshold=0.2)
        ]

    monkeypatch.setattr(suite, "make_trace", lambda scheme, *_, **__: trace(scheme))
    controls = (("signed_permutation", "mlp", "linked", 0.9),)
    plan = plans.Plan("S1", attack, ("mlp",), plans.Setting(STEPS), controls)
    kept = []
    found, judged = suite.run(
        [plan],
        ["mixing"],
        [0, 1],
        tmp_path,
        simulate=True,
        keep=lambda rows, controls: kept.append((len(rows), controls[0].value)),
    )
    assert [r.scheme for r in found] == ["mixing"] * 2
    assert [(c.value, c.reached) for c in judged] == [(0.8, False)]
    assert kept[0] == (2, pytest.approx(math.nan, nan_ok=True)) and kept[-1] == (2, 0.8)


def test_an_attack_that_measures_nothing_does_not_pass(monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "make_trace", lambda scheme, *_, **__: trace(scheme))
    plan = plans.Plan("S1", lambda *_: [], ("mlp",), plans.Setting(STEPS))
    found, judged = suite.run([plan], ["mixing"], [0], tmp_path, simulate=True)
    assert __main__.status(found, judged) == 1


def test_a_product_that_vanished_is_refused(monkeypatch, tmp_path):
    whole = trace("mixing")
    views = [dict(view) for view in whole.views]
    del views[1]["dense2"]
    lacking = dataclasses.replace(whole, views=views)
    monkeypatch.setattr(suite, "make_trace", lambda *_, **__: lacking)
    with pytest.raises(RuntimeError, match="mlp, dense2: not in every step"):
        suite.run(plans.all_plans(quick=True)[:1], ["mixing"], [0], tmp_path, simulate=True)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer"])
def test_every_kind_of_victim_has_controls(kind):
    every = plans.all_plans(quick=False)
    attacked = {plan.attack for plan in every if kind in plan.victims}
    controlled = {plan.attack for plan in every for c in plan.controls if c[1] == kind}
    assert attacked - controlled <= {"S10"}, "which is no attack"


OTHER = (("permuted_rows", "mlp", "stolen", 0.9),)


def test_plans_are_restricted_with_the_controls_that_speak_for_them():
    near = (("permuted_rows", "cnn", "stolen", 0.6),)
    both = plans.Plan("S2", rows.attack, ("mlp", "cnn"), plans.Setting(2), (*OTHER, *near))
    lone = plans.Plan("S9", few_shot.attack, ("mlp", "cnn"), plans.Setting(2), OTHER)
    more = (("permuted_rows", "mlp", "images by pca", 0.85), *OTHER, *near)
    many = plans.Plan("S6", inputs.attack, ("mlp", "cnn"), plans.Setting(2), more)
    found = plans.restrict([both, lone, many], ["cnn"])
    assert [p.victims for p in found] == [("cnn",)] * 3
    assert [p.controls for p in found] == [near, OTHER, (more[0], *near)]
    assert not plans.restrict([both], ["transformer"])


def test_luck_is_no_leak():
    assert scoring.twice_chance(0.01, 10_000) == pytest.approx(0.02)
    assert scoring.twice_chance(0.01, 100) == pytest.approx(0.04)


def test_options():
    options = __main__.parse_options(["--quick", "--attacks", "S1", "S3", "--schemes", "mixing"])
    assert options.seeds == 1 and options.attacks == ["S1", "S3"] and options.schemes == ["mixing"]
    assert __main__.parse_options([]).seeds == 3
    with pytest.raises(SystemExit):
        __main__.parse_options(["--attacks", "S99"])


def test_every_attack_has_a_control():
    for quick in (True, False):
        every = plans.all_plans(quick=quick)
        controlled = {plan.attack for plan in every if plan.controls}
        assert {plan.attack for plan in every} == set(__main__.ATTACKS)
        assert set(__main__.ATTACKS) - controlled == {"S10"}, "which measures cost, not leaks"


def test_plot(tmp_path):
    costs = {"mixing": 2.0, "tempo": 0.8}
    results.plot([row(0.4, 0.5), row(0.9, 0.5, scheme="tempo")], costs, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
