"""The training steps that are compared: plain JAX alone, since two versions of it run them.

Labels come as one-hot floats, and pools are means over reshaped axes: both are what a fixed-point
machine of matrix products does best, and cost JAX nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = Mapping[str, Any]
LEARNING_RATE = 0.05
MOMENTUM = 0.9
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, a batch and a loss.

    Attributes:
      title: names it in the table.
      draw: gives parameters and a batch, float32 arrays by name, the same for the same generator.
      loss: of parameters and a batch.
    """

    title: str
    draw: Callable[[np.random.Generator], tuple[Arrays, Arrays]]
    loss: Callable[[Arrays, Arrays], jax.Array]

    def start(self) -> tuple[dict[str, Arrays], Arrays]:
        """The first state, which has no momentum yet, and the batch of every step."""
        params, batch = self.draw(np.random.default_rng(0))
        momentum = {name: np.zeros_like(x) for name, x in params.items()}
        return {"params": params, "momentum": momentum}, batch

    def step(self, state: Mapping[str, Arrays], batch: Arrays) -> dict[str, Arrays]:
        """One step of momentum; after the first the momentum is the update, but for its size."""
        gradients = jax.grad(self.loss)(state["params"], batch)
        momentum = {
            name: MOMENTUM * old + gradients[name] for name, old in state["momentum"].items()
        }
        params = {
            name: old - LEARNING_RATE * momentum[name] for name, old in state["params"].items()
        }
        return {"params": params, "momentum": momentum}


def _cross_entropy(logits: jax.Array, one_hot: jax.Array) -> jax.Array:
    shifted = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    log_sums = jnp.log(jnp.exp(shifted).sum(-1))
    return (log_sums - (shifted * one_hot).sum(-1)).mean()


def _weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    fan_in = int(np.prod(shape[:-1]))
    return rng.normal(0, (2 / fan_in) ** 0.5, shape).astype(np.float32)


def _labelled(rng: np.random.Generator, *shape: int) -> dict[str, np.ndarray]:
    labels = rng.integers(0, CLASSES, shape[0])
    return {
        "x": rng.normal(size=shape).astype(np.float32),
        "y": np.eye(CLASSES, dtype=np.float32)[labels],
    }


def _dense(params: Arrays, name: str, x: jax.Array) -> jax.Array:
    return x @ params[name] + params[f"{name}.bias"]


def _dense_weights(rng: np.random.Generator, name: str, *shape: int) -> dict[str, np.ndarray]:
    return {name: _weights(rng, *shape), f"{name}.bias": np.zeros(shape[-1], np.float32)}


# 784-512-512-10


