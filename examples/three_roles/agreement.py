"""What owner and host agree on: the step, and the shapes of what it takes. No data, no keys.

Both read this file on their own machines. The owner provisions the step, and the enclave runs
what the owner provisioned; should the host's copy differ, it finds no such program there.
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tempo_jax as tempo
from examples.common import SCHEMES, add_scheme_option

# So that the owner can compare what it opens with plain training to the last digits.
jax.config.update("jax_enable_x64", True)

PIXELS, CLASSES = 64, 10
WIDTHS = (PIXELS, 128, 128, CLASSES)
OPTIMIZER = optax.adam(1e-3)

# Files that pass between owner and host. All that is in them is sealed.
STATE, BATCHES, RESULT = "state.sealed", "batches.sealed", "result.sealed"


def initial_state(seed: int = 0) -> Any:
    """Parameters of a perceptron and the state of its optimizer."""
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) - 1)
    params = [
        {
            "kernel": jax.random.normal(key, (inputs, outputs)) * jnp.sqrt(2 / inputs),
            "bias": jnp.zeros(outputs),
        }
        for key, inputs, outputs in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
    ]
    return params, OPTIMIZER.init(params)


def train_step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
    """One step of Adam; the loss is what the host learns."""
    params, optimizer = state

    def loss_fn(params: Any) -> jax.Array:
        x = batch["image"]
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        logits = x @ params[-1]["kernel"] + params[-1]["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean()

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    updates, optimizer = OPTIMIZER.update(gradients, optimizer, params)
    return (optax.apply_updates(params, updates), optimizer), tempo.reveal(loss)


def shielded(enclave: tempo.Enclave, options: argparse.Namespace) -> tempo.Shielded:
    """The step as both sides shield it: equal options give equal programs."""
    scheme = SCHEMES[options.scheme]()
    return tempo.shield(train_step, enclave=enclave, scheme=scheme, offload="all")


def shapes(options: argparse.Namespace) -> tuple[Any, Any]:
    """Shapes and dtypes of the state and of the list of batches."""
    batch = {
        "image": jax.ShapeDtypeStruct((options.batch_size, PIXELS), jnp.float64),
        "label": jax.ShapeDtypeStruct((options.batch_size,), jnp.int32),
    }
    return jax.eval_shape(initial_state), [batch] * options.batches


def add_options(parser: argparse.ArgumentParser) -> None:
    """What both sides have to be told alike."""
    parser.add_argument("--batch-size", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="(default: %(default)s)")
    add_scheme_option(parser)
    parser.add_argument(
        "--exchange",
        type=pathlib.Path,
        required=True,
        metavar="DIR",
        help="folder whose files pass between owner and host",
    )
