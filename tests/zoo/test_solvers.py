"""Libraries of solvers, samplers and agents: a training step of each equals plain JAX's."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import tempo_jax as tempo
from tests.support.steps import (
    Training,
    assert_close,
    assert_trains_alike,
    shield_all,
    training,
    uniform,
)

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

ROWS, FEATURES = 256, 6
TARGETS = uniform(3, ROWS)
VECTORS = [{"x": uniform(seed, ROWS, FEATURES), "y": TARGETS} for seed in (1, 2)]
ADAM = optax.adam(1e-2)


def check(enclave: tempo.Enclave, case: Training, tolerance: float = 1e-10) -> None:
    assert_trains_alike(shield_all(case.step, enclave=enclave), enclave, case, tolerance, steps=2)


def test_diffrax(enclave):
    diffrax = pytest.importorskip("diffrax")
    term = diffrax.ODETerm(lambda t, y, weights: jnp.tanh(y @ weights["field"]))

    def loss(weights: Any, rest: Any, batch: Any) -> Any:
        solution = diffrax.diffeqsolve(
            *(term, diffrax.Heun(), 0.0, 1.0, 0.1, batch["x"], weights),
            stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-3),
            max_steps=64,
        )
        found = solution.ys[0] @ weights["head"]
        return jnp.square(found - batch["y"]).mean(), (rest, found)

    weights = {"field": uniform(4, FEATURES, FEATURES), "head": uniform(5, FEATURES)}
    check(enclave, training(loss, weights, VECTORS, ADAM))


def test_diffrax_that_fails_says_why_where_checks_are_revealed(enclave):
    diffrax = pytest.importorskip("diffrax")
    term = diffrax.ODETerm(lambda t, y, field: jnp.tanh(y @ field))

    def solve(y: jax.Array, field: jax.Array, end: jax.Array) -> jax.Array:
        solution = diffrax.diffeqsolve(
            *(term, diffrax.Heun(), 0.0, end, 0.1, y, field), max_steps=8
        )
        return tempo.reveal(solution.ys[0])

    shielded = shield_all(solve, enclave=enclave, donate=False, reveal_checks=True)
    y, field = uniform(9, ROWS, FEATURES), uniform(4, FEATURES, FEATURES)
    assert_close(shielded(y, field, 0.5), jax.jit(solve)(y, field, 0.5))
    with pytest.raises(tempo.errors.CheckError, match="maximum number of"):
        shielded(y, field, 5.0)


def test_lineax(enclave):
    lx = pytest.importorskip("lineax")

    def loss(weights: Any, rest: Any, batch: Any) -> Any:
        # A ridge regression on learned features, differentiated through its solution.
        features = jnp.tanh(batch["x"] @ weights["kernel"])
        gram = features.T @ features + jnp.eye(4)
        operator = lx.MatrixLinearOperator(gram, lx.positive_semidefinite_tag)
        head = lx.linear_solve(operator, features.T @ batch["y"]).value
        least = lx.linear_solve(lx.MatrixLinearOperator(features), batch["y"], lx.QR()).value
        found = features @ head
        return jnp.square(found - batch["y"]).mean() + least.mean(), (rest, found)

    check(enclave, training(loss, {"kernel": uniform(6, FEATURES, 4)}, VECTORS, ADAM))


def test_optimistix(enclave):
    optx = pytest.importorskip("optimistix")

    def loss(weights: Any, rest: Any, batch: Any) -> Any:
        features = jnp.tanh(batch["x"] @ weights["kernel"])

        def residuals(head: jax.Array, given: Any) -> Any:
            return jnp.tanh(given[0] @ head) - given[1], 0.1 * head

        solver = optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)
        inner = optx.least_squares(
            residuals, solver, jnp.zeros(4), args=(features, batch["y"]), throw=False
        )
        found = jnp.tanh(features @ inner.value)
        return jnp.square(found - batch["y"]).mean(), (rest, found)

    check(enclave, training(loss, {"kernel": uniform(7, FEATURES, 4)}, VECTORS, ADAM))


def test_numpyro(enclave):
    numpyro = pytest.importorskip("numpyro")
    distributions = pytest.importorskip("numpyro.distributions")
    infer = pytest.importorskip("numpyro.infer")
    autoguide = pytest.importorskip("numpyro.infer.autoguide")

    def model(x: jax.Array, y: jax.Array) -> None:
        hidden = numpyro.param("hidden", uniform(8, FEATURES, 8))
        prior = distributions.Normal(jnp.zeros(8), 1.0).to_event(1)
        head = numpyro.sample("head", prior)
        with numpyro.plate("rows", ROWS):
            logits = jnp.tanh(x @ hidden) @ head
            numpyro.sample("y", distributions.Bernoulli(logits=logits), obs=y)

    guide = autoguide.AutoNormal(model)
    svi = infer.SVI(model, guide, numpyro.optim.Adam(1e-2), infer.Trace_ELBO(4))
    batches = [{"x": b["x"], "y": (b["y"] > 0).astype(float)} for b in VECTORS]

    def step(state: Any, batch: Any) -> Any:
        state, value = svi.update(state, **batch)
        return state, tempo.reveal(value)

    state = svi.init(jax.random.key(0), **batches[0])
    check(enclave, Training(step, state, batches))


def test_blackjax(enclave):
    blackjax = pytest.importorskip("blackjax")
    x, y = VECTORS[0]["x"], TARGETS

    def step(state: Any, key: jax.Array) -> Any:
        position, x, y = state

        def log_density(position: Any) -> jax.Array:
            found = jnp.tanh(x @ position["kernel"]) @ position["head"]
            return -50 * jnp.square(found - y).mean() - optax.tree.norm(position) ** 2

        sampler = blackjax.hmc(
            log_density, 1e-2, jnp.ones(5 * FEATURES - 2), num_integration_steps=4
        )
        new, info = sampler.step(key, sampler.init(position))
        return (new.position, x, y), tempo.reveal(info.acceptance_rate)

    position = {"kernel": uniform(9, FEATURES, 4), "head": uniform(10, 4)}
    keys = list(jax.random.split(jax.random.key(1), 2))
    check(enclave, Training(step, (position, x, y), keys))


def test_rlax(enclave):
    rlax = pytest.importorskip("rlax")
    actions = jnp.arange(ROWS) % 3

    def values(weights: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ weights["first"]) @ weights["second"]

    def loss(weights: Any, target: Any, batch: Any) -> Any:
        now, then = values(weights, batch["x"]), values(weights, batch["x"][::-1])
        later = values(target, batch["x"][::-1])
        errors = jax.vmap(rlax.double_q_learning)(
            now, actions, batch["y"], jnp.full(ROWS, 0.9), later, then
        )
        target = optax.incremental_update(weights, target, 0.1)
        return rlax.huber_loss(errors).mean(), (target, now)

    weights = {"first": uniform(11, FEATURES, 16), "second": uniform(12, 16, 3)}
    check(enclave, training(loss, weights, VECTORS, ADAM, jax.tree.map(jnp.sin, weights)))


@pytest.fixture
def float32() -> Iterator[None]:
    """JAX's default, in which a library may have been written."""
    with jax.enable_x64(False):
        yield


