"""The products of matrices that a convolution can be sent as, and which of them is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import jaxpr_as_fun

from tempo_jax.families.finder import FORWARD, TO_INPUT, TO_WEIGHT, Family, find_families
from tempo_jax.jaxprs.products import is_product, products_above
from tempo_jax.jaxprs.trace import trace
from tempo_jax.planning import matrix_form as matrix_form_module
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.matrix_form import matrix_form
from tempo_jax.schemes import Mixing
from tests.support.steps import assert_close, uniform


@st.composite
def convolutions(draw):
    """A convolution of one to three axes and its operands; most axes keep the image's size."""
    axes = draw(st.integers(1, 3))

    def each(values):
        return [draw(values) for _ in range(axes)]

    sizes, window = each(st.integers(5, 7)), each(st.integers(1, 3))
    strides, of_input, of_window = (each(st.sampled_from([1, 1, 1, 2])) for _ in range(3))
    margins = []
    for size, taps, dilation in zip(sizes, window, of_window, strict=True):
        span = (taps - 1) * dilation + 1
        low = draw(st.integers(-1, span))
        high = draw(st.sampled_from([span - 1 - low] * 3 + [span - size, 1]))
        margins.append((low, max(high, span - size - low)))
    names = "XYZ"[:axes]
    last = ("N" + names + "C", names + "IO", "N" + names + "C")
    first = ("NC" + names, "OI" + names, "NC" + names)
    layout = draw(st.sampled_from([last, first, (last[0], first[1], first[2])]))
    lengths = dict(zip(names, sizes, strict=True)) | {"N": 2, "C": draw(st.integers(1, 3))}
    taps = dict(zip(names, window, strict=True)) | {"I": lengths["C"], "O": draw(st.integers(1, 3))}
    x = uniform(1, *(lengths[c] for c in layout[0]))
    w = uniform(2, *(taps[c] for c in layout[1]))
    product = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=margins,
        lhs_dilation=of_input,
        rhs_dilation=of_window,
        dimension_numbers=layout,
    )
    return product, x, w


def family_of(product, x, w) -> Family:
    """The family of a convolution and its gradients, whose arguments are x, w and g."""

    def function(x, w, g):
        y, pullback = jax.vjp(product, x, w)
        return y, *pullback(g)

    avals = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, w)]
    closed = trace(function, [*avals, jax.eval_shape(product, *avals)])
    return find_families(closed.jaxpr, frozenset(), products_above(closed.jaxpr))[0]


@settings(max_examples=25)
@given(convolutions())
def test_every_form_multiplies_as_the_convolution(drawn):
    product, x, w = drawn
    g = uniform(3, *jax.eval_shape(product, x, w).shape)
    family = family_of(product, x, w)

    @jax.jit  # one by one, its operations take ten times as long to compile
    def results(x, w, g):
        y, pullback = jax.vjp(product, x, w)
        expected = dict(zip((TO_INPUT, TO_WEIGHT), pullback(g), strict=True)) | {FORWARD: y}
        pairs = []
        for form in (family, *family.others):
            matrices = {
                name: operand.form.matrix(value)
                for (name, operand), value in zip(form.operands.items(), (x, w, g), strict=True)
            }
            products = {
                FORWARD: matrices["x"] @ matrices["w"],
                TO_INPUT: matrices["g"] @ matrices["w"].T,
                TO_WEIGHT: matrices["x"].T @ matrices["g"],
            }
            for member in form.members.values():
                kind = member.left, member.right
                pairs.append((member.out.array(products[kind]), expected[kind]))
        return pairs

    pairs = results(x, w, g)
    assert len(pairs) == 3 * (1 + len(family.others))
    for found, wanted in pairs:
        assert_close(found, wanted)


def convolve(x, w, **options):
    settings = {"window_strides": (1, 1), "padding": "SAME"} | options
    return lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)


@pytest.mark.parametrize(
    ("image", "window", "options", "count"),
    [
        ((6, 6), (3, 3), {}, 3),
        ((6, 6), (3, 1), {}, 1),
        ((5, 6), (3, 3), {}, 2),
        ((6, 6), (3, 3), {"padding": "VALID"}, 1),
        ((6, 6), (3, 3), {"window_strides": (2, 1)}, 2),
        ((6, 6), (3, 3), {"lhs_dilation": (1, 2), "padding": ((1, 1), (1, 1))}, 2),
        ((6, 10), (3, 3), {"rhs_dilation": (2, 2)}, 2),
    ],
)
def test_only_axes_that_keep_their_size_are_left_for_the_result(image, window, options, count):
    x, w = uniform(1, 2, *image, 2), uniform(2, *window, 2, 3)
    assert 1 + len(family_of(functools.partial(convolve, **options), x, w).others) == count


