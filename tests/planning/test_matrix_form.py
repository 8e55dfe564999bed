"""Families, fusion, the default scheme's policy, and the programs that come of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun

import tempo_jax as tempo
from tempo_jax.families.finder import TO_INPUT, TO_WEIGHT, find_families
from tempo_jax.jaxprs import flatten
from tempo_jax.jaxprs.flatten import Flattening
from tempo_jax.jaxprs.products import KEPT, is_product, products_above
from tempo_jax.planning import matrix_form as matrix_form_module
from tempo_jax.planning.matrix_form import matrix_form
from tempo_jax.planning.plan import offloaded
from tempo_jax.schemes import Mixing, Orthogonal, SignedPermutation, Tempo
from tests.support.interpreter import interpret, plan
from tests.support.steps import assert_close, uniform

TOLERANCE = 1e-9  # keys of condition 4 and decoys of four times the energy cost a digit


def flat(function: Callable[..., Any], *arguments: Any) -> Any:
    closed: Any = jax.make_jaxpr(function)(*arguments)
    return flatten.merge_equal(flatten.flatten(closed, Flattening(is_product, [])))


def families(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    jaxpr = flat(function, *arguments).jaxpr
    return find_families(jaxpr, frozenset(jaxpr.invars), products_above(jaxpr))


@pytest.fixture
def any_size(monkeypatch):
    """Lets small and single products out, so that tests need not be large."""
    monkeypatch.setattr(Mixing, "least_rows", 1)
    monkeypatch.setattr(Mixing, "least_side", 1)
    monkeypatch.setattr(Mixing, "first_layer_share", 0.0)
    monkeypatch.setattr(matrix_form_module, "last_products", lambda *_: {})


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
    result = jaxpr_as_fun(form.closed)(*arguments)
    assert_close(result, jax.tree.leaves(function(*arguments)))


@pytest.mark.parametrize("name", ["dense", "crossed", "attention", "values", "strided"])
def test_blinded_program_gives_the_same(name, any_size):
    product, x, w = PRODUCTS[name]
    arguments = uniform(1, *x), uniform(2, *w)
    function = with_gradients(product)
    result = interpret(plan(function, *arguments, scheme=Mixing()))
    assert_close(result, function(*arguments), tolerance=TOLERANCE)


def test_a_gradient_has_keys_of_its_own_for_each_product(any_size):
    x, w = uniform(1, 4, 3), uniform(2, 3, 5)
    made = plan(with_gradients(lambda x, w: x @ w), x, w, scheme=Mixing()).plan
    layouts = [[made.layouts[v].classes for v in e.eqn.invars] for e in made.cut.host]
    (x_of_y, w_of_y) = layouts.pop(0)
    (g_of_dx,) = (a for a, b in layouts if b == w_of_y)
    (g_of_dw,) = (b for a, b in layouts if a == x_of_y)
    # What they share is what is summed over.
    assert g_of_dx[1] == w_of_y[1] and g_of_dw[0] == x_of_y[0]
    assert g_of_dx[0] not in (*x_of_y, *w_of_y, *g_of_dw)
    assert g_of_dw[1] not in (*x_of_y, *w_of_y, *g_of_dx)


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


def stays(function, *arguments, scheme=None):
    return matrix_form(flat(function, *arguments), scheme or Mixing(), None, {}).stays


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


def logits(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


CODES = uniform(11, 64, 64)


def confusion(p, x, y):
    found = jax.nn.one_hot(logits(p, x).argmax(-1), 64)
    return jax.nn.one_hot(y, 64).T @ found


def soft_confusion(p, x, y):
    return jax.nn.one_hot(y, 64).T @ jax.nn.softmax(logits(p, x))


def with_noise(p, x, y, noise=CODES):
    rows = jnp.arange(len(y))
    return -jnp.log(jax.nn.softmax(logits(p, x)) @ jnp.square(noise))[rows, y].mean()


def with_two_noises(p, x, y):
    again = jax.nn.softmax(logits(p, x)) @ jnp.square(CODES) @ jnp.square(CODES)
    return -jnp.log(again)[jnp.arange(len(y)), y].mean()


def summed(p, x, y):
    hits = confusion(p, x, y) @ CODES @ CODES.T
    return mlp_loss(p, x, y), hits


@pytest.mark.parametrize(
    ("function", "out"),
    [
        (confusion, 2),
        (soft_confusion, 2),
        (jax.grad(with_noise), 5),
        (jax.grad(with_two_noises), 5),
        (jax.grad(jax.checkpoint(with_noise)), 5),
        (jax.grad(summed, has_aux=True), 5),
        (lambda p, x, y: (jax.grad(mlp_loss)(p, x, y), confusion(p, x, y)), 5),
    ],
    ids=["confusion", "soft", "noise", "noises", "remat", "sums", "both"],
)
def test_what_depends_on_the_classifier_alone_stays_inside(function, out):
    """Two layers and, in training, their gradients but the first by its input: no more goes out."""
    found = stays(function, *mlp())
    assert found.count(None) == out
    why = found[2] or ""  # the logits
    assert "last product" in why or "no product with a trained weight" in why


def test_noise_that_is_an_argument_is_no_layer():
    """Nor if it is part of the carried state, where nothing computes its gradient."""
    arguments = (*mlp(), CODES)
    assert stays(jax.grad(with_noise), *arguments).count(None) == 5
    carried = dict(enumerate([0, 1, 2])) | {5: 3}
    closed = flat(jax.grad(with_noise), *arguments)
    assert matrix_form(closed, Mixing(), None, carried).stays.count(None) == 5


def test_logits_of_a_single_layer_stay_inside_if_anything_multiplies_them():
    p, x, y = mlp()

    def evaluate(w, x, y):
        return jax.nn.one_hot(y, 64).T @ jax.nn.one_hot((x @ w).argmax(-1), 64)

    assert None not in stays(evaluate, p["c"], x, y)


def conditional(p, x, y):
    return mlp_loss(p, x + jax.nn.one_hot(y, 64) @ p["e"], y)


def test_labels_as_an_operand_stay_inside():
    p, x, y = mlp()
    found = stays(jax.grad(conditional), p | {"e": CODES}, x, y)
    # By the input of the first layer as well, which holds the embedding.
    assert found.count(None) == 6
    assert [n for n, why in enumerate(found) if "one-hot" in (why or "")] == [0, len(found) - 1]


def test_pixels_and_embedded_tokens_go_out():
    """Integers are labels only where nothing but comparisons reads them."""
    p, x, y = mlp()
    pixels = jnp.arange(128 * 64, dtype=jnp.uint8).reshape(128, 64)

    def of_pixels(p, x, y):
        return mlp_loss(p, x / 255.0, y)

    def of_tokens(p, x, y):
        return mlp_loss(p, p["e"][x], y)

    assert stays(jax.grad(of_pixels), p, pixels, y).count(None) == 5
    assert stays(jax.grad(of_tokens), p | {"e": CODES}, y, y).count(None) == 6


def test_frozen_layers_go_out_before_a_trained_one_and_without_any():
    p, x, y = mlp()
    teacher = {name: 2 * w for name, w in p.items()}

    def trained(name):
        return lambda w: mlp_loss(p | {name: w}, x, y)

    def distilled(p):
        return jnp.square(logits(p, x) - logits(teacher, x)).mean()

    assert stays(jax.grad(trained("a")), p["a"]).count(None) == 0
    assert stays(jax.grad(trained("c")), p["c"]).count(None) == 2
    assert stays(jax.grad(lambda x: mlp_loss(p, x, y)), x).count(None) == 4  # no weight is trained
    assert stays(jax.grad(distilled), p).count(None) == 5 + 2  # the teacher's layers too


def test_gradients_of_single_examples_are_named():
    found = stays(jax.vmap(jax.grad(mlp_loss), (None, 0, 0)), *mlp())
    assert found.count(None) == 3  # two layers, and one gradient by an input
    assert sum("last product" in (why or "") for why in found) == 3
    assert sum("gradient for each example" in (why or "") for why in found) == 2


# Marks


def marked(name, wrap=lambda f: f):
    """A perceptron of four layers with a mark on one value."""

    def keep(this, value):
        return tempo.keep_inside(value) if this == name else value

    @wrap
    def loss(p, x, y):
        h = x
        for layer in "abd":
            h = keep(layer, jax.nn.relu(h @ keep(f"weight {layer}", p[layer])))
        labels = keep("labels", y)
        z = h @ p["c"]
        return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()

    return loss


def four_layers():
    p, x, y = mlp()
    return p | {"d": uniform(9, 64, 64)}, x, y


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"]
)
@pytest.mark.parametrize(
    ("name", "out"),
    [("none", 8), ("b", 2), ("a", 3), ("weight b", 5), ("labels", 8)],
)
def test_marked_values_and_their_gradients_stay_inside(name, out, wrap):
    found = stays(jax.value_and_grad(marked(name, wrap)), *four_layers())
    assert found.count(None) == out
    assert any("keep_inside" in (why or "") for why in found) == (name != "none")


def test_marks_inside_loops_and_batches():
    p, x, y = four_layers()

    def scanned(p, x):
        def layer(h, w):
            return tempo.keep_inside(jnp.tanh(h @ w)), None

        h, _ = lax.scan(layer, x @ p["a"], jnp.stack([p["b"], p["d"]]))
        return jnp.square(h @ p["c"]).mean()

    assert stays(jax.grad(scanned), p, x).count(None) == 2  # of the layer before the loop

    def each_example(name):
        return stays(jax.vmap(jax.grad(marked(name)), (None, 0, 0)), p, x, y).count(None)

    assert each_example("none") == 5 and each_example("b") == 1

    def whole(p, x):
        def more(h):
            return jnp.tanh(tempo.keep_inside(h)) * 0.5

        h = lax.while_loop(lambda h: jnp.square(h).mean() > 1.0, more, x @ p["a"])
        return jax.nn.relu(h @ p["b"]) @ p["c"]

    found = stays(whole, p, x)
    assert found.count(None) == 0 and sum("keep_inside" in (why or "") for why in found) == 2


@pytest.mark.parametrize("scheme", [SignedPermutation(), Tempo(), Orthogonal()], ids=str)
def test_marks_count_under_every_scheme(scheme):
    def products(name):
        def step(p, x, y):
            grads = jax.grad(marked(name))(p, x, y)
            tx = tempo.cheap_update(optax.sgd(0.1))
            updates, _ = tx.update(grads, tx.init(p), p)
            return optax.apply_updates(p, updates), tempo.reveal(x.sum())

        made = plan(step, *arguments, stateful=True, scheme=scheme)
        assert_close(interpret(made), step(*arguments))
        return len(offloaded(made.plan)), set(made.plan.placement.kept_inside.values())

    p, x, y = four_layers()
    arguments = jax.tree.map(lambda w: w[:16, :16], (p, x)) + (y[:16] % 16,)
    # Both products around the mark, forward and backward; of the second the input's gradient too.
    assert products("none") == (11, set())
    assert products("b") == (11 - 6, {KEPT})


def test_marks_are_identities_outside_shield():
    tree = {"x": uniform(1, 3), "y": jnp.arange(3), "key": jax.random.key(0)}
    kept = jax.jit(tempo.keep_inside)(tree)
    assert_close(kept, tree)
    f = jax.vmap(jax.grad(lambda x: jnp.sin(tempo.keep_inside(x))))
    assert_close(f(tree["x"]), jnp.cos(tree["x"]))
    tangents = jax.jvp(tempo.keep_inside, (tree["x"],), (tree["x"],))
    assert_close(tangents, (tree["x"], tree["x"]))


def test_explain_names_what_a_mark_keeps_inside(enclave):
    step = tempo.shield(jax.grad(marked("b")), enclave=enclave, offload="all")
    report = str(step.explain(*four_layers()))
    assert "stays inside: `keep_inside` marks its result or an operand" in report


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


@pytest.mark.parametrize(("energy", "out"), [(10.0, True), (0.0, False)])
def test_products_of_activations_go_out_under_masks_alone(energy, out):
    """A sequence's spectrum names it, unless it is masked (S11 of the suite)."""
    scheme = Mixing(decoy_rows=32, mask_energy=energy)

    def loss(p, x, y):
        h = jnp.tanh(x @ p["a"])
        scores = jax.nn.softmax(h @ jnp.tanh(x @ p["b"]).T)
        return jnp.mean((jnp.tanh(scores @ h) @ p["c"] - y) ** 2)

    p = {name: uniform(i, 128, 128) for i, name in enumerate("abc")}
    found = stays(jax.grad(loss), p, uniform(3, 128, 128), uniform(4, 128, 128), scheme=scheme)
    reasons = [why for why in found if "both operands are activations" in (why or "")]
    assert len(reasons) == (0 if out else 6), "two products, each with its two gradients"
    assert None in found


def test_grouped_convolution_stays_inside():
    product, x, w = convolution(shape=(2, 6, 6, 4), out=4, feature_group_count=2)
    w = (*w[:2], 2, 4)
    (why,) = stays(product, uniform(1, *x), uniform(2, *w))
    assert "grouped convolution" in (why or "")


@pytest.mark.parametrize("rows", [128, 129, 160, 1000])
def test_decoys_fill_up_to_whole_blocks(rows):
    count = Mixing(decoy_rows=32).decoys(rows)
    assert 32 <= count < 96 and (rows + count) % 64 == 0
    assert Mixing(decoy_rows=0).decoys(rows) == 0


def test_costs_decide_by_the_family(enclave):
    step = tempo.shield(jax.grad(mlp_loss), enclave=enclave)
    report = str(step.explain(*mlp()))
    assert "on the devices: 0 products" in report
    assert "computing it inside takes about" in report


def test_gradient_kinds_are_named():
    (family,) = families(with_gradients(lambda x, w: x @ w), uniform(1, 4, 3), uniform(2, 3, 5))
    assert family.number(TO_INPUT) != family.number(TO_WEIGHT)
