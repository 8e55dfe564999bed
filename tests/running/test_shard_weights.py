"""Workers that keep parts of what lies on the devices: equal results, and really less memory."""

import re
from typing import Any

import jax
import optax
import optax.contrib
import pytest

import tempo_jax as tempo
from tempo_jax.api.shielded import Shielded
from tempo_jax.errors import UnsupportedError
from tempo_jax.planning.mesh import split_axis
from tempo_jax.schemes import Mixing, Orthogonal, SecretShares, SignedPermutation, Tempo
from tempo_jax.sealing.array import BLINDED, is_sealed
from tests.support.steps import assert_close, shield_all
from tests.support.workers import (
    ADAMW,
    MLP,
    STEPS,
    Attention,
    ConvNet,
    Task,
    make_task,
    mesh_of,
    train,
)

MOMENTUM = tempo.cheap_update(optax.sgd(1e-2, momentum=0.9))
CLIPPED = tempo.cheap_update(optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)))
# Updates that take more than what is at an element's place: products, and means over an axis.
MUON = tempo.cheap_update(optax.contrib.muon(1e-2))
ADAFACTOR = tempo.cheap_update(optax.adafactor(1e-2, min_dim_size_to_factor=4))
# Each with an optimizer under which its weights stay on the devices.
SCHEMES = {
    "signed-permutation": (SignedPermutation(), ADAMW),
    "orthogonal": (Orthogonal(budget=8), MOMENTUM),
    "tempo": (Tempo(), MOMENTUM),
}


@pytest.fixture(scope="module")
def mlp() -> Task:
    return make_task(MLP(16, 8), (8, 8), ADAMW)


def compiled(shielded: Shielded) -> str:
    """The program of the devices, as XLA compiled it."""
    programs = [p for several in shielded._programs.values() for p in several]
    runtime = next(p.runtime for p in reversed(programs) if p.runtime is not None)
    return runtime._host_program(observe=False).as_text()


def on_devices(state: Any) -> list[Any]:
    """What of a sealed state lies on the devices."""
    leaves = jax.tree.leaves(state, is_leaf=is_sealed)
    return [x.content for x in leaves if x.form == BLINDED]


