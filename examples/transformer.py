"""Trains a character transformer on the standard library's source text under `tempo.shield`.

Run it from the repository's root: ``python -m examples.transformer``.
"""

import argparse
import dataclasses
import functools
import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

import tempo_jax as tempo
from examples import common, models

MAX_TEXT_BYTES = 4_000_000
HELD_OUT_SHARE = 0.05
WEIGHT_DECAY = 0.1


@dataclasses.dataclass(frozen=True)
class TextData:
    """A text as tokens, one for each byte.

    Attributes:
      train: int32 tokens.
      held_out: int32 tokens; the end of the text.
      vocabulary: the byte that each token stands for.
    """

    train: np.ndarray
    held_out: np.ndarray
    vocabulary: bytes


def load_text() -> TextData:
    """Returns the running Python's own source text: the top-level modules, in order of name.

    Another version of Python has another text, so its losses differ a little.

    Raises:
      FileNotFoundError: this Python came without its source.
    """
    directory = pathlib.Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(directory.glob("*.py")))
    if not text:
        raise FileNotFoundError(f"no python source in {directory}, where the stdlib should be.")
    characters = np.frombuffer(text[:MAX_TEXT_BYTES], np.uint8)
    vocabulary, tokens = np.unique(characters, return_inverse=True)
    tokens = tokens.astype(np.int32)
    split = round(len(tokens) * (1 - HELD_OUT_SHARE))
    return TextData(tokens[:split], tokens[split:], vocabulary.tobytes())


def text_batches(
    data: TextData, batch_size: int, sequence_length: int, seed: int
) -> Iterator[common.Batch]:
    """Yields batches of windows that begin at random places, without end."""
    rng = np.random.default_rng(seed)
    window = np.arange(sequence_length + 1)
    while True:
        starts = rng.integers(len(data.train) - sequence_length, size=batch_size)
        yield _next_token_batch(data.train[starts[:, None] + window])


def held_out_batches(
    data: TextData, batch_size: int, sequence_length: int
) -> Iterator[common.Batch]:
    """Yields the held-out text once, in windows side by side, in whole batches."""
    size = batch_size * sequence_length
    for start in range(0, len(data.held_out) - size, size):
        window = np.arange(sequence_length + 1)
        starts = start + sequence_length * np.arange(batch_size)
        yield _next_token_batch(data.held_out[starts[:, None] + window])


def _next_token_batch(windows: np.ndarray) -> common.Batch:
    """Splits windows (batch, length + 1) into inputs and, one place later, labels."""
    return {"token": windows[:, :-1], "label": windows[:, 1:]}


class TrainState(train_state.TrainState):
    """Flax's train state with the key from which every step derives its dropout."""

    dropout_key: jax.Array


def train_step(state: TrainState, batch: common.Batch) -> tuple[TrainState, common.Metrics]:
    """One step of AdamW; the host learns the loss and the accuracy and nothing else."""
    key = jax.random.fold_in(state.dropout_key, state.step)

    def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = state.apply_fn(
            {"params": params}, batch["token"], train=True, rngs={"dropout": key}
        )
        return common.cross_entropy(logits, batch["label"]), logits

    (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=gradients)
    return state, {
        "loss": tempo.reveal(loss),
        "accuracy": tempo.reveal(common.accuracy(logits, batch["label"])),
    }


def evaluate_step(state: TrainState, batch: common.Batch) -> common.Metrics:
    """Returns the loss and the accuracy without dropout."""
    logits = state.apply_fn({"params": state.params}, batch["token"], train=False)
    return {
        "loss": common.cross_entropy(logits, batch["label"]),
        "accuracy": common.accuracy(logits, batch["label"]),
    }


def create_state(
    model: models.Transformer,
    schedule: optax.Schedule,
    seed: int,
    mark: Callable[..., Any] = tempo.cheap_update,
) -> TrainState:
    """Draws the first weights and sets up AdamW.

    Args:
      model: the network.
      schedule: learning rate over the steps.
      seed: of the weights and of dropout.
      mark: marks the optimizer for the devices, or leaves it.
    """
    weights_key, dropout_key = jax.random.split(jax.random.PRNGKey(seed))
    tokens = jnp.zeros((1, model.sequence_length), jnp.int32)
    return TrainState.create(
        apply_fn=model.apply,
        params=model.init(weights_key, tokens, train=False)["params"],
        tx=mark(optax.adamw(schedule, b2=0.99, weight_decay=WEIGHT_DECAY)),
        dropout_key=dropout_key,
    )


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, or `arguments` in its place."""
    parser = common.argument_parser(__doc__, steps=300, batch_size=32)
    common.add_training_options(parser, learning_rate=6e-3, plot="transformer.png")
    parser.add_argument("--blocks", type=common.positive, default=2, help="transformer blocks")
    parser.add_argument("--width", type=common.positive, default=128, help="of a token's vector")
    parser.add_argument("--heads", type=common.positive, default=4, help="attention heads")
    parser.add_argument(
        "--sequence-length", type=common.positive, default=64, help="characters in a window"
    )
    parser.add_argument("--dropout", type=float, default=0.1, help="share that is dropped")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    options = parse_options(arguments)
    data = load_text()
    model = models.Transformer(
        len(data.vocabulary),
        blocks=options.blocks,
        width=options.width,
        heads=options.heads,
        sequence_length=options.sequence_length,
        dropout_rate=options.dropout,
    )
    schedule = common.warmup_cosine(options.learning_rate, options.steps)
    window = (options.batch_size, options.sequence_length)
    common.compare(
        train_step,
        create_state(
            model, schedule, options.seed, functools.partial(common.marked, scheme=options.scheme)
        ),
        functools.partial(text_batches, data, *window, options.seed),
        lambda state: common.evaluate(evaluate_step, state, held_out_batches(data, *window)),
        options,
    )


if __name__ == "__main__":
    main()
