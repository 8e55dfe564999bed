"""What users hear without asking: warnings, once each, and a line for each new signature."""

import logging
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import tempo_jax as tempo
from tempo_jax.errors import PlanWarning
from tests.support.steps import shield_all

W, X = [jnp.ones((64, 64))] * 3, jnp.ones((128, 64))


def step(w, x, tx):
    def loss(w):
        h = x
        for layer in w:
            h = jnp.tanh(h @ layer)
        return jnp.sum(h)

    gradient = jax.grad(loss)(w)
    return optax.apply_updates(w, tx.update(gradient, tx.init(w), w)[0])


def marked(w, x):
    return step(w, x, tempo.cheap_update(optax.sgd(0.1)))


def plain(w, x):
    return step(w, x, optax.sgd(0.1))


def heard(function, *arguments):
    """What a call warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PlanWarning)
        function(*arguments)
    return [w for w in caught if w.category is PlanWarning]


def test_a_plan_that_sends_little_out_says_what_would_change_that(enclave):
    weights = [jnp.ones((1024, 1024), jnp.float32)] * 3
    shielded = tempo.shield(plain, enclave=enclave, donate=False)
    (warning,) = heard(shielded, weights, jnp.ones((64, 1024), jnp.float32))
    text = str(warning.message)
    assert re.search(r"sends 0 of its \d products .*From [\d,]+ rows on \(now 64\)", text)
    assert warning.filename == __file__  # the user's own line
    assert text.split(". ")[1] in str(shielded.explain(weights, jnp.ones((64, 1024), jnp.float32)))


def test_each_warning_comes_once_for_a_function(enclave):
    shielded = tempo.shield(plain, enclave=enclave, donate=False)
    assert len(heard(shielded, W, X)) == 1
    assert not heard(shielded, W, X)
    assert not heard(shielded, W, X[:64])  # a new signature
    assert len(heard(tempo.shield(plain, enclave=enclave), W, X)) == 1


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (plain, {"placement": "enclave"}),
        (marked, {"placement": "enclave"}),
        (lambda w, x: jnp.tanh(x), {}),
    ],
    ids=["asked for", "asked for, and marked", "no products"],
)
def test_what_was_asked_for_is_no_warning(enclave, function, options):
    assert not heard(tempo.shield(function, enclave=enclave, donate=False, **options), W, X)


def test_what_leaves_is_no_warning(enclave):
    assert not heard(shield_all(plain, enclave=enclave), W, X)
    assert not heard(shield_all(marked, enclave=enclave), W, X)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (tempo.schemes.Mixing(), "mixing has new keys for every step"),
        (tempo.schemes.Orthogonal(), "does not commute with orthogonal matrices"),
    ],
    ids=["keys of a step", "an update that does not commute"],
)
def test_cheap_update_without_effect(enclave, scheme, words):
    def adam(w, x):
        return step(w, x, tempo.cheap_update(optax.adam(0.1)))

    shielded = shield_all(adam, enclave=enclave, scheme=scheme)
    (warning,) = heard(shielded, W, X)
    assert "`cheap_update` has no effect on `adam`: " in str(warning.message)
    assert words in str(warning.message)


def test_mesh_without_effect(enclave):
    mesh = Mesh(np.array(jax.devices()[:2]), ("w",))
    options = {"enclave": enclave, "mesh": mesh, "donate": False}
    (warning,) = heard(tempo.shield(plain, placement="enclave", **options), W, X)
    assert "`mesh=` has no effect on `plain`: nothing leaves" in str(warning.message)
    odd = shield_all(lambda w, x: jnp.tanh(x @ w), **options)
    (warning,) = heard(odd, jnp.ones((63, 65)), jnp.ones((67, 63)))
    assert "no axis of what crosses can be split over 2 devices" in str(warning.message)
    assert not heard(shield_all(plain, **options), W, X)


def test_signatures_are_logged_and_warnings_are_not_said_twice(enclave, caplog):
    with caplog.at_level(logging.INFO, logger="tempo_jax"):
        shielded = tempo.shield(plain, enclave=enclave, donate=False)
        (warning,) = heard(shielded, W, X)
        heard(shielded, W, X)
        heard(shielded, W, X[:64])
    lines = [r.message for r in caplog.records if r.name == "tempo_jax"]
    assert str(warning.message) not in lines
    signatures = [line for line in lines if "planned in" in line]
    assert len(signatures) == 2  # one for each signature, none for a repeated call
    pattern = r"`plain`: planned in [\d.]+ s \(0 of 8 products go out\), exported in [\d.]+ s, "
    assert re.match(pattern + r"compiled in the enclave in [\d.]+ s$", signatures[0])


def test_debugging_that_shows_nothing_is_said_once(enclave):
    def talkative(x):
        jax.debug.print("x {}", x)
        jax.lax.cond(jnp.sum(x) > 0, lambda: jax.debug.callback(print, x), lambda: None)
        return x + 1

    shielded = tempo.shield(talkative, enclave=enclave, donate=False)
    (warning,) = heard(shielded, jnp.ones(3))
    lines = [talkative.__code__.co_firstlineno + n for n in (1, 2)]
    named = ", ".join(f"test_notices.py:{line}" for line in lines)
    assert f"`jax.debug` in `talkative` ({named}) prints and calls nothing" in str(warning.message)
    assert not heard(shielded, jnp.ones(3)) and not heard(shielded, jnp.ones(4))
