"""The client's checkpoints: its key and memory, and states that survive their enclave."""

import contextlib
import copy
import json
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tempo_jax as tempo
from enclave_runtime.protocol.checkpoint import Seen
from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.protocol.wire import Kind
from tempo_jax import CheckpointKey, CheckpointLedger
from tempo_jax.errors import (
    CheckpointError,
    EnclaveError,
    SealedValueError,
    TempoError,
    UnsupportedError,
)
from tempo_jax.sealing import ledger as ledger_module
from tempo_jax.sealing.array import handle_text
from tests.support.steps import TOLERANCE, assert_close, shield_all, uniform

OPTIMIZER = tempo.cheap_update(optax.adam(1e-2))
X, Y = uniform(1, 8, 6), uniform(2, 8, 3)
KEY = CheckpointKey.generate()
SECRET = bytes(range(32))
ALTERED = "failed its authentication"


def train_step(state, x, y):
    """One step of an MLP with Adam and a random key that is split."""
    params, optimizer, key = state
    key, noise = jax.random.split(key)
    x = x + 0.1 * jax.random.normal(noise, x.shape)

    def loss_of(params):
        hidden = jnp.tanh(x @ params["first"] + params["bias"])
        return jnp.mean((hidden @ params["second"] - y) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, optimizer = OPTIMIZER.update(gradients, optimizer, params)
    return (optax.apply_updates(params, updates), optimizer, key), tempo.reveal(loss)


def initial_state():
    params = {"first": uniform(3, 6, 4), "bias": uniform(4, 4), "second": uniform(5, 4, 3)}
    return params, OPTIMIZER.init(params), jax.random.key(0)


def plain_state(steps: int) -> Any:
    state, step = initial_state(), jax.jit(train_step)
    for _ in range(steps):
        state, _ = step(state, X, Y)
    return state


def is_sealed(x: Any) -> bool:
    return isinstance(x, tempo.SealedArray)


def forms(tree: Any) -> set[str]:
    return {leaf.form for leaf in jax.tree.leaves(tree, is_leaf=is_sealed)}


@pytest.fixture
def keyed(enclave) -> tempo.Enclave:
    """The enclave with a fresh key."""
    enclave.use_checkpoint_key(CheckpointKey.generate())
    return enclave


@pytest.fixture(scope="module")
def other_enclave() -> Iterator[tempo.Enclave]:
    """An enclave of another session."""
    with tempo.Enclave.launch() as running:
        yield running


# Keys


def test_key_keeps_its_secret():
    assert repr(KEY) == str(KEY) == f"{KEY}" == "CheckpointKey(<secret>)"
    assert repr(CheckpointKey.enclave_identity("a", SECRET)) == "CheckpointKey(<secret>, run='a')"
    for convert in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(CheckpointError, match="is not pickled"):
            convert(KEY)
    with pytest.raises(TypeError):
        jax.jit(lambda x: x)(KEY)
    assert CheckpointKey.generate().to_bytes() != CheckpointKey.generate().to_bytes()


def test_key_from_bytes():
    again = CheckpointKey.from_bytes(KEY.to_bytes())
    assert again.lineage == KEY.lineage != CheckpointKey.generate().lineage
    for wrong in (b"", bytes(31), bytes(33), "0" * 32, bytearray(32)):
        with pytest.raises(CheckpointError, match="expected 32 bytes"):
            CheckpointKey.from_bytes(wrong)  # pyright: ignore[reportArgumentType]


def test_key_of_an_identity_has_no_bytes():
    with pytest.raises(CheckpointError, match="never leaves the enclave"):
        CheckpointKey.enclave_identity("a", SECRET).to_bytes()
    for wrong in ("", "a" * 257, 3):
        with pytest.raises(CheckpointError, match="1 to 256 characters"):
            CheckpointKey.enclave_identity(wrong, SECRET)  # pyright: ignore[reportArgumentType]
    for wrong in (b"", bytes(31), "0" * 32, None):
        with pytest.raises(CheckpointError, match="enclave_identity: expected 32 bytes"):
            CheckpointKey.enclave_identity("a", wrong)  # pyright: ignore[reportArgumentType]


def test_key_of_an_identity_has_a_ledger_of_its_own():
    names = [
        CheckpointKey.enclave_identity(run, secret).lineage
        for run in ("a", "b")
        for secret in (SECRET, SECRET[::-1])
    ]
    assert len({*names, CheckpointKey.from_bytes(SECRET).lineage}) == 5
    assert CheckpointKey.enclave_identity("a", SECRET).lineage == names[0]


def test_enclave_without_an_identity_says_so(enclave):
    with pytest.raises(CheckpointError, match="no identity to seal to, which takes SGX"):
        enclave.use_checkpoint_key(CheckpointKey.enclave_identity("a", SECRET))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((bytes(32),), "key is a bytes, expected"),
        ((KEY, {}), "ledger is a dict, expected"),
    ],
)
def test_wrong_key_or_ledger_type_is_refused(enclave, arguments, text):
    with pytest.raises(CheckpointError, match=text):
        enclave.use_checkpoint_key(*arguments)