def test_brax(enclave, float32):
    types = pytest.importorskip("brax.training.types")
    losses = pytest.importorskip("brax.training.agents.ppo.losses")
    networks = pytest.importorskip("brax.training.agents.ppo.networks")

    long, count = 8, 32
    network = networks.make_ppo_networks(
        *(FEATURES, 2),
        policy_hidden_layer_sizes=(16,),
        value_hidden_layer_sizes=(16,),
    )
    keys = jax.random.split(jax.random.key(0))
    weights = losses.PPONetworkParams(
        policy=network.policy_network.init(keys[0]), value=network.value_network.init(keys[1])
    )

    def transition(seed: int) -> Any:
        def drawn(number: int, *shape: int) -> jax.Array:
            return uniform(seed + number, count, long, *shape, dtype=jnp.float32)

        return types.Transition(
            observation=drawn(1, FEATURES),
            action=jnp.tanh(drawn(2, 2)),
            reward=drawn(3),
            discount=jnp.ones((count, long)),
            next_observation=drawn(4, FEATURES),
            extras={
                "policy_extras": {
                    "log_prob": drawn(5) - 2,
                    "raw_action": drawn(2, 2),
                    "distribution_params": drawn(6, 4),
                },
                "state_extras": {"truncation": jnp.zeros((count, long))},
            },
        )

    def loss(weights: Any, key: Any, batch: Any) -> Any:
        key, own = jax.random.split(key)
        value, metrics = losses.compute_ppo_loss(weights, None, batch, own, network)
        return value, (key, metrics["policy_loss"])

    batches = [transition(20), transition(40)]
    check(enclave, training(loss, weights, batches, ADAM, jax.random.key(2)), 1e-4)
