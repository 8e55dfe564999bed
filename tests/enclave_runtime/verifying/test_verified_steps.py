"""Whole steps that verify: each product is altered in turn on its way to a real enclave.

Then leaves that lie where nothing checked them are offered to a step that verifies.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import Mesh

import tempo_jax as tempo
from tempo_jax import errors
from tempo_jax.running.call import Runtime
from tempo_jax.running.host_run import HostRun
from tempo_jax.schemes import Mixing, Orthogonal, SignedPermutation, Tempo
from tempo_jax.sealing.array import is_sealed
from tests.support.steps import assert_close, comparable, shield_all, uniform
from tests.support.verification import ERROR, Alter, V, W, X, altered, chain, lying, rms


class MLP(nn.Module):
    """Two layers."""

    dtype: Any = jnp.float64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(20, dtype=self.dtype, param_dtype=self.dtype)(x))
        return nn.Dense(18, dtype=self.dtype, param_dtype=self.dtype)(x)


class ConvNet(nn.Module):
    """A convolution, a grouped one, and a last one."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Conv(8, (3, 3), param_dtype=float)(x))
        x = jnp.tanh(nn.Conv(8, (3, 3), feature_group_count=2, param_dtype=float)(x))
        return nn.Conv(6, (3, 3), (2, 2), param_dtype=float)(x)


class Attention(nn.Module):
    """Heads without biases, so that products follow products with nothing between."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.MultiHeadDotProductAttention(2, use_bias=False, param_dtype=float)(x, x)


class Wide(nn.Module):
    """Wide enough for `Mixing`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(64, param_dtype=jnp.float32)(x))
        return nn.Dense(5, param_dtype=jnp.float32)(jnp.tanh(nn.Dense(64)(x)))


@dataclasses.dataclass(frozen=True)
class Task:
    """A training step with what it starts from, and the scheme to shield it with."""

    step: Callable[..., Any]
    state: Any
    batch: Any
    scheme: Any
    tolerance: float

    def shield(self, enclave: tempo.Enclave, **options: Any) -> Any:
        options = {"offload": "all", "verify": True, **options}
        return tempo.shield(self.step, enclave=enclave, scheme=self.scheme, **options)


def make_task(
    model: nn.Module,
    shape: tuple[int, ...],
    scheme: Any,
    dtype: str = "float64",
    tolerance: float = 1e-9,
) -> Task:
    x = uniform(1, *shape, dtype=dtype)
    params = jax.tree.map(
        lambda leaf: leaf.astype(dtype), jax.jit(model.init)(jax.random.key(0), x)
    )
    tx = tempo.cheap_update(optax.sgd(0.1, momentum=0.9))

    def step(state, x):
        def loss_of(params):
            out: Any = model.apply(params, x)
            return jnp.mean(jnp.square(out.astype(jnp.float32)))

        loss, gradients = jax.value_and_grad(loss_of)(state[0])
        updates, momentum = tx.update(gradients, state[1], state[0])
        return (optax.apply_updates(state[0], updates), momentum), tempo.reveal(loss)

    return Task(step, (params, tx.init(params)), x, scheme, tolerance)


TASKS: dict[str, Callable[[], Task]] = {
    "mlp": lambda: make_task(MLP(), (22, 19), SignedPermutation()),
    "mlp, float32": lambda: make_task(MLP(jnp.float32), (22, 19), Orthogonal(3), "float32", 1e-5),
    "mlp, bfloat16": lambda: make_task(
        MLP(jnp.bfloat16), (22, 19), SignedPermutation(), "bfloat16", 2e-2
    ),
    "mlp, tempo": lambda: make_task(MLP(), (22, 19), Tempo()),
    "convolutions": lambda: make_task(ConvNet(), (3, 6, 6, 4), SignedPermutation()),
    "attention": lambda: make_task(Attention(), (3, 6, 8), SignedPermutation()),
    "mixing": lambda: make_task(Wide(), (128, 64), Mixing(), "float32", 2e-4),
}


@pytest.fixture(scope="module", params=TASKS)
def task(request) -> Task:
    return TASKS[request.param]()


@pytest.fixture(scope="module")
def watchful() -> Iterator[tempo.Enclave]:
    """An enclave of this module's own: it counts the lies it was told."""
    with tempo.Enclave.launch() as running:
        yield running


def one_element(seed: int) -> Alter:
    """Makes one element wrong by `ERROR` of the RMS."""

    def alter(product: np.ndarray) -> np.ndarray:
        return altered(product, np.random.default_rng(seed), ERROR * rms(product))

    return alter