# The ledger


def test_ledger_remembers_the_newest(keyed):
    sealed, key = keyed.seal({"a": X}), CheckpointKey.generate()
    keyed.use_checkpoint_key(key)
    first, second = keyed.checkpoint(sealed), keyed.checkpoint(sealed)
    ledger = CheckpointLedger()
    assert ledger.number(key) == 0
    ledger = ledger.recorded(key, second)
    assert ledger == keyed.ledger
    assert (ledger.number(key), ledger.number(KEY)) == (2, 0)
    assert ledger.recorded(key, first) is ledger
    with pytest.raises(CheckpointError, match="another key"):
        ledger.recorded(KEY, second)
    forged = bytearray(second)
    forged[23] += 1  # the number
    with pytest.raises(CheckpointError, match=ALTERED):
        ledger.recorded(key, bytes(forged))


def test_ledger_as_text():
    ledger = CheckpointLedger({KEY.lineage: Seen(3, bytes(range(32)))})
    text = ledger.to_json()
    assert CheckpointLedger.from_json(text) == ledger
    assert KEY.to_bytes().hex() not in text


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", "3", "null", '{"version": 2, "newest": {}}', '{"version": 1}'),
        '{"version": 1, "newest": 3}',
        '{"version": 1, "newest": {"a": 3}}',
        '{"version": 1, "newest": {"a": {"number": 0, "identifier": ""}}}',
        "[" * 100000,
    ],
)
def test_damaged_ledger_is_refused(text):
    with pytest.raises(CheckpointError, match="an empty ledger would accept old checkpoints"):
        CheckpointLedger.from_json(text)


# Files


