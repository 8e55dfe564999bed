"""A host that lies about nothing, and hands sealed values to where they were not meant for."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tempo_jax as tempo
from enclave_runtime.protocol.wire import Kind
from tempo_jax.errors import AdmissionError, EnclaveError, SealedValueError, UnsupportedError
from tempo_jax.running.host_run import HostRun
from tests.support.serving import Roles, sealed_for, serving
from tests.support.steps import assert_close, shield_all, uniform

CLASSES, ROWS, PIXELS = 3, 12, 5
NOTHING_REFUSED: dict[str, Any] = {
    "allow_any": ("state", "batch"),
    "allow_forks": True,
    "runs_per_batch": None,
}


def batch_of(labels: Any) -> dict[str, jax.Array]:
    return {"x": uniform(len(labels), len(labels), PIXELS), "labels": jnp.asarray(labels)}


def step_of(optimizer: optax.GradientTransformation) -> Any:
    """A training step of a classifier, which reveals its loss, and the state it starts from."""

    def train_step(state: Any, batch: Any) -> Any:
        params, moments = state

        def loss_of(params: Any) -> jax.Array:
            hidden = jnp.tanh(batch["x"] @ params["first"])
            logits = hidden @ params["second"] + params["bias"]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
            return losses.mean()

        loss, gradient = jax.value_and_grad(loss_of)(params)
        changes, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, changes), moments), tempo.reveal(loss)

    params = {
        "first": uniform(3, PIXELS, 4),
        "second": uniform(4, 4, CLASSES),
        "bias": uniform(5, CLASSES),
    }
    return train_step, (params, optimizer.init(params))


# The attack: a network of zeros learns how often each label is in a batch, and nothing else


def label_entropy(labels: Any) -> float:
    _, counts = np.unique(labels, return_counts=True)
    return float(-(counts / len(labels) * np.log(counts / len(labels))).sum())


SECRET_LABELS = [[0] * 12, [0] * 6 + [1] * 6, [0] * 2 + [1] * 5 + [2] * 5]
OPTIMIZERS = {
    "adam": (optax.adam(0.3), 60),
    "sgd": (optax.sgd(1.0, momentum=0.5), 40),
}


def zeros_as_parameters(state: Any) -> Any:
    """The state with the optimizer's zeros in place of the parameters."""
    _, moments = state
    zeros = moments[0].mu if hasattr(moments[0], "mu") else moments[0].trace
    return zeros, moments


def entropies(host_step: Any, state: Any, batches: Any, steps: int) -> list[float]:
    """What the host reads from the losses that each batch's runs reveal."""
    read = []
    for batch in batches:
        forged, loss = zeros_as_parameters(state), np.inf
        for _ in range(steps):
            forged, loss = host_step(forged, batch)
        read.append(float(loss))
    return read


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_of_the_optimizer_do_not_pass_for_parameters(roles, name):
    optimizer, steps = OPTIMIZERS[name]
    train_step, plain = step_of(optimizer)
    owned, host_step = (
        shield_all(train_step, enclave=side, verify=True, donate=False)
        for side in (roles.client, roles.host)
    )
    batches = [batch_of(labels) for labels in SECRET_LABELS]
    attack = functools.partial(entropies, host_step, steps=steps)

    owned.provision(plain, batches[0], **NOTHING_REFUSED)
    (state,) = sealed_for(roles.client, state=plain)
    sealed = [roles.client.seal(batch, tag="batch") for batch in batches]
    read = attack(state, sealed)  # the control: it reads the labels' entropies from honest runs
    np.testing.assert_allclose(read, list(map(label_entropy, SECRET_LABELS)), atol=0.1)

    owned.provision(plain, batches[0])
    with pytest.raises(AdmissionError, match="`state` of `train_step` takes here a value tagged"):
        attack(state, sealed)
    # Nor does the state's own successor serve, whose moments are no zeros but known all the same.
    after, _ = host_step(state, sealed[0])
    with pytest.raises(AdmissionError, match=r"tagged `state\[0\].* or `train_step.state\[0\]"):
        attack(after, sealed[1:])
    host_step(after, sealed[1])


