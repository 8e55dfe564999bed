"""The client's side of checkpoints: its key, its memory of the newest, and whole files."""

import copy
import os
import pickle
from typing import Any

import jax
import pytest

from enclave_runtime.protocol.checkpoint import Seen
from tempo_jax import CheckpointKey, CheckpointLedger
from tempo_jax.errors import (
    CheckpointError,
)
from tempo_jax.sealing import ledger as ledger_module
from tests.support.checkpointed import ALTERED, KEY, SECRET, X


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
