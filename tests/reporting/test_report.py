"""What `explain` says of a plan: its sentence, its layers, its forms."""

import json
import re
import xml.etree.ElementTree as ElementTree

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import tempo_jax as tempo
from tempo_jax.errors import UnsupportedError
from tempo_jax.jaxprs import equations
from tempo_jax.jaxprs.products import is_product
from tempo_jax.planning.plan import offloaded
from tempo_jax.reporting import costs
from tempo_jax.reporting.text import duration, percent
from tests.support.steps import shield_all

X = jnp.ones((128, 64))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(nn.Dense(64, name="wide")(x)), None


class Network(nn.Module):
    """Layers in every place that Flax has for them: remat, jit, scan, and plain."""

    @nn.compact
    def __call__(self, x):
        x, _ = nn.remat(Inner)(name="again")(x)
        x, _ = nn.jit(Inner)(name="compiled")(x)
        lifted = nn.scan(Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = lifted(name="layers")(x, None)
        return nn.Dense(64, name="last")(x)


def names(report):
    return [layer.name for layer in report.costs.layers]


@pytest.fixture(scope="module")
def network():
    return Network(), Network().init(jax.random.key(0), X)


@pytest.fixture(params=[None, tempo.schemes.Mixing()], ids=["signed permutations", "default"])
def gradient(network, enclave, request):
    model, _ = network
    options = {} if request.param is None else {"scheme": request.param}
    loss = jax.grad(lambda params, x: jnp.sum(model.apply(params, x) ** 2))
    return shield_all(loss, enclave=enclave, **options)


def test_rows_bear_the_users_names(gradient, network):
    report = gradient.explain(network[1], X)
    expected = ["again/wide", "compiled/wide", "layers/wide", "last"]
    assert names(report) == [*(f"Network/{name}" for name in expected), costs.OTHERS]
    text = str(report)
    assert all(re.search(rf"^Network/{name} ", text, re.M) for name in expected)
    # Three iterations of one name, each with its product and two gradients.
    scanned = report.costs.layers[2]
    assert scanned.products == 9 and 0 < scanned.outside <= 9


def test_without_scopes_rows_bear_the_weights_names(enclave):
    params = {"first": jnp.ones((64, 64)), "q": jnp.ones((64, 64)), "k": jnp.ones((64, 32))}

    def loss(params, x):
        h = jnp.tanh(x @ params["first"])
        return jnp.sum(jnp.tanh(h @ params["q"])) + jnp.sum(jnp.tanh(h @ params["k"]))

    def step(params, x):
        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params, x))

    expected = {"params['first']": 2, "params['q']": 3, "params['k']": 3}
    for function in (step, jax.grad(loss)):
        shielded = shield_all(function, enclave=enclave, placement="enclave", donate=False)
        layers = shielded.explain(params, X).costs.layers[:-1]
        assert {layer.name: layer.products for layer in layers} == expected


def test_a_product_without_a_name_has_its_line(enclave):
    report = shield_all(lambda x: jnp.tanh(x) @ jnp.sin(x).T, enclave=enclave).explain(X)
    assert re.fullmatch(r"test_report\.py:\d+", names(report)[0])


def test_scopes_are_named_once_under_custom_gradients():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    def loss(x, w):
        with jax.named_scope("outer"), jax.named_scope("inner"):
            return jnp.sum(product(x, w))

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(X, X.T).jaxpr
    found = [equations.scopes(e) for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert found and set(found) == {("outer", "inner")}


def test_first_a_sentence_then_totals_last_the_legend(gradient, network):
    lines = str(gradient.explain(network[1], X)).splitlines()
    assert re.match(r"`.+` sends \d+ of its 1[78] products, .* to the devices blinded by", lines[0])
    assert "the enclave about" in lines[1] and "inside" in lines[1] and "blinding" in lines[1]
    assert "MB go down" in lines[2] and "MB come back" in lines[2]
    assert "largest possible gain" in lines[3]
    assert lines[-1].startswith("legend: ") and "kN names" in lines[-1]


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (jnp.tanh, {}, "has no matrix product"),
        (lambda x: x @ x.T, {"placement": "enclave"}, 'as placement="enclave" asks'),
        (lambda x: x[:1] @ x.T, {}, "the lines below say why"),
    ],
    ids=["no products", "by option", "by the plan"],
)
def test_what_sends_nothing_says_why(enclave, function, options, words):
    report = tempo.shield(function, enclave=enclave, **options).explain(X)
    assert words in str(report).splitlines()[0]
    assert report.products[0] == 0 and "largest possible gain" not in str(report)


def test_marks_are_no_work(enclave):
    tx = tempo.cheap_update(optax.sgd(0.1))

    def step(w, x):
        gradient = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ tempo.keep_inside(w))))(w)
        return optax.apply_updates(w, tx.update(gradient, tx.init(w), w)[0]), tempo.reveal(w[0, 0])

    report = tempo.shield(step, enclave=enclave).explain(jnp.ones((64, 64)), X)
    assert any(e.primitive in costs.MARKERS for e in report.plan.jaxpr.eqns)
    assert "tempo_" not in str(report)