def plain_steps(task: Task, steps: int) -> Any:
    state, step, losses = task.state, jax.jit(task.step), []
    for _ in range(steps):
        state, loss = step(state, task.batch)
        losses.append(loss)
    return state, losses


@pytest.mark.slow
def test_every_wrong_product_stops_the_step(watchful, task):
    shielded = task.shield(watchful)
    state, _ = shielded(task.state, task.batch)
    before = comparable(watchful.open(state))
    program = shielded.explain(task.state, task.batch).plan.program
    uploads = [(i, n, c) for i, s in enumerate(program.segments) for n, c in enumerate(s.uploads)]
    assert len(uploads) >= 3
    lies = watchful.statistics()["wrong_products"]
    for index, number, crossing in uploads:
        with lying(one_element(number), index, number):
            with pytest.raises(errors.IntegrityError) as caught:
                shielded(state, task.batch)
        assert f"wrong product: {crossing.source}." in str(caught.value)
        assert "the last committed state stands" in str(caught.value)
    statistics = watchful.statistics()
    assert statistics["wrong_products"] == lies + len(uploads) and statistics["runs"] == 0
    jax.tree.map(np.testing.assert_array_equal, comparable(watchful.open(state)), before)
    state, loss = shielded(state, task.batch)  # the next honest call goes on from there
    assert_close((watchful.open(state), [loss]), after(task, 2), task.tolerance)


def after(task: Task, steps: int) -> Any:
    """The plain state after so many steps, and the last loss."""
    state, losses = plain_steps(task, steps)
    return state, losses[-1:]


def test_honest_devices_are_believed(watchful, task):
    lies = watchful.statistics()["wrong_products"]
    shielded = task.shield(watchful)
    state, steps = task.state, 12
    for _ in range(steps):
        state, loss = shielded(state, task.batch)
    assert watchful.statistics()["wrong_products"] == lies
    assert_close((watchful.open(state), [loss]), after(task, steps), 4 * task.tolerance)


@pytest.fixture(scope="module")
def mlp() -> Task:
    return TASKS["mlp"]()


@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(lambda y: np.zeros_like(y), id="zeros"),
        pytest.param(lambda y: y[::-1], id="rows in another order"),
        pytest.param(lambda y: -y, id="signs"),
        pytest.param(lambda y: y * 1.001, id="scale"),
        pytest.param(lambda y: y.astype(np.float32).astype(y.dtype), id="fewer digits"),
        pytest.param(lambda y: np.full_like(y, np.nan), id="NaN"),
        pytest.param(lambda y: np.where(y == y.max(), np.inf, y), id="infinity"),
        pytest.param(
            lambda y: y + 1e-3 * (-1.0) ** np.arange(y.size).reshape(y.shape),
            id="a pattern that cancels in sums",
        ),
    ],
)
def test_other_lies(watchful, mlp, alter):
    shielded = mlp.shield(watchful, donate=False)
    with lying(alter, 2), pytest.raises(errors.IntegrityError, match="wrong product"):
        shielded(mlp.state, mlp.batch)


def test_a_product_of_other_operands_is_noticed(watchful, mlp, monkeypatch):
    # What the host changes in shared memory after it was sent must not count as an operand.
    fetch = Runtime._fetch

    def changing(self: Any, run: Any, worker: int, index: int) -> Any:
        downloads = fetch(self, run, worker, index)
        for crossing in self._program.segments[index].downloads:
            run.arena.view(crossing.blinded, crossing.offset)[...] *= 1.5
        return downloads

    monkeypatch.setattr(Runtime, "_fetch", changing)
    with pytest.raises(errors.IntegrityError, match="wrong product"):
        mlp.shield(watchful, donate=False)(mlp.state, mlp.batch)


def test_without_verification_a_lie_passes(watchful, mlp):
    """The control: the same lies are believed, and the step's result is wrong."""
    shielded = mlp.shield(watchful, verify=False, donate=False)
    with lying(lambda y: 2 * y, 1):
        _, loss = shielded(mlp.state, mlp.batch)
    _, (right,) = plain_steps(mlp, 1)
    assert abs(loss - right) > 1e-3 * right