def assert_equals_one_device(enclave: tempo.Enclave, shielded: Shielded, task: Task) -> Any:
    state, losses = train(shielded, enclave.seal(task.state), task.batch)
    assert_close((enclave.open(state), losses), task.result)
    return state


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("name", SCHEMES)
def test_parts_equal_one_device(enclave, name, workers):
    scheme, optimizer = SCHEMES[name]
    task = make_task(MLP(16, 8), (8, 8), optimizer)
    shielded = shield_all(
        task.step, enclave=enclave, mesh=mesh_of(workers), scheme=scheme, shard_weights=True
    )
    report = shielded.explain(task.state, *task.batch)
    assert report.resident
    assert all(axis is not None for axis in report.split_leaves.values())
    state = assert_equals_one_device(enclave, shielded, task)
    contents = on_devices(state)
    assert len(contents) == len(report.resident)
    for x in contents:
        assert {s.data.nbytes for s in x.addressable_shards} == {x.nbytes // workers}
    kept, whole = report.resident_bytes
    assert kept * workers == whole == sum(x.nbytes for x in contents)


@pytest.mark.parametrize(
    ("model", "shape", "optimizer"),
    [
        (ConvNet(), (8, 4, 4, 2), ADAMW),
        (Attention(), (8, 3, 6), ADAMW),
        (MLP(16, 8), (8, 8), CLIPPED),
        (MLP(16, 8), (8, 8), MUON),
        (MLP(16, 8), (8, 8), ADAFACTOR),
        (MLP(16, 8), (7, 8), ADAMW),
    ],
    ids=["convnet", "attention", "clipped", "muon", "adafactor", "batch that does not divide"],
)
def test_other_models_equal_one_device(enclave, model, shape, optimizer):
    task = make_task(model, shape, optimizer)
    shielded = shield_all(task.step, enclave=enclave, mesh=mesh_of(2), shard_weights=True)
    assert shielded.explain(task.state, *task.batch).plan.parts
    assert_equals_one_device(enclave, shielded, task)


def test_what_the_workers_run_gathers_and_scatters(enclave, mlp):
    def collectives(**options: Any) -> tuple[int, int]:
        shielded = shield_all(mlp.step, enclave=enclave, mesh=mesh_of(4), **options)
        train(shielded, enclave.seal(mlp.state), mlp.batch)
        text = compiled(shielded)
        gathers, scatters = (
            len(re.findall(rf" {n}\(", text)) for n in ("all-gather", "reduce-scatter")
        )
        return gathers, scatters

    gathers, scatters = collectives(shard_weights=True)
    # Each of two kernels, forward and (but for the first) back; and both of their gradients.
    assert gathers >= 2 and scatters >= 2
    assert collectives() == (0, 0), "without the option every worker has the whole"


def test_leaves_that_do_not_divide_stay_whole(enclave):
    # Of 8 → 10 → 5 features 4 workers divide only the first.
    task = make_task(MLP(10, 5), (8, 8), ADAMW)
    shielded = shield_all(task.step, enclave=enclave, mesh=mesh_of(4), shard_weights=True)
    report = shielded.explain(task.state, *task.batch)
    axes = report.split_leaves
    whole = [name for name, axis in axes.items() if axis is None]
    assert len(whole) == 3 and all("Dense_1" in name and "kernel" in name for name in whole)
    text = f"{len(axes) - len(whole)} of {len(axes)} leaves split"
    assert text in str(report) and f"4 divides no axis: {whole[0]}" in str(report)
    state = assert_equals_one_device(enclave, shielded, task)
    parts = {x.addressable_shards[0].data.nbytes / x.nbytes for x in on_devices(state)}
    assert parts == {0.25, 1.0}


def test_checked_steps(enclave):
    task = make_task(MLP(16, 8), (8, 8), MOMENTUM)
    shielded = shield_all(
        task.step, enclave=enclave, mesh=mesh_of(4), shard_weights=True, verify=True
    )
    assert shielded.explain(task.state, *task.batch).plan.parts
    assert_equals_one_device(enclave, shielded, task)


def test_inside_jit_and_scan(enclave, mlp):
    shielded = shield_all(mlp.step, enclave=enclave, mesh=mesh_of(2), shard_weights=True)
    batch = enclave.seal(mlp.batch)
    state, first = shielded(enclave.seal(mlp.state), *batch)

    @jax.jit
    def rest(state, batch):
        return jax.lax.scan(lambda s, _: shielded(s, *batch), state, None, length=STEPS - 1)

    state, losses = rest(state, batch)
    assert_close((enclave.open(state), [first, *losses]), mlp.result)


def test_state_moves_between_parts_and_wholes(enclave, mlp):
    options = [
        {"mesh": mesh_of(4), "shard_weights": True},
        {"mesh": None},
        {"mesh": mesh_of(2), "shard_weights": True},
    ]
    state, losses = enclave.seal(mlp.state), []
    for option in options:
        state, loss = shield_all(mlp.step, enclave=enclave, **option)(state, *mlp.batch)
        losses.append(loss)
    assert_close((enclave.open(state), losses), mlp.result)


def test_a_checkpoint_holds_the_whole(other_enclave, mlp):
    enclave = other_enclave
    enclave.use_checkpoint_key(tempo.CheckpointKey.generate())
    shielded = shield_all(mlp.step, enclave=enclave, mesh=mesh_of(4), shard_weights=True)
    state, first = shielded(enclave.seal(mlp.state), *mlp.batch)
    losses = [first]
    for _ in range(STEPS - 1):
        state = enclave.restore(enclave.checkpoint(state), like=mlp.state)
        state, loss = shielded(state, *mlp.batch)
        losses.append(loss)
    assert_close((enclave.open(state), losses), mlp.result)


def test_products_see_whole_weights(enclave, mlp):
    shielded = shield_all(mlp.step, enclave=enclave, mesh=mesh_of(2), shard_weights=True)
    with tempo.testing.host_view() as view:
        shielded(enclave.seal(mlp.state), *mlp.batch)
    shapes = {x.shape for product in view.products for x in product.operands}
    assert {(8, 16), (16, 8)} <= shapes


# Refusals


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "there is none of several devices"),
        ({"mesh": 1}, "there is none of several devices"),
        ({"mesh": 2, "placement": "enclave"}, "none does: they are the enclave's"),
        ({"mesh": 2, "scheme": Mixing()}, "under mixing"),
        ({"mesh": 3, "scheme": SecretShares()}, "none does: they are the enclave's"),
    ],
)
def test_what_is_refused_at_once(enclave, mlp, options, why):
    if "mesh" in options:
        options = {**options, "mesh": mesh_of(options["mesh"])}
    with pytest.raises(UnsupportedError, match=why):
        shield_all(mlp.step, enclave=enclave, shard_weights=True, **options)


def test_a_step_without_state_on_the_devices_is_refused(enclave):
    task = make_task(MLP(16, 8), (8, 8), optax.adamw(1e-2))
    shielded = shield_all(task.step, enclave=enclave, mesh=mesh_of(2), shard_weights=True)
    with pytest.raises(UnsupportedError, match="none does in this step.*cheap_update"):
        shielded(enclave.seal(task.state), *task.batch)


@pytest.mark.parametrize(
    ("shape", "workers", "axis"),
    [((), 2, None), ((6,), 4, None), ((8,), 4, 0), ((4, 8), 4, 1), ((8, 8), 2, 0), ((0, 3), 3, 1)],
)
def test_the_longest_axis_that_divides(shape, workers, axis):
    assert split_axis(shape, workers) == axis
