"""What the host sees: no plaintext operand, and no trusted equation in its program.

The plaintext is computed by evaluating the plan's flat program in the clear. The first
test also runs with a plan whose keys are taken away, and must then find every operand.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.extend.core import primitives as prims

import tempo_jax as tempo
from enclave_runtime.protocol.program import Layout
from tempo_jax.api import shielded as shielded_module
from tempo_jax.errors import UnsupportedError
from tempo_jax.jaxprs import equations as equations_module
from tempo_jax.jaxprs import primitives
from tempo_jax.jaxprs.callbacks import call_p
from tempo_jax.planning.plan import Plan, offloaded
from tempo_jax.planning.walk import Side
from tempo_jax.testing import HostView
from tests.support.steps import assert_close, plain_steps, shield_all, uniform

OPTIMIZER = tempo.cheap_update(optax.adamw(1e-2))


class MLP(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (n, 8) to (n, 6)."""
        for features in (10, 9):
            x = nn.gelu(nn.Dense(features, param_dtype=float)(x))
        return nn.Dense(6, param_dtype=float)(x)


class ConvNet(nn.Module):
    """Two convolutions with batch norm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (n, 6, 6, 3) to (n, 6)."""
        for features, strides in ((7, 1), (8, 2)):
            x = nn.Conv(features, (3, 3), strides, use_bias=False, param_dtype=float)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False, param_dtype=float)(x))
        return nn.Dense(6, param_dtype=float)(x.mean(axis=(1, 2)))


MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "mlp": (MLP(), (8, 8)),
    "convnet": (ConvNet(), (8, 6, 6, 3)),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A training step in plain JAX, shielded, and what two steps compute in the clear.

    Attributes:
      step: the function.
      arguments: state, inputs and labels.
      shielded: the function, shielded.
      plain: every array of both steps: arguments, constants, intermediate values, results.
      result: the state and the loss after them.
    """

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    shielded: tempo.Shielded
    plain: list[np.ndarray]
    result: Any


def train_step(model: nn.Module) -> Callable[..., Any]:
    """A step of a model with AdamW; the loss is revealed."""

    def step(state, x, y):
        variables, optimizer = state

        def loss_of(params):
            out, new = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return optax.softmax_cross_entropy(out, y).mean(), new

        (loss, new), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        updates, optimizer = OPTIMIZER.update(gradients, optimizer, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, **new}, optimizer), tempo.reveal(loss)

    return step


def initial_state(model: nn.Module, x: jax.Array) -> Any:
    """Random variables and moments, none of them constant: a permutation would not hide that."""
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    optimizer = jax.eval_shape(OPTIMIZER.init, variables["params"])
    leaves, structure = jax.tree.flatten((variables, optimizer))
    return jax.tree.unflatten(
        structure,
        [
            jnp.int32(2) if leaf.dtype == jnp.int32 else uniform(i, *leaf.shape) ** 2 + 0.01
            for i, leaf in enumerate(leaves)
        ],
    )


@pytest.fixture(scope="module", params=MODELS)
def task(enclave, request) -> Task:
    """One of the models."""
    model, shape = MODELS[request.param]
    x, y = uniform(1, *shape), jax.nn.softmax(uniform(2, shape[0], 6))
    step, arguments = train_step(model), (initial_state(model, x), x, y)
    shielded = shield_all(step, enclave=enclave, donate=False)
    result, values = plain_steps(shielded.explain(*arguments).plan, arguments, 2)
    plain = [array for step_values in values for array in step_values.values()]
    result = jax.tree.unflatten(jax.tree.structure((arguments[0], 0)), result)
    return Task(step, arguments, shielded, plain, result)


# No plaintext operand


def plaintext_among(recorded: Iterable[np.ndarray], plain: Iterable[np.ndarray]) -> int:
    """How many recorded arrays hold the elements of a plaintext array, in the same order."""
    rows: dict[int, list[np.ndarray]] = {}
    for value in plain:
        rows.setdefault(value.size, []).append(np.ravel(value))
    tables = {size: np.stack(values) for size, values in rows.items()}
    return sum(
        bool(np.isclose(array.ravel(), tables[array.size], rtol=1e-9, atol=0).all(axis=1).any())
        for array in recorded
        if array.size in tables
    )


def observe(enclave: tempo.Enclave, task: Task, shielded: tempo.Shielded) -> HostView:
    """Trains two steps under observation."""
    state, *batch = task.arguments
    state = enclave.seal(state)
    with tempo.testing.host_view() as view:
        for _ in range(2):
            state, loss = shielded(state, *batch)
    assert_close((enclave.open(state), loss), task.result)
    return view


def test_no_plaintext_reaches_the_host(enclave, task):
    view = observe(enclave, task, task.shielded)
    assert view.steps == 2 and len(view.products) == 2 * 8
    assert view.leaves and len(view.revealed) == 2
    tensors = [array for array in view.arrays() if array.shape]
    assert plaintext_among(tensors, task.plain) == 0
    # Beside the losses only the two bias corrections of Adam cross in the clear, at each step.
    clear = [array for _, array in view.crossings if not array.shape]
    assert len(clear) == 2 * (1 + 2)
    assert plaintext_among(clear, task.plain) == len(clear)


def without_keys(plan: Plan) -> Plan:
    """The same plan with a blinding that does nothing."""

    def clear(part):
        layout = Layout((None,) * len(part.array.shape), (0,) * len(part.array.shape))
        return dataclasses.replace(part, layout=layout)

    program = plan.program
    segments = tuple(
        dataclasses.replace(
            s, uploads=tuple(map(clear, s.uploads)), downloads=tuple(map(clear, s.downloads))
        )
        for s in program.segments
    )
    inputs, outputs = (tuple(map(clear, ports)) for ports in (program.inputs, program.outputs))
    program = dataclasses.replace(program, segments=segments, inputs=inputs, outputs=outputs)
    return dataclasses.replace(plan, program=program)


def test_without_keys_every_operand_is_found(enclave, task, monkeypatch):  # the control
    make_plan = shielded_module.make_plan
    monkeypatch.setattr(
        shielded_module, "make_plan", lambda request: without_keys(make_plan(request))
    )
    shielded = shield_all(task.step, enclave=enclave, donate=False)
    view = observe(enclave, task, shielded)
    tensors = [array for array in view.arrays() if array.shape]
    assert len(tensors) > 50
    assert plaintext_among(tensors, task.plain) == len(tensors)
    for product in view.products:
        assert plaintext_among([*product.operands, product.result], task.plain) == 3


def test_comparison_is_up_to_rounding_and_shape():
    x = np.asarray(uniform(1, 4, 6))
    assert plaintext_among([x * (1 + 1e-12), x.reshape(3, 8), -x, x.T, x + 1e-6], [x]) == 2


def test_blinding_differs_from_run_to_run(enclave):
    shielded = shield_all(lambda x, w: x @ w, enclave=enclave, donate=False)
    with tempo.testing.host_view() as view:
        for _ in range(2):
            shielded(uniform(1, 9, 8), uniform(2, 8, 7))
    first, second = view.products
    for a, b in zip(
        (*first.operands, first.result), (*second.operands, second.result), strict=True
    ):
        assert not np.allclose(a, b)
        np.testing.assert_allclose(
            np.sort(np.abs(a), axis=None), np.sort(np.abs(b), axis=None), rtol=1e-12
        )


def test_recording_of_a_call_inside_jit_is_refused(enclave):
    shielded = shield_all(lambda x: tempo.reveal(x @ x.T), enclave=enclave)
    sealed = enclave.seal(uniform(1, 4, 4))
    with tempo.testing.host_view() as view:
        with pytest.raises(UnsupportedError, match="outside jit only"):
            jax.jit(shielded)(sealed)
    assert not view.products and not view.steps


# No trusted equation

LAYOUT = {
    *(prims.broadcast_in_dim_p, prims.concatenate_p, prims.convert_element_type_p, prims.copy_p),
    *(prims.reshape_p, prims.rev_p, prims.slice_p, prims.squeeze_p, prims.transpose_p),
    *(primitives.cheap_p,),
}
# What lets a late product begin only when the enclave has: a branch on a token.
ORDER = {prims.cond_p, prims.eq_p}
# Handles are opaque arrays of a key type, whose words are what the visits carry.
HANDLES = {
    eqn.primitive
    for eqn in jax.make_jaxpr(lambda w: jax.random.key_data(jax.random.wrap_key_data(w)))(
        np.zeros(2, np.uint32)
    ).eqns
}
UPDATE = {
    *(prims.add_p, prims.add_jaxvals_p, prims.div_p, prims.integer_pow_p, prims.mul_p, prims.neg_p),
    *(prims.sqrt_p, prims.square_p, prims.sub_p),
}


def test_no_trusted_equation_stands_in_the_host_program(enclave, task):
    state, *batch = enclave.seal(task.arguments)
    state, _ = task.shielded(state, *batch)
    report = task.shielded.explain(state, *batch)
    program = jax.make_jaxpr(task.shielded)(state, *batch)
    equations = list(equations_module.equations(program.jaxpr))

    products = [e for e in equations if e.primitive in (prims.dot_general_p, primitives.conv_p)]
    visits = [e for e in equations if e.primitive is call_p]
    rest = [e for e in equations if e not in products and e not in visits]
    assert len(products) == len(offloaded(report.plan)) == 8
    assert f"on the devices: {len(products)} products" in str(report)
    # Begin and commit; and where the enclave works beside late products, two calls.
    cut = report.plan.cut
    apart = {cut.levels[v] for v in cut.late} & set(range(len(cut.segments)))
    assert len(visits) == report.round_trips + len(apart) + 2

    allowed = LAYOUT | UPDATE | HANDLES | ORDER
    assert {e.primitive.name for e in rest if e.primitive not in allowed} == set()
    tokens = [v.aval for e in rest if e.primitive is prims.eq_p for v in e.invars]
    assert {(a.shape, a.dtype.name) for a in tokens} == {((), "int32")}
    # Arithmetic is the update's alone: on values of the shape of a leaf that stays there.
    leaves = {report.plan.jaxpr.invars[i].aval.shape for i in report.plan.placement.resident}
    assert leaves and report.resident
    for eqn in rest:
        if eqn.primitive in UPDATE:
            assert all(v.aval.shape in leaves | {()} for v in eqn.outvars), eqn
    # No equation that placement gave to the enclave is there under another name.
    trusted = {
        eqn.primitive
        for eqn, side in zip(report.plan.jaxpr.eqns, report.plan.placement.sides, strict=True)
        if side is Side.ENCLAVE
    }
    assert {prims.exp_p, prims.reduce_sum_p, prims.reduce_max_p} <= trusted
    assert not {e.primitive for e in equations} & (trusted - LAYOUT - UPDATE - ORDER)
    # Nor does a constant, unless it is a scalar: an array would be plaintext in the program.
    assert all(np.ndim(c) == 0 for c in program.consts)
