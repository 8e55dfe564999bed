"""Libraries of layers: a training step of each equals plain JAX's."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import tempo_jax as tempo
from tests.support.steps import Training, assert_trains_alike, shield_all, training, uniform

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

ROWS, FEATURES, CLASSES = 256, 12, 5
LABELS = jnp.arange(ROWS) % CLASSES
VECTORS = [{"x": uniform(seed, ROWS, FEATURES), "y": LABELS} for seed in (1, 2)]
ADAM = optax.adam(1e-2)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def check(enclave: tempo.Enclave, case: Training, tolerance: float = 1e-10) -> None:
    assert_trains_alike(shield_all(case.step, enclave=enclave), enclave, case, tolerance, steps=2)


def test_equinox(enclave):
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        """Attention between the halves of a row, dropout, a check, and a perceptron."""

        attention: Any
        norm: Any
        dropout: Any
        head: Any

        def __init__(self, key: jax.Array):
            first, second = jax.random.split(key)
            self.attention = eqx.nn.MultiheadAttention(2, FEATURES // 2, key=first)
            self.norm = eqx.nn.LayerNorm(FEATURES)
            self.dropout = eqx.nn.Dropout(0.25)
            self.head = eqx.nn.MLP(FEATURES, CLASSES, 16, 2, key=second)

        def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
            halves = x.reshape(2, FEATURES // 2)
            x = x + self.attention(halves, halves, halves).reshape(FEATURES)
            x = eqx.error_if(x, jnp.abs(x).max() > 1e3, "the inputs are too large")
            return self.head(self.dropout(self.norm(x), key=key))

    model = Network(jax.random.key(0))
    parameters, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(parameters: Any, key: Any, batch: Any) -> Any:
        network = eqx.combine(parameters, static)
        key, own = jax.random.split(key)
        logits = jax.vmap(network)(batch["x"], jax.random.split(own, ROWS))
        return cross_entropy(logits, batch["y"]), (key, logits)

    check(enclave, training(loss, parameters, VECTORS, ADAM, jax.random.key(1)))


def test_haiku(enclave):
    hk = pytest.importorskip("haiku")

    @hk.transform_with_state
    def network(x: jax.Array) -> jax.Array:
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(16)(x), is_training=True)
        x = hk.dropout(hk.next_rng_key(), 0.25, jax.nn.relu(x))
        return hk.nets.MLP([16, CLASSES])(x)

    parameters, rest = network.init(jax.random.key(0), VECTORS[0]["x"])

    def loss(parameters: Any, rest: Any, batch: Any) -> Any:
        key, own = jax.random.split(rest[1])
        logits, norms = network.apply(parameters, rest[0], own, batch["x"])
        return cross_entropy(logits, batch["y"]), ((norms, key), logits)

    check(enclave, training(loss, parameters, VECTORS, ADAM, (rest, jax.random.key(1))))


def test_keras(enclave, monkeypatch):
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((FEATURES,), dtype="float64"),
            keras.layers.Dense(16, "gelu", dtype="float64"),
            keras.layers.BatchNormalization(dtype="float64"),
            keras.layers.Dropout(0.25, seed=1, dtype="float64"),
            keras.layers.Dense(CLASSES, dtype="float64"),
        ]
    )
    optimizer = keras.optimizers.Adam(1e-2)
    optimizer.build(model.trainable_variables)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")

    def loss(trained: Any, others: Any, batch: Any) -> Any:
        logits, others = model.stateless_call(trained, others, batch["x"], training=True)
        return entropy(batch["y"], logits), others

    def step(state: Any, batch: Any) -> Any:
        trained, others, moments = state
        (value, others), grads = jax.value_and_grad(loss, has_aux=True)(trained, others, batch)
        trained, moments = optimizer.stateless_apply(moments, grads, trained)
        return (trained, others, moments), tempo.reveal(value)

    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
    )
    state = jax.tree.map(lambda v: jnp.asarray(v.value), variables)
    # Keras keeps Adam's learning rate in float32, and everything that it multiplies.
    check(enclave, Training(step, state, VECTORS), 1e-6)


def test_penzai(enclave):
    pz = pytest.importorskip("penzai.pz")
    mlp = pytest.importorskip("penzai.models.simple_mlp")
    model = mlp.MLP.from_config(
        name="mlp", init_base_rng=jax.random.key(0), feature_sizes=[FEATURES, 16, CLASSES]
    )
    unbound, parameters = pz.unbind_params(model, freeze=True)

    def loss(parameters: Any, rest: Any, batch: Any) -> Any:
        x = pz.nx.wrap(batch["x"]).tag("batch", "features")
        logits = pz.bind_variables(unbound, parameters)(x).unwrap("batch", "features")
        return cross_entropy(logits, batch["y"]), (rest, logits)

    check(enclave, training(loss, parameters, VECTORS, ADAM))


def test_jraph(enclave):
    jraph = pytest.importorskip("jraph")
    senders = (jnp.arange(3 * ROWS) * 7) % ROWS
    receivers = jnp.arange(3 * ROWS) % ROWS

    def loss(parameters: Any, rest: Any, batch: Any) -> Any:
        graph = jraph.GraphsTuple(
            nodes=batch["x"],
            edges=None,
            senders=senders,
            receivers=receivers,
            n_node=jnp.asarray([ROWS]),
            n_edge=jnp.asarray([3 * ROWS]),
            globals=None,
        )
        for name in ("first", "second"):
            layer = jraph.GraphConvolution(
                lambda nodes, w=parameters[name]: jnp.tanh(nodes @ w), add_self_edges=True
            )
            graph = layer(graph)
        return cross_entropy(graph.nodes, batch["y"]), (rest, graph.nodes)

    parameters = {"first": uniform(3, FEATURES, 16), "second": uniform(4, 16, CLASSES)}
    check(enclave, training(loss, parameters, VECTORS, ADAM))


def test_e3nn(enclave):
    e3nn = pytest.importorskip("e3nn_jax")
    linen = pytest.importorskip("e3nn_jax.flax")
    layer = linen.Linear("8x0e + 4x1o")
    last = linen.Linear(f"{CLASSES}x0e")

    def forward(parameters: Any, positions: jax.Array) -> jax.Array:
        harmonics = e3nn.spherical_harmonics("0e + 1o + 2e", positions, normalize=True)
        hidden = layer.apply(parameters["first"], harmonics)
        return last.apply(parameters["last"], e3nn.tensor_product(hidden, harmonics)).array

    batches = [{"x": uniform(s, ROWS, 3), "y": LABELS} for s in (5, 6)]
    harmonics = e3nn.spherical_harmonics("0e + 1o + 2e", batches[0]["x"], normalize=True)
    first = layer.init(jax.random.key(0), harmonics)
    hidden = e3nn.tensor_product(layer.apply(first, harmonics), harmonics)
    parameters = {"first": first, "last": last.init(jax.random.key(1), hidden)}

    def loss(parameters: Any, rest: Any, batch: Any) -> Any:
        logits = forward(parameters, batch["x"])
        return cross_entropy(logits, batch["y"]), (rest, logits)

    check(enclave, training(loss, parameters, batches, ADAM))


def test_pix(enclave):
    pix = pytest.importorskip("dm_pix")
    count, size = 16, 12

    def augmented(key: jax.Array, image: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 3)
        image = pix.random_flip_left_right(keys[0], image)
        image = pix.random_crop(keys[1], image, (8, 8, 3))
        return pix.random_brightness(keys[2], image, 0.2)

    def loss(parameters: Any, key: Any, batch: Any) -> Any:
        key, own = jax.random.split(key)
        images = jax.vmap(augmented)(jax.random.split(own, count), batch["x"])
        hidden = jax.nn.relu(
            jax.lax.conv_general_dilated(
                *(images, parameters["kernel"], (1, 1), "SAME"),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        )
        logits = hidden.mean((1, 2)) @ parameters["head"]
        return cross_entropy(logits, batch["y"]), (key, logits)

    parameters = {"kernel": uniform(7, 3, 3, 3, 8), "head": uniform(8, 8, CLASSES)}
    batches = [
        {"x": (1 + uniform(s, count, size, size, 3)) / 2, "y": LABELS[:count]} for s in (9, 10)
    ]
    check(enclave, training(loss, parameters, batches, ADAM, jax.random.key(1)))