def _draw_perceptron(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    sizes = (784, 512, 512, CLASSES)
    params: dict[str, np.ndarray] = {}
    for i, shape in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        params.update(_dense_weights(rng, f"layer{i}", *shape))
    return params, _labelled(rng, 128, 784)


def _perceptron_loss(params: Arrays, batch: Arrays) -> jax.Array:
    x = batch["x"]
    for i in range(2):
        x = jax.nn.relu(_dense(params, f"layer{i}", x))
    return _cross_entropy(_dense(params, "layer2", x), batch["y"])


# Convolutions


def _convolved(x: jax.Array, window: jax.Array, stride: int = 1, padding: str = "SAME") -> Any:
    return jax.lax.conv_general_dilated(
        x, window, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _halved(x: jax.Array) -> jax.Array:
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def _draw_lenet(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    params = {"window0": _weights(rng, 5, 5, 1, 6), "window1": _weights(rng, 5, 5, 6, 16)}
    for i, shape in enumerate(((400, 120), (120, 84), (84, CLASSES))):
        params.update(_dense_weights(rng, f"layer{i}", *shape))
    return params, _labelled(rng, 32, 28, 28, 1)


def _lenet_loss(params: Arrays, batch: Arrays) -> jax.Array:
    x = _halved(jax.nn.relu(_convolved(batch["x"], params["window0"])))
    x = _halved(jax.nn.relu(_convolved(x, params["window1"], padding="VALID")))
    x = x.reshape(x.shape[0], -1)
    for i in range(2):
        x = jax.nn.relu(_dense(params, f"layer{i}", x))
    return _cross_entropy(_dense(params, "layer2", x), batch["y"])


STAGES = (16, 32, 64)  # channels, three blocks each
BLOCKS = 3


def _draw_resnet(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    params: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int) -> None:
        params[name] = _weights(rng, *shape)
        params[f"{name}.scale"] = np.ones(shape[-1], np.float32)
        params[f"{name}.bias"] = np.zeros(shape[-1], np.float32)

    add("stem", 3, 3, 3, STAGES[0])
    before = STAGES[0]
    for stage, channels in enumerate(STAGES):
        for block in range(BLOCKS):
            add(f"{stage}.{block}.first", 3, 3, before, channels)
            add(f"{stage}.{block}.second", 3, 3, channels, channels)
            if before != channels:
                add(f"{stage}.{block}.shortcut", 1, 1, before, channels)
            before = channels
    params.update(_dense_weights(rng, "head", STAGES[-1], CLASSES))
    return params, _labelled(rng, 16, 32, 32, 3)


def _normalized(x: jax.Array, axes: Any) -> jax.Array:
    centred = x - x.mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(axes, keepdims=True) + 1e-5)


def _resnet_loss(params: Arrays, batch: Arrays) -> jax.Array:
    def layer(name: str, x: jax.Array, stride: int = 1) -> jax.Array:
        x = _normalized(_convolved(x, params[name], stride), (0, 1, 2))
        return x * params[f"{name}.scale"] + params[f"{name}.bias"]

    x = jax.nn.relu(layer("stem", batch["x"]))
    for stage in range(len(STAGES)):
        for block in range(BLOCKS):
            name, stride = f"{stage}.{block}", 2 if stage and not block else 1
            y = jax.nn.relu(layer(f"{name}.first", x, stride))
            y = layer(f"{name}.second", y)
            if f"{name}.shortcut" in params:
                x = layer(f"{name}.shortcut", x, stride)
            x = jax.nn.relu(x + y)
    return _cross_entropy(_dense(params, "head", x.mean((1, 2))), batch["y"])


# A block of a transformer

WIDTH, HEADS, LENGTH = 128, 4, 64


def _draw_block(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    params: dict[str, np.ndarray] = {}
    for name in ("query", "key", "value", "out"):
        params.update(_dense_weights(rng, name, WIDTH, WIDTH))
    params.update(_dense_weights(rng, "wide", WIDTH, 4 * WIDTH))
    params.update(_dense_weights(rng, "narrow", 4 * WIDTH, WIDTH))
    for name in ("before", "between"):
        params[f"{name}.scale"] = np.ones(WIDTH, np.float32)
        params[f"{name}.bias"] = np.zeros(WIDTH, np.float32)
    shape = (8, LENGTH, WIDTH)
    batch = {name: rng.normal(size=shape).astype(np.float32) for name in ("x", "y")}
    return params, batch


def _block_loss(params: Arrays, batch: Arrays) -> jax.Array:
    def norm(name: str, x: jax.Array) -> jax.Array:
        return _normalized(x, -1) * params[f"{name}.scale"] + params[f"{name}.bias"]

    def heads(name: str, x: jax.Array) -> jax.Array:
        y = _dense(params, name, x)
        return y.reshape(*x.shape[:2], HEADS, WIDTH // HEADS)

    x = batch["x"]
    y = norm("before", x)
    scores = jnp.einsum("bqhd,bkhd->bhqk", heads("query", y), heads("key", y))
    scores = scores * (WIDTH // HEADS) ** -0.5
    scores = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    attention = scores / scores.sum(-1, keepdims=True)
    y = jnp.einsum("bhqk,bkhd->bqhd", attention, heads("value", y))
    x = x + _dense(params, "out", y.reshape(x.shape))
    y = jax.nn.gelu(_dense(params, "wide", norm("between", x)))
    return ((x + _dense(params, "narrow", y) - batch["y"]) ** 2).mean()


WORKLOADS = {
    "mlp": Workload("MLP 784-512-512-10, batch 128", _draw_perceptron, _perceptron_loss),
    "lenet": Workload("LeNet, batch 32", _draw_lenet, _lenet_loss),
    "transformer": Workload(
        "transformer block of width 128, 4 heads, length 64, batch 8", _draw_block, _block_loss
    ),
    "resnet20": Workload("ResNet-20, batch 16", _draw_resnet, _resnet_loss),
}


def update_error(actual: Arrays, expected: Arrays) -> float:
    """How far an update is from another, ``‖a − b‖ / ‖b‖`` over all its leaves."""
    off = total = 0.0
    for name, b in expected.items():
        a, b = np.asarray(actual[name], np.float64), np.asarray(b, np.float64)
        off, total = off + ((a - b) ** 2).sum(), total + (b**2).sum()
    return float(np.sqrt(off / total))
