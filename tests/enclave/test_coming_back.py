"""Clients and hosts that connect, leave and come back, and what they keep of their own."""

import contextlib
import copy
import gc
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from tempo_jax.cli.serve import served
from tempo_jax.errors import (
    ChannelError,
    UnsupportedError,
)
from tempo_jax.transport.host_key import default_path, read_host_key, write_host_key
from tests.support.roles import X, Y, scaled, sealed_step
from tests.support.serving import IDENTITY, INSECURE
from tests.support.steps import assert_close, shield_all
from tests.support.steps import momentum_state as initial_state
from tests.support.steps import momentum_step as train_step


def test_client_leaves_and_returns(roles, tmp_path):
    IDENTITY.save(tmp_path / "identity")
    again = tempo.ClientIdentity.load(tmp_path / "identity")
    sealed = roles.client.seal(jnp.arange(3.0))
    connect = tempo.Enclave.connect
    with connect(roles.ports.client, policy=INSECURE, identity=again) as client:
        assert client.session == roles.client.session
        np.testing.assert_array_equal(client.open(sealed), [0, 1, 2])
        assert repr(client) == f"Enclave({roles.ports.client})"
    assert repr(client) == "Enclave(closed)"
    with connect(roles.ports.client, policy=INSECURE, identity=again) as client:
        np.testing.assert_array_equal(client.open(sealed), [0, 1, 2])


def test_identity_may_be_made_on_the_way(tmp_path):
    with served(host_key=tmp_path / "key") as ports:
        with tempo.Enclave.connect(ports.client, policy=INSECURE) as client:
            sealed, identity = client.seal(jnp.arange(3.0)), client.identity
        assert identity is not None
        identity.save(tmp_path / "identity")
        again = tempo.ClientIdentity.load(tmp_path / "identity")
        with tempo.Enclave.connect(ports.client, policy=INSECURE, identity=again) as client:
            np.testing.assert_array_equal(client.open(sealed), [0, 1, 2])
        with pytest.raises(ChannelError, match="has an owner already"):
            tempo.Enclave.connect(ports.client, policy=INSECURE)


def test_identity_is_kept_safe(tmp_path):
    identity = tempo.ClientIdentity.generate()
    path = tmp_path / "identity"
    identity.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        tempo.ClientIdentity.generate().save(path)
    loaded = tempo.ClientIdentity.load(path)
    assert loaded.session_secret("s", b"key") == identity.session_secret("s", b"key")
    assert repr(identity) == str(identity) == "ClientIdentity(<secret>)"
    for use in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(ChannelError, match="cannot be pickled"):
            use(identity)
    with pytest.raises(TypeError):
        jax.jit(lambda x: x)(identity)


def test_identity_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "identity"
    IDENTITY.save(path)
    path.chmod(0o640)
    with pytest.raises(ChannelError, match="chmod 600"):
        tempo.ClientIdentity.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"format": "other", "secret": "00"}',
        b'{"format": "tempo_jax/client identity/1", "secret": "zz"}',
        b'{"format": "tempo_jax/client identity/1", "secret": 3}',
    ],
)
def test_file_that_is_no_identity_is_refused(tmp_path, content):
    path = tmp_path / "identity"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(ChannelError, match="is not a client's identity"):
        tempo.ClientIdentity.load(path)
    with pytest.raises(ChannelError, match="has 3 bytes, expected 32"):
        tempo.ClientIdentity(b"abc")


def test_host_attaches_on_its_own_machine_only(roles):
    with pytest.raises(ChannelError, match=r"expected 127\.0\.0\.1:PORT, got example\.org"):
        tempo.Enclave.attach("example.org:7442", host_key=roles.ports.host_key)


def test_host_key_is_found_or_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ChannelError, match=r"no host key at .*host-7.key: pass `host_key=`"):
        tempo.Enclave.attach("127.0.0.1:7")
    key = bytes(range(32))
    write_host_key(default_path(7), key)
    write_host_key(default_path(7), key)
    assert read_host_key(7) == key and default_path(7).stat().st_mode & 0o777 == 0o600
    assert [p.name for p in default_path(7).parent.iterdir()] == ["host-7.key"]
    for content in ("", "00" * 31, "zz" * 32, "00" * 33):
        default_path(7).write_text(content)
        with pytest.raises(ChannelError, match="holds no host key"):
            read_host_key(7)


def test_shield_takes_an_enclave_of_any_role_and_nothing_else():
    with pytest.raises(UnsupportedError, match="expected what `Enclave.launch"):
        tempo.shield(scaled, enclave=None)  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_host_that_leaves_keeps_what_it_saved(roles, tmp_path):
    shield_all(train_step, enclave=roles.client).provision(initial_state(), X, Y)
    state, x, y = sealed_step(roles.client)
    with contextlib.closing(
        tempo.Enclave.attach(roles.ports.host, host_key=roles.ports.host_key)
    ) as host:
        state, _ = shield_all(train_step, enclave=host)(state, x, y)
        tempo.save_sealed(tmp_path / "out", state)
    del state
    gc.collect()
    result = tempo.load_sealed(tmp_path / "out", jax.eval_shape(initial_state))
    expected, _ = jax.jit(train_step)(initial_state(), X, Y)
    assert_close(roles.client.open(result), expected)
