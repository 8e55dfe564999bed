"""States that survive their enclave, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from enclave_runtime.protocol.checkpoint import Seen
from tempo_jax import CheckpointKey, CheckpointLedger
from tempo_jax.errors import (
    CheckpointError,
    SealedValueError,
    UnsupportedError,
)
from tempo_jax.sealing import ledger as ledger_module
from tests.support.checkpointed import (
    ALTERED,
    KEY,
    SECRET,
    X,
    Y,
    forms,
    initial_state,
    is_sealed,
    plain_state,
    train_step,
)
from tests.support.steps import TOLERANCE, assert_close, shield_all


def test_every_form_of_leaf_survives(keyed, other_enclave):
    train = shield_all(train_step, enclave=keyed)
    state, _ = train(keyed.seal(initial_state()), X, Y)
    tree = {"state": state, "batch": keyed.seal((X, Y))}
    assert forms(tree) == {"blinded", "resident", "encrypted"}
    key = CheckpointKey.generate()
    for enclave in (keyed, other_enclave):
        enclave.use_checkpoint_key(key)
    data = keyed.checkpoint(tree)
    restored = other_enclave.restore(data, like=tree)
    assert forms(restored) == {"resident"}
    assert all(
        leaf.session == other_enclave.session
        for leaf in jax.tree.leaves(restored, is_leaf=is_sealed)
    )
    assert_close(other_enclave.open(restored), {"state": plain_state(1), "batch": (X, Y)})
    # The state is still there, too.
    state, _ = train(state, X, Y)
    assert_close(keyed.open(state), plain_state(2))


def test_training_goes_on_in_another_enclave_under_fresh_keys(keyed, other_enclave):
    key = CheckpointKey.generate()
    for enclave in (keyed, other_enclave):
        enclave.use_checkpoint_key(key)
    first, second = (shield_all(train_step, enclave=e) for e in (keyed, other_enclave))
    state, _ = first(keyed.seal(initial_state()), X, Y)
    data = keyed.checkpoint(state)
    like = jax.eval_shape(initial_state)
    restored = other_enclave.restore(data, like=like)
    mine, _ = first(state, X, Y)
    others, _ = second(restored, X, Y)
    assert_close(keyed.open(mine), plain_state(2), TOLERANCE)
    assert_close(other_enclave.open(others), plain_state(2), TOLERANCE)
    # The same weights lie on the devices under other keys.
    kernels = [np.asarray(state[0]["first"].content) for state in (mine, others)]
    assert sorted(np.abs(kernels[0]).ravel().round(9)) == sorted(
        np.abs(kernels[1]).ravel().round(9)
    )
    assert np.mean(kernels[0] == kernels[1]) < 0.5


def test_restoring_twice_gives_fresh_keys_too(keyed):
    train = shield_all(train_step, enclave=keyed)
    data = keyed.checkpoint(keyed.seal(initial_state()))
    kernels = []
    for _ in range(2):
        state, _ = train(keyed.restore(data, like=initial_state()), X, Y)
        kernels.append(np.asarray(state[0]["second"].content))
    assert np.mean(kernels[0] == kernels[1]) < 0.5


def test_values_of_every_kind(keyed):
    values = {
        "typed keys": jax.random.split(jax.random.key(4), (2, 3)),
        "rbg key": jax.random.key(5, impl="rbg"),
        "weak": 0.5,
        "bfloat16": jnp.asarray([1.5, np.nan], jnp.bfloat16),
        "complex": jnp.asarray([1 - 2j]),
        "bool": jnp.asarray([True, False]),
        "empty": jnp.zeros((3, 0)),
        "large": jnp.arange(300_000.0),
    }
    restored = keyed.restore(keyed.checkpoint(keyed.seal(values)), like=values)
    for name, value in values.items():
        assert restored[name].dtype == jax.typeof(value).dtype
        assert restored[name].weak_type == jax.typeof(value).weak_type
    opened = keyed.open(restored)
    np.testing.assert_array_equal(
        jax.random.key_data(opened["rbg key"]), jax.random.key_data(values["rbg key"])
    )
    assert_close(opened, jax.tree.map(jnp.asarray, values))
    assert keyed.restore(keyed.checkpoint({}), like={}) == {}


def test_client_opens_a_checkpoint_without_an_enclave(keyed):
    key, state = CheckpointKey.generate(), initial_state()
    keyed.use_checkpoint_key(key)
    data = keyed.checkpoint(keyed.seal(state))
    assert_close(ledger_module.open_checkpoint(data, key, state), state)
    assert key.authenticated(data).number == 1
    with pytest.raises(CheckpointError, match="another key"):
        ledger_module.open_checkpoint(data, KEY, state)
    with pytest.raises(CheckpointError, match=ALTERED):
        ledger_module.open_checkpoint(data[:-1], key, state)
    with pytest.raises(CheckpointError, match="holds another tree"):
        ledger_module.open_checkpoint(data, key, state[0])


def test_checkpoint_shows_nothing(keyed):
    secret = jnp.full(100, 12345.0)
    data = keyed.checkpoint(keyed.seal({"weights of a secret layer": secret}))
    assert b"secret layer" not in data
    assert np.asarray(secret)[:1].tobytes() not in data


# What is refused


def test_older_checkpoint_is_refused_unless_named(keyed):
    first, second = (keyed.checkpoint(keyed.seal(jnp.float64(i))) for i in (1, 2))
    like = jnp.float64(0)
    with pytest.raises(CheckpointError, match="checkpoint 1 is older than checkpoint 2"):
        keyed.restore(first, like=like)
    assert keyed.open(keyed.restore(first, like=like, allow_rollback_to=1)) == 1
    assert keyed.open(keyed.restore(second, like=like)) == 2
    key = keyed._checkpointing.key
    named = key.authenticated(first)
    assert keyed.open(keyed.restore(first, like=like, allow_rollback_to=named)) == 1
    for other in (1, named, Seen(2, named.identifier)):
        with pytest.raises(CheckpointError, match="`allow_rollback_to` names another"):
            keyed.restore(second, like=like, allow_rollback_to=other)


def test_later_enclave_refuses_what_is_older_than_the_ledger_says(keyed, other_enclave):
    key = CheckpointKey.generate()
    keyed.use_checkpoint_key(key)
    first, second = (keyed.checkpoint(keyed.seal(jnp.float64(i))) for i in (1, 2))
    ledger = CheckpointLedger.from_json(keyed.ledger.to_json())
    other_enclave.use_checkpoint_key(key, ledger)
    with pytest.raises(CheckpointError, match="older than checkpoint 2"):
        other_enclave.restore(first, like=jnp.float64(0))
    assert other_enclave.open(other_enclave.restore(second, like=jnp.float64(0))) == 2
    assert other_enclave.ledger == ledger
    data = other_enclave.checkpoint(other_enclave.seal(jnp.float64(3)))
    assert other_enclave.ledger.number(key) == key.authenticated(data).number == 3


def test_without_a_ledger_rollback_is_not_noticed(keyed):
    # What SECURITY.md says cannot be promised.
    key = CheckpointKey.generate()
    keyed.use_checkpoint_key(key)
    old = keyed.checkpoint(keyed.seal(jnp.float64(1)))
    keyed.checkpoint(keyed.seal(jnp.float64(2)))
    with tempo.Enclave.launch(checkpoint_key=key) as forgetful:
        assert forgetful.open(forgetful.restore(old, like=jnp.float64(0))) == 1


def test_altered_checkpoint_is_refused_and_leaves_nothing(keyed):
    tree = {"a": X, "b": Y}
    data = keyed.checkpoint(keyed.seal(tree))
    handles = keyed.statistics()["handles"]
    for position in (30, 90, len(data) - X.nbytes, len(data) - 1):
        altered = bytearray(data)
        altered[position] ^= 1
        with pytest.raises(CheckpointError, match=f"{ALTERED}|another key"):
            keyed.restore(bytes(altered), like=tree)
    for wrong in (data[:50], data[:100], data[:-1], data + b"\0", b""):
        with pytest.raises(CheckpointError, match=f"{ALTERED}|bytes of header"):
            keyed.restore(wrong, like=tree)
    assert keyed.statistics()["handles"] == handles
    assert_close(keyed.open(keyed.restore(data, like=tree)), tree)


def test_leaves_of_another_checkpoint_are_refused(keyed):
    tree = {"a": X, "b": X + 1}
    first, second = (keyed.checkpoint(keyed.seal(tree)) for _ in range(2))
    size = X.nbytes + 16
    for mixed in (second[:-size] + first[-size:], second[: -2 * size] + first[-2 * size :]):
        with pytest.raises(CheckpointError, match=ALTERED):
            keyed.restore(mixed, like=tree)
    with pytest.raises(CheckpointError, match=ALTERED):
        keyed.restore(second[: -2 * size] + second[-size:] + second[-2 * size : -size], like=tree)


def test_wrong_key_is_refused(keyed):
    data = keyed.checkpoint(keyed.seal(X))
    keyed.use_checkpoint_key(KEY)
    with pytest.raises(CheckpointError, match="sealed under another key"):
        keyed.restore(data, like=X)


@pytest.mark.parametrize(
    ("like", "text"),
    [
        ({"a": X}, "2 leaves, expected 1"),
        ({"a": X, "b": Y, "c": Y}, "2 leaves, expected 3"),
        ({"a": X, "c": Y}, r"leaf 1 is \['b'\] float64\[8, 3\], expected \['c'\] float64"),
        ({"a": X, "b": Y.astype(jnp.float32)}, r"expected \['b'\] float32\[8, 3\]"),
        ({"a": X.T, "b": Y}, r"leaf 0 is .* expected \['a'\] float64\[6, 8\]"),
        ([X, Y], r"expected \[0\] float64"),
    ],
)
def test_another_tree_is_refused(keyed, like, text):
    data = keyed.checkpoint(keyed.seal({"a": X, "b": Y}))
    with pytest.raises(CheckpointError, match=text):
        keyed.restore(data, like=like)


def test_arguments_that_are_no_checkpoint_are_refused(keyed):
    data = keyed.checkpoint(keyed.seal(X))
    array = np.frombuffer(data, np.uint8)
    with pytest.raises(CheckpointError, match="data is a ndarray, expected bytes.*tobytes"):
        keyed.restore(array, like=X)
    assert_close(keyed.open(keyed.restore(array.tobytes(), like=X)), X)
    with pytest.raises(CheckpointError, match="of type str is not an array, a number"):
        keyed.restore(data, like="X")
    with pytest.raises(CheckpointError, match=r"leaf \['a'\] is a .* and not sealed"):
        keyed.checkpoint({"a": X})
    with pytest.raises(CheckpointError, match="path in the pytree has 5004 characters"):
        keyed.checkpoint({"x" * 5000: keyed.seal(X)})


def test_donated_or_foreign_state_is_refused(keyed, other_enclave):
    train = shield_all(train_step, enclave=keyed)
    old = keyed.seal(initial_state())
    train(old, X, Y)
    with pytest.raises(SealedValueError, match="was donated"):
        keyed.checkpoint(old)
    with pytest.raises(SealedValueError, match="belongs to another session"):
        keyed.checkpoint(other_enclave.seal(X))


def test_checkpoint_inside_jit_is_refused(keyed):
    resident = tempo.shield(lambda x: x, enclave=keyed)(X)
    for sealed in (keyed.seal(X), resident):
        with pytest.raises(UnsupportedError, match="called inside jit: there is no state yet"):
            jax.jit(lambda s: [keyed.checkpoint(s), s][1])(sealed)


def test_launch_that_cannot_take_the_key_leaves_no_process(monkeypatch):
    launched: list[Any] = []
    close = tempo.Enclave.close
    monkeypatch.setattr(tempo.Enclave, "close", lambda self: [launched.append(self), close(self)])
    with pytest.raises(CheckpointError, match="no identity"):
        tempo.Enclave.launch(checkpoint_key=CheckpointKey.enclave_identity("a", SECRET))
    assert launched[0].connection.process.poll() is not None


def test_without_a_key_nothing_is_written_or_restored():
    with tempo.Enclave.launch() as running:
        with pytest.raises(CheckpointError, match="provisioned no checkpoint key"):
            running.checkpoint(running.seal(X))
        with pytest.raises(CheckpointError, match="this client gave no checkpoint key"):
            running.restore(b"", like=X)
