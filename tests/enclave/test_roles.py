"""Client and host apart: what each can do, and that the host runs what the client agreed to."""

import gc
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from enclave_runtime.protocol.tags import Rules
from enclave_runtime.protocol.wire import REFUSAL, Kind
from tempo_jax.cli.serve import served
from tempo_jax.errors import (
    CheckpointError,
    EnclaveError,
    RoleError,
    SealedValueError,
    SecrecyError,
    UnprovisionedError,
)
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.export import export_segments
from tempo_jax.running.host_run import HostRun
from tempo_jax.sealing.array import handle_text
from tempo_jax.transport.channel import dial
from tests.support.roles import X, Y, carry, scaled, sealed_step
from tests.support.serving import IDENTITY, INSECURE, sealed_for
from tests.support.steps import assert_close, shield_all, uniform
from tests.support.steps import momentum_state as initial_state
from tests.support.steps import momentum_step as train_step


@pytest.mark.parametrize(
    ("scheme", "verify"),
    [
        (tempo.schemes.SignedPermutation(), False),
        (tempo.schemes.SignedPermutation(), True),
        (tempo.schemes.Mixing(), False),
    ],
)
def test_host_trains_what_the_client_sealed_and_opens(roles, tmp_path, scheme, verify):
    options = {"scheme": scheme, "offload": "all", "verify": verify}
    sealed = sealed_step(roles.client)
    owned = tempo.shield(train_step, enclave=roles.client, **options)
    digest = owned.provision(initial_state(), X, Y, runs_per_batch=3).digest
    shielded = tempo.shield(train_step, enclave=roles.host, **options)
    state, x, y = carry(tmp_path / "in", sealed)
    assert shielded.provision(state, x, y).digest == digest
    assert owned.provision(*sealed, runs_per_batch=3).digest == digest
    expected, plain = initial_state(), jax.jit(train_step)
    for _ in range(3):
        state, loss = shielded(state, x, y)
        expected, expected_loss = plain(expected, X, Y)
        assert_close(loss, expected_loss)
    result = carry(tmp_path / "out", state)
    forms = {leaf.form for leaf in jax.tree.leaves(result, is_leaf=_is_sealed)}
    kept = isinstance(scheme, tempo.schemes.SignedPermutation)
    assert ("blinded" in forms) == kept
    assert_close(roles.client.open(result), expected)


def _is_sealed(x: Any) -> bool:
    return isinstance(x, tempo.SealedArray)


def test_host_trains_inside_its_own_jit(roles):
    shielded = shield_all(train_step, enclave=roles.host)
    shield_all(train_step, enclave=roles.client).provision(initial_state(), X, Y)
    state, x, y = sealed_step(roles.client)
    state, loss = jax.jit(shielded)(state, x, y)
    expected, expected_loss = jax.jit(train_step)(initial_state(), X, Y)
    assert_close(loss, expected_loss)
    assert_close(roles.client.open(state), expected)


# What the host may run


def test_program_that_was_not_provisioned_is_refused(roles):
    shield_all(train_step, enclave=roles.client).provision(initial_state(), X, Y)
    state, x, y = sealed_step(roles.client)

    def other(state, x, y):  # reveals the state instead of the loss
        return train_step(state, x, y)[0], tempo.reveal(state[0]["bias"])

    for unknown in (
        shield_all(other, enclave=roles.host),
        shield_all(train_step, enclave=roles.host, public=("y",)),
        shield_all(train_step, enclave=roles.host, scheme=tempo.schemes.Tempo()),
    ):
        public = Y if unknown._public else y
        match = r"the client provisioned no program of digest [0-9a-f]{64}\. Have it call"
        with pytest.raises(UnprovisionedError, match=match):
            unknown(state, x, public)
        with pytest.raises(UnprovisionedError, match=match):
            unknown.provision(state, x, public)
    # Nothing was donated to what did not run.
    shield_all(train_step, enclave=roles.host)(state, x, y)


@pytest.mark.parametrize("digest", ["", "00" * 32, 3, None, []], ids=repr)
def test_unknown_digest_is_refused(roles, digest):
    with pytest.raises(EnclaveError, match=f"provisioned no such program|^enclave: {REFUSAL}$"):
        roles.host.connection.request(Kind.FIND, {"digest": digest})
    with pytest.raises(EnclaveError, match=f"^enclave: {REFUSAL}$"):
        roles.host.connection.request(Kind.FIND, {})


