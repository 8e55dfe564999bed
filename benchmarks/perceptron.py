"""A multilayer perceptron of any width, and its training in turn under several variants.

What `benchmarks.placement` and `benchmarks.integrity` measure. Its optimizer is momentum, so that
schemes that keep keys leave its weights on the devices.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tempo_jax as tempo
from benchmarks.overhead import WARM_UP_STEPS, Contender
from examples import common

ROWS = 1024  # examples in a step
CLASSES = 10
LAYERS = 3  # of the width, before the classifier
FIRST = 1 + WARM_UP_STEPS  # steps before those that count


def build(width: int) -> tuple[Any, Any]:
    """Returns a training step of a perceptron of this width, and its first state."""
    rng = np.random.default_rng(0)
    sizes = [width] * (LAYERS + 1) + [CLASSES]
    layers = [
        {
            "kernel": jnp.asarray(rng.normal(0, n**-0.5, (n, p)), jnp.float32),
            "bias": jnp.zeros(p),
        }
        for n, p in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    tx = tempo.cheap_update(optax.sgd(1e-3, momentum=0.9))

    def loss_fn(params: Any, batch: common.Batch) -> jax.Array:
        x = batch["x"]
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        logits = x @ params[-1]["kernel"] + params[-1]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    def train_step(state: Any, batch: common.Batch) -> tuple[Any, common.Metrics]:
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
        updates, optimizer = tx.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "optimizer": optimizer}, {"loss": tempo.reveal(loss)}

    return train_step, {"params": layers, "optimizer": tx.init(layers)}


def batch(width: int, rows: int = ROWS) -> common.Batch:
    """Returns so many random examples of this width, and their classes."""
    rng = np.random.default_rng(1)
    return {
        "x": rng.normal(size=(rows, width)).astype(np.float32),
        "y": rng.integers(0, CLASSES, rows).astype(np.int32),
    }


def train_in_turn(
    contenders: Mapping[str, Contender],
    enclaves: Mapping[str, tempo.Enclave],
    examples: common.Batch,
    steps: int,
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
    """Lets every contender take a step in each round.

    Args:
      contenders: by variant.
      enclaves: of those variants that have one.
      examples: the batch of every step.
      steps: that count; `FIRST` more come before.

    Returns:
      Seconds of each step that counts, by variant; those that the enclave was busy; and those
      of its processors.
    """
    kept = ("busy_seconds", "processor_seconds")
    used: dict[str, dict[str, list[float]]] = {k: {v: [] for v in enclaves} for k in kept}
    for _ in range(FIRST + steps):
        for variant, contender in contenders.items():
            enclave = enclaves.get(variant)
            before = enclave.statistics() if enclave else {}
            contender.run(examples)
            if enclave:
                told = enclave.statistics()
                for name, seconds in used.items():
                    seconds[variant].append(told[name] - before[name])
    busy, processor = ({v: s[FIRST:] for v, s in used[name].items()} for name in kept)
    return (
        {v: c.seconds[FIRST:] for v, c in contenders.items()},
        busy,
        processor,
    )
