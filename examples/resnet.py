"""Trains a ResNet with batch norm and momentum under `tempo.shield`, and beside it without.

Run it from the repository's root: ``python -m examples.resnet``.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

import tempo_jax as tempo
from examples import common, models

WEIGHT_DECAY = 5e-4


class TrainState(train_state.TrainState):
    """Flax's train state with the running statistics of the batch norms."""

    batch_stats: Any


def train_step(state: TrainState, batch: common.Batch) -> tuple[TrainState, common.Metrics]:
    """One step of momentum; the host learns the loss and the accuracy and nothing else."""

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, updated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        return common.cross_entropy(logits, batch["label"]), (logits, updated["batch_stats"])

    (loss, (logits, batch_stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params
    )
    state = state.apply_gradients(grads=gradients, batch_stats=batch_stats)
    return state, {
        "loss": tempo.reveal(loss),
        "accuracy": tempo.reveal(common.accuracy(logits, batch["label"])),
    }


def evaluate_step(state: TrainState, batch: common.Batch) -> common.Metrics:
    """Returns the loss and the accuracy under the running statistics."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, batch["image"], train=False)
    return {
        "loss": common.cross_entropy(logits, batch["label"]),
        "accuracy": common.accuracy(logits, batch["label"]),
    }


def create_state(
    model: models.ResNet,
    image_shape: tuple[int, ...],
    schedule: optax.Schedule,
    seed: int,
    mark: Callable[..., Any] = tempo.cheap_update,
) -> TrainState:
    """Draws the first weights and sets up momentum.

    Args:
      model: the network.
      image_shape: height, width and channels of one image.
      schedule: learning rate over the steps.
      seed: of the weights.
      mark: marks the optimizer for the devices, or leaves it.
    """
    variables = model.init(jax.random.PRNGKey(seed), jnp.zeros((1, *image_shape)), train=False)
    tx = mark(
        optax.chain(
            optax.add_decayed_weights(WEIGHT_DECAY),
            optax.sgd(schedule, momentum=0.9, nesterov=True),
        )
    )
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=tx,
    )


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, or `arguments` in its place."""
    parser = common.argument_parser(__doc__, steps=40, batch_size=128)
    common.add_training_options(parser, learning_rate=0.1, plot="resnet.png")
    common.add_data_option(parser)
    parser.add_argument(
        "--model", choices=sorted(models.RESNETS), default="resnet20", help="which network"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    options = parse_options(arguments)
    data = common.load_images(options.data)
    state = create_state(
        models.resnet(options.model, data.num_classes),
        data.train_images.shape[1:],
        common.warmup_cosine(options.learning_rate, options.steps),
        options.seed,
        functools.partial(common.marked, scheme=options.scheme),
    )
    common.compare(
        train_step,
        state,
        functools.partial(common.image_batches, data, options.batch_size, options.seed),
        lambda state: common.evaluate(evaluate_step, state, common.held_out_batches(data)),
        options,
    )


if __name__ == "__main__":
    main()
