"""A training run goes on after kills, cuts and a full disk; `benchmarks.faults` tries them all."""

import pytest

from benchmarks.faults import enclave_faults, full_disk, host_faults
from benchmarks.faults.enclave_faults import RESET
from benchmarks.faults.fuse import CHECKPOINT, STEP
from benchmarks.faults.host_faults import TRUNCATED
from benchmarks.faults.tally import Tally
from tempo_jax.transport import child


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scheme", "counts"),
    [
        (enclave_faults.KILLED, "signed-permutation", {STEP: 1, CHECKPOINT: 1}),
        (enclave_faults.KILLED, "mixing", {STEP: 1}),
        (RESET, "mixing", {STEP: 1}),
    ],
)
def test_training_survives_its_enclave(monkeypatch, kind, scheme, counts):
    monkeypatch.setattr(child, "STOP_SECONDS", 0.5)
    tally = Tally()
    enclave_faults.strike(kind, scheme, counts, tally)
    assert tally.failures == []
    assert tally.survived == tally.tried == sum(counts.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scheme", "counts"),
    [
        (host_faults.KILLED, "signed-permutation", {CHECKPOINT: 1}),
        (TRUNCATED, "mixing", {STEP: 1}),
    ],
)
def test_training_survives_its_host(kind, scheme, counts):
    tally = Tally()
    host_faults.strike(kind, scheme, counts, tally)
    assert tally.failures == []
    assert tally.survived == tally.tried == sum(counts.values())


@pytest.mark.slow
def test_checkpoint_on_a_full_disk_leaves_the_one_before():
    tally = Tally()
    full_disk.fill(1, tally, mount=full_disk.may_mount())
    assert tally.failures == []
    assert tally.survived == tally.tried == 1


def test_a_run_that_ends_elsewhere_does_not_count():
    tally = Tally()
    tally.count("a", [], 1e-12)
    tally.count("b", [], 1e-9)
    tally.count("c", [], float("nan"))
    tally.count("d", ["lost a checkpoint"], 0.0)
    assert (tally.survived, tally.tried) == (1, 4)
    assert tally.failures == ["b: another result", "c: another result", "d: lost a checkpoint"]
