"""`tempo.testing.compare` tells a step's own conditioning from a fault of ours."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import tempo_jax as tempo
from tempo_jax.jaxprs import trace
from tempo_jax.jaxprs.reorder import reordered
from tempo_jax.schemes import Mixing, Orthogonal, SignedPermutation
from tests.support.fresh import run_fresh
from tests.support.verification import lying

OPTIMIZER = tempo.cheap_update(optax.sgd(0.1, momentum=0.9))
ROWS, WIDTH = 256, 96


def norm(x, scale, shift):
    """Batch norm by the batch's own statistics."""
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) * lax.rsqrt(variance + 1e-5) * scale + shift


def convolved(x, kernel, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=numbers)


def residual_network(dtype) -> tuple[Any, Any]:
    """A step of an 18-layer residual network with batch norm, and its first state."""
    rng = np.random.default_rng(0)
    strides = (2, 1, 2, 1, 2, 1, 2, 1)  # to one pixel: the last norms see two values
    widths = (16, 16, 32, 32, 64, 64, 128, 128)

    def kernel(*shape):
        return jnp.asarray(rng.normal(0, (2 / np.prod(shape[:-1])) ** 0.5, shape), dtype)

    def normed(*shape):
        ones = jnp.ones(shape[-1], dtype)
        return {"kernel": kernel(*shape), "scale": ones, "shift": 0 * ones}

    params: Any = {"first": normed(3, 3, 3, 16), "last": kernel(128, 10)}
    before = 16
    for i, width in enumerate(widths):
        block: Any = {"a": normed(3, 3, before, width), "b": normed(3, 3, width, width)}
        if strides[i] > 1:
            block["skip"] = normed(1, 1, before, width)
        params[f"block{i}"], before = block, width

    def layer(p, x, stride=1):
        return norm(convolved(x, p["kernel"], stride), p["scale"], p["shift"])

    def loss_of(params, batch):
        x = jax.nn.relu(layer(params["first"], batch["image"], 2))
        for i, stride in enumerate(strides):
            block = params[f"block{i}"]
            y = layer(block["b"], jax.nn.relu(layer(block["a"], x, stride)))
            x = jax.nn.relu(y + (layer(block["skip"], x, stride) if "skip" in block else x))
        logits = x.mean((1, 2)) @ params["last"]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return each.mean()

    def step(state, batch):
        params, moments = state
        loss, gradients = jax.value_and_grad(loss_of)(params, batch)
        updates, moments = OPTIMIZER.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), tempo.reveal(loss)

    return step, (params, OPTIMIZER.init(params))


def deep_network() -> None:
    jax.config.update("jax_enable_x64", True)
    with tempo.Enclave.launch() as enclave:
        step, state = residual_network(jnp.float64)
        rng = np.random.default_rng(1)
        batch = {"image": jnp.asarray(rng.normal(size=(2, 32, 32, 3))), "label": jnp.arange(2)}
        shielded: Any = tempo.shield(
            step, enclave=enclave, scheme=SignedPermutation(), offload="all"
        )
        found = tempo.testing.compare(shielded, state, batch)
        assert found.verdict == "plain's own", found
        # A tolerance for float64 would call it a fault: norms over two values cancel.
        assert max(leaf.shielded for leaf in found.leaves) > 1e-10
        assert {leaf.verdict for leaf in found.leaves} == {"plain's own"}


def perceptron(state, x, *, labels):
    """A step of a perceptron."""
    params, moments = state

    def loss_of(params):
        hidden = jax.nn.gelu(x @ params["first"] + params["bias"])
        each = optax.softmax_cross_entropy_with_integer_labels(hidden @ params["last"], labels)
        return each.mean()

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, moments = OPTIMIZER.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), {"loss": tempo.reveal(loss)}


def perceptron_data() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(0, shape[0] ** -0.5, shape), jnp.float32)

    params = {"first": normal(WIDTH, WIDTH), "bias": normal(WIDTH), "last": normal(WIDTH, 10)}
    x = jnp.asarray(rng.standard_normal((ROWS, WIDTH)), jnp.float32)
    return (params, OPTIMIZER.init(params)), x, jnp.asarray(rng.integers(0, 10, ROWS))


def faults_are_ours() -> None:
    state, x, labels = perceptron_data()
    with tempo.Enclave.launch() as enclave:
        for scheme, lie in (
            (SignedPermutation(), 1e-3),
            (Orthogonal(budget=4), 1e-2),
            (Mixing(), 1e-1),
        ):
            step = tempo.shield(perceptron, enclave=enclave, scheme=scheme, offload="all")
            honest = tempo.testing.compare(step, state, x, labels=labels)
            assert honest.verdict == "plain's own", honest
            with lying(lambda product, lie=lie: product * np.float32(1 + lie), segment=1):
                lied = tempo.testing.compare(step, state, x, labels=labels)
            assert lied.verdict == "ours", lied
            assert str(lied).splitlines()[2].endswith("ours")
            names = {leaf.name for leaf in lied.leaves}
            assert {"state[0]['first']", "result[1]['loss']"} <= names
        print("done")


@pytest.mark.slow
def test_conditioning_is_plains_own():
    run_fresh(deep_network, seconds=500, optimized=False)