OUT_OF_ORDER: dict[str, tuple[Kind, dict[str, Any]]] = {
    "a later segment": (Kind.SEGMENT, {"segment": 1, "worker": 0}),
    "an unknown worker": (Kind.SEGMENT, {"segment": 0, "worker": 1}),
    "no segment": (Kind.SEGMENT, {}),
    "an early commit": (Kind.COMMIT, {"donate": []}),
    "a commit of nothing": (Kind.COMMIT, {}),
    "a commit of others": (Kind.COMMIT, {"donate": [99]}),
    "an input that is not awaited": (Kind.SETTLE, {"offsets": {"0": 0}, "blind_at": {"0": 0}}),
    "an input without a number": (Kind.SETTLE, {"offsets": {"x": 0}, "blind_at": {}}),
}


def provisioned_step(roles) -> tuple[Any, Any, Any, list[Any]]:
    """The host's step, its sealed arguments, what runs it, and the arguments' leaves."""
    owned, shielded = (shield_all(train_step, enclave=e) for e in (roles.client, roles.host))
    owned.provision(initial_state(), X, Y)
    arguments = sealed_step(roles.client)
    runtime = shielded._runtime(shielded._program(shielded._signature(arguments, {})))
    return shielded, arguments, runtime, jax.tree.leaves(arguments, is_leaf=_is_sealed)


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_host_that_does_not_follow_its_run_loses_it(roles, name):
    shielded, arguments, runtime, inputs = provisioned_step(roles)
    request = roles.host.connection.request
    run = HostRun(runtime._served)
    run.begin(inputs)
    assert roles.host.statistics()["runs"] == 1
    kind, fields = OUT_OF_ORDER[name]
    with pytest.raises(EnclaveError, match=f"^enclave: {REFUSAL}$"):
        request(kind, {"run": run.number, **fields})
    assert roles.host.statistics()["runs"] == 0
    # Nor does what would have been right now serve any more.
    with pytest.raises(EnclaveError, match=f"^enclave: {REFUSAL}$"):
        request(Kind.SEGMENT, {"run": run.number, "segment": 0, "worker": 0})
    # The state stands, and the next run is as good as ever.
    _, loss = shielded(*arguments)
    assert_close(loss, jax.jit(train_step)(initial_state(), X, Y)[1])


def test_host_that_repeats_a_segment_with_other_bytes_loses_the_run(roles):
    _, _, runtime, inputs = provisioned_step(roles)
    request = roles.host.connection.request
    run = HostRun(runtime._served)
    run.begin(inputs)
    for segment in (0, 1):
        request(Kind.SEGMENT, {"run": run.number, "segment": segment, "worker": 0})
    (changed, *_) = runtime._program.segments[1].uploads
    view = run.arena.view(changed.blinded, changed.offset)
    view[...] = view + 1
    with pytest.raises(EnclaveError, match=f"^enclave: {REFUSAL}$"):
        request(Kind.SEGMENT, {"run": run.number, "segment": 1, "worker": 0})
    assert roles.host.statistics()["runs"] == 0


def test_donated_value_is_explained_to_the_host(roles):
    owned = shield_all(train_step, enclave=roles.client)
    owned.provision(initial_state(), X, Y, runs_per_batch=2)
    state, x, y = sealed_step(roles.client)
    shielded = shield_all(train_step, enclave=roles.host)
    first, _ = shielded(state, x, y)
    shielded(first, x, y)
    with pytest.raises(SealedValueError, match="was donated|deleted"):
        shielded(first, x, y)


@pytest.mark.parametrize("verify", [False, True])
def test_same_code_elsewhere_is_the_same_program(roles, verify):
    # Client and host keep their code where they like.
    sources = "def product(x, w):\n    return tempo.reveal(jnp.tanh(x @ w) @ w.T)\n"
    compiled = []
    for name, lines in (("/laptop/model.py", 0), ("/host/elsewhere/model.py", 40)):
        names: dict[str, Any] = {"jnp": jnp, "tempo": tempo}
        exec(compile("\n" * lines + sources, name, "exec"), names)
        compiled.append(names["product"])
    w = uniform(3, 5, 4)
    owned = shield_all(compiled[0], enclave=roles.client, verify=verify)
    digest = owned.provision(X, w).digest
    elsewhere = shield_all(compiled[1], enclave=roles.host, verify=verify)
    assert elsewhere.provision(X, w).digest == digest
    plan = owned.explain(X, w).plan
    assert all(b"model.py" not in blob for blob in export_segments(plan.cut))
    # What the client is told of a wrong product names its own line, and none of its folders.
    sources = [c.source for s in plan.program.segments for c in s.uploads]
    assert len(sources) == 2
    assert all(s.endswith(" at model.py:2") if verify else s == "" for s in sources)
    assert "laptop" not in json.dumps(plan.program.encode())


