"""Laws over random products, random programs and random blindings.

Most programs run in the reference interpreter (`tests.interpreter`), which blinds with the
enclave's own scheme but needs no compilation; a few go through the enclave as well.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import primitives as prims

from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import KeyClass, Layout
from tempo_jax.jaxprs import primitives
from tempo_jax.jaxprs.types import array_type
from tempo_jax.planning.plan import Plan, offloaded
from tempo_jax.schemes import Mixing, Orthogonal, Tempo
from tests.support.interpreter import blind, interpret, plan
from tests.support.steps import SIGNED_PERMUTATION, assert_close, shield_all, training, uniform

# Sums of at most a few hundred products of values in [-1, 1), by the format they are made in.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.1}


# Products


@dataclasses.dataclass(frozen=True)
class Product:
    """A product and its operands' shapes."""

    function: Callable[[jax.Array, jax.Array], jax.Array]
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]

    def operands(self, dtype: str = "float64") -> tuple[jax.Array, jax.Array]:
        return uniform(1, *self.lhs, dtype=dtype), uniform(2, *self.rhs, dtype=dtype)

    def with_gradients(self, lhs: jax.Array, rhs: jax.Array) -> Any:
        """The product and the gradients of a nonlinear function of it."""
        out, pullback = jax.vjp(self.function, lhs, rhs)
        return out, pullback(jnp.cos(out))


@st.composite
def dot_generals(draw: Any) -> Product:
    """A `dot_general` with any axes contracted or batched, in any order."""
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=2)
    batch, contracted = draw(sizes), draw(sizes)
    shapes, axes = [], []
    for _ in range(2):
        named = [("batch", i, n) for i, n in enumerate(batch)]
        named += [("contracted", i, n) for i, n in enumerate(contracted)]
        named += [("free", i, n) for i, n in enumerate(draw(sizes))]
        named = draw(st.permutations(named))
        shapes.append(tuple(n for _, _, n in named))
        axes.append({(kind, i): axis for axis, (kind, i, _) in enumerate(named)})
    numbers: Any = tuple(
        tuple(tuple(side[kind, i] for i in range(len(group))) for side in axes)
        for kind, group in (("contracted", contracted), ("batch", batch))
    )
    precision = draw(st.sampled_from([None, lax.Precision.HIGHEST]))
    preferred = draw(st.sampled_from([None, np.float64]))
    return Product(
        lambda x, y: lax.dot_general(
            x, y, numbers, precision=precision, preferred_element_type=preferred
        ),
        *shapes,
    )


@st.composite
def convolutions(draw: Any) -> Product:
    """A convolution with any strides, padding, dilations, groups and order of axes."""
    rank = draw(st.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    features, batches = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (3, 1), (1, 2)]))
    space, window = each(1, 5), each(1, 3)
    lhs = (batches * draw(st.integers(1, 3)), features * draw(st.integers(1, 3)), *space)
    outputs = features * batches * draw(st.integers(1, 3))
    rhs = (outputs, lhs[1] // features, *window)
    orders = [draw(st.permutations(range(rank + 2))) for _ in range(3)]
    lhs_order, rhs_order, _ = orders
    options = {
        "window_strides": each(1, 3),
        "padding": tuple(zip(each(-1, 2), each(0, 2), strict=True)),
        "lhs_dilation": each(1, 2),
        "rhs_dilation": each(1, 2),
        "feature_group_count": features,
        "batch_group_count": batches,
        "dimension_numbers": lax.ConvDimensionNumbers(
            *(tuple(order.index(i) for i in range(rank + 2)) for order in orders)
        ),
    }
    product = Product(
        lambda x, y: lax.conv_general_dilated(x, y, **options),
        tuple(lhs[i] for i in lhs_order),
        tuple(rhs[i] for i in rhs_order),
    )
    hypothesis.assume(0 not in jax.eval_shape(product.function, *product.operands()).shape)
    return product


def could_carry_keys(product: Product) -> bool:
    """Whether every array of a `dot_general` has an axis to permute."""
    out = jax.eval_shape(product.function, *product.operands()).shape
    return all(any(n > 1 for n in shape) for shape in (product.lhs, product.rhs, out))


@hypothesis.settings(max_examples=25)
@hypothesis.given(dot_generals())
def test_dot_general_and_its_gradients(product):
    flat = plan(product.with_gradients, *product.operands())
    assert_close(interpret(flat), product.with_gradients(*product.operands()))
    # The sign of a batch axis may be all that is left of an axis's key, but never the key.
    forward = flat.plan.jaxpr.eqns[0]
    assert (forward in [eqn for _, eqn in offloaded(flat.plan)]) == could_carry_keys(product)


@hypothesis.settings(max_examples=12)
@hypothesis.given(convolutions())
def test_convolution_and_its_gradients(product):
    flat = plan(product.with_gradients, *product.operands())
    assert_close(interpret(flat), product.with_gradients(*product.operands()))


@hypothesis.settings(max_examples=6)
@hypothesis.given(dot_generals(), st.sampled_from(["float32", "bfloat16"]))
def test_dot_general_in_lower_precision(product, dtype):
    operands = product.operands(dtype)
    flat = plan(product.with_gradients, *operands)
    assert_close(interpret(flat), product.with_gradients(*operands), TOLERANCES[dtype])


@hypothesis.settings(max_examples=5, phases=[hypothesis.Phase.generate])
@hypothesis.given(product=st.one_of(dot_generals(), convolutions()))
def test_products_through_the_enclave(enclave, product):
    operands = product.operands()
    shielded = shield_all(product.with_gradients, enclave=enclave, donate=False)
    assert_close(enclave.open(shielded(*operands)), product.with_gradients(*operands))


# Programs


FEATURES, LENGTH, ROWS = 8, 4, 6
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "tanh": jnp.tanh,
    "norm": lambda x: jax.nn.standardize(x, axis=-1),
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
}


