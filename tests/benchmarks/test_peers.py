"""The comparison with SPU: its table, its errors, and the environment that it makes."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import workloads
from benchmarks.peers.workloads import LEARNING_RATE, WORKLOADS, update_error


def test_the_table_has_medians_ratios_and_megabytes():
    result = {
        "title": "a model",
        "seconds": {
            peers.PLAIN: [0.2, 0.1, 9.0],
            peers.MIXING: [0.5, 0.6, 0.7],
            peers.SPU: [60.0, 1.0, 120.0],
        },
        "errors": {peers.MIXING: 2e-6, peers.SPU: 0.034},
        "bytes": {peers.MIXING: 1_200_000, peers.SPU: 3_000_000_000},
        "offloaded": 0.876,
        "versions": {"spu": "0.9.5", "jax": "0.4.34"},
    }
    results = {"environment": peers.environment(), "results": [result]}
    lines = peers.table(results).splitlines()
    assert "the peer's spu 0.9.5, jax 0.4.34" in lines[0]
    assert lines[-1] == "| a model | 0.2 | 3.0 | 300 | 100 | 88% | 2e-06 | 0.034 | 1.2 | 3000 | 3 |"
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_an_error_counts_all_leaves_together():
    expected = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    assert update_error(expected, expected) == 0
    actual = {"a": np.array([3.0, 0.3]), "b": np.array([[4.4]])}
    assert update_error(actual, expected) == pytest.approx(0.1)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_first_momentum_is_the_gradient(name):
    """So that its error is the update's, whatever rounding makes of the weights."""
    workload = WORKLOADS[name]
    state, batch = workload.start()
    shapes = jax.eval_shape(workload.step, state, batch)
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(np.shape, state)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves((state, batch)))
    if name != "mlp":
        return  # the others take seconds to compile, and share the rest
    gradients = jax.grad(workload.loss)(state["params"], batch)
    after = workload.step(state, batch)
    for leaf, gradient in gradients.items():
        np.testing.assert_array_equal(after["momentum"][leaf], gradient)
        np.testing.assert_allclose(
            after["params"][leaf], state["params"][leaf] - LEARNING_RATE * gradient, rtol=1e-6
        )


def test_cross_entropy_is_that_of_softmax():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 10)) * 50)
    labels = jnp.eye(10)[jnp.asarray([1, 0, 9, 3])]
    expected = -(jax.nn.log_softmax(logits) * labels).sum(-1).mean()
    np.testing.assert_allclose(workloads._cross_entropy(logits, labels), expected, rtol=1e-12)


def test_an_environment_is_made_once(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(peers.subprocess, "run", lambda command, check: ran.append(command))
    folder = tmp_path / "spu"

    def make():
        folder.mkdir(exist_ok=True)
        return peers.make_environment(folder, "python3.11")

    assert make() == make() == folder / "bin" / "python"
    venv, install = ran
    assert venv == ["python3.11", "-m", "venv", "--clear", folder]
    assert install[-len(peers.PACKAGES) :] == list(peers.PACKAGES)


def test_one_that_failed_is_made_again(monkeypatch, tmp_path):
    def fail(command, check):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(peers.subprocess, "run", fail)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            peers.make_environment(tmp_path, "python3.11")


def test_a_python_with_wheels_is_found_or_asked_for(monkeypatch):
    assert peers.find_python("mine") == "mine"
    monkeypatch.setattr(peers, "PYTHONS", (f"{sys.version_info.major}.{sys.version_info.minor}",))
    assert peers.find_python(None) == sys.executable
    monkeypatch.setattr(peers, "PYTHONS", ("2.6",))
    monkeypatch.setattr(peers.shutil, "which", lambda name: f"/bin/{name}")
    assert peers.find_python(None) == "/bin/python2.6"
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="name one with --python"):
        peers.find_python(None)


def test_a_peer_that_ends_says_why(tmp_path):
    (tmp_path / "spu.log").write_text("no such protocol")
    with peers.Peer(Path(sys.executable), "none", tmp_path) as peer:  # without SPU in it
        with pytest.raises(RuntimeError, match="ended with 1:\nno such protocol"):
            peer.step()