# Places and origins


@pytest.fixture(scope="module")
def trained(roles) -> Any:
    """The step of both sides, its first state and a batch, in the clear."""
    train_step, plain = step_of(optax.sgd(0.1, momentum=0.9))
    owned, host_step = (
        shield_all(train_step, enclave=side, donate=False) for side in (roles.client, roles.host)
    )
    return owned, host_step, plain, batch_of([0, 1, 2] * 4)


def provisioned(trained: Any, client: tempo.Enclave, **allowed: Any) -> list[Any]:
    """Provisions the step under these rules; a freshly sealed state and batch."""
    owned, _, plain, batch = trained
    owned.provision(plain, batch, **allowed)
    return sealed_for(client, state=plain, batch=batch)


def test_value_that_is_not_meant_there_is_refused(roles, trained):
    _, step, plain, content = trained
    state, batch = provisioned(trained, roles.client)
    params, moments = state
    (other_state,) = sealed_for(roles.client, state=plain)
    (other_batch,) = sealed_for(roles.client, batch=content)
    (test_set,) = sealed_for(roles.client, test_set=content)
    square = {**params, "bias": moments[0].trace["bias"]}
    for forged, text in (
        ((roles.client.seal(plain), batch), "and this one has no tag"),
        ((state, roles.client.seal(content)), "and this one has no tag"),
        ((state, test_set), r"takes here a value tagged `batch\['.*'\]`, .* is tagged otherwise"),
        (((square, moments), batch), r"tagged `state\[0\]\['bias'\]` or `train_step"),
        ((state, {**batch, "x": other_batch["x"]}), "`batch` .* come from several seals"),
        (((params, other_state[1]), batch), "`state` of `train_step` come from several seals"),
    ):
        with pytest.raises(AdmissionError, match=text):
            step(*forged)
    # None of it was in vain: the values still serve where they belong.
    state, loss = step(state, batch)
    again, _ = step(state, other_batch)
    with pytest.raises(AdmissionError, match="`state` of `train_step` come from several seals"):
        step((again[0], state[1]), test_set)
    assert np.isfinite(loss)


def test_tag_cannot_be_altered(roles, trained):
    _, step, *_ = trained
    state, batch = provisioned(trained, roles.client)
    bias, trace = (tree["bias"] for tree in (state[0], state[1][0].trace))
    # The head of one ciphertext in front of another's.
    content = np.concatenate([np.asarray(bias.content)[:48], np.asarray(trace.content)[48:]])
    forged = type(bias)(
        (jnp.asarray(content), bias.handle),
        *(bias.form, bias.shape, bias.dtype, bias.weak_type, bias.session),
    )
    with pytest.raises(SealedValueError, match="failed its authentication"):
        step(({**state[0], "bias": forged}, state[1]), batch)


def test_owner_says_what_else_an_argument_takes(roles, trained):
    _, step, plain, content = trained

    def evaluate(params: Any, batch: Any) -> Any:
        logits = jnp.tanh(batch["x"] @ params["first"]) @ params["second"] + params["bias"]
        return tempo.reveal((logits.argmax(1) == batch["labels"]).mean())

    owned, evaluated = (shield_all(evaluate, enclave=s) for s in (roles.client, roles.host))
    state, batch = provisioned(trained, roles.client)
    test_set = roles.client.seal(content, tag="test set")
    owned.provision(plain[0], content)
    state, _ = step(state, batch)
    with pytest.raises(AdmissionError, match="`params` of `evaluate` takes here"):
        evaluated(state[0], test_set)
    allowed = {"params": ["state[0]", "train_step.state[0]"], "batch": "test set"}
    owned.provision(plain[0], content, tags=allowed)
    for _ in range(3):  # an evaluation that reveals the same is not counted by default
        accuracy = evaluated(state[0], test_set)
    opened = roles.client.open(state[0])
    assert_close(accuracy, jax.jit(evaluate)(opened, content))
    with pytest.raises(AdmissionError, match="`batch` of `evaluate` takes here"):
        evaluated(state[0], batch)
    with pytest.raises(AdmissionError, match="`params` of `evaluate` takes here"):
        evaluated(state[1][0].trace, test_set)


