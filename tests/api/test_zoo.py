"""Shielded training equals plain training, over models, optimizers and ways to write a step.

All in float64 unless said otherwise. Products are offloaded however small they are
(`shield_all`), over several steps, so that leaves come back in their blinded form.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from flax import linen, nnx
from flax.training import train_state
from jax import lax

import tempo_jax as tempo
from tempo_jax.planning.plan import offloaded
from tempo_jax.schemes import Mixing, Orthogonal, Tempo
from tests.support.interpreter import interpret, plan
from tests.support.steps import (
    TOLERANCE,
    Training,
    assert_close,
    assert_trains_alike,
    is_matrix,
    leaf_names,
    offloaded_products,
    shield_all,
    training,
    uniform,
    uniform_like,
)

BATCH, FEATURES, CLASSES = 8, 12, 9
F64 = jnp.float64
Dense = functools.partial(linen.Dense, param_dtype=F64)
Conv = functools.partial(linen.Conv, param_dtype=F64)


def vectors(*inner: int) -> list[dict[str, jax.Array]]:
    """Two batches of vectors, or of sequences of them, with labels."""
    labels = jnp.arange(BATCH) % CLASSES
    return [{"x": uniform(s, BATCH, *inner, FEATURES), "y": labels} for s in (101, 102)]


def images(channels: int) -> list[dict[str, jax.Array]]:
    """Two batches of 6 by 6 images with labels."""
    labels = jnp.arange(BATCH) % CLASSES
    return [{"x": uniform(s, BATCH, 6, 6, channels), "y": labels} for s in (103, 104)]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def plain_model(
    apply: Callable[[Any, jax.Array], jax.Array],
    shapes: dict[str, tuple[int, ...]],
    batches: list[Any],
    tx: Any,
) -> Training:
    """A model written as a function of a dict of arrays."""

    def loss(parameters: Any, rest: Any, batch: Any) -> Any:
        logits = apply(parameters, batch["x"])
        return cross_entropy(logits, batch["y"]), (rest, logits)

    parameters = uniform_like({name: jnp.zeros(shape) for name, shape in shapes.items()})
    return training(loss, parameters, batches, tx)


def linen_model(
    model: linen.Module, batches: list[Any], tx: Any, rngs: Any = None, mutable: Any = ()
) -> Training:
    """A Flax linen model; the rest of its state is a key and its mutable collections."""
    key = jax.random.key(11)
    streams = {"params": key, **({} if rngs is None else {rngs: key})}
    # Drawing weights op by op takes longer than the test, so only their shapes are computed.
    shapes = jax.eval_shape(model.init, streams, batches[0]["x"])
    parameters = uniform_like(shapes["params"])

    @jax.jit
    def collections() -> Any:
        variables = model.init(streams, batches[0]["x"])
        return jax.tree.map(F64, {name: variables[name] for name in mutable})

    def loss(parameters: Any, rest: Any, batch: Any) -> Any:
        now, later = jax.random.split(rest["key"])
        logits, updated = model.apply(
            {"params": parameters, **rest["collections"]},
            batch["x"],
            rngs={} if rngs is None else {rngs: now},
            mutable=list(mutable),
        )
        rest = {"key": later, "collections": updated}
        return cross_entropy(logits, batch["y"]), (rest, logits)

    return training(loss, parameters, batches, tx, {"key": key, "collections": collections()})


# Models


def mlp(tx: Any) -> Training:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        h = jax.nn.relu(x @ p["w1"] + p["b1"])
        return jax.nn.gelu(h @ p["w2"] + p["b2"]) @ p["w3"]

    shapes = {"w1": (FEATURES, 16), "b1": (16,), "w2": (16, 10), "b2": (10,), "w3": (10, CLASSES)}
    return plain_model(apply, shapes, vectors(), tx)


class BatchNormConvNet(linen.Module):
    """A residual block with batch norm and a strided convolution."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(
            linen.BatchNorm, use_running_average=False, momentum=0.9, param_dtype=F64
        )
        x = Conv(10, (3, 3), use_bias=False)(x)
        x = linen.relu(norm()(x))
        y = Conv(12, (3, 3), strides=2, use_bias=False)(x)
        y = linen.relu(norm()(y)) + Conv(12, (1, 1), strides=2, use_bias=False)(x)
        y = linen.max_pool(y, (2, 2), (1, 1), "SAME")
        return Dense(CLASSES)(y.mean((1, 2)))


def batch_norm_conv_net(tx: Any) -> Training:
    return linen_model(BatchNormConvNet(), images(8), tx, mutable=["batch_stats"])


