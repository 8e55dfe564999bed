"""The products of matrices that a convolution can be sent as, and which of them is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from tempo_jax.families.finder import FORWARD, TO_INPUT, TO_WEIGHT, Family, find_families
from tempo_jax.jaxprs import equations
from tempo_jax.jaxprs.products import products_above
from tempo_jax.jaxprs.trace import trace
from tempo_jax.planning import matrix_form as matrix_form_module
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.matrix_form import matrix_form
from tempo_jax.schemes import Mixing
from tests.support.steps import assert_close, uniform


@st.composite
def convolutions(draw):
    """A convolution of one to three axes with its operands, one that has a result."""
    axes = draw(st.integers(1, 3))

    def each(values):
        return [draw(values) for _ in range(axes)]

    sizes, window = each(st.integers(3, 6)), each(st.integers(1, 3))
    strides, of_input, of_window = (each(st.sampled_from([1, 1, 2])) for _ in range(3))
    margins = [(draw(st.integers(-1, 3)), draw(st.integers(-1, 3))) for _ in range(axes)]
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
    dilated = [(n - 1) * d + 1 for n, d in zip(sizes, of_input, strict=True)]
    spans = [(n - 1) * d + 1 for n, d in zip(window, of_window, strict=True)]
    room = [
        n + low + high - span for n, (low, high), span in zip(dilated, margins, spans, strict=True)
    ]
    return product if min(room) >= 0 else None, x, w


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
    if product is None:
        return
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
    ("options", "count"),
    [
        ({}, 4),
        ({"window_strides": (2, 1)}, 2),
        ({"window_strides": (2, 2)}, 1),
        ({"lhs_dilation": (1, 2), "padding": ((1, 1), (1, 1))}, 2),
        ({"rhs_dilation": (2, 2)}, 4),
    ],
)
def test_axes_with_strides_are_not_left_for_the_result(options, count):
    x, w = uniform(1, 2, 6, 6, 2), uniform(2, 3, 3, 2, 3)
    assert 1 + len(family_of(functools.partial(convolve, **options), x, w).others) == count


def sent(channels, out, costs, image=8, batch=32) -> set[tuple[int, ...]]:
    """Shapes of what a layer's products multiply outside, in a program that has two layers."""

    def loss(w, x):
        x = convolve(jax.nn.relu(convolve(jax.nn.relu(x), w["first"])), w["second"])
        return jnp.tanh(jax.nn.relu(x).mean((1, 2)) @ w["last"]).sum()

    shapes = {"first": (3, 3, channels, out), "second": (3, 3, out, out), "last": (out, 10)}
    w = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    x = jax.ShapeDtypeStruct((batch, image, image, channels), jnp.float32)
    leaves, structure = jax.tree.flatten((w, x))
    closed = trace(lambda *flat: jax.grad(loss)(*structure.unflatten(flat))["first"], leaves)
    form = matrix_form(closed, Mixing(), costs, {})
    return {
        tuple(v.aval.shape)
        for eqn, stays in zip(
            [e for e in form.closed.jaxpr.eqns if e.primitive.name in PRODUCTS],
            form.stays,
            strict=True,
        )
        if stays is None
        for v in eqn.invars
    }


PRODUCTS = ("dot_general", "conv_general_dilated")


def test_a_wide_layer_goes_out_as_rows_of_its_image():
    rows = 32 * 8 * 8
    shapes = sent(512, 512, CostModel())
    assert (rows, 3 * 512) in shapes and (3 * 512, 3 * 512) in shapes
    assert (rows, 9 * 512) not in shapes


def test_a_layer_with_few_channels_goes_out_as_patches():
    """Its rows would be narrower than what the scheme mixes well enough."""
    assert 3 * 16 < Mixing.least_side <= 9 * 16
    shapes = sent(16, 64, None, image=16)
    assert (32 * 16 * 16, 9 * 16) in shapes


def test_without_costs_the_fewest_elements_are_sent():
    shapes = sent(64, 64, None)
    assert (32 * 8 * 8, 3 * 64) in shapes and (32 * 8 * 8, 9 * 64) not in shapes


def test_parts_are_added_up_before_they_are_rounded_to_16_bits(monkeypatch):
    monkeypatch.setattr(Mixing, "first_layer_share", 0.0)
    monkeypatch.setattr(matrix_form_module, "last_products", lambda *_: {})
    x, w = uniform(1, 8, 8, 8, 64), uniform(2, 3, 3, 64, 64)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    closed = trace(convolve, [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, w)])
    form = matrix_form(closed, Mixing(), None, {})
    assert form.stays == (None,)
    jaxpr = form.closed.jaxpr
    values = dict(zip(jaxpr.invars, (x, w), strict=True))
    values |= dict(zip(jaxpr.constvars, form.closed.consts, strict=True))
    (found,) = equations.evaluate(jaxpr.eqns, values, jaxpr.outvars)
    assert found.dtype == jnp.bfloat16
    # Rounded once, each is off by half a unit in its last place at most.
    exact = convolve(x.astype(float), w.astype(float))
    np.testing.assert_allclose(found.astype(float), exact, rtol=1.01 * 2**-8, atol=1e-4)