def test_other_outputs_are_tagged_by_the_function_that_made_them(roles):
    def encode(text: Any) -> Any:
        return text * 2, text * 3

    def decode(code: Any) -> Any:
        return tempo.reveal(code.sum())

    text = uniform(7, 4)
    tempo.shield(encode, enclave=roles.client).provision(text)
    tempo.shield(decode, enclave=roles.client).provision(text, tags={"code": "encode.result[1]"})
    (sealed,) = sealed_for(roles.client, text=text)
    double, triple = tempo.shield(encode, enclave=roles.host)(sealed)
    decoded = tempo.shield(decode, enclave=roles.host)
    assert_close(decoded(triple), 3 * text.sum())
    with pytest.raises(AdmissionError, match=r"tagged `encode.result\[1\]`"):
        decoded(double)


# Generations


def test_generation_is_used_once(roles, trained):
    _, step, *_ = trained
    batches = [provisioned(trained, roles.client)[1] for _ in range(3)]
    state, batch = provisioned(trained, roles.client)
    after, _ = step(state, batch)
    match = r"`state` of `train_step`: a run was committed on this value"
    with pytest.raises(AdmissionError, match=match):
        step(state, batches[0])  # what the owner sealed, which is bytes the host may keep
    later, _ = step(after, batches[0])
    with pytest.raises(AdmissionError, match=match):
        step(after, batches[1])
    step(later, batches[1])


def test_forks_are_the_owners_to_allow(roles, trained):
    _, step, plain, content = trained
    state, batch = provisioned(trained, roles.client, allow_forks=True, runs_per_batch=3)
    losses = [step(state, batch)[1] for _ in range(3)]
    assert_close(jnp.stack(losses), jnp.full(3, losses[0]))  # keys change how products round
    with pytest.raises(AdmissionError, match="`batch` of `train_step`: 3 of the 3 runs"):
        step(state, batch)


def test_arguments_that_were_returned_together_are_passed_on_together(roles):
    def summed(params: Any, moments: Any, x: Any) -> Any:
        changed = params["w"] + moments["w"] * x
        return {"w": changed}, {"w": moments["w"] * 2}, tempo.reveal(changed.sum())

    plain = [{"w": uniform(8, 4)}, {"w": uniform(9, 4)}]
    owned, shielded = (
        tempo.shield(summed, enclave=side, donate=False) for side in (roles.client, roles.host)
    )
    x = uniform(10, 4)
    owned.provision(*plain, x, runs_per_batch=9, allow_forks=True)
    params, moments, x = sealed_for(roles.client, params=plain[0], moments=plain[1], x=x)
    first = shielded(params, moments, x)
    second = shielded(first[0], first[1], x)
    for mixed in ((second[0], first[1]), (params, first[1]), (first[0], moments)):
        with pytest.raises(AdmissionError, match="what a run returned is passed on together"):
            shielded(*mixed, x)


# Runs that fail, and batches


@contextlib.contextmanager
def begun(step: Any, *arguments: Any) -> Iterator[tuple[HostRun, Any]]:
    """A run that the host has begun and conducts by hand; it is aborted at the end."""
    runtime = step._runtime(step._program(step._signature(arguments, {})))
    run = HostRun(runtime._served)
    run.begin(jax.tree.leaves(arguments, is_leaf=tempo.is_sealed))
    try:
        yield run, runtime
    finally:
        run.abort(EnclaveError("the host gave up"))


@pytest.fixture(scope="module")
def counted(roles) -> Any:
    def count(state: Any, batch: Any) -> Any:
        return state + batch.sum(), tempo.reveal(state * batch[0])

    # All of it is computed inside, so that the only segment is the one that reveals.
    make = functools.partial(tempo.shield, count, placement="enclave", donate=False)
    return make(enclave=roles.client), make(enclave=roles.host)


