"""Shielded training equals plain training, over models and ways to write a step.

All in float64 unless said otherwise. Products are offloaded however small they are
(`shield_all`), over several steps, so that leaves come back in their blinded form.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state
from jax import lax

import tempo_jax as tempo
from tempo_jax.planning.plan import offloaded
from tempo_jax.schemes import Mixing, Orthogonal, Tempo
from tests.support.interpreter import interpret, plan
from tests.support.models import (
    BATCH,
    CLASSES,
    F64,
    FEATURES,
    cross_entropy,
    images,
    plain_model,
    vectors,
)
from tests.support.steps import (
    Training,
    assert_close,
    assert_trains_alike,
    is_matrix,
    leaf_names,
    offloaded_products,
    shield_all,
    training,
    uniform_like,
)

Dense = functools.partial(linen.Dense, param_dtype=F64)
Conv = functools.partial(linen.Conv, param_dtype=F64)


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
