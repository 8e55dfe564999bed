"""Sealed checkpoints lie in Orbax beside the rest of a training run: an array of bytes each."""

import pickle
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import tempo_jax as tempo
from tempo_jax.errors import CheckpointError, SealedValueError
from tests.support.fresh import run_fresh
from tests.support.steps import assert_close, shield_all, uniform

ocp = pytest.importorskip("orbax.checkpoint", reason="Orbax is not installed")

OPTIMIZER = tempo.cheap_update(optax.adam(1e-2))
BATCHES = [(uniform(i, 8, 6), uniform(50 + i, 8, 3)) for i in range(4)]


def train_step(state, x, y):
    """One step of a linear model with Adam."""
    params, optimizer = state
    loss, gradients = jax.value_and_grad(lambda w: jnp.mean((jnp.tanh(x @ w) - y) ** 2))(params)
    updates, optimizer = OPTIMIZER.update(gradients, optimizer, params)
    return (optax.apply_updates(params, updates), optimizer), tempo.reveal(loss)


def initial_state():
    params = uniform(9, 6, 3)
    return params, OPTIMIZER.init(params)


def save(manager: Any, enclave: tempo.Enclave, state: Any, step: int) -> None:
    sealed = np.frombuffer(enclave.checkpoint(state), np.uint8)
    manager.save(step, args=ocp.args.StandardSave({"sealed": sealed, "next_batch": np.array(step)}))


def test_training_resumes_from_orbax(enclave, tmp_path):
    key = tempo.CheckpointKey.generate()
    enclave.use_checkpoint_key(key)
    train, state = shield_all(train_step, enclave=enclave), enclave.seal(initial_state())
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2):
            state, _ = train(state, *BATCHES[step - 1])
            save(manager, enclave, state, step)
        manager.wait_until_finished()
    ledger = tempo.CheckpointLedger.from_json(enclave.ledger.to_json())

    expected = initial_state()
    for batch in BATCHES:
        expected, _ = jax.jit(train_step)(expected, *batch)

    launched = tempo.Enclave.launch(checkpoint_key=key, checkpoint_ledger=ledger)
    with launched as later, ocp.CheckpointManager(tmp_path / "run") as manager:
        kept = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
        restored = later.restore(kept["sealed"].tobytes(), like=initial_state())
        train = shield_all(train_step, enclave=later)
        for batch in BATCHES[int(kept["next_batch"]) :]:
            restored, _ = train(restored, *batch)
        assert_close(later.open(restored), expected)
        # Orbax keeps older ones too, and its user may name one; so must the client.
        older = manager.restore(1, args=ocp.args.StandardRestore())["sealed"].tobytes()
        with pytest.raises(CheckpointError, match="checkpoint 1 is older than checkpoint 2"):
            later.restore(older, like=initial_state())
        back = later.restore(older, like=initial_state(), allow_rollback_to=1)
        assert_close(later.open(back), jax.jit(train_step)(initial_state(), *BATCHES[0])[0])


def test_nothing_on_disk_is_plaintext(enclave, tmp_path):
    enclave.use_checkpoint_key(tempo.CheckpointKey.generate())
    secret = np.linspace(0.1, 0.2, 4096)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        save(manager, enclave, enclave.seal({"weights": secret}), 1)
        manager.wait_until_finished()
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        kept = manager.restore(1, args=ocp.args.StandardRestore())
    assert set(kept) == {"sealed", "next_batch"}
    files = [path.read_bytes() for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert len(files) > 1
    for content in (kept["sealed"].tobytes(), *files):
        assert secret[:2].tobytes() not in content and b"weights" not in content


def refused_in_a_users_program() -> None:
    rows = np.ones((256, 64), np.float32)
    plain = {"mean": jnp.ones(64), "key": jax.random.key(1), "rows": rows}
    with tempo.Enclave.launch() as enclave, tempfile.TemporaryDirectory() as folder:
        step = tempo.shield(lambda s: jax.tree.map(lambda x: 2 * x, s), enclave=enclave)
        states = {"encrypted": enclave.seal({"rows": rows}), "resident": step({"rows": rows})}
        for form, state in states.items():
            assert state["rows"].form == form
            for make in (ocp.StandardCheckpointer, ocp.PyTreeCheckpointer):
                with make() as checkpointer:
                    path = Path(folder, f"{form}-{make.__name__}")
                    # No NumPy array beside it: for each Orbax starts a thread before this fails,
                    # which at the end of a process on Python 3.12 waits for a folder in vain.
                    with pytest.raises(SealedValueError, match=r"enclave\.checkpoint\(state\)"):
                        checkpointer.save(path, {"step": jnp.array(1), "state": state})
            with pytest.raises(SealedValueError, match="not saved or pickled"):
                pickle.dumps(state)
            with pytest.raises(SealedValueError, match="has no value on the host"):
                np.save(Path(folder, "rows.npy"), state["rows"])
            with pytest.raises(TypeError, match="can not serialize 'SealedArray'"):
                serialization.to_bytes(state)
            # Taken apart, names are no arrays of numbers either.
            for leaf in jax.tree.leaves(state):
                if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
                    with pytest.raises(TypeError, match="cannot be converted to a NumPy array"):
                        np.save(Path(folder, "leaf.npy"), leaf)
        # What is not sealed is saved as ever, keys and all.
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(folder, "plain"), plain)
            checkpointer.wait_until_finished()
            back = checkpointer.restore(Path(folder, "plain"))
        np.testing.assert_array_equal(back["rows"], rows)
        assert jax.random.key_data(back["key"]).tolist() == [0, 1]


def test_sealed_values_are_refused_at_save():
    run_fresh(refused_in_a_users_program, optimized=False)