def sealed_count(counted: Any, client: tempo.Enclave, **allowed: Any) -> list[Any]:
    counted[0].provision(jnp.zeros(()), uniform(1, 4), **allowed)
    batches = [client.seal(uniform(seed, 4), tag="batch") for seed in range(3)]
    return [client.seal(jnp.ones(()), tag="state"), *batches]


def segment(roles: Roles, run: HostRun) -> None:
    roles.host.connection.request(Kind.SEGMENT, {"run": run.number, "segment": 0, "worker": 0})


def test_aborted_run_uses_no_generation_and_is_counted(roles, counted):
    _, step = counted
    state, batch, other, third = sealed_count(counted, roles.client, retries=2)
    for tried in (batch, other):  # nothing was shown, so that the next may be another
        with begun(step, state, tried):
            pass
    after, _ = step(state, batch)
    for _ in range(3):
        with begun(step, after, third):
            pass
    match = "`state` of `count`: 3 runs were begun on this value, of which 1 may count and 2 may"
    with pytest.raises(AdmissionError, match=match):
        step(after, other)


def test_run_that_showed_something_may_be_repeated_with_the_same_inputs_only(roles, counted):
    _, step = counted
    state, batch, other, _ = sealed_count(counted, roles.client)
    with begun(step, state, batch) as (run, _):
        segment(roles, run)
    with pytest.raises(AdmissionError, match="showed its results and was not committed"):
        step(state, other)
    after, shown = step(state, batch)
    assert_close(shown, uniform(0, 4)[0])
    with pytest.raises(AdmissionError, match="a run was committed on this value"):
        step(state, batch)
    step(after, other)


def test_of_two_open_runs_one_shows_something(roles, counted):
    _, step = counted
    state, batch, other, _ = sealed_count(counted, roles.client)
    with begun(step, state, batch) as (first, _), begun(step, state, other) as (second, _):
        segment(roles, first)
        with pytest.raises(AdmissionError, match="showed its results"):
            segment(roles, second)
    step(state, batch)


def test_batch_serves_as_many_runs_as_its_owner_says(roles, counted):
    _, step = counted
    state, batch, other, third = sealed_count(counted, roles.client, runs_per_batch=2)
    for one in (batch, other, batch):
        state, _ = step(state, one)
    with pytest.raises(AdmissionError, match="`batch` of `count`: 2 of the 2 runs that are"):
        step(state, batch)
    # Sealed anew it is another batch, and the owner may allow more later, or less.
    state, _ = step(state, other)
    counted[0].provision(jnp.zeros(()), uniform(1, 4), runs_per_batch={"batch": 3})
    state, _ = step(state, batch)
    counted[0].provision(jnp.zeros(()), uniform(1, 4))
    with pytest.raises(AdmissionError, match="1 of the 1 runs"):
        step(state, other)
    step(state, third)


def test_function_that_carries_nothing_may_run_as_often_as_the_host_likes(roles):
    def infer(params: Any, x: Any) -> Any:
        return tempo.reveal(jnp.tanh(x @ params).sum())

    owned, shielded = (tempo.shield(infer, enclave=s) for s in (roles.client, roles.host))
    params, x = uniform(11, 5, 2), uniform(12, 3, 5)
    given = owned.provision(params, x)
    assert "the host may run params, x as often as it likes" in str(given)
    sealed = sealed_for(roles.client, params=params, x=x)
    for _ in range(3):
        shielded(*sealed)
    bounded = owned.provision(params, x, runs_per_batch={"x": 1})
    assert "the host may run params as often" in str(bounded)
    assert "x: what is tagged `x`, runs on one: 1" in str(bounded)
    shielded(*sealed)
    with pytest.raises(AdmissionError, match="`x` of `infer`: 1 of the 1 runs"):
        shielded(*sealed)


# Checkpoints