def test_closed_over_arrays_are_the_clients(roles):
    # The host has their shapes and no more.
    secret, placeholder = uniform(7, 5, 4), jnp.zeros((5, 4))

    def using(weight):
        return lambda x: tempo.reveal(jnp.tanh(x @ weight))

    shield_all(using(secret), enclave=roles.client).provision(X)
    sealed = roles.client.seal(X, tag="x")
    out = shield_all(using(placeholder), enclave=roles.host, donate=False)(sealed)
    assert_close(out, jnp.tanh(X @ secret))


def test_programs_constants_are_bounded(roles):
    function = shield_all(lambda x: tempo.reveal(x + Y[0, 0]), enclave=roles.client)
    plan = function.explain(X).plan
    program = function._runtime(function._program(function._signature((X,), {})))._program
    content = roles.client.encrypt(_encoded(program), "provision")
    behind = b"".join(roles.client.encrypt_array(value).tobytes() for value in plan.flat.consts)
    request = roles.client.connection.request
    for size, attachment, text in (
        (len(content), content + behind[:-1], "shorter than|failed its authentication"),
        (len(content), content + behind + b"\0", "more bytes follow"),
        (len(content) + 1, content + behind, "failed its authentication"),
        (len(content) + len(behind) + 1, content + behind, "shorter than"),
        (-1, content + behind, "shorter than"),
        (True, content + behind, "`program_bytes` is not a whole number"),
        ("0", content + behind, "`program_bytes` is not a whole number"),
        (None, content + behind, "`program_bytes` is not a whole number"),
    ):
        with pytest.raises((EnclaveError, SealedValueError), match=text):
            request(Kind.PROVISION, {"program_bytes": size}, attachment)
    assert request(Kind.PROVISION, {"program_bytes": len(content)}, content + behind)


def _encoded(program: Any) -> bytes:
    rules = Rules("", ("",) * len(program.outputs))
    return json.dumps({"program": program.encode(), "rules": rules.encode()}).encode()


def test_state_that_returns_weakly_typed_is_provisioned_too(roles):
    def count(state, x):  # the first state is strongly typed, what it returns is weakly
        return {"n": jnp.where(True, 1.0, 2.0), "s": state["s"] + x.sum() + state["n"]}

    plain = {"n": jnp.zeros(()), "s": jnp.zeros(())}
    types = jax.eval_shape(count, plain, X)
    assert types["n"].weak_type and not jax.typeof(plain["n"]).weak_type
    tempo.shield(count, enclave=roles.client).provision(plain, X, runs_per_batch=3)
    shielded = tempo.shield(count, enclave=roles.host)
    state, x = sealed_for(roles.client, state=plain, x=X)
    expected = plain
    for _ in range(3):
        state, expected = shielded(state, x), count(expected, X)
    assert_close(roles.client.open(state), expected)


def test_provisioning_a_launched_enclave_compiles_ahead(enclave):
    shielded = tempo.shield(scaled, enclave=enclave)
    before = enclave.statistics()["programs"]
    digest = shielded.provision(jax.ShapeDtypeStruct((6, 5), X.dtype), X)
    assert len(digest.digest) == 64 and enclave.statistics()["programs"] == before + 1
    assert_close(shielded(X, X), scaled(X, X))
    assert enclave.statistics()["programs"] == before + 1


def test_both_sides_plan_from_the_enclaves_figures(roles):
    assert roles.client.costs == roles.host.costs
    assert isinstance(roles.client.costs, CostModel)


# What each role cannot do


def test_host_neither_seals_nor_opens_nor_provisions(roles):
    sealed = roles.client.seal(jnp.ones(3))
    host = roles.host
    for use in (lambda: host.seal(jnp.ones(3)), lambda: host.open(sealed)):
        with pytest.raises(RoleError, match="needs the client's keys, and this is the host's side"):
            use()
    with pytest.raises(RoleError, match="needs the client's keys"):
        host.encrypt(b"", "compile")
    with pytest.raises(
        RoleError, match="argument `.*` of `scaled` is plain, and the host has no key"
    ):
        tempo.shield(scaled, enclave=host)(X, sealed)
    assert host.connection.keys is None and not host.is_client and host.verified is None


def test_host_holds_nothing_that_the_client_does_not_show(roles):
    # Neither the session's keys nor the identity are reachable from the host's side.
    connection, certificate = dial(roles.ports.client)
    connection.close()
    secret = IDENTITY.session_secret(roles.host.session, certificate.public_key)
    keys = roles.client.connection.keys
    reachable = repr(vars(roles.host.connection))
    for value in (secret, *keys):
        assert repr(value) not in reachable and value.hex() not in reachable


