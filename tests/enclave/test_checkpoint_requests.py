"""What a host may ask about checkpoints, and what it is refused."""

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import pytest

import tempo_jax as tempo
from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.protocol.wire import Kind
from tempo_jax import CheckpointKey, CheckpointLedger
from tempo_jax.errors import (
    CheckpointError,
    EnclaveError,
    SealedValueError,
    TempoError,
)
from tempo_jax.sealing import ledger as ledger_module
from tempo_jax.sealing.array import handle_text
from tests.support.checkpointed import X, Y, initial_state
from tests.support.steps import assert_close


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