def test_restored_state_keeps_its_tags_and_goes_on(roles, trained, tmp_path):
    owned, step, plain, content = trained
    key = tempo.CheckpointKey.generate()
    roles.client.use_checkpoint_key(key)
    state, batch = provisioned(trained, roles.client)
    after, _ = step(state, batch)
    params, moments = after
    # The host may name leaves as it likes, and what they are stays in the checkpoint.
    honest, lying = (roles.host.checkpoint(t) for t in (after, (moments[0].trace, moments)))
    like = jax.eval_shape(lambda: plain)
    expected, _ = jax.jit(step_of(optax.sgd(0.1, momentum=0.9))[0])(plain, content)
    with serving(tmp_path) as later:
        later.client.use_checkpoint_key(key)
        mine, again = (
            shield_all(owned._function, enclave=s, donate=False) for s in (later.client, later.host)
        )
        mine.provision(plain, content)
        batches = [later.client.seal(content, tag="batch") for _ in range(4)]

        def restored(data: bytes) -> Any:
            named = key.authenticated(data)
            order = later.client.restore_order(like, allow_rollback_to=named)
            return later.host.restore(data, like, order=order)

        with pytest.raises(AdmissionError, match="`state` of `train_step` takes here"):
            again(restored(lying), batches[0])
        state = restored(honest)
        assert_close(later.client.open(state), expected)
        then, _ = again(state, batches[0])
        with pytest.raises(AdmissionError, match="a run was committed on this value"):
            again(state, batches[1])
        # A restore is a fork that the client's order allows, and each order allows one.
        again(restored(honest), batches[1])
        with pytest.raises(AdmissionError, match="come from several seals or runs"):
            again((then[0], restored(honest)[1]), batches[2])


# The client of its own enclave, and mistakes


def test_client_that_launched_its_enclave_does_what_it_likes(enclave):
    train_step, plain = step_of(optax.sgd(0.1, momentum=0.9))
    step = shield_all(train_step, enclave=enclave, donate=False)
    batch = batch_of([0, 1, 2] * 4)
    given = step.provision(plain, batch)
    assert "launched by its host, which is refused nothing" in str(given)
    state = enclave.seal(plain)
    for _ in range(3):
        after, _ = step(zeros_as_parameters(state), batch)
        step((after[0], state[1]), batch)


def test_provision_lists_what_each_argument_takes(roles, trained):
    owned, step, plain, batch = trained
    given = owned.provision(plain, batch, runs_per_batch=4, retries=3)
    assert str(given).splitlines() == [
        f"program {given.digest}",
        "  state: what is tagged `state[0]['bias']` … or `train_step.state[0]['bias']` …, "
        "each generation once",
        "  batch: what is tagged `batch['labels']` …, runs on one: 4",
        "  a value may be used by 3 more runs that fail",
    ]
    assert str(step.provision(plain, batch)) == f"program {given.digest}"
    open_one = owned.provision(plain, batch, **NOTHING_REFUSED)
    assert "state: any sealed value of its types, of any generation" in str(open_one)


@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        ({"tags": {"stat": "state"}}, "tags names 'stat', expected some of .* state, batch"),
        ({"allow_any": "state"}, "allow_any names 'state', expected some of"),
        ({"allow_any": ("stat",)}, "allow_any names 'stat'"),
        ({"runs_per_batch": 0}, "runs_per_batch is 0, expected None or a whole number from 1"),
        ({"runs_per_batch": True}, "runs_per_batch is True"),
        ({"runs_per_batch": {"batch": 1.5}}, "runs_per_batch is 1.5"),
        ({"runs_per_batch": {"x": 1}}, "runs_per_batch names 'x'"),
        ({"retries": -1}, "retries is -1, expected a whole number from 0"),
    ],
    ids=str,
)
def test_options_that_name_nothing_are_refused(roles, trained, allowed, text):
    owned, _, plain, batch = trained
    with pytest.raises(UnsupportedError, match=text):
        owned.provision(plain, batch, **allowed)