class GroupedConvNet(linen.Module):
    """Grouped, depthwise, dilated and transposed convolutions."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(Conv(12, (3, 3), feature_group_count=2)(x))
        x = jnp.tanh(Conv(12, (3, 3), feature_group_count=12, padding="CIRCULAR")(x))
        x = jnp.tanh(Conv(10, (2, 2), kernel_dilation=2, padding="VALID")(x))
        x = jnp.tanh(linen.ConvTranspose(8, (3, 3), strides=(2, 1), param_dtype=F64)(x))
        return Dense(CLASSES)(x.mean((1, 2)))


def grouped_conv_net(tx: Any) -> Training:
    return linen_model(GroupedConvNet(), images(8), tx)


class Attention(linen.Module):
    """A block of causal attention with dropout, layer norm and a feed-forward net."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = linen.LayerNorm(param_dtype=F64)(x)
        y = linen.MultiHeadDotProductAttention(
            2, dropout_rate=0.2, deterministic=False, param_dtype=F64
        )(y, mask=linen.make_causal_mask(x[..., 0]))
        x = x + linen.Dropout(0.2, deterministic=False)(y)
        return Dense(CLASSES)(linen.gelu(Dense(20)(x.mean(1))))


def attention(tx: Any) -> Training:
    return linen_model(Attention(), vectors(5), tx, rngs="dropout")


def scan_over_layers(tx: Any) -> Training:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        def layer(h: jax.Array, weights: Any) -> Any:
            w, b = weights
            return h + jnp.tanh(h @ w + b), None

        h, _ = lax.scan(layer, x, (p["w"], p["b"]))
        return h @ p["head"]

    shapes = {"w": (3, FEATURES, FEATURES), "b": (3, FEATURES), "head": (FEATURES, CLASSES)}
    return plain_model(apply, shapes, vectors(), tx)


