"""The models under attack: small, in plain JAX, with every product of matrices named.

A victim's forward pass takes the products as an argument, so that the same code trains in the
clear, under a recording that keeps each product's operands, under `tempo.shield`, and with one
product replaced by what an attacker built.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sysconfig
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

# Attacks look for structure below float32's rounding.
jax.config.update("jax_enable_x64", True)

Parameters = dict[str, Any]

TEST_DIGITS = 500
VOCABULARY = 128  # tokens are ASCII
LENGTH, WIDTH, HEADS = 128, 128, 2
WIDER = (512, 1024, 2048)  # perceptrons that S11 to S13 are run on as well


class Products(Protocol):
    """How a victim multiplies; `name` says which of its products it is."""

    def dense(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """Multiplies (m, n) by (n, p)."""
        ...

    def convolve(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """Convolves (N, H, W, n) with (3, 3, n, p), padded to the same size."""
        ...

    def attend(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """Multiplies (N, heads, m, n) by (N, heads, n, p), each batch and head on its own."""
        ...


class Plain:
    """The products as JAX computes them."""

    def dense(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """See `Products`."""
        return x @ w

    def convolve(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """See `Products`."""
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def attend(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """See `Products`."""
        return x @ w


def unfolded(x: Any, window: tuple[int, int]) -> Any:
    """(N, H, W, n) as (N H W, taps n): what stands in this window about each pixel, 0 outside."""
    numpy = jnp if isinstance(x, jax.Array) else np
    count, height, width, channels = x.shape
    above, before = (size // 2 for size in window)
    x = numpy.pad(x, ((0, 0), (above, above), (before, before), (0, 0)))
    shifts = [
        x[:, i : i + height, j : j + width] for i in range(window[0]) for j in range(window[1])
    ]
    return numpy.concatenate(shifts, -1).reshape(count * height * width, -1)


class Patched(Plain):
    """Convolutions as products of patches: one of two ways in which `Mixing` sends them."""

    def convolve(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """See `Products`."""
        y = unfolded(x, (3, 3)) @ w.reshape(-1, w.shape[-1])
        return y.reshape(*x.shape[:3], -1)


class InRows:
    """Convolutions as products of rows of the image, the other way: Y's three parts added up."""

    def __init__(self, products: Products):
        """Multiplies by `products`."""
        self.dense, self.attend = products.dense, products.attend

    def convolve(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """See `Products`."""
        count, height, width, _ = x.shape
        _, _, n, p = w.shape
        kernel = w.transpose(1, 2, 0, 3).reshape(3 * n, 3 * p)
        y = self.dense(name, unfolded(x, (1, 3)), kernel).reshape(count, height, width, 3, p)
        y = jnp.pad(y, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        parts = (y[:, k : k + height, :, k] for k in range(3))
        return functools.reduce(jnp.add, parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Labelled examples: digits as (n, 64) in [0, 1], or windows of tokens.

    Attributes:
      inputs: of training.
      labels: int, one for each row of logits of an example.
      test_inputs: like `inputs`.
      test_labels: like `labels`.
    """

    inputs: np.ndarray
    labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Victim:
    """A model and how it is trained.

    Attributes:
      name: key in `VICTIMS`.
      initialize: draws parameters; the weight of product `name` is called `name` too.
      apply: maps parameters, inputs and products to logits, one row for each label.
      data: what it trains on.
      batch: examples in a step.
      learning_rate: of Adam.
      warm_up: plain steps before anything is recorded.
      inside: products that the default scheme's policy keeps in the enclave.
      links: pairs of products with an elementwise function between them, norms aside.
    """

    name: str
    initialize: Callable[[np.random.Generator], Parameters]
    apply: Callable[[Parameters, jax.Array, Products], jax.Array]
    data: Callable[[], Data]
    batch: int
    learning_rate: float
    warm_up: int
    inside: tuple[str, ...]
    links: tuple[tuple[str, str], ...]

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam at the victim's rate."""
        return optax.adam(self.learning_rate)

    @property
    def linear_optimizer(self) -> optax.GradientTransformation:
        """SGD with momentum, which keeps weights on the devices where Adam does not."""
        return optax.sgd(10 * self.learning_rate, momentum=0.9)

    def loss(
        self, parameters: Parameters, inputs: Any, labels: Any, products: Products
    ) -> jax.Array:
        """Mean cross entropy of a batch, in nats."""
        logits = self.apply(parameters, inputs, products)
        labels = labels.reshape(-1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def accuracy(self, parameters: Parameters, products: Products | None = None) -> float:
        """Share of test labels that have the largest logit."""
        data = self.data()
        logits = self.apply(parameters, jnp.asarray(data.test_inputs), products or Plain())
        return float(jnp.mean(jnp.argmax(logits, -1) == data.test_labels.reshape(-1)))


@functools.cache
def digits() -> Data:
    """Scikit-learn's 8×8 digits, split at random, the same in every run."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels[order] / 16.0, labels[order]
    split = TEST_DIGITS
    return Data(pixels[split:], labels[split:], pixels[:split], labels[:split])


@functools.cache
def text() -> Data:
    """Windows of the running Python's own source; the label is the next character."""
    directory = pathlib.Path(sysconfig.get_path("stdlib"))
    raw = b"".join(path.read_bytes() for path in sorted(directory.glob("*.py"))[:40])
    tokens = np.minimum(np.frombuffer(raw, np.uint8), VOCABULARY - 1).astype(np.int64)
    windows = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    windows = windows[np.random.default_rng(0).permutation(len(windows))]
    test = windows[:32]
    return Data(windows[32:, :-1], windows[32:, 1:], test[:, :-1], test[:, 1:])


def _draw(rng: np.random.Generator, *shape: int, gain: float = 2.0) -> np.ndarray:
    return rng.normal(size=shape) * np.sqrt(gain / np.prod(shape[:-1]))


def _batch_norm(y: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    # Test examples are normalized by their own statistics, too: no running averages to keep.
    return (y - y.mean(axes, keepdims=True)) / jnp.sqrt(y.var(axes, keepdims=True) + 1e-5)


def _layer_norm(y: jax.Array) -> jax.Array:
    return (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-5)


def _initialize_mlp(width: int, rng: np.random.Generator) -> Parameters:
    sizes = {"dense1": (64, width), "dense2": (width, width), "head": (width, 10)}
    parameters: Parameters = {name: _draw(rng, *shape) for name, shape in sizes.items()}
    for name, (_, columns) in sizes.items():
        parameters |= {f"{name}.bias": np.zeros(columns), f"{name}.gain": np.ones(columns)}
    return parameters


def _apply_mlp(norm: str, parameters: Parameters, x: jax.Array, products: Products) -> jax.Array:
    for name in ("dense1", "dense2"):
        gain, bias = parameters[f"{name}.gain"], parameters[f"{name}.bias"]
        y = products.dense(name, x, parameters[name])
        if norm == "batch":
            x = jax.nn.relu(gain * _batch_norm(y, (0,)) + bias)
        elif norm == "layer":
            x = jax.nn.gelu(gain * _layer_norm(y) + bias)
        else:
            x = jax.nn.relu(y + bias)
    return products.dense("head", x, parameters["head"]) + parameters["head.bias"]


def _initialize_cnn(rng: np.random.Generator) -> Parameters:
    channels = {"stem": (1, 64), "conv1": (64, 64), "conv2": (64, 128)}
    parameters: Parameters = {n: _draw(rng, 3, 3, *shape) for n, shape in channels.items()}
    for name, (_, width) in channels.items():
        parameters |= {f"{name}.bias": np.zeros(width), f"{name}.gain": np.ones(width)}
    return parameters | {"head": _draw(rng, 128, 10, gain=1.0), "head.bias": np.zeros(10)}


def _apply_cnn(parameters: Parameters, x: jax.Array, products: Products) -> jax.Array:
    x = x.reshape(-1, 8, 8, 1)
    for name in ("stem", "conv1", "conv2"):
        y = _batch_norm(products.convolve(name, x, parameters[name]), (0, 1, 2))
        x = jax.nn.relu(parameters[f"{name}.gain"] * y + parameters[f"{name}.bias"])
    return products.dense("head", x.mean((1, 2)), parameters["head"]) + parameters["head.bias"]


def _apply_cnn_in_rows(parameters: Parameters, x: jax.Array, products: Products) -> jax.Array:
    return _apply_cnn(parameters, x, InRows(products))


def _initialize_transformer(rng: np.random.Generator) -> Parameters:
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "proj": (WIDTH, WIDTH), "up": (WIDTH, 2 * WIDTH)}
    shapes |= {"down": (2 * WIDTH, WIDTH), "head": (WIDTH, VOCABULARY)}
    parameters: Parameters = {n: _draw(rng, *shape, gain=1.0) for n, shape in shapes.items()}
    for name in ("qkv", "up", "head"):
        parameters |= {f"{name}.gain": np.ones(WIDTH), f"{name}.offset": np.zeros(WIDTH)}
    parameters |= {f"{name}.bias": np.zeros(shape[1]) for name, shape in shapes.items()}
    tables = {"tokens": rng.normal(size=(VOCABULARY, WIDTH)) * 0.5}
    return parameters | tables | {"positions": rng.normal(size=(LENGTH, WIDTH)) * 0.1}


def _apply_transformer(parameters: Parameters, tokens: jax.Array, products: Products) -> jax.Array:
    def norm(name: str, x: jax.Array) -> jax.Array:
        return parameters[f"{name}.gain"] * _layer_norm(x) + parameters[f"{name}.offset"]

    def dense(name: str, x: jax.Array) -> jax.Array:
        return products.dense(name, x, parameters[name]) + parameters[f"{name}.bias"]

    count, length = tokens.shape
    x = parameters["tokens"][tokens] + parameters["positions"][:length]
    x = x.reshape(-1, WIDTH)
    qkv = dense("qkv", norm("qkv", x)).reshape(count, length, 3, HEADS, WIDTH // HEADS)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = products.attend("qk", q, k.swapaxes(-1, -2)) / np.sqrt(WIDTH // HEADS)
    causal = np.tril(np.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
    mixed = products.attend("pv", weights, v).transpose(0, 2, 1, 3).reshape(-1, WIDTH)
    x = x + dense("proj", mixed)
    x = x + dense("down", jax.nn.gelu(dense("up", norm("up", x))))
    return dense("head", norm("head", x))


def _mlp(
    name: str,
    norm: str,
    learning_rate: float = 1e-3,
    batch: int = 128,
    width: int = 128,
    warm_up: int = 200,
    inside: tuple[str, ...] = ("head",),
) -> Victim:
    return Victim(
        name=name,
        initialize=functools.partial(_initialize_mlp, width),
        apply=functools.partial(_apply_mlp, norm),
        data=digits,
        batch=batch,
        learning_rate=learning_rate,
        warm_up=warm_up,
        inside=inside,
        links=(("dense1", "dense2"),),
    )


CNN = Victim(
    name="cnn",
    initialize=_initialize_cnn,
    apply=_apply_cnn,
    data=digits,
    batch=16,
    learning_rate=1e-3,
    warm_up=60,
    # A stem of one channel has patches of 9 numbers, and the classifier 10 classes.
    inside=("stem", "head"),
    links=(("conv1", "conv2"),),
)

# The same network; what lies between adjacent products is no longer a function of single pixels.
CNN_ROWS = dataclasses.replace(CNN, name="cnn_rows", apply=_apply_cnn_in_rows, links=())

TRANSFORMER = Victim(
    name="transformer",
    initialize=_initialize_transformer,
    apply=_apply_transformer,
    data=text,
    batch=4,
    learning_rate=2e-3,
    warm_up=150,
    inside=("head",),
    links=(("up", "down"), ("qk", "pv")),
)

VICTIMS = {
    victim.name: victim
    for victim in (
        _mlp("mlp", "none"),
        _mlp("mlp_bn", "batch"),
        _mlp("mlp_ln", "layer"),
        _mlp("mlp_large", "none", batch=1024),
        *(
            # Of the wider ones the first layer is too small a share to be worth showing.
            _mlp(
                f"mlp_{width}",
                "none",
                batch=256,
                width=width,
                warm_up=60,
                inside=("dense1", "head") if width > 512 else ("head",),
            )
            for width in WIDER
        ),
        CNN,
        CNN_ROWS,
        TRANSFORMER,
    )
}