def test_diverged_values_are_computed_inside(watchful):
    @jax.jit
    def step(x, w):
        return jnp.tanh(x @ w) @ w.T

    x = X.at[2, 3].set(jnp.nan).at[4, 4].set(jnp.inf)
    shielded = shield_all(step, enclave=watchful, verify=True, donate=False)
    honest = watchful.open(shielded(x, W))
    np.testing.assert_array_equal(np.isnan(honest), np.isnan(step(x, W)))
    with lying(lambda y: np.zeros_like(y), 1):  # what the device says then does not matter
        np.testing.assert_allclose(watchful.open(shielded(x, W)), honest, rtol=1e-12)


def test_zeros_through_an_enclave(watchful):
    shielded = shield_all(chain, enclave=watchful, verify=True, donate=False)
    assert_close(watchful.open(shielded(0 * X, W, V)), jnp.zeros((18, 19)), 0.0)
    with lying(lambda y: y + 1e-9, 1), pytest.raises(errors.IntegrityError):
        shielded(0 * X, W, V)


def test_products_of_products_are_each_checked(watchful):
    shielded = shield_all(chain, enclave=watchful, verify=True, donate=False)
    assert len(shielded.explain(X, W, V).checked) == 2
    assert_close(watchful.open(shielded(X, W, V)), chain(X, W, V))
    for segment in (1, 2):
        with lying(one_element(0), segment), pytest.raises(errors.IntegrityError):
            shielded(X, W, V)


def test_lie_inside_jit(watchful, mlp):
    shielded = jax.jit(mlp.shield(watchful))
    state, batch = watchful.seal((mlp.state, mlp.batch))
    with lying(one_element(0), 1):
        with pytest.raises(jax.errors.JaxRuntimeError, match="wrong product: dot_general"):
            jax.block_until_ready(shielded(state, batch))
    state, loss = shielded(state, batch)
    assert_close((watchful.open(state), [loss]), after(mlp, 1))


@pytest.mark.parametrize("worker", [0, 3])
def test_lying_worker_of_a_mesh(watchful, worker):
    task = make_task(MLP(), (24, 19), SignedPermutation())
    mesh = Mesh(np.array(jax.devices()[:4]), ("workers",))
    shielded = task.shield(watchful, mesh=mesh)
    program = shielded.explain(task.state, task.batch).plan.program
    state, _ = shielded(task.state, task.batch)
    lies = watchful.statistics()["wrong_products"]
    split = 0
    for index, segment in enumerate(program.segments):
        for number, crossing in enumerate(segment.uploads):
            shared = (
                set(crossing.layout.classes) & shielded.explain(task.state, task.batch).plan.sharded
            )
            if worker and not shared:
                continue  # the first worker brings what all of them have
            split += 1
            with lying(one_element(number), index, number, worker):
                with pytest.raises(errors.IntegrityError, match="wrong product"):
                    shielded(state, task.batch)
    assert split and watchful.statistics()["wrong_products"] == lies + split
    state, loss = shielded(state, task.batch)
    assert_close((watchful.open(state), [loss]), after(task, 2))


def test_same_segment_again_is_checked_again(watchful, mlp, monkeypatch):
    # A worker may ask again for the segment that just ran; other bytes end the run.
    fetch = Runtime._fetch

    def twice(self: Any, *arguments: Any) -> Any:
        fetch(self, *arguments)
        return fetch(self, *arguments)

    monkeypatch.setattr(Runtime, "_fetch", twice)
    state, loss = mlp.shield(watchful, donate=False)(mlp.state, mlp.batch)
    assert_close((watchful.open(state), [loss]), after(mlp, 1))


# What nothing checked


def test_leaves_on_the_devices_are_refused(watchful, mlp):
    unverified, verified = (mlp.shield(watchful, verify=v, donate=False) for v in (False, True))
    state, _ = unverified(mlp.state, mlp.batch)
    refused = "lies blinded on the devices, where nothing checks"
    with pytest.raises(errors.IntegrityError, match=refused):
        verified(state, mlp.batch)
    state, loss = verified(watchful.seal(watchful.open(state)), mlp.batch)  # as the error says
    assert_close((watchful.open(state), [loss]), after(mlp, 2))


def test_enclave_refuses_leaves_on_the_devices(watchful, mlp):
    # A host that does not ask the client.
    state, _ = mlp.shield(watchful, verify=False, donate=False)(mlp.state, mlp.batch)
    verified = mlp.shield(watchful, donate=False)
    runtime = verified._runtime(verified._program(verified._signature((mlp.state, mlp.batch), {})))
    inputs = [*jax.tree.leaves(state, is_leaf=is_sealed), watchful.seal(mlp.batch)]
    with pytest.raises(errors.IntegrityError, match="lies blinded on the devices, where nothing"):
        HostRun(runtime._served).begin(inputs)