def operands(function, costs, *shapes) -> set[tuple[int, ...]]:
    """Shapes of what products multiply outside."""
    avals = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    form = matrix_form(trace(function, avals), Mixing(), costs, {})
    products = [eqn for eqn in form.closed.jaxpr.eqns if is_product(eqn)]
    outside = [e for e, why in zip(products, form.stays, strict=True) if why is None]
    return {tuple(v.aval.shape) for eqn in outside for v in eqn.invars}


def layer(*kernels, costs=None, image=8, batch=32, padding="SAME") -> set[tuple[int, ...]]:
    """What is sent of a layer with its gradients, or of several on one input."""

    def loss(x, last, *kernels):
        x = jax.nn.relu(x)
        parts = [convolve(x, kernel, padding=padding) for kernel in kernels]
        return jnp.tanh(jax.nn.relu(jnp.concatenate(parts, -1)).mean((1, 2)) @ last).sum()

    gradients = jax.grad(loss, range(2 + len(kernels)))
    x = (batch, image, image, kernels[0][2])
    return operands(gradients, costs, x, (sum(k[3] for k in kernels), 10), *kernels)


@pytest.fixture
def first_layer(monkeypatch):
    """Lets a network's only layer out."""
    monkeypatch.setattr(Mixing, "first_layer_share", 0.0)
    monkeypatch.setattr(matrix_form_module, "last_products", lambda *_: {})


ROWS = 32 * 8 * 8


def test_a_wide_layer_goes_out_as_rows_of_its_image(first_layer):
    shapes = layer((3, 3, 512, 512), costs=CostModel())
    assert {(ROWS, 3 * 512), (3 * 512, 3 * 512)} <= shapes
    assert (ROWS, 9 * 512) not in shapes


@pytest.mark.parametrize(
    ("kernel", "sent"),
    [
        ((3, 3, 64, 64), (ROWS, 3 * 64)),
        # Rows would be narrower than what the scheme mixes well enough.
        ((3, 3, 16, 64), (ROWS, 9 * 16)),
        # The result's parts would be more than what is saved.
        ((3, 3, 64, 512), (ROWS, 9 * 64)),
    ],
)
def test_what_costs_least_is_sent(kernel, sent, first_layer):
    assert sent in layer(kernel)


def test_results_count_in_a_forward_pass(first_layer):
    def forward(x, w):
        return jnp.tanh(convolve(x, w)).sum()

    shapes = operands(forward, None, (32, 8, 8, 64), (3, 3, 64, 256))
    assert shapes == {(ROWS, 9 * 64), (9 * 64, 256)}


def test_no_form_sends_what_mixes_too_little(first_layer):
    """Eight channels out, or as many places as images, are too few however they are laid out."""
    assert not layer((3, 3, 64, 8))
    assert not layer((3, 3, 64, 64), image=3, batch=16, padding="VALID")


def test_layers_on_one_input_are_one_product_of_one_form(first_layer):
    assert (ROWS, 9 * 16) in layer((3, 3, 16, 30), (3, 3, 16, 34))
    shapes = layer((3, 3, 512, 512), (3, 3, 512, 1536), costs=CostModel())
    inputs = {shape for shape in shapes if shape in [(ROWS, 3 * 512), (ROWS, 9 * 512)]}
    assert len(inputs) == 1
    assert shapes & {(3 * 512, 3 * 2048), (9 * 512, 2048)}


def test_parts_are_added_up_before_they_are_rounded_to_16_bits(first_layer):
    x, w = uniform(1, 8, 8, 8, 64), uniform(2, 3, 3, 64, 64)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    closed = trace(convolve, [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, w)])
    form = matrix_form(closed, Mixing(), None, {})
    assert form.stays == (None,)
    (found,) = jaxpr_as_fun(form.closed)(x, w)
    assert found.dtype == jnp.bfloat16
    # Rounded once, each is off by half a unit in its last place at most.
    exact = convolve(x.astype(float), w.astype(float))
    np.testing.assert_allclose(found.astype(float), exact, rtol=1.01 * 2**-8, atol=1e-4)