@jax.custom_vjp
def clipped_gradient(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product whose gradient is cut off."""
    return x @ w


def _clipped_forward(x: jax.Array, w: jax.Array) -> Any:
    return x @ w, (x, w)


def _clipped_backward(residuals: Any, ct: jax.Array) -> Any:
    x, w = residuals
    ct = jnp.clip(ct, -0.05, 0.05)
    return ct @ w.T, x.T @ ct


clipped_gradient.defvjp(_clipped_forward, _clipped_backward)


def custom_vjp(tx: Any) -> Training:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return clipped_gradient(jax.nn.silu(clipped_gradient(x, p["w1"])), p["w2"])

    return plain_model(apply, {"w1": (FEATURES, 16), "w2": (16, CLASSES)}, vectors(), tx)


def rematerialized(tx: Any) -> Training:
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def block(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    @jax.checkpoint
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return block(x, p["w"]) @ p["head"]

    shapes = {"w": (FEATURES, FEATURES), "head": (FEATURES, CLASSES)}
    return plain_model(apply, shapes, vectors(), tx)


class TiedLanguageModel(linen.Module):
    """An embedding that is also the last layer's matrix."""

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = linen.Embed(CLASSES, 10, param_dtype=F64)
        x = embed(tokens).mean(1)
        return embed.attend(jnp.tanh(Dense(10)(x)))


def embedding(tx: Any) -> Training:
    tokens = jnp.arange(BATCH * 5).reshape(BATCH, 5) % CLASSES
    batches = [{"x": tokens, "y": tokens[:, 0]}, {"x": tokens[::-1], "y": tokens[:, 1]}]
    return linen_model(TiedLanguageModel(), batches, tx)


def accumulated_gradients(tx: Any) -> Training:
    """Means of gradients over microbatches, by a scan around `grad`."""
    tx = tempo.cheap_update(tx)

    def loss(w: Any, batch: Any) -> jax.Array:
        h = jnp.tanh(jnp.tanh(batch["x"] @ w["first"]) @ w["second"])
        return cross_entropy(h @ w["head"], batch["y"])

    def step(state: Any, batch: Any) -> Any:
        micro = jax.tree.map(lambda x: x.reshape(2, BATCH // 2, *x.shape[1:]), batch)

        def accumulate(total: Any, part: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(state["w"], part)
            return jax.tree.map(jnp.add, total, (value, grads)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["w"]))
        (value, grads), _ = lax.scan(accumulate, zero, micro)
        updates, optimizer = tx.update(grads, state["opt"], state["w"])
        new = {"w": optax.apply_updates(state["w"], updates), "opt": optimizer}
        return new, tempo.reveal(value)

    shapes = {"first": (FEATURES, 16), "second": (16, 10), "head": (10, CLASSES)}
    w = uniform_like({name: jnp.zeros(shape) for name, shape in shapes.items()})
    return Training(step, {"w": w, "opt": tx.init(w)}, vectors())


def flax_train_state(tx: Any) -> Training:
    """Flax's own `TrainState`, with static fields and a Python counter."""
    model = linen.Sequential([Dense(16), linen.tanh, Dense(CLASSES)])
    batches = vectors()
    shapes = jax.eval_shape(model.init, jax.random.key(0), batches[0]["x"])
    parameters = uniform_like(shapes["params"])
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=parameters, tx=tempo.cheap_update(tx)
    )

    def step(state: Any, batch: Any) -> Any:
        def loss(parameters: Any) -> jax.Array:
            logits = state.apply_fn({"params": parameters}, batch["x"])
            return cross_entropy(logits, batch["y"])

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), {"loss": tempo.reveal(value)}

    return Training(step, state, batches)


class NnxNet(nnx.Module):
    """A net with batch norm and dropout, as `flax.nnx` writes it."""

    def __init__(self, rngs: nnx.Rngs):
        """Draws the weights."""
        # A bias before batch norm has the gradient 0, and Adam would scale up its rounding.
        self.first = nnx.Linear(FEATURES, 16, use_bias=False, param_dtype=F64, rngs=rngs)
        self.norm = nnx.BatchNorm(16, param_dtype=F64, rngs=rngs)
        self.norm.mean = nnx.BatchStat(jnp.zeros(16))
        self.norm.var = nnx.BatchStat(jnp.ones(16))
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.second = nnx.Linear(16, CLASSES, param_dtype=F64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps vectors to logits."""
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


def nnx_state(tx: Any) -> Training:
    """An nnx model and optimizer, split into a closed-over graph and a pytree of state."""
    model = jax.jit(lambda: NnxNet(nnx.Rngs(params=0, dropout=1)))()
    optimizer = nnx.Optimizer(model, tempo.cheap_update(tx), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def step(state: Any, batch: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(batch["x"]), batch["y"]))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), {"loss": tempo.reveal(loss)}

    return Training(step, state, vectors())


MODELS = [
    mlp,
    batch_norm_conv_net,
    grouped_conv_net,
    attention,
    scan_over_layers,
    custom_vjp,
    rematerialized,
    embedding,
    accumulated_gradients,
    flax_train_state,
    nnx_state,
]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_models(enclave, model):
    case = model(optax.adamw(1e-2))
    shielded = shield_all(case.step, enclave=enclave)
    assert offloaded_products(shielded, case.state, case.batches[0]) >= 3
    assert_trains_alike(shielded, enclave, case)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    ("scheme", "tolerance"),
    [(Mixing(), 1e-9), (Tempo(), 1e-10), (Orthogonal(2), 1e-10)],
    ids=["mixing", "tempo", "orthogonal"],
)
def test_models_under_every_scheme(monkeypatch, model, scheme, tolerance):
    """One step in this process, by the reference interpreter: nothing compiles but plain JAX."""
    # Mixing keeps products as small as these inside, for what they would hide too little.
    monkeypatch.setattr(Mixing, "least_rows", 1)
    monkeypatch.setattr(Mixing, "least_side", 1)
    monkeypatch.setattr(Mixing, "first_layer_share", 0.0)
    case = model(tempo.cheap_update(optax.sgd(0.1, momentum=0.9)))
    flat = plan(case.step, case.state, case.batches[0], stateful=True, scheme=scheme)
    assert offloaded(flat.plan)
    expected = jax.jit(case.step)(case.state, case.batches[0])
    assert_close(interpret(flat), expected, tolerance)


def test_everything_inside(enclave):
    case = mlp(optax.adamw(1e-2))
    shielded = shield_all(case.step, enclave=enclave, placement="enclave")
    assert offloaded_products(shielded, case.state, case.batches[0]) == 0
    assert_trains_alike(shielded, enclave, case)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # One rounding of a product to the format, which reordering its sum can turn over, grown
    # by the few layers and steps: about 10 units in the last place of values near 1.
    [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-5), (jnp.float16, 2**-8)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_mixed_precision(enclave, dtype, tolerance):
    def apply(p: Any, x: jax.Array) -> jax.Array:
        low = jax.tree.map(lambda w: w.astype(dtype), p)
        h = jax.nn.relu(x.astype(dtype) @ low["w1"])
        return jnp.tanh(h @ low["w2"]).astype(jnp.float32)

    # Momentum is linear in the gradient; Adam would blow up the error of small gradients.
    shapes = {"w1": (FEATURES, 16), "w2": (16, CLASSES)}
    case = plain_model(apply, shapes, vectors(), optax.sgd(0.1, momentum=0.9))
    shielded = shield_all(case.step, enclave=enclave)
    assert leaf_names("state", case.state, is_matrix) == set(
        shielded.explain(case.state, case.batches[0]).resident
    )
    assert_trains_alike(shielded, enclave, case, tolerance)


# Optimizers


def small_conv_net(tx: Any) -> Training:
    """One convolution and two dense layers, large enough that Adafactor factors them."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        h = lax.conv_general_dilated(
            x, p["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jax.nn.gelu(h + p["b1"]).mean((1, 2))
        return jnp.tanh(h @ p["w1"] + p["b2"]) @ p["w2"]

    shapes = {
        "conv": (3, 3, 8, 10),
        "b1": (10,),
        "w1": (10, 12),
        "b2": (12,),
        "w2": (12, CLASSES),
    }
    return plain_model(apply, shapes, images(8), tx)


def is_wide(parameters: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, parameters)


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.05, 2, 10)
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01),
    "lion": optax.lion(0.01),
    "rmsprop": optax.rmsprop(0.01, centered=True, momentum=0.9),
    "adagrad": optax.adagrad(0.1),
    "adafactor": optax.adafactor(0.05, min_dim_size_to_factor=8, momentum=0.9),
    "muon": optax.contrib.muon(0.05),
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01)),
    "masked": optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), is_wide), optax.sgd(0.1, momentum=0.9)
    ),
    "schedule": optax.adamw(SCHEDULE),
    "multi_steps": optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.01), 3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(enclave, name):
    case = small_conv_net(OPTIMIZERS[name])
    shielded = shield_all(case.step, enclave=enclave)
    assert_trains_alike(shielded, enclave, case)
    # Every kernel and every moment of one stays on the devices.
    resident = set(shielded.explain(case.state, case.batches[0]).resident)
    assert leaf_names("state", case.state, is_matrix) <= resident


