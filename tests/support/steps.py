"""Step builders and comparisons that several test modules share."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import tempo_jax as tempo
from tempo_jax.jaxprs import equations, types
from tempo_jax.planning.plan import Plan, offloaded
from tempo_jax.schemes import SignedPermutation

# The scheme that blinds products of any size and keeps weights on the devices.
SIGNED_PERMUTATION = SignedPermutation()

# Sums of a few hundred terms near 1 in float64, taken in another order.
TOLERANCE = 1e-10
# A few roundings, by which two programs of float32 differ.
FLOAT32_TOLERANCE = 1e-6

# `shield` with every product on the devices, however small: what most tests are about.
shield_all: Any = functools.partial(tempo.shield, scheme=SIGNED_PERMUTATION, offload="all")

_MOMENTUM = tempo.cheap_update(optax.sgd(0.1, momentum=0.9))

# loss(parameters, rest, batch) -> (loss, (rest, outputs)); `rest` is whatever else is carried.
Loss = Callable[[Any, Any, Any], tuple[jax.Array, tuple[Any, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Training:
    """A training step with what it starts from.

    Attributes:
      step: maps state and batch to the next state and what it reveals.
      state: carried by the step.
      batches: one for each step.
    """

    step: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    batches: Sequence[Any]


def uniform(seed: int, *shape: int, dtype: Any = jnp.float64) -> jax.Array:
    """Values in [-1, 1)."""
    values = np.random.default_rng(seed).uniform(-1, 1, shape)
    return jnp.asarray(values, dtype)


def momentum_step(state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
    """One step of a small MLP with momentum; the loss is revealed."""
    params, moments = state

    def loss_of(params: Any) -> jax.Array:
        hidden = jnp.tanh(x @ params["first"] + params["bias"])
        return jnp.mean((hidden @ params["second"] - y) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, moments = _MOMENTUM.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), tempo.reveal(loss)


def momentum_state() -> Any:
    """What `momentum_step` starts from; x has 5 columns and y 3."""
    params = {"first": uniform(3, 5, 4), "bias": uniform(4, 4), "second": uniform(5, 4, 3)}
    return params, _MOMENTUM.init(params)


MOMENTUM_BATCH = uniform(1, 6, 5), uniform(2, 6, 3)


def momentum_after(steps: int) -> Any:
    """The state after so many plain steps over `MOMENTUM_BATCH`."""
    state, step = momentum_state(), jax.jit(momentum_step)
    for _ in range(steps):
        state, _ = step(state, *MOMENTUM_BATCH)
    return state


def uniform_like(tree: Any, seed: int = 0) -> Any:
    """A tree of the same structure, its matrices drawn anew and scaled by their fan-in.

    Biases and scales are drawn as well, so that no rounding hides behind a zero.
    """
    leaves, structure = jax.tree.flatten(tree)
    drawn = []
    for number, leaf in enumerate(leaves):
        fan_in = leaf.size // leaf.shape[-1] if leaf.ndim > 1 else 4
        values = uniform(seed + number, *leaf.shape, dtype=leaf.dtype)
        drawn.append(values * jnp.sqrt(3 / fan_in).astype(leaf.dtype))
    return jax.tree.unflatten(structure, drawn)


def training(
    loss: Loss,
    parameters: Any,
    batches: Sequence[Any],
    tx: optax.GradientTransformation,
    rest: Any = None,
) -> Training:
    """A step of gradient descent over a dict of parameters, optimizer state and the rest."""
    tx = tempo.cheap_update(tx)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, (rest, outputs)), grads = gradient(state["params"], state["rest"], batch)
        updates, optimizer = tx.update(grads, state["opt"], state["params"])
        new = {
            "params": optax.apply_updates(state["params"], updates),
            "opt": optimizer,
            "rest": rest,
        }
        return new, {"loss": tempo.reveal(value), "largest": tempo.reveal(outputs.max())}

    state = {"params": parameters, "opt": tx.init(parameters), "rest": rest}
    return Training(step, state, batches)


def comparable(tree: Any) -> Any:
    """The same tree of NumPy arrays, with typed keys as their data."""

    def convert(x: Any) -> np.ndarray:
        x = jnp.asarray(x)
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(convert, tree)


def assert_close(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Structures, shapes and dtypes are equal, and values within a tolerance.

    Of float32 leaves, which no two programs round alike, it is at least `FLOAT32_TOLERANCE`.
    """
    chex.assert_trees_all_equal_structs(actual, expected)
    actual, expected = comparable(actual), comparable(expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for (path, one), other in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        within = max(tolerance, FLOAT32_TOLERANCE) if one.dtype == np.float32 else tolerance
        name = jax.tree_util.keystr(path)
        chex.assert_trees_all_close(one, other, rtol=within, atol=within, custom_message=name)


def assert_trains_alike(
    shielded: Any,
    enclave: tempo.Enclave,
    case: Training,
    tolerance: float = TOLERANCE,
    steps: int = 3,
) -> None:
    """A shielded step reveals the plain step's outputs and ends in its state."""
    plain = jax.jit(case.step)
    expected_state = state = case.state
    for batch in itertools.islice(itertools.cycle(case.batches), steps):
        expected_state, expected = plain(expected_state, batch)
        state, revealed = shielded(state, batch)
        assert_close(revealed, expected, tolerance)
    assert_close(enclave.open(state), expected_state, tolerance)


def leaf_names(root: str, tree: Any, keep: Callable[[jax.Array], bool]) -> set[str]:
    """Names, as `explain` writes them, of the leaves that `keep` accepts."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {root + jax.tree_util.keystr(path) for path, leaf in leaves if keep(leaf)}


def is_matrix(leaf: jax.Array) -> bool:
    """Whether a leaf is a kernel, or an optimizer's moment of one."""
    return jnp.ndim(leaf) > 1 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def plain_steps(
    plan: Plan, arguments: tuple[Any, ...], steps: int
) -> tuple[list[Any], list[dict[Any, np.ndarray]]]:
    """Evaluates the flat program in plain JAX, each step on the state that the last one returned.

    Returns:
      The last outputs, and for each step every array by its variable.
    """

    @jax.jit
    def evaluate(constants, inputs):
        values = dict(zip(plan.jaxpr.constvars, constants, strict=True))
        values.update(zip(plan.jaxpr.invars, inputs, strict=True))
        for eqn in plan.jaxpr.eqns:
            operands = [v.val if isinstance(v, types.Literal) else values[v] for v in eqn.invars]
            values.update(zip(eqn.outvars, equations.bind(eqn, operands), strict=True))
        order[:] = values
        return [values[v] for v in plan.jaxpr.outvars], list(values.values())

    state, *_ = arguments
    size, seen = len(jax.tree.leaves(state)), []
    inputs, outputs, order = jax.tree.leaves(arguments), [], []
    for _ in range(steps):
        outputs, values = evaluate(plan.flat.consts, inputs)
        inputs = [*outputs[:size], *inputs[size:]]
        seen.append(dict(zip(order, map(np.asarray, values), strict=True)))
    return outputs, seen


def offloaded_products(shielded: Any, *arguments: Any) -> int:
    """How many products a shielded function computes outside the enclave."""
    return len(offloaded(shielded.explain(*arguments).plan))
