"""What the examples share: options, image data, the training loop, the comparison, the picture.

An example brings a `train_step(state, batch)` and a first state; `compare` trains it twice, under
`tempo.shield` and under `jax.jit`, from the same state and on the same batches.
"""

import argparse
import dataclasses
import functools
import pathlib
import pickle
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from matplotlib.figure import Figure
from sklearn import datasets

import tempo_jax as tempo

State = Any  # any pytree
Batch = dict[str, Any]  # arrays of one length: NumPy's outside a step, traced ones inside
Metrics = dict[str, jax.Array]

# The names `--scheme` takes.
SCHEMES: dict[str, Callable[[], tempo.schemes.Scheme]] = {
    name.replace("_", "-"): scheme for name, scheme in sorted(tempo.schemes.SCHEMES.items())
}
# These programs run on one device, from which shares hide nothing: they show what shares cost.
SCHEMES["secret-shares"] = functools.partial(tempo.schemes.SecretShares, insecure_one_pool=True)

HELD_OUT_DIGITS = 297
HELD_OUT_BATCH = 500


def argument_parser(
    description: str | None, *, steps: int, batch_size: int
) -> argparse.ArgumentParser:
    """Returns a parser of the options that every example takes, with the example's defaults."""
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=steps, help="training steps")
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="examples a step")
    add_scheme_option(parser)
    parser.add_argument(
        "--offload",
        choices=("auto", "all"),
        default="auto",
        help="send a product out when that is less work for the enclave, or whenever the scheme "
        "lets it out",
    )
    parser.add_argument(
        "--placement",
        choices=("auto", "enclave"),
        default="auto",
        help="send products and convolutions to the device, or keep the whole step inside",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument(
        "--explain", action="store_true", help="print what runs where and what crosses"
    )
    return parser


def add_scheme_option(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of a scheme."""
    parser.add_argument(
        "--scheme",
        choices=sorted(SCHEMES),
        default="mixing",
        help="how tensors are blinded before they leave the enclave; all but `mixing` obfuscate "
        "and do not protect",
    )


def marked(optimizer: optax.GradientTransformation, scheme: str) -> optax.GradientTransformation:
    """Marks an optimizer for the devices, under a scheme that keeps weights there.

    Under any other the mark would have no effect, and the library would say so.

    Args:
      optimizer: from Optax.
      scheme: of `SCHEMES`.
    """
    chosen = SCHEMES[scheme]()
    keeps = chosen.key_budget != 0 and not chosen.keys_per_product
    return tempo.cheap_update(optimizer) if keeps else optimizer


def add_training_options(
    parser: argparse.ArgumentParser, *, learning_rate: float, plot: str
) -> None:
    """Adds the options of the examples that train under shield."""
    parser.add_argument(
        "--learning-rate", type=float, default=learning_rate, help="peak of the schedule"
    )
    parser.add_argument(
        "--judge",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="say leaf by leaf whether three steps differ from plain JAX by more than rounding; "
        "takes them operation by operation as well",
    )
    parser.add_argument(
        "--plot", type=pathlib.Path, default=pathlib.Path(plot), help="picture of the loss curves"
    )


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option of the examples that can train on CIFAR-10."""
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        metavar="DIR",
        help="folder with the python batches of CIFAR-10, instead of scikit-learn's digits; they "
        "are pickles, so name only files that you trust",
    )


def positive(text: str) -> int:
    """Parses an integer of at least one, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Labelled images, standardized with the training images' mean and deviation.

    Attributes:
      train_images: float32, (count, 32, 32, channels).
      train_labels: int32, (count,).
      held_out_images: like `train_images`.
      held_out_labels: like `train_labels`.
      num_classes: labels are below this.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    held_out_images: np.ndarray
    held_out_labels: np.ndarray
    num_classes: int = 10


def load_images(directory: pathlib.Path | None) -> ImageData:
    """Reads CIFAR-10 from `directory`, or scikit-learn's handwritten digits if it is None."""
    return load_digits() if directory is None else load_cifar10(directory)


def load_digits() -> ImageData:
    """Returns scikit-learn's 1797 handwritten digits, scaled from 8×8 to 32×32 pixels.

    The split is the same in every run; it is drawn at random, since the file is ordered by writer.
    """
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    small = jnp.asarray(pixels[order].reshape(-1, 8, 8, 1), jnp.float32)
    images = np.asarray(jax.image.resize(small, (len(order), 32, 32, 1), "bilinear"))
    labels = labels[order]
    held_out = HELD_OUT_DIGITS
    return _standardized(images[held_out:], labels[held_out:], images[:held_out], labels[:held_out])


def load_cifar10(directory: pathlib.Path) -> ImageData:
    """Reads the official python batches of CIFAR-10.

    They are pickles, and a pickle can run any code as it is read: use only files that you trust.

    Args:
      directory: holds ``data_batch_1`` to ``data_batch_5`` and ``test_batch``.

    Raises:
      FileNotFoundError: one of the files is missing.
    """
    train = [_read_cifar10_batch(directory / f"data_batch_{i}") for i in range(1, 6)]
    held_out_images, held_out_labels = _read_cifar10_batch(directory / "test_batch")
    return _standardized(
        np.concatenate([images for images, _ in train]),
        np.concatenate([labels for _, labels in train]),
        held_out_images,
        held_out_labels,
    )


def _read_cifar10_batch(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns one file's images, uint8 (count, 32, 32, 3), and its labels."""
    if not path.is_file():
        raise FileNotFoundError(
            f"--data: no file {path}. Name the folder `cifar-10-batches-py` that the archive "
            "`cifar-10-python.tar.gz` unpacks to."
        )
    with path.open("rb") as file:
        content = pickle.load(file, encoding="bytes")
    images = content[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.asarray(content[b"labels"])


def _standardized(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    held_out_images: np.ndarray,
    held_out_labels: np.ndarray,
) -> ImageData:
    """Shifts and scales each channel to mean 0 and deviation 1 over the training images."""
    mean = train_images.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    deviation = train_images.std(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    return ImageData(
        (train_images.astype(np.float32) - mean) / deviation,
        train_labels.astype(np.int32),
        (held_out_images.astype(np.float32) - mean) / deviation,
        held_out_labels.astype(np.int32),
    )


def image_batches(data: ImageData, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yields training batches without end, every epoch in a new order.

    All batches have the same size: what is left over at the end of an epoch waits for a later one.

    Raises:
      ValueError: a batch would be larger than the data.
    """
    count = len(data.train_labels)
    if batch_size > count:
        raise ValueError(f"--batch-size: {batch_size} is more than the {count} training images.")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield {"image": data.train_images[chosen], "label": data.train_labels[chosen]}


def held_out_batches(data: ImageData) -> Iterator[Batch]:
    """Yields every held-out image once."""
    for start in range(0, len(data.held_out_labels), HELD_OUT_BATCH):
        chosen = slice(start, start + HELD_OUT_BATCH)
        yield {"image": data.held_out_images[chosen], "label": data.held_out_labels[chosen]}


def warmup_cosine(learning_rate: float, steps: int) -> optax.Schedule:
    """Returns a learning rate that rises over a tenth of the steps, then falls to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean over all labels of ``-log softmax(logits)[label]``, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of labels that have the largest logit, between 0 and 1."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def evaluate(
    evaluate_step: Callable[[State, Batch], Metrics], state: State, batches: Iterable[Batch]
) -> dict[str, float]:
    """Returns each metric's mean over all examples of `batches`.

    Args:
      evaluate_step: returns a batch's mean metrics; compiled here.
      state: plain, not sealed.
      batches: need not be of equal size.
    """
    compiled = jax.jit(evaluate_step)
    sums: dict[str, float] = {}
    count = 0
    for batch in batches:
        size = batch_length(batch)
        count += size
        for name, value in compiled(state, batch).items():
            sums[name] = sums.get(name, 0.0) + size * float(value)
    return {name: total / count for name, total in sums.items()}


def batch_length(batch: Batch) -> int:
    """Returns the number of examples in a batch."""
    return len(next(iter(batch.values())))


@dataclasses.dataclass(frozen=True)
class History:
    """What a training run showed, one entry a step.

    Attributes:
      batch_size: examples in each step.
      losses: training loss, in nats.
      accuracies: training accuracy, between 0 and 1.
      seconds: wall time; the first entry holds the compilation.
    """

    batch_size: int
    losses: list[float] = dataclasses.field(default_factory=list)
    accuracies: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def examples_per_second(self, last: int = 0) -> float:
        """Returns the median speed of the `last` steps (0: all), of which the first never counts.

        A run of one step has only the first, and gets its speed.
        """
        return self.batch_size / statistics.median((self.seconds[1:] or self.seconds)[-last:])


def train(
    step: Callable[[State, Batch], tuple[State, Metrics]],
    state: State,
    batches: Iterable[Batch],
    *,
    steps: int,
    title: str,
) -> tuple[State, History]:
    """Runs `steps` steps and shows a progress bar.

    Args:
      step: plain, jitted or shielded; its metrics hold ``loss`` and ``accuracy``.
      state: the step's first argument; a shielded step consumes it.
      batches: yields at least `steps` batches of one size.
      steps: number of steps.
      title: stands in front of the bar.

    Returns:
      The state after the last step, and what the bar showed.
    """
    history: History | None = None
    with tqdm.tqdm(total=steps, desc=title, unit="step") as progress:
        for _, batch in zip(range(steps), batches, strict=False):
            history = history or History(batch_length(batch))
            started = time.perf_counter()
            state, metrics = step(state, batch)
            # Reading the metrics waits for the step, so the time is not just that of its launch.
            history.losses.append(float(metrics["loss"]))
            history.accuracies.append(float(metrics["accuracy"]))
            history.seconds.append(time.perf_counter() - started)
            progress.set_postfix_str(
                f"loss {history.losses[-1]:.4f}, accuracy {history.accuracies[-1]:.1%}, "
                f"{history.examples_per_second(last=10):.0f} examples/s",
                refresh=False,
            )
            progress.update()
    assert history is not None
    return state, history


def compare(
    train_step: Callable[[State, Batch], tuple[State, Metrics]],
    state: State,
    batches: Callable[[], Iterable[Batch]],
    evaluate_state: Callable[[State], dict[str, float]],
    options: argparse.Namespace,
) -> None:
    """Trains under shield and without it, prints both results and saves both loss curves.

    Between them the table of `tempo.testing.compare` says whether they differ by more than
    rounding.

    Args:
      train_step: the plain step; inside, `tempo.reveal` marks what the host may see.
      state: the plain state from which both runs start.
      batches: called once for each run; must yield the same batches each time.
      evaluate_state: returns the held-out metrics of a plain state.
      options: from `argument_parser` with `add_training_options`.
    """
    with tempo.Enclave.launch() as enclave:
        shielded_step = tempo.shield(
            train_step,
            enclave=enclave,
            scheme=SCHEMES[options.scheme](),
            placement=options.placement,
            offload=options.offload,
        )
        sealed = enclave.seal(state)
        if options.explain:
            print(shielded_step.explain(sealed, next(iter(batches()))))
        sealed, shielded = train(
            shielded_step, sealed, batches(), steps=options.steps, title="shielded"
        )
        shielded_held_out = evaluate_state(enclave.open(sealed))
        if options.judge:
            # Long runs drift apart by rounding alone; three steps tell it from a fault.
            tempo.testing.compare(shielded_step, state, next(iter(batches())))

    trained, plain = train(
        jax.jit(train_step), state, batches(), steps=options.steps, title="plain"
    )
    plain_held_out = evaluate_state(trained)

    save_loss_curves(options.plot, shielded, plain)
    rows = [
        ("held-out accuracy", "{:.2%}", shielded_held_out["accuracy"], plain_held_out["accuracy"]),
        ("held-out loss", "{:.4f}", shielded_held_out["loss"], plain_held_out["loss"]),
        ("training loss, last step", "{:.4f}", shielded.losses[-1], plain.losses[-1]),
        ("examples/s, median", "{:.0f}", *(h.examples_per_second() for h in (shielded, plain))),
        ("first step, with compilation", "{:.1f} s", shielded.seconds[0], plain.seconds[0]),
    ]
    print(f"\n{'':30}{'shielded':>12}{'plain':>12}")
    for name, style, *values in rows:
        print(f"{name:30}" + "".join(f"{style.format(value):>12}" for value in values))
    print(f"\nBoth loss curves: {options.plot}")


def save_loss_curves(path: pathlib.Path, shielded: History, plain: History) -> None:
    """Draws the training loss of both runs over the steps; the file's ending says the format."""
    # A figure of its own, without pyplot, draws with Agg and needs no display.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(plain.losses) + 1)
    axes.plot(steps, plain.losses, color="tab:orange", linewidth=4, alpha=0.5, label="plain")
    axes.plot(steps, shielded.losses, color="tab:blue", linewidth=1.2, label="shielded")
    axes.set(xlabel="step", ylabel="training loss, nats", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