def test_written_file_has_the_bytes(tmp_path):
    path = tmp_path / "state"
    for data in (b"first", b"second"):
        ledger_module.write(path, data)
        assert path.read_bytes() == data
        assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, function):
    path = tmp_path / "state"
    ledger_module.write(path, b"first")

    def failing(*_: Any) -> None:
        raise OSError("planted")

    monkeypatch.setattr(os, function, failing)
    with pytest.raises(OSError, match="planted"):
        ledger_module.write(path, b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["state"]


def test_rest_of_a_crashed_write_is_in_nobodys_way(tmp_path):
    (tmp_path / "state.partial").write_bytes(b"rest of a longer checkpoint")
    ledger_module.write(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["state"]
    (tmp_path / "state.partial").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic link"):
        ledger_module.write(tmp_path / "state", b"newer")
    assert not (tmp_path / "other").exists()


# States that survive


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


# What a host may ask


def test_orders_that_the_client_did_not_make_are_refused(keyed):
    request, data = keyed.connection.request, keyed.checkpoint(keyed.seal(X))
    order = json.dumps({"newest": None, "allow_rollback_to": None, "leaves": []}).encode()
    for kind, purpose in ((Kind.RESTORE, "checkpoint key"), (Kind.CHECKPOINT_KEY, "restore")):
        for forged in (order, bytes(100), b"", keyed.encrypt(order, purpose)):
            fields = {"head": ""} if kind is Kind.RESTORE else {}
            with pytest.raises(SealedValueError, match="ciphertext failed its authentication"):
                request(kind, fields, forged)
    assert_close(keyed.open(keyed.restore(data, like=X)), X)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"identifier": "00"}, "no such checkpoint is being written"),
        ({"leaf": 1}, "in order, each once"),
        ({"leaf": -1}, "in order, each once"),
        ({"offset": 1 << 40}, "outside the shared memory"),
        ({"offset": -1}, "outside the shared memory"),
        ({"offset": "0"}, "malformed CHECKPOINT_LEAF"),
        ({"arena": "none"}, "no such shared memory"),
        ({"handle": "00" * 16}, "not in this enclave"),
        ({"handle": None}, "`handle` is not a text"),
    ],
)
def test_malformed_leaf_is_refused(keyed, fields, text):
    tree = tempo.shield(lambda x: [x, x + 1], enclave=keyed)(X)
    pass_on = keyed.connection.request

    def altered(kind: Kind, given: dict[str, Any], *rest: Any, **options: Any) -> Any:
        changed = given | fields if kind is Kind.CHECKPOINT_LEAF else given
        return pass_on(kind, changed, *rest, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(keyed.connection, "request", altered)
        with pytest.raises(TempoError, match=text):
            keyed.checkpoint(tree)
    keyed.checkpoint(tree)


def test_leaf_of_another_shape_is_refused(keyed):
    resident = tempo.shield(lambda x: x, enclave=keyed)(X)
    begun = keyed.connection.request(Kind.CHECKPOINT, {"leaves": [_leaf([6, 8]), _leaf([8, 6])]})
    with keyed.arena(10_000) as (name, _), pytest.raises(EnclaveError, match=r"expected float64"):
        keyed.connection.request(
            Kind.CHECKPOINT_LEAF,
            {
                "identifier": begun["identifier"],
                "leaf": 0,
                "arena": name,
                "offset": 0,
                "handle": _text(resident),
            },
        )


def _leaf(shape: list[int]) -> dict[str, Any]:
    array = {"shape": shape, "dtype": "float64"}
    return {"name": "", "array": array, "dtype": "float64", "weak": False}


def _text(sealed: tempo.SealedArray) -> str:
    return handle_text(sealed.handle)


def test_leaves_are_written_and_restored_once(keyed):
    """No nonce serves twice, and nothing is restored from a part of a checkpoint."""
    seen: list[tuple[Kind, dict[str, Any]]] = []
    pass_on = keyed.connection.request

    def record(kind: Kind, fields: dict[str, Any], *rest: Any, **options: Any) -> Any:
        reply = pass_on(kind, fields, *rest, **options)
        if kind in (Kind.CHECKPOINT_LEAF, Kind.RESTORE_LEAF):
            seen.append((kind, fields))
            with pytest.raises(CheckpointError, match="in order, each once|no such checkpoint"):
                pass_on(kind, fields)
        return reply

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(keyed.connection, "request", record)
        tree = {"a": X, "b": Y}
        data = keyed.checkpoint(keyed.seal(tree))
        assert_close(keyed.open(keyed.restore(data, like=tree)), tree)
    assert len(seen) == 4


def test_given_up_checkpoint_makes_room(keyed):
    sealed, pass_on = keyed.seal({"a": X, "b": Y}), keyed.connection.request

    def failing(kind: Kind, fields: dict[str, Any], *rest: Any, **options: Any) -> Any:
        if fields.get("leaf") == 1:
            raise EnclaveError("planted")
        return pass_on(kind, fields, *rest, **options)

    newest = keyed.checkpoint(sealed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(keyed.connection, "request", failing)
        for _ in range(2):
            with pytest.raises(EnclaveError, match="planted"):
                keyed.checkpoint(sealed)
            with pytest.raises(EnclaveError, match="planted"):
                keyed.restore(newest, like=sealed)
    # The client has seen neither, so the last whole one still is the newest.
    assert_close(keyed.open(keyed.restore(newest, like=sealed)), {"a": X, "b": Y})
    keyed.checkpoint(sealed)


def test_threads_take_checkpoints_side_by_side(keyed):
    sealed, barrier = keyed.seal({"a": X, "b": Y}), threading.Barrier(4)

    def take(_: int) -> bytes:
        barrier.wait()
        return keyed.checkpoint(sealed)

    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(take, range(4)))
    newest = max(taken, key=lambda data: data[16:24])
    assert_close(keyed.open(keyed.restore(newest, like=sealed)), {"a": X, "b": Y})


def test_host_that_holds_no_key_may_take_a_checkpoint(keyed):
    """The client provisions its key and leaves; what is then written only it can open."""
    key = CheckpointKey.generate()
    keyed.use_checkpoint_key(key)
    sealed = keyed.seal(initial_state())
    known = keyed._checkpointing
    known.key, known.ledger = None, CheckpointLedger()
    data = keyed.checkpoint(sealed)
    assert keyed.ledger == CheckpointLedger()
    with pytest.raises(CheckpointError, match="gave no checkpoint key"):
        keyed.restore(data, like=sealed)
    ledger = CheckpointLedger().recorded(key, data)
    assert ledger.number(key) == 1
    assert_close(ledger_module.open_checkpoint(data, key, sealed), initial_state())


def test_host_that_changes_shared_memory_while_a_leaf_is_restored_changes_nothing(keyed):
    tree = {"a": jnp.arange(400_000.0)}
    data = keyed.checkpoint(keyed.seal(tree))
    stop, pass_on = threading.Event(), keyed.connection.request

    def scribble(arena: Any) -> None:
        view = arena.view(ArrayType((len(data) // 2,), "uint8"), 0)
        original = view.copy()
        while not stop.is_set():
            view[:] ^= 1
        view[:] = original

    def racing(kind: Kind, fields: dict[str, Any], *rest: Any, **options: Any) -> Any:
        if kind is not Kind.RESTORE_LEAF:
            return pass_on(kind, fields, *rest, **options)
        writer = threading.Thread(target=scribble, args=(arenas[-1],))
        writer.start()
        try:
            return pass_on(kind, fields, *rest, **options)
        finally:
            stop.set()
            writer.join()

    arenas: list[Any] = []
    arena = keyed.arena

    @contextlib.contextmanager
    def remembered(size: int) -> Iterator[Any]:
        with arena(size) as reserved:
            arenas.append(reserved[1])
            yield reserved

    for _ in range(5):
        stop.clear()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(keyed.connection, "request", racing)
            patched.setattr(keyed, "arena", remembered)
            with contextlib.suppress(CheckpointError):
                restored = keyed.restore(data, like=tree)
                assert_close(keyed.open(restored), tree)