def exponentials() -> optax.GradientTransformation:
    """An update that does not commute with signs: the exponential of the gradient."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda g: -0.01 * jnp.exp(g), updates))


def test_unsuitable_optimizer_falls_back_leaf_by_leaf(enclave):
    labels = {"conv": "usual", "b1": "usual", "w1": "odd", "b2": "usual", "w2": "usual"}
    tx = optax.partition({"usual": optax.adam(0.01), "odd": exponentials()}, labels)
    case = small_conv_net(tx)
    shielded = shield_all(case.step, enclave=enclave)
    report = shielded.explain(case.state, case.batches[0])
    weight = "state['params']['w1']"
    assert leaf_names("state", case.state, is_matrix) - {weight} <= set(report.resident)
    assert "exp" in report.fallbacks[weight]
    assert_trains_alike(shielded, enclave, case)


def test_update_that_is_not_marked_stays_inside(enclave):
    tx = optax.adam(0.01)

    def step(state: Any, batch: Any) -> Any:
        w, optimizer = state
        value, grads = jax.value_and_grad(lambda w: jnp.sum(jnp.tanh(batch @ w) ** 2))(w)
        updates, optimizer = tx.update(grads, optimizer, w)
        return (optax.apply_updates(w, updates), optimizer), tempo.reveal(value)

    w = uniform(1, FEATURES, 10)
    case = Training(step, (w, tx.init(w)), [uniform(2, BATCH, FEATURES)])
    shielded = shield_all(step, enclave=enclave)
    report = shielded.explain(case.state, case.batches[0])
    assert not report.resident and not report.fallbacks
    assert offloaded_products(shielded, case.state, case.batches[0]) >= 2
    assert_trains_alike(shielded, enclave, case, TOLERANCE)


def test_two_optimizers_of_one_model(enclave):
    """Weights under two updates, one of which reads the other's parameters (an average)."""
    tx = tempo.cheap_update(optax.sgd(0.1))
    average = tempo.cheap_update(optax.ema(0.9))

    def step(state: Any, batch: Any) -> Any:
        w, optimizer, shadow = state
        value, grads = jax.value_and_grad(lambda w: jnp.sum(jnp.tanh(batch @ w) ** 2))(w)
        updates, optimizer = tx.update(grads, optimizer, w)
        w = optax.apply_updates(w, updates)
        _, shadow = average.update(w, shadow)
        return (w, optimizer, shadow), tempo.reveal(value)

    w = uniform(1, FEATURES, 10)
    state = (w, tx.init(w), average.init(w))
    case = Training(step, state, [uniform(2, BATCH, FEATURES)])
    shielded = shield_all(step, enclave=enclave)
    assert leaf_names("state", state, is_matrix) <= set(
        shielded.explain(state, case.batches[0]).resident
    )
    assert_trains_alike(shielded, enclave, case)
