"""No program reaches an `assert` of the planner: random ones over everything that broadcasts.

Planning alone, which compiles nothing. What plans mean is for `tests/equivariance` to test.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import strategies as st
from jax import lax

import tempo_jax as tempo
from tempo_jax.planning.cost import CostModel
from tempo_jax.schemes import Mixing, Orthogonal, SignedPermutation, Tempo
from tests.support.interpreter import interpret, plan
from tests.support.steps import assert_close, training, uniform

M, N = 6, 4
EXAMPLES = 60
SHAPES = {"w": (M, N), "rows": (M, 1), "columns": (1, N), "one": (1, 1), "bias": (N,), "c": ()}
SCHEMES = [SignedPermutation(), Orthogonal(), Tempo(), Mixing()]

# Elementwise functions that take operands of size 1 beside longer ones.
BINARY: list[Callable[..., Any]] = [
    *(lax.add, lax.sub, lax.mul, lax.div, lax.max, lax.min, lax.rem, lax.pow, lax.atan2),
    *(lax.nextafter, lambda x, y: lax.select(lax.gt(x, y), x, y)),
    *(lambda x, y: lax.eq(x, y) * x, lambda x, y: jnp.where(x < y, 0.0, y)),
    *(lambda x, y: lax.clamp(-1.0, x, 1.0) + y, lambda x, y: lax.complex(x, y).real),
    *(lambda x, y: lax.bitwise_and(x > 0, y > 0) * 1.0, lambda x, y: jnp.hypot(x, y)),
]
UNARY: list[Callable[..., Any]] = [
    *(jnp.tanh, jnp.abs, jnp.square, jnp.sign, jnp.exp, jnp.cbrt, lax.rsqrt, lax.neg),
    *(lambda x: x**3, lambda x: jnp.sqrt(jnp.abs(x)), lambda x: x.astype(jnp.float32) * 1.0),
    *(jnp.sum, jnp.max, lambda x: x.sum(-1, keepdims=True), lambda x: x.mean(0, keepdims=True)),
    *(lambda x: jnp.linalg.norm(x, axis=-1, keepdims=True), lambda x: x / jnp.linalg.norm(x)),
    *(lambda x: x.T, lambda x: x[::-1], lambda x: x[:1], lambda x: x[..., :1], jnp.cumsum),
    *(lambda x: jnp.pad(x, 1), lambda x: jnp.concatenate([x, x[:1]]), lambda x: x.reshape(-1)),
    *(lambda x: x.reshape(x.shape + (1,)), lambda x: x[None], lambda x: x.reshape(-1, 1)),
    *(lambda x: jnp.broadcast_to(x, (M, N)), lambda x: jnp.squeeze(x), lambda x: jnp.sort(x)),
    *(lambda x: lax.dynamic_slice_in_dim(x, 0, 1), lambda x: jnp.repeat(x, N, -1)[..., :N]),
    *(lambda x: jnp.tile(x, (M, 1)), lambda x: jnp.where(x > 0, x, 0.0), jnp.argmax, jax.nn.relu),
    *(lambda x: jax.nn.softmax(x), lambda x: jnp.clip(x, 0.0), lambda x: x @ x.T, jnp.var),
]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One call: which function, and which values of those there are."""

    function: int
    first: int
    second: int
    binary: bool


INSTRUCTIONS = st.builds(
    Instruction,
    st.integers(0, 99),
    st.integers(0, 99),
    st.integers(0, 99),
    st.booleans(),
)


def run(program: Sequence[Instruction], pool: Sequence[Any]) -> list[Any]:
    """The values of a program; calls that do not fit together, or give no reals, are left out."""
    pool = list(pool)
    for each in program:
        first, second = (pool[i % len(pool)] for i in (each.first, each.second))
        try:
            if each.binary:
                result = BINARY[each.function % len(BINARY)](*_same_rank(first, second))
            else:
                result = UNARY[each.function % len(UNARY)](first)
        except (TypeError, ValueError, IndexError, NotImplementedError):
            continue
        if jnp.issubdtype(result.dtype, jnp.floating) and 0 < math.prod(result.shape) < 1000:
            pool.append(result.astype(first.dtype))
    return pool