def dense(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"]


def dense_with_bias(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


def residual(p: Any, x: jax.Array) -> jax.Array:
    return x + x @ p["w"]


def over_positions(p: Any, x: jax.Array) -> jax.Array:
    return (x.swapaxes(1, 2) @ p["mix"]).swapaxes(1, 2)


def heads(p: Any, x: jax.Array) -> jax.Array:
    """A product for each of two heads, between two reshapes."""
    split = x.reshape(*x.shape[:2], 2, FEATURES // 2)
    return jnp.einsum("blhf,hfg->blhg", split, p["heads"]).reshape(x.shape)


def attention(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = x @ p["w"], x @ p["w2"], x @ p["w3"]
    return jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v


def convolution(p: Any, x: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, p["window"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )


# The layers, with the parameters that they read.
LAYERS: dict[Any, list[str]] = {
    dense: ["w"],
    dense_with_bias: ["w", "b"],
    residual: ["w"],
    over_positions: ["mix"],
    heads: ["heads"],
    attention: ["w", "w2", "w3"],
    convolution: ["window"],
}
SHAPES = {
    "w": (FEATURES, FEATURES),
    "w2": (FEATURES, FEATURES),
    "w3": (FEATURES, FEATURES),
    "b": (FEATURES,),
    "mix": (LENGTH, LENGTH),
    "heads": (2, FEATURES // 2, FEATURES // 2),
    "window": (3, FEATURES, FEATURES),
}
UPDATES = [optax.sgd(0.1, momentum=0.9), optax.adamw(0.01), optax.lion(0.01), optax.rmsprop(0.01)]


@dataclasses.dataclass(frozen=True)
class Net:
    """Layers with an activation after each; "none" leaves it out."""

    layers: tuple[Callable[[Any, jax.Array], jax.Array], ...]
    activations: tuple[str, ...]
    update: int = 0

    def __call__(self, parameters: Any, x: jax.Array) -> jax.Array:
        for layer, activation, p in zip(self.layers, self.activations, parameters, strict=True):
            x = layer(p, x)
            x = ACTIVATIONS[activation](x) if activation in ACTIVATIONS else x
        return x

    def parameters(self) -> list[dict[str, jax.Array]]:
        return [
            {
                name: uniform(10 * i + j, *SHAPES[name]) / math.sqrt(SHAPES[name][-1])
                for j, name in enumerate(LAYERS[layer])
            }
            for i, layer in enumerate(self.layers)
        ]

    def training(self) -> Any:
        def loss(parameters: Any, rest: Any, batch: Any) -> Any:
            out = self(parameters, batch)
            return jnp.mean((out - 0.3) ** 2), (rest, out)

        batch = uniform(99, ROWS, LENGTH, FEATURES)
        return training(loss, self.parameters(), [batch], UPDATES[self.update])


@st.composite
def nets(draw: Any, layers: Any, activations: Any) -> Net:
    depth = draw(st.integers(1, 4))
    return Net(
        tuple(draw(st.sampled_from(layers)) for _ in range(depth)),
        tuple(draw(st.sampled_from(activations)) for _ in range(depth)),
        draw(st.integers(0, len(UPDATES) - 1)),
    )


def classes(plan: Plan, state: Any) -> dict[str, tuple[int | None, ...]]:
    """Key classes of the resident leaves, by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    variables = plan.jaxpr.invars
    return {names[i]: plan.layouts[variables[i]].classes for i in plan.placement.resident}


@hypothesis.settings(max_examples=6)
@hypothesis.given(nets(list(LAYERS), [*ACTIVATIONS, "none"]))
def test_random_training_steps(net):
    case = net.training()
    flat = plan(case.step, case.state, case.batches[0], stateful=True)
    assert_close(interpret(flat), case.step(case.state, case.batches[0]))
    # All kernels in use stay on the devices.
    resident = classes(flat.plan, case.state)
    for i, layer in enumerate(net.layers):
        if layer in (dense, dense_with_bias, residual):
            assert f"['params'][{i}]['w']" in resident


def blinded_kernels(plan: Plan, state: Any) -> list[list[int]]:
    """Key classes of each kernel as products on the host take it, resident or not."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    kernels = {}
    for (path, leaf), variable in zip(leaves, plan.jaxpr.invars, strict=False):
        if jax.tree_util.keystr(path[:1]) == "['params']" and leaf.ndim > 1:
            kernels[variable] = variable
    for eqn in plan.jaxpr.eqns:
        if eqn.primitive in (prims.reshape_p, prims.transpose_p, primitives.blind_p):
            if eqn.invars[0] in kernels:
                kernels[eqn.outvars[0]] = kernels[eqn.invars[0]]
    found = {}
    for _, eqn in offloaded(plan):
        for v in eqn.invars:
            if v in kernels:
                keyed = [c for c in plan.layouts[v].classes if c is not None]
                assert found.setdefault(kernels[v], keyed) == keyed
    return list(found.values())


@pytest.mark.parametrize(
    "scheme", [SIGNED_PERMUTATION, Tempo(), Orthogonal(), Mixing()], ids=lambda s: s.name
)
@hypothesis.settings(max_examples=20)
@hypothesis.given(nets([dense, dense_with_bias, residual, convolution], list(ACTIVATIONS)))
def test_no_class_crosses_a_nonlinearity(scheme, net):
    """Sharing one would hand the host a working model, up to the order of its neurons."""
    case = net.training()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mixing, "least_rows", 1)
        patch.setattr(Mixing, "least_side", 1)
        patch.setattr(Mixing, "first_layer_share", 0.0)
        flat = plan(case.step, case.state, case.batches[0], stateful=True, scheme=scheme)
    kernels = blinded_kernels(flat.plan, case.state)
    inside = scheme == Mixing()  # the last one
    assert len(kernels) == len(net.layers) - inside
    ends = [c for kernel in kernels for c in kernel]
    # A residual sum is taken inside, so even the two ends of one kernel differ.
    assert len(set(ends)) == len(ends) == 2 * len(kernels)


def test_a_linear_chain_shares_the_class_between():
    net = Net((dense, dense), ("none", "none"))
    case = net.training()
    flat = plan(case.step, case.state, case.batches[0], stateful=True)
    first, second = (classes(flat.plan, case.state)[f"['params'][{i}]['w']"] for i in range(2))
    assert first[1] == second[0] and first[0] != second[1]


OTHER_OPTIMIZERS = {
    "lamb": optax.lamb(0.01),
    "lars": optax.lars(0.1),
    "adabelief": optax.adabelief(0.01),
    "adadelta": optax.adadelta(0.1),
    "adamax": optax.adamax(0.01),
    "adan": optax.adan(0.01),
    "amsgrad": optax.amsgrad(0.01),
    "centralize": optax.chain(optax.centralize(), optax.sgd(0.1)),
    "fromage": optax.fromage(0.1),
    "nadam": optax.nadam(0.01),
    "novograd": optax.novograd(0.01),
    "prodigy": optax.contrib.prodigy(0.1),
    "radam": optax.radam(0.01),
    "schedule_free": optax.contrib.schedule_free_adamw(0.01),
    "sm3": optax.sm3(0.1),
    "yogi": optax.yogi(0.01),
    "adaptive_grad_clip": optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_optimizers_beyond_the_zoo(name):
    def loss(parameters: Any, rest: Any, batch: Any) -> Any:
        out = jnp.tanh(batch @ parameters["w"] + parameters["b"]) @ parameters["v"]
        return jnp.mean((out - 0.3) ** 2), (rest, out)

    parameters = {"w": uniform(1, 8, 10), "b": uniform(2, 10), "v": uniform(3, 10, 6)}
    case = training(loss, parameters, [uniform(4, ROWS, 8)], OTHER_OPTIMIZERS[name])
    state, _ = jax.jit(case.step)(case.state, case.batches[0])
    flat = plan(case.step, state, case.batches[0], stateful=True)
    assert_close(interpret(flat), jax.jit(case.step)(state, case.batches[0]))


# Blinding


@st.composite
def blindings(draw: Any) -> tuple[np.ndarray, Layout, dict[int, Any]]:
    """An array with its layout and keys; axes may share a class, and carry no key."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    numbers: dict[tuple[int, str], int] = {}
    layout_classes: list[int | None] = []
    for n in shape:
        which = draw(st.sampled_from(["unkeyed", "first", "second"]))
        keyed = which != "unkeyed" and n > 1
        layout_classes.append(numbers.setdefault((n, which), len(numbers)) if keyed else None)
    parities = tuple(draw(st.integers(0, 1)) for _ in shape)
    schedule = KeySchedule()
    keys = {}
    for (size, _), number in numbers.items():
        stream = schedule.stream("test", number)
        key_class = KeyClass(size, batch=draw(st.booleans()))
        keys[number] = SIGNED_PERMUTATION.draw(key_class, stream)
    dtype = jnp.dtype(draw(st.sampled_from(["float64", "float32", "float16", "bfloat16"])))
    values = draw(
        st.lists(
            st.sampled_from([0.0, -0.0, 1.5, -2.75, 1e-30, math.inf, -math.inf, math.nan]),
            min_size=math.prod(shape),
            max_size=math.prod(shape),
        )
        if math.prod(shape) <= 8
        else st.just(np.random.default_rng(0).normal(size=shape))
    )
    x = np.asarray(values, np.float64).reshape(shape).astype(dtype)
    return x, Layout(tuple(layout_classes), parities), keys


def blind_signed(x: Any, layout: Layout, keys: dict[int, Any]) -> np.ndarray:
    blinded, _ = blind(SIGNED_PERMUTATION, x, layout, keys, array_type(x))
    return blinded


def bits(x: Any) -> np.ndarray:
    """The array's bits, with every NaN made the same."""
    x = np.array(x)
    x[np.isnan(x)] = np.nan
    return x.view(f"u{x.dtype.itemsize}") if x.ndim else x.reshape(1).view(f"u{x.dtype.itemsize}")


@hypothesis.settings(max_examples=50)
@hypothesis.given(blindings())
def test_unblinding_inverts_blinding_bit_for_bit(blinding):
    x, layout, keys = blinding
    blinded = blind_signed(x, layout, keys)
    assert (blinded.shape, blinded.dtype) == (x.shape, x.dtype)
    # Only order and signs change.
    np.testing.assert_array_equal(
        np.sort(np.abs(blinded.astype(float)), axis=None),
        np.sort(np.abs(x.astype(float)), axis=None),
    )
    restored = SIGNED_PERMUTATION.unblind(blinded, layout, keys, None)
    np.testing.assert_array_equal(bits(restored), bits(x))


def test_subnormal_values_survive_blinding():
    x = np.array([5e-324, -5e-324, 2e-310, 1.0])
    key = SIGNED_PERMUTATION.draw(KeyClass(4), KeySchedule().stream("test"))
    layout = Layout((0,), (1,))
    blinded = blind_signed(x, layout, {0: key})
    restored = SIGNED_PERMUTATION.unblind(blinded, layout, {0: key}, None)
    np.testing.assert_array_equal(bits(restored), bits(x))


def test_blinding_changes_what_it_should():
    """A key that did nothing would pass every test above."""
    x = uniform(1, 32, 16)
    stream = KeySchedule().stream("test")
    keys = {n: SIGNED_PERMUTATION.draw(KeyClass(s), stream) for n, s in enumerate((32, 16))}
    blinded = blind_signed(x, Layout((0, 1), (1, 1)), keys)
    assert np.mean(blinded == np.asarray(x)) < 0.1
    assert 0.25 < np.mean(np.sign(blinded) != np.sign(x)) < 0.75