def test_client_runs_nothing(roles):
    client = roles.client
    shielded = tempo.shield(scaled, enclave=client)
    with pytest.raises(RoleError, match="`scaled` runs on the host, and this is the client's side"):
        shielded(X, Y)
    with pytest.raises(RoleError, match="is the host's work, and this is the client's side"):
        client.statistics()
    with pytest.raises(RoleError, match="is the host's work"):
        with client.arena(64):
            pass
    assert client.is_client and not client.is_host and client.verified.insecure


def test_client_drops_nothing_of_the_hosts(roles, tmp_path):
    shield_all(train_step, enclave=roles.client).provision(initial_state(), X, Y)
    state, x, y = sealed_step(roles.client)
    state, _ = shield_all(train_step, enclave=roles.host)(state, x, y)
    tempo.save_sealed(tmp_path / "out", state)
    like = jax.eval_shape(initial_state)
    del state
    gc.collect()
    roles.host.statistics()
    for _ in range(2):
        roles.client.open(tempo.load_sealed(tmp_path / "out", like))
        gc.collect()


@pytest.mark.parametrize("change", ["short", "long", "unknown"])
def test_blinded_value_is_opened_with_its_content_only(roles, tmp_path, change):
    shield_all(train_step, enclave=roles.client).provision(initial_state(), X, Y)
    state, x, y = sealed_step(roles.client)
    state, _ = shield_all(train_step, enclave=roles.host)(state, x, y)
    leaf = state[0]["first"]
    assert leaf.form == "blinded"
    content = np.asarray(leaf.content).tobytes()
    handle = handle_text(leaf.handle)
    sent, text = {
        "short": (content[:-1], "of 160 bytes comes with 159"),
        "long": (content + b"\0", "of 160 bytes comes with 161"),
        "unknown": (content, "not in this enclave"),
    }[change]
    if change == "unknown":
        handle = "00" * 16
    with pytest.raises((EnclaveError, SealedValueError), match=text):
        roles.client.connection.request(Kind.OPEN, {"handle": handle}, sent)


def test_host_checkpoints_alone_and_restores_by_the_clients_order(roles, tmp_path):
    # In another enclave, after the first one died; the client comes by to allow it.
    key, like = tempo.CheckpointKey.generate(), jax.eval_shape(initial_state)
    shield_all(train_step, enclave=roles.client).provision(initial_state(), X, Y)
    roles.client.use_checkpoint_key(key)
    state, x, y = sealed_step(roles.client)
    state, _ = shield_all(train_step, enclave=roles.host)(state, x, y)
    data = roles.host.checkpoint(state)
    with (
        served(host_key=tmp_path / "key") as ports,
        tempo.Enclave.connect(ports.client, policy=INSECURE, identity=IDENTITY) as client,
        tempo.Enclave.attach(ports.host, host_key=ports.host_key) as host,
    ):
        with pytest.raises(RoleError, match="needs the client's leave. Pass `order=`"):
            host.restore(data, like)
        with pytest.raises(RoleError, match="is the host's work"):
            client.restore(data, like)
        with pytest.raises(CheckpointError, match="gave no checkpoint key"):
            client.restore_order(like)
        client.use_checkpoint_key(key)
        with pytest.raises(RoleError, match="allowing a restore needs the client's keys"):
            host.restore_order(like)
        with pytest.raises(SealedValueError, match="failed its authentication"):
            host.restore(data, like, order=roles.client.restore_order(like))  # of another session
        with pytest.raises(CheckpointError):
            host.restore(data, like, order=client.restore_order({"other": X}))
        order = client.restore_order(like)
        restored = host.restore(data, like, order=order)
        with pytest.raises(CheckpointError, match="was used before, and each serves once"):
            host.restore(data, like, order=order)
        shield_all(train_step, enclave=client).provision(restored, X, Y)
        x, y = sealed_for(client, x=X, y=Y)
        restored, _ = shield_all(train_step, enclave=host)(restored, x, y)
        expected = initial_state()
        for _ in range(2):
            expected, _ = jax.jit(train_step)(expected, X, Y)
        assert_close(client.open(carry(tmp_path / "out", restored)), expected)
        with pytest.raises(RoleError, match="is the host's work"):
            client.checkpoint(restored)


def test_plain_arguments_inside_the_hosts_jit_are_refused(roles):
    shielded = tempo.shield(scaled, enclave=roles.host)
    with pytest.raises(SecrecyError, match="its value is already the host's"):
        jax.jit(shielded)(X, Y)