def _same_rank(first: Any, second: Any) -> tuple[Any, Any]:
    """Both with as many axes; those that are new have size 1, which lax itself broadcasts."""
    rank = max(first.ndim, second.ndim)
    return tuple(x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (first, second))


def like(value: Any, shape: tuple[int, ...]) -> Any:
    """A value of this shape made from another, as directly as can be."""
    if value.shape == shape:
        return value
    try:
        return jnp.broadcast_to(value, shape)
    except ValueError:
        return jnp.broadcast_to(value.sum(), shape)


def step_of(
    forward: Sequence[Instruction], update: Sequence[Instruction]
) -> Callable[[Any, Any], Any]:
    """A training step whose model and whose marked optimizer are random programs."""

    def loss(p: Any, x: Any) -> Any:
        values = run(forward, list(p.values()))
        matrix = next(v for v in reversed(values) if v.shape == (M, N))
        h = jnp.tanh(x @ matrix + p["bias"])
        return jnp.square(h @ (p["w"] * p["rows"] * p["columns"]).T).sum() * like(values[-1], ())

    def transform(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        out = {}
        for name, g in updates.items():
            values = run(update, [g, *jax.tree.leaves(params), *jax.tree.leaves(state)])
            out[name] = like(values[-1], g.shape)
        return out, jax.tree.map(lambda s, g: 0.9 * s + g, state, out)

    tx = tempo.cheap_update(
        optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), transform)
    )

    def step(state: Any, x: Any) -> Any:
        params, opt = state
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), tempo.reveal(value)

    return step


def state_of_all_shapes() -> Any:
    params = {name: uniform(i, *shape) + 0.5 for i, (name, shape) in enumerate(SHAPES.items())}
    return params, jax.tree.map(jnp.zeros_like, params)


@pytest.mark.parametrize(
    "scheme",
    [*(pytest.param(s, marks=pytest.mark.slow) for s in SCHEMES[1:3]), SCHEMES[0], SCHEMES[3]],
    ids=lambda s: s.name,
)
@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(
    st.lists(INSTRUCTIONS, max_size=6), st.lists(INSTRUCTIONS, max_size=5), st.booleans()
)
def test_random_steps_can_be_planned(scheme, forward, update, verify):
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("least_rows", "least_side"):
            patch.setattr(Mixing, limit, 1)
        patch.setattr(CostModel, "may_go_ahead", lambda *_: True)
        x = uniform(9, 5, M)
        step = step_of(forward, update)
        made = plan(step, state_of_all_shapes(), x, stateful=True, scheme=scheme, verify=verify)
    assert made.plan.program.segments


def weight_norm(p, x):
    return x @ (p["w"] * p["rows"] / jnp.linalg.norm(p["w"], axis=-1, keepdims=True))


def dora(p, x):
    w = p["w"] + p["a"] @ p["b"]
    return x @ (p["columns"] * w / jnp.linalg.norm(w, axis=0, keepdims=True))


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=lambda s: s.name)
@pytest.mark.parametrize("layer", [weight_norm, dora])
def test_layers_that_scale_their_weight_give_the_same(layer, scheme):
    """Their scale has an axis of size 1, which meets the weight's."""

    def loss(p, rest, x):
        h = jnp.tanh(layer(p, x))
        return jnp.square(h).mean(), (rest, h)

    p, _ = state_of_all_shapes()
    p |= {"a": uniform(7, M, 2), "b": uniform(8, 2, N)}
    case = training(loss, p, [uniform(9, 5, M)], optax.sgd(0.1, momentum=0.9))
    arguments = case.state, case.batches[0]
    made = plan(case.step, *arguments, stateful=True, scheme=scheme)
    assert_close(interpret(made), jax.jit(case.step)(*arguments))
