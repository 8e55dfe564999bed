"""When a plan's estimate is held against what its runs take, and what is said then."""

import logging

import jax
import jax.numpy as jnp
import pytest

import tempo_jax as tempo
from tempo_jax.planning.cost import CostModel
from tempo_jax.running import expectation
from tempo_jax.running.expectation import FIRST, RUNS, Expectation


def told(caplog, expected, *runs, shared=False):
    """What is logged when an estimate meets runs of so many seconds."""
    doubts = []

    def doubt():
        doubts.append(1)
        return "They stay."

    caplog.clear()
    with caplog.at_level(logging.INFO, "tempo_jax"):
        checked = Expectation("step", lambda: expected, doubt, shared=shared)
        for seconds in runs:
            checked.ran(seconds)
    assert len(doubts) == len(caplog.records)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("busy", [0.16, 0.3, 0.066, 0.01])
def test_far_off_runs_are_told_of_once(caplog, busy):
    (line,) = told(caplog, 0.1, *[9.0] * FIRST, *[busy] * 3 * RUNS)
    assert line == (
        f"`step` keeps the enclave busy for {busy:.3g} s in a run (the least of {RUNS}), where its "
        "plan expected 0.1 s from this machine's rates. They stay."
    )


@pytest.mark.parametrize("busy", [0.149, 0.1, 0.067])
def test_other_runs_are_not(caplog, busy):
    assert told(caplog, 0.1, *[9.0] * FIRST, *[busy] * 2 * RUNS) == []


def test_devices_on_the_enclaves_processors_take_half_of_them(caplog):
    assert told(caplog, 0.1, *[0.29] * 2 * RUNS, shared=True) == []
    assert len(told(caplog, 0.1, *[0.31] * 2 * RUNS, shared=True)) == 1
    assert len(told(caplog, 0.1, *[0.066] * 2 * RUNS, shared=True)) == 1


def test_one_quick_run_tells_that_the_others_were_disturbed(caplog):
    assert told(caplog, 0.1, *[9.0] * (FIRST + RUNS - 1), 0.12) == []
    assert told(caplog, 0.1, *[0.001] * FIRST, *[0.12] * RUNS) == []  # the first do not count


def test_too_few_and_too_short_runs_say_nothing(caplog):
    assert told(caplog, 0.1, *[9.0] * (FIRST + RUNS - 1)) == []
    assert told(caplog, 0.009, *[9.0] * 2 * RUNS) == []


def test_nobody_knows_how_long_a_loop_takes(caplog):
    assert told(caplog, None, *[9.0] * 2 * RUNS) == []


@pytest.mark.parametrize("in_jit", [False, True])
def test_runs_are_heard_of(enclave, caplog, monkeypatch, tmp_path, in_jit):
    """With an estimate that nothing can meet; whose figures are not this machine's."""
    monkeypatch.setattr(expectation, "SHORTEST", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    step = tempo.shield(lambda x: tempo.reveal(jnp.sin(x @ x)), enclave=enclave, donate=False)
    x = enclave.seal(jnp.ones((64, 64)))
    report = step.explain(x)
    model = CostModel(dot_flops=1e30, nanoseconds_per_byte=1e9)
    monkeypatch.setitem(enclave.__dict__, "costs", model)
    call = jax.jit(step) if in_jit else step
    with caplog.at_level(logging.WARNING, "tempo_jax"):
        for _ in range(FIRST + 2 * RUNS):
            jax.block_until_ready(call(x))
    assert report.busy_seconds and report.busy_seconds > 0
    (line,) = [m for m in caplog.messages if "keeps the enclave busy" in m]
    assert line.startswith("`<lambda>` keeps") and "They are in no cache." in line


def test_what_is_only_kept_is_not_timed_to_its_end(enclave, caplog, monkeypatch):
    monkeypatch.setattr(expectation, "SHORTEST", 0.0)
    step = tempo.shield(lambda x: jnp.sin(x @ x), enclave=enclave, donate=False)
    x = enclave.seal(jnp.ones((64, 64)))
    monkeypatch.setitem(enclave.__dict__, "costs", CostModel(dot_flops=1e30))
    for _ in range(FIRST + RUNS):
        jax.block_until_ready(step(x))
    assert not any("keeps the enclave busy" in m for m in caplog.messages)


def test_a_while_leaves_the_estimate_open(enclave):
    def looped(x):
        return jax.lax.while_loop(lambda s: s.sum() < 9, lambda s: s + 1, x)

    assert tempo.shield(looped, enclave=enclave).explain(jnp.ones(3)).busy_seconds is None
