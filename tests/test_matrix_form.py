"""Families, fusion, the default scheme's policy, and the programs that come of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import tempo_jax as tempo
from tempo_jax import _jaxpr, _matrix_form
from tempo_jax._families import TO_INPUT, TO_WEIGHT, find_families
from tempo_jax._jaxpr import Flattening
from tempo_jax._matrix_form import decoy_count, matrix_form
from tempo_jax._products import is_product, products_above
from tempo_jax.schemes import Mixing
from tests.interpreter import interpret, plan
from tests.steps import assert_close, uniform

TOLERANCE = 1e-9  # keys of condition 4 and decoys of four times the energy cost a digit


def flat(function: Callable[..., Any], *arguments: Any) -> Any:
    closed: Any = jax.make_jaxpr(function)(*arguments)
    return _jaxpr.merge_equal(_jaxpr.flatten(closed, Flattening(is_product, [])))


def families(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    jaxpr = flat(function, *arguments).jaxpr
    return find_families(jaxpr, frozenset(jaxpr.invars), products_above(jaxpr))


@pytest.fixture
def any_size(monkeypatch):
    """Lets small and single products out, so that tests need not be large."""
    monkeypatch.setattr(_matrix_form, "LEAST_ROWS", 1)
    monkeypatch.setattr(_matrix_form, "LEAST_SIDE", 1)
    monkeypatch.setattr(_matrix_form, "FIRST_LAYER_SHARE", 0.0)
    monkeypatch.setattr(_matrix_form, "last_products", lambda *_: {})


def with_gradients(product: Callable[..., Any]) -> Callable[..., Any]:
    def function(x, w):
        y, pullback = jax.vjp(product, x, w)
        return y, pullback(jnp.cos(y))

    return function


def convolution(*, shape=(2, 6, 5, 3), window=(3, 3), out=4, spec="NHWC", **options: Any):
    kernel = "HWIO" if spec == "NHWC" else "OIHW"
    sizes = dict(zip("HW", window, strict=True)) | {"I": shape[spec.index("C")], "O": out}
    settings = {"window_strides": (1, 1), "padding": "SAME"} | options
    product = functools.partial(
        lax.conv_general_dilated, dimension_numbers=(spec, kernel, spec), **settings
    )
    return product, shape, tuple(sizes[c] for c in kernel)


PRODUCTS = {
    "dense": (lambda x, w: x @ w, (4, 3), (3, 5)),
    "rank 3": (lambda x, w: x @ w, (2, 4, 3), (3, 5)),
    "weight first": (lambda x, w: jnp.einsum("nd,btd->nbt", w, x), (2, 4, 3), (5, 3)),
    "several contracted": (lambda x, w: jnp.einsum("bthd,hdf->btf", x, w), (2, 3, 4, 5), (4, 5, 6)),
    "crossed": (lambda x, w: jnp.einsum("bhtd,dfh->btf", x, w), (2, 3, 4, 5), (5, 6, 3)),
    "attention": (lambda x, w: jnp.einsum("bthd,bshd->bhts", x, w), (2, 4, 3, 5), (2, 6, 3, 5)),
    "values": (lambda x, w: jnp.einsum("bhts,bshd->bthd", x, w), (2, 3, 4, 6), (2, 6, 3, 5)),
    "same": convolution(),
    "valid": convolution(padding="VALID"),
    "strided": convolution(window_strides=(2, 3)),
    "dilated": convolution(rhs_dilation=(2, 1)),
    "transposed": convolution(lhs_dilation=(2, 2), padding=((1, 2), (2, 1))),
    "negative padding": convolution(padding=((-1, 0), (1, -1))),
    "1x1": convolution(window=(1, 1)),
    "channels first": convolution(shape=(2, 3, 6, 5), spec="NCHW"),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_and_gradients_are_one_family(name, any_size):
    product, x, w = PRODUCTS[name]
    arguments = uniform(1, *x), uniform(2, *w)
    (family,) = families(with_gradients(product), *arguments)
    assert len(family.members) == 3 and set(family.operands) == {"x", "w", "g"}


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_of_matrices_gives_the_same(name, any_size):
    product, x, w = PRODUCTS[name]
    arguments = uniform(1, *x), uniform(2, *w)
    function = with_gradients(product)
    closed = flat(function, *arguments)
    form = matrix_form(closed, Mixing(), None, {})
    assert form.stays == (None, None, None)
    result = _jaxpr.evaluate(
        form.closed.jaxpr.eqns,
        dict(zip(form.closed.jaxpr.invars, arguments, strict=True))
        | dict(zip(form.closed.jaxpr.constvars, form.closed.consts, strict=True)),
        form.closed.jaxpr.outvars,
    )
    assert_close(result, jax.tree.leaves(function(*arguments)))


@pytest.mark.parametrize("name", ["dense", "crossed", "attention", "values", "strided"])
def test_blinded_program_gives_the_same(name, any_size):
    product, x, w = PRODUCTS[name]
    arguments = uniform(1, *x), uniform(2, *w)
    function = with_gradients(product)
    result = interpret(plan(function, *arguments, scheme=Mixing()))
    assert_close(result, function(*arguments), tolerance=TOLERANCE)


def test_families_share_no_key_class(any_size):
    def loss(p, x):
        h = jnp.tanh(x @ p["a"])
        return (jnp.tanh(h @ p["b"]) @ p["b"] * jnp.cos(h)).sum()

    p = {"a": uniform(1, 6, 8), "b": uniform(2, 8, 8)}
    made = plan(jax.grad(loss), p, uniform(3, 5, 6), scheme=Mixing()).plan
    classes: dict[int, set[int]] = {}
    for equation in made.cut.host:
        keys = {c for v in equation.eqn.invars for c in made.layouts[v].classes if c is not None}
        for c in keys:
            classes.setdefault(c, set()).add(equation.number)
    # Three products under one key at most: forward, by the input, by the weight.
    assert classes and all(len(numbers) <= 3 for numbers in classes.values())
    sent = [v for e in made.cut.host for v in e.eqn.invars]
    assert not {v for v in sent if v in {u for e in made.cut.host for u in e.eqn.outvars}}


def test_queries_keys_and_values_are_fused(any_size):
    def loss(p, x):
        q, k, v = (x @ p[n] for n in "qkv")
        return (jnp.tanh(q @ k.T) @ v).sum()

    p = {n: uniform(i, 6, 4) for i, n in enumerate("qkv")}
    gradient = jax.grad(loss, (0, 1))
    arguments = p, uniform(9, 5, 6)
    made = plan(gradient, *arguments, scheme=Mixing())
    widths = [v.aval.shape for e in made.plan.cut.host for v in e.eqn.outvars]
    assert (5, 12) in widths
    assert_close(interpret(made), gradient(*arguments), tolerance=TOLERANCE)


def mlp_loss(p, x, y):
    h = jax.nn.relu(x @ p["a"])
    h = jax.nn.relu(h @ p["b"])
    return optax.softmax_cross_entropy_with_integer_labels(h @ p["c"], y).mean()


def mlp(rows=128, width=64, classes=64):
    p = {"a": uniform(1, width, width), "b": uniform(2, width, width)}
    p["c"] = uniform(3, width, classes)
    return p, uniform(4, rows, width), jnp.arange(rows) % classes


def stays(function, *arguments):
    return matrix_form(flat(function, *arguments), Mixing(), None, {}).stays


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_classifier_stays_inside(wrap):
    found = stays(jax.value_and_grad(wrap(mlp_loss)), *mlp())
    assert sum(why is None for why in found) == 5  # two layers, the first without dX
    assert sum("last product" in (why or "") for why in found) == 3


def test_coupled_heads_stay_inside():
    p, x, y = mlp()

    def loss(p):
        h = jax.nn.relu(x @ p["a"])
        losses = (mlp_loss({"a": jnp.eye(64), "b": p["b"], "c": p[n]}, h, y) for n in "cd")
        return jnp.sqrt(sum(losses))

    found = stays(jax.grad(loss), p | {"d": uniform(8, 64, 64)})
    assert sum("last product" in (why or "") for why in found) >= 6


def test_loss_inside_a_scan_stays_inside():
    p, x, y = mlp(rows=256)

    def loss(p):
        h = jax.nn.relu(x @ p["a"]).reshape(2, 128, 64)

        def chunk(total, part):
            logits = part[0] @ p["c"]
            return total + optax.softmax_cross_entropy_with_integer_labels(
                *(logits, part[1])
            ).sum(), None

        return lax.scan(chunk, 0.0, (h, y.reshape(2, 128)))[0]

    found = stays(jax.grad(loss), p)
    out = [why for why in found if why is None]
    assert len(out) == 2  # the first layer and its gradient; no logits, no G of theirs


def test_optimizers_products_stay_inside():
    p, x, y = mlp()
    tx = optax.contrib.muon(1e-3)

    def step(p, state):
        return tx.update(jax.grad(mlp_loss)(p, x, y), state, p)

    found = stays(step, p, tx.init(p))
    assert sum("optimizer" in (why or "") for why in found) > 20
    assert sum(why is None for why in found) == 5


@pytest.mark.parametrize(
    ("rows", "width", "reason"), [(127, 64, "127 rows"), (128, 63, "a side of 63")]
)
def test_thin_products_stay_inside(rows, width, reason):
    found = stays(jax.grad(mlp_loss), *mlp(rows, width))
    assert any(reason in (why or "") for why in found)
    assert None not in found


def test_small_first_layer_stays_inside():
    p, x, y = mlp(width=512)
    p["a"], x = uniform(1, 16, 512), x[:, :16]
    found = stays(jax.grad(mlp_loss), p, x, y)
    assert "first layer" in (found[0] or "") or "a side of 16" in (found[0] or "")
    p["a"], x = uniform(1, 64, 512), uniform(5, 128, 64)
    p["b"] = uniform(6, 512, 2048)
    p["c"] = uniform(7, 2048, 64)
    found = stays(jax.grad(mlp_loss), p, x, y)
    assert any("first layer" in (why or "") for why in found)


def test_grouped_convolution_stays_inside():
    product, x, w = convolution(shape=(2, 6, 6, 4), out=4, feature_group_count=2)
    w = (*w[:2], 2, 4)
    (why,) = stays(product, uniform(1, *x), uniform(2, *w))
    assert "grouped convolution" in (why or "")


@pytest.mark.parametrize("rows", [128, 129, 160, 1000])
def test_decoys_fill_up_to_whole_blocks(rows):
    count = decoy_count(rows, 32)
    assert 32 <= count < 96 and (rows + count) % 64 == 0
    assert decoy_count(rows, 0) == 0


def test_costs_decide_by_the_family(enclave):
    step = tempo.shield(jax.grad(mlp_loss), enclave=enclave)
    report = str(step.explain(*mlp()))
    assert "on the devices: 0 products" in report
    assert "computing it inside takes about" in report


def test_gradient_kinds_are_named():
    (family,) = families(with_gradients(lambda x, w: x @ w), uniform(1, 4, 3), uniform(2, 3, 5))
    assert family.number(TO_INPUT) != family.number(TO_WEIGHT)
