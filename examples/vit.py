"""Trains a vision transformer written in `flax.nnx` under `tempo.shield`, and beside it without.

Run it from the repository's root: ``python -m examples.vit``.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from flax import nnx

import tempo_jax as tempo
from examples import common, models

WEIGHT_DECAY = 0.05


def make_train_step(
    graphdef: nnx.GraphDef,
) -> Callable[[nnx.State, common.Batch], tuple[nnx.State, common.Metrics]]:
    """Returns the step for a model and optimizer that `create_state` has split.

    What `nnx.split` calls the graph definition has no arrays in it: the step closes over it, and
    all that is secret is in the state.
    """

    def train_step(state: nnx.State, batch: common.Batch) -> tuple[nnx.State, common.Metrics]:
        """One step of AdamW; the host learns the loss and the accuracy and nothing else."""
        model, optimizer = nnx.merge(graphdef, state)

        def loss_fn(model: models.VisionTransformer) -> tuple[jax.Array, jax.Array]:
            logits = model(batch["image"])
            return common.cross_entropy(logits, batch["label"]), logits

        (loss, logits), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), {
            "loss": tempo.reveal(loss),
            "accuracy": tempo.reveal(common.accuracy(logits, batch["label"])),
        }

    return train_step


def make_evaluate_step(
    graphdef: nnx.GraphDef,
) -> Callable[[nnx.State, common.Batch], common.Metrics]:
    """Returns a function from state and batch to the loss and the accuracy."""

    def evaluate_step(state: nnx.State, batch: common.Batch) -> common.Metrics:
        model, _ = nnx.merge(graphdef, state)
        logits = model(batch["image"])
        return {
            "loss": common.cross_entropy(logits, batch["label"]),
            "accuracy": common.accuracy(logits, batch["label"]),
        }

    return evaluate_step


def create_state(
    model: models.VisionTransformer,
    schedule: optax.Schedule,
    mark: Callable[..., Any] = tempo.cheap_update,
) -> tuple[nnx.GraphDef, nnx.State]:
    """Sets up AdamW for the model, and splits both into their structure and one pytree.

    Args:
      model: the network.
      schedule: learning rate over the steps.
      mark: marks the optimizer for the devices, or leaves it.
    """
    tx = mark(optax.adamw(schedule, weight_decay=WEIGHT_DECAY))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    return nnx.split((model, optimizer))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, or `arguments` in its place."""
    parser = common.argument_parser(__doc__, steps=100, batch_size=128)
    common.add_training_options(parser, learning_rate=1e-3, plot="vit.png")
    common.add_data_option(parser)
    parser.add_argument("--blocks", type=common.positive, default=3, help="transformer blocks")
    parser.add_argument("--width", type=common.positive, default=192, help="of a patch's vector")
    parser.add_argument("--heads", type=common.positive, default=3, help="attention heads")
    parser.add_argument("--patch", type=common.positive, default=8, help="side of a patch, pixels")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    options = parse_options(arguments)
    data = common.load_images(options.data)
    model = models.VisionTransformer(
        data.train_images.shape[1:],
        data.num_classes,
        blocks=options.blocks,
        width=options.width,
        heads=options.heads,
        patch=options.patch,
        rngs=nnx.Rngs(options.seed),
    )
    schedule = common.warmup_cosine(options.learning_rate, options.steps)
    graphdef, state = create_state(
        model, schedule, functools.partial(common.marked, scheme=options.scheme)
    )
    evaluate_step = make_evaluate_step(graphdef)
    common.compare(
        make_train_step(graphdef),
        state,
        functools.partial(common.image_batches, data, options.batch_size, options.seed),
        lambda state: common.evaluate(evaluate_step, state, common.held_out_batches(data)),
        options,
    )


if __name__ == "__main__":
    main()