def test_layers_and_visits_add_up(gradient, network):
    report = gradient.explain(network[1], X)
    costs = report.costs
    assert sum(layer.bytes_down for layer in costs.layers) == report.bytes_down
    assert sum(layer.bytes_up for layer in costs.layers) == report.bytes_up
    assert sum(v.bytes_down for v in costs.visits) == report.bytes_down
    assert sum(v.bytes_up for v in costs.visits) == report.bytes_up
    assert len(costs.visits) == report.round_trips
    outside, total = report.offloaded_work
    assert sum(layer.work for layer in costs.layers) == total
    assert sum(layer.work_outside for layer in costs.layers) == outside
    assert sum(work for v in costs.visits for _, work in v.products) == outside
    products = sum(map(is_product, report.plan.jaxpr.eqns))
    assert report.products == (len(offloaded(report.plan)), products)
    for field in ("inside_seconds", "blinding_seconds"):
        by_layer = sum(getattr(layer, field) for layer in costs.layers)
        assert by_layer == pytest.approx(getattr(costs, field)) and by_layer > 0
    # None of the layers' own blinding is the rest's.
    assert costs.layers[-1].blinding_seconds < costs.blinding_seconds / 10


def test_everything_inside_costs_what_all_inside_does(enclave, network):
    model, params = network
    function = tempo.shield(model.apply, enclave=enclave, placement="enclave")
    costs = function.explain(params, X).costs
    assert costs.inside_seconds == pytest.approx(costs.all_inside_seconds)
    assert costs.blinding_seconds < 1e-3 and len(costs.visits) == 1


def test_repetitions_of_a_loop_count(enclave):
    def looped(x):
        return jax.lax.fori_loop(0, 100, lambda _, x: jnp.tanh(x @ x), x)

    x = jnp.ones((64, 64))
    once = tempo.shield(lambda x: jnp.tanh(x @ x), enclave=enclave).explain(x).costs
    often = tempo.shield(looped, enclave=enclave).explain(x).costs
    assert 50 < often.all_inside_seconds / once.all_inside_seconds < 200


def test_json_has_the_figures(gradient, network):
    report = gradient.explain(network[1], X)
    fields = json.loads(report.to_json())
    assert (fields["products_outside"], fields["products"]) == report.products
    assert fields["sentence"] == str(report).splitlines()[0]
    assert [layer["name"] for layer in fields["layers"]] == names(report)
    assert fields["bytes_down"] == report.bytes_down
    assert fields["largest_gain"] == report.costs.largest_gain
    assert len(fields["visits"]) == report.round_trips


def test_json_names_the_options_as_shield_does(enclave):
    def named(**options):
        report = tempo.shield(lambda x: x @ x.T, enclave=enclave, **options).explain(X)
        fields = json.loads(report.to_json())
        return fields["placement"], fields["offload"]

    assert named() == ("auto", "auto")
    assert named(offload="all") == ("auto", "all")
    assert named(placement="enclave") == ("enclave", None)


def test_the_suffix_names_the_form(gradient, network, tmp_path):
    report = gradient.explain(network[1], X)
    report.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == report.to_json()
    report.save(str(tmp_path / "plan.txt"))
    assert (tmp_path / "plan.txt").read_text() == str(report)
    with pytest.raises(UnsupportedError, match=r"suffix is '.pdf', expected one of .html, .json"):
        report.save(tmp_path / "plan.pdf")
    assert not (tmp_path / "plan.pdf").exists()


def test_page_needs_nothing_beside_itself(gradient, network, tmp_path):
    report = gradient.explain(network[1], X)
    report.save(tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text()
    assert page.startswith("<!doctype html>") and report._repr_html_() in page
    assert not re.search(r"<script|<link|src=|href=|url\(|https?:", page)
    (svg,) = re.findall(r'<svg viewBox="0 0 1000.*?</svg>', page, re.S)
    boxes = [e for e in ElementTree.fromstring(svg).iter("rect") if e.get("class") == "devices"]
    titles = ["".join(e.itertext()) for e in boxes]
    assert sum(title.startswith("Network/") for title in titles) == report.products[0]
    # Drawn to scale, and inside the drawing.
    edges = [float(e.get("x", 0)) + float(e.get("width", 0)) for e in boxes]
    assert max(edges) <= 990.1 and all(float(e.get("height", -1)) >= 0 for e in boxes)


def test_page_escapes_the_users_names(enclave):
    @jax.named_scope("<script>alert(1)</script>")
    def product(x):
        return x @ x.T

    report = shield_all(product, enclave=enclave).explain(X)
    assert "alert" in report._repr_html_() and "<script" not in report._repr_html_()


def test_an_enclave_without_visits_can_be_drawn(enclave):
    report = tempo.shield(lambda x: x, enclave=enclave).explain(X)
    assert "<svg" in report._repr_html_() and str(report) and report.to_json()


def test_explaining_refuses_what_calling_refuses(enclave):
    callback = lambda x: jax.pure_callback(lambda y: y, x, x)  # noqa: E731
    with pytest.raises(UnsupportedError, match="calls back into"):
        tempo.shield(callback, enclave=enclave).explain(X)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 ms"),
        (1e-5, "0 ms"),
        (2e-4, "0.2 ms"),
        (0.0834, "83 ms"),
        (0.1, "0.1 s"),
        (120, "120 s"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("part", "words"), [(0, "0%"), (1, "<1%"), (500, "50%"), (999, ">99%"), (1000, "100%")]
)
def test_shares_are_not_rounded_to_nothing_or_all(part, words):
    assert percent(part, 1000) == words
