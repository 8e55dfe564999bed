"""Each feature as a user's program has it: float32, hundreds of rows, the machine's own costs.

Every test runs in an interpreter of its own, in which nothing of `conftest` holds: XLA optimises,
plans follow what was measured on this machine, and a device is one unless the test says otherwise.
"""

import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import tempo_jax as tempo
from benchmarks.convolutions import convolve
from tempo_jax.schemes import Mixing, Orthogonal, SignedPermutation, Tempo
from tests.support.fresh import run_fresh

ROWS, WIDTH, CLASSES, STEPS = 512, 128, 10, 3
OPTIMIZER = tempo.cheap_update(optax.sgd(0.05, momentum=0.9))
SCHEMES = (Mixing(), Orthogonal(budget=4), Tempo(), SignedPermutation())
# float32 against float32: sums of some hundred terms, over three steps.
RTOL, ATOL = 2e-3, 2e-4


def logits_of(weights: Any, x: jax.Array) -> jax.Array:
    """Maps (rows, WIDTH) to (rows, CLASSES)."""
    return jax.nn.gelu(x @ weights["first"] + weights["bias"]) @ weights["last"]


def train_step(state: Any, x: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
    """A step of a classifier; its loss is revealed."""

    def loss_of(weights: Any) -> jax.Array:
        each = optax.softmax_cross_entropy_with_integer_labels(logits_of(weights, x), labels)
        return each.mean()

    loss, gradients = jax.value_and_grad(loss_of)(state[0])
    updates, moments = OPTIMIZER.update(gradients, state[1], state[0])
    return (optax.apply_updates(state[0], updates), moments), tempo.reveal(loss)


def initial() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"first": (WIDTH, WIDTH), "bias": (WIDTH,), "last": (WIDTH, CLASSES)}
    weights = {
        name: jnp.asarray(rng.normal(0, WIDTH**-0.5, shape), jnp.float32)
        for name, shape in shapes.items()
    }
    return weights, OPTIMIZER.init(weights)


def batch() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(rng.integers(0, CLASSES, ROWS))


def train(step: Any, state: Any, steps: int = STEPS) -> tuple[Any, list[float]]:
    losses = []
    for _ in range(steps):
        state, loss = step(state, *batch())
        losses.append(float(loss))
    return state, losses


def check(found: Any, losses: list[float], steps: int = STEPS) -> None:
    """The opened state and the losses are those of a plain run."""
    plain, plain_losses = train(jax.jit(train_step), initial(), steps)
    np.testing.assert_allclose(losses, plain_losses[-len(losses) :], rtol=RTOL, atol=ATOL)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=ATOL)


def with_every_scheme() -> None:
    with tempo.Enclave.launch() as enclave:
        for scheme in SCHEMES:
            for offload in ("auto", "all"):
                step = tempo.shield(train_step, enclave=enclave, scheme=scheme, offload=offload)
                state, losses = train(step, enclave.seal(initial()))
                check(enclave.open(state), losses)


def verified() -> None:
    with tempo.Enclave.launch() as enclave:
        for scheme in (Mixing(), SignedPermutation()):
            step = tempo.shield(
                train_step, enclave=enclave, scheme=scheme, offload="all", verify=True
            )
            state, losses = train(step, enclave.seal(initial()))
            check(enclave.open(state), losses)


def inference() -> None:
    weights, (x, _) = initial()[0], batch()
    with tempo.Enclave.launch() as enclave:
        answer = tempo.shield(logits_of, enclave=enclave, offload="all")
        sealed = enclave.seal(weights)
        for _ in range(2):
            found = enclave.open(answer(sealed, x))
            np.testing.assert_allclose(found, jax.jit(logits_of)(weights, x), rtol=RTOL, atol=ATOL)


def convolutions(**options: Any) -> None:
    """Two layers, sent as rows of their images; the classifier stays inside."""
    rng = np.random.default_rng(2)

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape), jnp.float32)

    def step(weights: Any, x: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        def loss_of(weights: Any) -> jax.Array:
            y = jax.nn.gelu(convolve(x, weights["first"]))
            y = jax.nn.gelu(convolve(y, weights["second"])).mean((1, 2)) @ weights["last"]
            return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()

        loss, gradients = jax.value_and_grad(loss_of)(weights)
        weights = jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients)
        return weights, tempo.reveal(loss)

    weights = {"first": drawn(3, 3, 64, 64), "second": drawn(3, 3, 64, 96), "last": drawn(96, 10)}
    x = jnp.asarray(rng.normal(size=(32, 8, 8, 64)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, CLASSES, 32))
    expected, loss = jax.jit(step)(weights, x, labels)
    with tempo.Enclave.launch() as enclave:
        shielded = tempo.shield(step, enclave=enclave, offload="all", **options)
        with tempo.testing.host_view() as seen:
            found, revealed = shielded(enclave.seal(weights), x, labels)
        operands = {operand.shape for product in seen.products for operand in product.operands}
        assert {(32 * 8 * 8, 3 * 64), (3 * 64, 3 * 96)} <= operands
        np.testing.assert_allclose(revealed, loss, rtol=RTOL)
        for ours, theirs in zip(
            *map(jax.tree.leaves, (enclave.open(found), expected)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=ATOL)


def verified_convolutions() -> None:
    convolutions(verify=True)


def convolutions_over_a_mesh() -> None:
    convolutions(mesh=Mesh(np.array(jax.devices()), ("workers",)))


def over_a_mesh() -> None:
    mesh = Mesh(np.array(jax.devices()), ("workers",))
    with tempo.Enclave.launch() as enclave:
        for scheme in (Mixing(), SignedPermutation()):
            step = tempo.shield(
                train_step, enclave=enclave, scheme=scheme, mesh=mesh, offload="all"
            )
            state, losses = train(step, enclave.seal(initial()))
            check(enclave.open(state), losses)


def resumed_in_another_enclave() -> None:
    key, ledger = tempo.CheckpointKey.generate(), tempo.CheckpointLedger()
    with tempo.Enclave.launch(checkpoint_key=key, checkpoint_ledger=ledger) as enclave:
        step = tempo.shield(train_step, enclave=enclave, offload="all")
        state, _ = train(step, enclave.seal(initial()))
        old = enclave.checkpoint(state)
        state, _ = train(step, state, 1)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "state")
            tempo.checkpoints.write(path, enclave.checkpoint(state))
            kept = path.read_bytes()
        ledger = enclave.ledger
    with tempo.Enclave.launch(checkpoint_key=key, checkpoint_ledger=ledger) as enclave:
        step = tempo.shield(train_step, enclave=enclave, offload="all")
        like = jax.eval_shape(initial)
        with pytest.raises(tempo.errors.CheckpointError, match="allow_rollback_to"):
            enclave.restore(old, like=like)
        state, losses = train(step, enclave.restore(kept, like=like), 1)
        check(enclave.open(state), losses, STEPS + 2)


@pytest.mark.parametrize(
    ("programs", "devices"),
    [
        ((with_every_scheme, verified), 1),
        ((inference, verified_convolutions, resumed_in_another_enclave), 1),
        ((over_a_mesh, convolutions_over_a_mesh), 4),
    ],
    ids=["schemes and verification", "inference, convolutions and checkpoints", "mesh"],
)
def test_users_programs(programs, devices):
    run_fresh(*programs, devices=devices)
