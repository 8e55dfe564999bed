"""Public arguments: what the client stands for, what the host chooses, and what that tells it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.protocol.wire import Kind
from tempo_jax.errors import (
    AdmissionError,
    CheckpointError,
    EnclaveError,
    RoleError,
    SealedValueError,
    SecrecyError,
    UnsupportedError,
)
from tests.support.serving import sealed_for
from tests.support.steps import assert_close, uniform

ROWS = 6
X, Y = uniform(1, ROWS, 4), uniform(2, ROWS)


def weighted(batch: Any, weights: Any) -> Any:
    """The weighted loss of a batch, which it reveals."""
    losses = (batch["x"].sum(1) - batch["y"]) ** 2
    return tempo.reveal((losses * weights).sum())


BATCH = {"x": X, "y": Y}
LOSSES = (X.sum(1) - Y) ** 2
UNIT = np.eye(ROWS)


def test_public_weight_would_read_each_examples_loss(roles):
    weights = jnp.ones(ROWS)
    (batch,) = sealed_for(roles.client, batch=BATCH)
    # The control: the host chooses, and reads.
    owned, chosen = (
        tempo.shield(weighted, enclave=s, host_chosen="weights", donate=False)
        for s in (roles.client, roles.host)
    )
    given = owned.provision(BATCH, weights)
    assert "weights: public, what the host chooses" in str(given)
    assert "note: the host chooses weights anew for each run" in str(given)
    assert given.host_chosen == ("weights",) and given.public == ()
    assert_close(jnp.stack([chosen(batch, one) for one in UNIT]), LOSSES)

    owned, authentic = (
        tempo.shield(weighted, enclave=s, public="weights", donate=False)
        for s in (roles.client, roles.host)
    )
    given = owned.provision(BATCH, weights)
    assert "weights: public, what is published as `weights`" in str(given)
    match = "`weights` of `weighted` is public, and takes what its owner published"
    with pytest.raises(AdmissionError, match=match):
        authentic(batch, UNIT[0])
    published = roles.client.publish(weights, tag="weights")
    assert_close(authentic(batch, published), LOSSES.sum())
    with pytest.raises(AdmissionError, match="takes here a value tagged `weights`"):
        authentic(batch, roles.client.publish(weights, tag="rate"))
    # Whatever is allowed, it is said where it is given up.
    assert "public, what the host chooses" in str(
        owned.provision(BATCH, weights, allow_any=["weights"])
    )
    assert_close(authentic(batch, UNIT[0]), LOSSES[0])


@pytest.fixture(scope="module")
def authentic(roles) -> Any:
    owned, hosted = (
        tempo.shield(weighted, enclave=s, public=(1,), donate=False)
        for s in (roles.client, roles.host)
    )
    owned.provision(BATCH, jnp.ones(ROWS))
    return hosted


def test_published_value_is_read_by_all_and_changed_by_nobody(roles, authentic, tmp_path):
    weights = uniform(5, ROWS)
    published = roles.client.publish(weights, tag="weights")
    assert repr(published) == "SealedArray(float64[6], published)"
    tempo.save_sealed(tmp_path / "weights", published)
    published = tempo.load_sealed(tmp_path / "weights", weights)
    np.testing.assert_array_equal(roles.host.open(published), weights)
    np.testing.assert_array_equal(roles.client.open(published), weights)
    (batch,) = sealed_for(roles.client, batch=BATCH)
    assert_close(authentic(batch, published), (LOSSES * weights).sum())
    content = np.asarray(published.content)
    for position in (0, 40, 50, 70, 76, content.size - 1):
        altered = content.copy()
        altered[position] ^= 1
        forged = type(published)(
            (jnp.asarray(altered), published.handle),
            *("published", published.shape, published.dtype, False, published.session),
        )
        with pytest.raises(SealedValueError, match="failed its authentication"):
            authentic(batch, forged)
        with pytest.raises(SealedValueError, match="failed its authentication"):
            roles.client.open(forged)


def test_published_value_in_the_hosts_own_jit(roles, authentic):
    (batch,) = sealed_for(roles.client, batch=BATCH)
    weights = uniform(6, ROWS)
    published = roles.client.publish(weights, tag="weights")
    assert_close(jax.jit(authentic)(batch, published), (LOSSES * weights).sum())


def test_what_is_published_is_no_secret_and_what_is_sealed_is_not_public(roles, authentic):
    (batch,) = sealed_for(roles.client, batch=BATCH)
    public_batch = roles.client.publish(BATCH, tag="batch")
    published = roles.client.publish(jnp.ones(ROWS), tag="weights")
    with pytest.raises(SecrecyError, match=r"is published, and expected to be a secret\. Name it"):
        authentic(public_batch, published)
    # Nor does a host get further that asks the enclave itself.
    runtime = authentic._runtime(authentic._program(authentic._signature((batch, published), {})))
    served, request = runtime._served, roles.host.connection.request
    with roles.host.arena(3 * 1024) as (name, arena):
        for number, sealed in enumerate((batch["x"], batch["y"], published)):
            content = np.asarray(sealed.content)
            arena.view(ArrayType(content.shape, "uint8"), 1024 * number)[...] = content
        begin = {"program": served.number, "arena": name, "workers": 1, "blind_at": [0, 0, 0]}
        for inputs in (
            [{"published": 0}, {"offset": 1024}, {"published": 2048}],
            [{"offset": 0}, {"offset": 1024}, {"handle": "00" * 16}],
            [{"offset": 0}, {"offset": 1024}, {"published": 2048, "offset": 0}],
        ):
            with pytest.raises(EnclaveError, match="refused"):
                request(Kind.BEGIN, {**begin, "inputs": inputs})
        honest = [{"offset": 0}, {"offset": 1024}, {"published": 2048}]
        begun = request(Kind.BEGIN, {**begin, "inputs": honest})
        request(Kind.ABORT, {"run": begun["run"]})


def test_host_publishes_nothing_and_checkpoints_hold_secrets(roles):
    with pytest.raises(RoleError, match="`enclave.publish` needs the client's keys"):
        roles.host.publish(X, tag="x")
    with pytest.raises(UnsupportedError, match="enclave.publish: leaf `` of type str"):
        roles.client.publish("text", tag="x")
    with pytest.raises(UnsupportedError, match="enclave.publish was called inside jit"):
        jax.jit(lambda x: roles.client.publish(x, tag="x"))(X)
    roles.client.use_checkpoint_key(tempo.CheckpointKey.generate())
    with pytest.raises(CheckpointError, match="is published and not sealed"):
        roles.host.checkpoint(roles.client.publish({"x": X}, tag="x"))


def test_typed_keys_and_narrow_floats_are_published(roles):
    tree = {"key": jax.random.key(3), "rate": jnp.bfloat16(0.5), "none": jnp.zeros((0, 2))}
    opened = roles.host.open(roles.client.publish(tree, tag="t"))
    assert opened["rate"].dtype == jnp.bfloat16 and float(opened["rate"]) == 0.5
    assert opened["none"].shape == (0, 2)
    np.testing.assert_array_equal(
        jax.random.key_data(opened["key"]), jax.random.key_data(tree["key"])
    )


def test_launched_enclave_takes_plain_and_published_values(enclave):
    (batch,) = sealed_for(enclave, batch=BATCH)
    known: Any
    for known in ({"public": "weights"}, {"host_chosen": "weights"}):
        step = tempo.shield(weighted, enclave=enclave, donate=False, **known)
        for weights in (UNIT[1], enclave.publish(UNIT[1], tag="weights")):
            assert_close(step(batch, weights), LOSSES[1])


def test_argument_is_public_in_one_way(enclave):
    options: Any
    for options, text in (
        ({"public": "weights", "host_chosen": 1}, "public and host_chosen both name"),
        ({"host_chosen": "w"}, "host_chosen names 'w', but the arguments are batch, weights"),
    ):
        with pytest.raises(UnsupportedError, match=text):
            tempo.shield(weighted, enclave=enclave, **options)
