"""Serves a model under `tempo.shield` that was fitted without it.

Run it from the repository's root: ``python -m examples.inference``.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax.training import train_state

import tempo_jax as tempo
from examples import common, models

LEARNING_RATE = 2e-3


def train_step(
    state: train_state.TrainState, batch: common.Batch
) -> tuple[train_state.TrainState, common.Metrics]:
    """One step of Adam, in the clear."""

    def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = state.apply_fn({"params": params}, batch["image"])
        return common.cross_entropy(logits, batch["label"]), logits

    (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=gradients)
    return state, {"loss": loss, "accuracy": common.accuracy(logits, batch["label"])}


def fit(model: models.ConvNet, data: common.ImageData, options: argparse.Namespace) -> Any:
    """Returns parameters trained in the clear."""
    variables = model.init(
        jax.random.PRNGKey(options.seed), jnp.zeros((1, *data.train_images.shape[1:]))
    )
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.adam(LEARNING_RATE)
    )
    batches = common.image_batches(data, options.batch_size, options.seed)
    state, _ = common.train(
        jax.jit(train_step), state, batches, steps=options.steps, title="fitting, plain"
    )
    return state.params


def serve(
    answer: Callable[[np.ndarray], Any], requests: Sequence[np.ndarray], title: str
) -> tuple[np.ndarray, float]:
    """Answers the requests one after the other.

    Args:
      answer: maps a request's images to its logits.
      requests: images, (batch, height, width, channels), all of one shape.
      title: stands in front of the progress bar.

    Returns:
      The logits of all requests in order, and the images per second; the first request does not
      count, since it waits for the compilation.
    """
    logits, seconds = [], []
    for images in tqdm.tqdm(requests, desc=title, unit="request"):
        started = time.perf_counter()
        logits.append(np.asarray(answer(images)))
        seconds.append(time.perf_counter() - started)
    return np.concatenate(logits), len(requests[0]) / statistics.median(seconds[1:] or seconds)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, or `arguments` in its place."""
    parser = common.argument_parser(__doc__, steps=100, batch_size=64)
    parser.add_argument(
        "--requests", type=common.positive, default=20, help="batches of held-out images to serve"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    options = parse_options(arguments)
    data = common.load_digits()
    model = models.ConvNet(data.num_classes)
    params = fit(model, data, options)

    def predict(params: Any, images: jax.typing.ArrayLike) -> Any:
        return model.apply({"params": params}, images)

    # The requests go round the held-out images, so that all have one shape and compile once.
    asked = np.arange(options.requests * options.batch_size) % len(data.held_out_labels)
    requests = np.split(data.held_out_images[asked], options.requests)
    labels = data.held_out_labels[asked]

    with tempo.Enclave.launch() as enclave:
        shielded_predict = tempo.shield(
            predict,
            enclave=enclave,
            scheme=common.SCHEMES[options.scheme](),
            placement=options.placement,
            offload=options.offload,
        )
        sealed = enclave.seal(params)
        if options.explain:
            print(shielded_predict.explain(sealed, requests[0]))
        # Nothing is revealed: the answer stays sealed until the client opens it.
        shielded, shielded_speed = serve(
            lambda images: enclave.open(shielded_predict(sealed, images)), requests, "shielded"
        )
        tempo.testing.compare(shielded_predict, params, requests[0], steps=1)
    plain, plain_speed = serve(functools.partial(jax.jit(predict), params), requests, "plain")

    shielded_choice, plain_choice = shielded.argmax(axis=-1), plain.argmax(axis=-1)
    agreement = np.mean(shielded_choice == plain_choice)
    print(f"\n{'':30}{'shielded':>12}{'plain':>12}")
    print(
        f"{'held-out accuracy':30}{np.mean(shielded_choice == labels):>12.2%}"
        f"{np.mean(plain_choice == labels):>12.2%}"
    )
    print(f"{'images/s, median':30}{shielded_speed:>12.0f}{plain_speed:>12.0f}")
    print(f"\nBoth choose the same digit for {agreement:.2%} of images.")


if __name__ == "__main__":
    main()