@pytest.mark.slow
def test_a_device_that_lies_is_ours():
    assert run_fresh(faults_are_ours, seconds=500).endswith("done\n")


def test_reordered_programs_are_the_same_programs():
    """At any depth, and exact where sums are."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.integers(-9, 9, (7, 5)), jnp.float32) for _ in range(2))

    def function(x, w):
        def body(carry, row):
            return carry + jnp.sum(row * w), jax.jit(jnp.matmul)(w, row)

        # Integers below 2**24: exact in any order.
        total, rows = lax.scan(jax.checkpoint(body), 0.0, x)
        doubled = lax.while_loop(lambda t: jnp.sum(t) < 9, lambda t: t + jnp.sum(jnp.abs(w)), x)
        chosen = lax.cond(total > 0, lambda a: a @ a.T, lambda a: -a @ a.T, x)
        gradient = jax.grad(lambda v: jnp.sum((v @ w.T) ** 2))(x)
        return total, rows, doubled, jax.nn.relu(chosen), gradient

    closed = trace.trace(function, (x, w))
    for seed in range(3):
        found = jax.jit(reordered(closed, seed))(x, w)
        for ours, theirs in zip(found, jax.tree.leaves(function(x, w)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_products_round_as_coarsely_as_asked():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)
    w = jnp.eye(64, dtype=jnp.float32)  # of one term each: no order changes the sums

    @jax.jit
    def inside(x):
        return lax.scan(jax.checkpoint(lambda c, _: (c @ w, None)), x, None, length=1)[0]

    closed = trace.trace(inside, (x,))
    for times in (0, 100):
        (found,) = jax.jit(reordered(closed, 0, times))(x)
        error = jnp.sqrt(jnp.mean((found - x) ** 2) / jnp.mean(x**2)) / jnp.finfo(x.dtype).eps
        assert abs(error - times) <= 0.05 * times


def kinks_are_the_roundings_own() -> None:
    """Where a product decides a comparison, rounding it changes the result by far more."""

    def step(w, x):
        def loss_of(w):
            # Sums of integers: many are exactly 0, in whatever order, where the slope changes.
            hidden = jax.nn.relu(x @ w["first"])
            return jnp.mean((jax.nn.relu(hidden @ w["second"]) @ w["last"] - 1) ** 2)

        return jax.grad(loss_of)(w), None

    rng = np.random.default_rng(0)
    sides = {"first": (128, 128), "second": (128, 128), "last": (128, 64)}
    w = {k: jnp.asarray(rng.normal(0, 0.1, side), jnp.float32) for k, side in sides.items()}
    w["first"] = jnp.asarray(rng.integers(-1, 2, (128, 128)), jnp.float32)
    x = jnp.asarray(rng.integers(-1, 2, (512, 128)), jnp.float32)
    with tempo.Enclave.launch() as enclave:
        for scheme in (Mixing(), Mixing(wire="bfloat16"), SignedPermutation()):
            shielded: Any = tempo.shield(step, enclave=enclave, scheme=scheme, offload="all")
            found = tempo.testing.compare(shielded, w, x, steps=1)
            assert found.verdict == "plain's own", found
            mixes = isinstance(scheme, Mixing)
            first = next(leaf for leaf in found.leaves if "first" in leaf.name)
            assert first.by_rounding == mixes, found
            assert (first.shielded > 1e-3) == mixes, found
            assert ("rounding of its products" in str(found)) == mixes
    print("done")


def test_what_a_scheme_rounds_is_said():
    assert run_fresh(kinks_are_the_roundings_own, seconds=200).endswith("done\n")


def test_sums_run_in_another_order():
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(4, 8, 8, 32)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 32, 8)), jnp.float32)
    for function, arguments in (
        (lambda x, k: convolved(x, k), (image, kernel)),
        (lambda x: x.reshape(-1, 32).T @ x.reshape(-1, 32), (image,)),
        (lambda x: jnp.sum(x, (0, 2)), (image,)),
    ):
        closed = trace.trace(function, arguments)
        plain, (other,) = jax.jit(function)(*arguments), jax.jit(reordered(closed, 1))(*arguments)
        np.testing.assert_allclose(other, plain, rtol=1e-3, atol=1e-4)
        assert not np.array_equal(other, plain)


def test_needs_a_step(enclave):
    step = tempo.shield(lambda w: w, enclave=enclave)
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        tempo.testing.compare(step, jnp.ones(2), steps=0)


def test_what_has_no_rounding_is_exact(enclave, capsys):
    """Counters and keys have nothing to round, and what is not finite is the same everywhere."""

    def step(state):
        key, _ = jax.random.split(state["key"])
        return {"key": key, "count": state["count"] + 1, "lost": state["lost"] * 0}

    shielded = tempo.shield(step, enclave=enclave)
    state = {"key": jax.random.key(3), "count": 0, "lost": jnp.array([jnp.inf, jnp.nan])}
    found = tempo.testing.compare(shielded, state)
    assert found.verdict == "plain's own" and [leaf.shielded for leaf in found.leaves] == [0, 0, 0]
    assert capsys.readouterr().out == f"{found}\n"
