"""A first look: trains a digits model shielded and plain, and shows what leaves and what it costs.

Under the defaults: outside is what saves the enclave work on this machine, which at this size is
nearly all of the arithmetic. Prints a table and draws a picture of what the untrusted device got.
"""

import argparse
import contextlib
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import linen as nn
from matplotlib.figure import Figure

import tempo_jax as tempo
from examples.common import Batch, History, Metrics, State, cross_entropy, load_digits, positive
from examples.common import train as run_steps

SIDE = 32  # pixels of a digit's side
TILES = 3  # digits, or rows of what the device got, to a side of the picture
INSIDE_STEPS = 4  # that measure what the enclave's work is without devices


class Network(nn.Module):
    """A residual perceptron; the products of its wide layers are nearly all of the arithmetic.

    Attributes:
      width: of each layer.
      depth: number of wide layers.
    """

    width: int
    depth: int = 3

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, pixels) to logits (batch, 10)."""
        x = nn.gelu(nn.Dense(self.width, name="wide_0")(images))
        for i in range(1, self.depth):
            x = x + nn.gelu(nn.Dense(self.width, name=f"wide_{i}")(x))
        return nn.Dense(10, name="classify")(nn.LayerNorm()(x))


def training(
    width: int, optimizer: optax.GradientTransformation
) -> tuple[State, Callable[..., Any]]:
    """Returns a first state, and the plain step that trains it."""
    model = Network(width)
    params = model.init(jax.random.key(0), jnp.zeros((1, SIDE * SIDE)))

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params, moments = state

        def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
            logits = model.apply(params, batch["image"])
            return cross_entropy(logits, batch["label"]), logits  # type: ignore[arg-type]

        (loss, logits), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        correct = jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])
        metrics = {"loss": tempo.reveal(loss), "accuracy": tempo.reveal(correct)}
        return (optax.apply_updates(params, updates), moments), metrics

    return (params, optimizer.init(params)), train_step


def batches(size: int, seed: int) -> Iterator[Batch]:
    """Yields batches of digits drawn at random, each moved by up to two pixels."""
    data, rng = load_digits(), np.random.default_rng(seed)
    images = data.train_images[..., 0]
    while True:
        chosen = rng.integers(len(images), size=size)
        moved = np.stack(
            [np.roll(images[i], rng.integers(-2, 3, size=2), axis=(0, 1)) for i in chosen]
        )
        yield {"image": moved.reshape(size, -1), "label": data.train_labels[chosen]}


@contextlib.contextmanager
def phase(title: str) -> Iterator[None]:
    """Shows that something without steps is going on, and how long it has taken."""
    ended = threading.Event()
    with tqdm.tqdm(desc=title, bar_format="{desc}: {elapsed}", leave=True) as shown:

        def tick() -> None:
            while not ended.wait(0.5):
                shown.refresh()

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield
        finally:
            ended.set()
            ticking.join()


def first_product(view: tempo.testing.HostView) -> tuple[np.ndarray, np.ndarray]:
    """What the device got of the first layer: its input and its weight, blinded."""
    return view.products[0].operands


def main() -> None:
    """Trains twice, prints the table and saves the picture."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=12, help="training steps")
    parser.add_argument("--batch-size", type=positive, default=4096, help="digits a step")
    parser.add_argument("--width", type=positive, default=2048, help="of each layer")
    parser.add_argument(
        "--offload",
        choices=("auto", "all"),
        default="auto",
        help="send out what saves the enclave work, as `shield` does by default, or all that the "
        "scheme lets out",
    )
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path("first.png"))
    options = parser.parse_args()
    state, step = training(options.width, optax.adam(3e-4))

    def draw() -> Iterator[Batch]:
        return batches(options.batch_size, seed=0)

    batch = next(draw())
    with phase("starting the enclave"):
        enclave = tempo.Enclave.launch()
    with enclave:
        shielded = tempo.shield(step, enclave=enclave, offload=options.offload)
        with phase("planning"):
            report = shielded.explain(state, batch)
        print(f"  {str(report).splitlines()[0]}")
        if not report.products[0]:
            parser.error(
                "nothing leaves at this size; raise --width or --batch-size, or send out what "
                "does not save work, with --offload all"
            )
        with phase("compiling, in the enclave; its kernels too, once per installation"):
            _, metrics = shielded(enclave.seal(state), batch)
            float(metrics["loss"])
        sealed = enclave.seal(state)
        counted, work_of_steps = _counting(shielded, enclave)
        sealed, history = run_steps(counted, sealed, draw(), steps=options.steps, title="shielded")
        trained = enclave.open(sealed)
        work = work_of_steps()
        inside = _inside_work(step, enclave, state, batch)
        got = {"device, Mixing (default)": _seen(shielded, enclave.seal(trained), batch)}
        permuted = tempo.shield(
            step, enclave=enclave, scheme=tempo.schemes.SignedPermutation(), offload="all"
        )
        with phase("looking at what the device gets under SignedPermutation"):
            got["device, SignedPermutation"] = _seen(permuted, enclave.seal(trained), batch)

    plain_state, plain = run_steps(jax.jit(step), state, draw(), steps=options.steps, title="plain")
    outside, total = report.products
    arithmetic = report.offloaded_work
    crossing = (report.bytes_down, report.bytes_up)
    losses = np.abs(np.subtract(history.losses, plain.losses))
    weights = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), trained[0], plain_state[0])
    rows = [
        ("products sent out", f"{outside} of {total}"),
        ("share of the arithmetic", f"{arithmetic[0] / arithmetic[1]:.1%}"),
        ("MB a step, down and up", " and ".join(f"{n / 1e6:.0f}" for n in crossing)),
        ("enclave's processor time ÷ all inside", f"{work / inside:.2f}"),
        ("seconds a step, shielded and plain", " and ".join(_seconds(h) for h in (history, plain))),
        ("largest difference of a loss to the plain run", f"{losses.max():.1g}"),
        ("largest difference of a weight", f"{max(jax.tree.leaves(weights)):.1g}"),
        ("accuracy in the last step", f"{history.accuracies[-1]:.1%}"),
    ]
    print()
    for name, value in rows:
        print(f"{name:46} {value:>18}")
    weight = np.asarray(trained[0]["params"]["wide_0"]["kernel"])
    draw_picture(options.plot, (batch["image"], weight), got, history, plain)
    print(f"\nWhat the device got, and both loss curves: {options.plot}")


def _seconds(history: History) -> str:
    return f"{history.batch_size / history.examples_per_second():.2g}"


def _counting(
    step: Callable[..., Any], enclave: tempo.Enclave
) -> tuple[Callable[..., Any], Callable[[], float]]:
    """The same step, and the enclave's median processor seconds for it; the first compiles."""
    used = [enclave.statistics()["processor_seconds"]]

    def counted(state: State, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = step(state, batch)
        float(metrics["loss"])
        used.append(enclave.statistics()["processor_seconds"])
        return state, metrics

    def work() -> float:
        spent = np.diff(used)
        return float(np.median(spent[1:] if len(spent) > 1 else spent))

    return counted, work


def _inside_work(
    step: Callable[..., Any], enclave: tempo.Enclave, state: State, batch: Batch
) -> float:
    """Processor seconds of the enclave for a step when nothing leaves it."""
    inside = tempo.shield(step, enclave=enclave, placement="enclave")
    counted, work = _counting(inside, enclave)
    sealed = enclave.seal(state)
    with phase("measuring the step all inside"):
        for _ in range(INSIDE_STEPS):
            sealed, _ = counted(sealed, batch)
    return work()


def _seen(shielded: Any, state: State, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    with tempo.testing.host_view() as view:
        shielded(state, batch)
    return first_product(view)


def draw_picture(
    path: pathlib.Path,
    truth: tuple[np.ndarray, np.ndarray],
    got: dict[str, tuple[np.ndarray, np.ndarray]],
    shielded: History,
    plain: History,
) -> None:
    """Draws input and weight as they are and as the device got them, and both loss curves."""
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 5)
    columns = {"as they are": truth, **got}
    for column, (title, (inputs, weight)) in enumerate(columns.items()):
        for row, (name, shown) in enumerate(
            (("inputs", _tiles(inputs)), ("weights", _tiles(weight.T)))
        ):
            axes = figure.add_subplot(grid[row, column])
            limit = np.percentile(np.abs(shown), 99)
            axes.imshow(shown, cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{name}\n{title}", fontsize=10)
    axes = figure.add_subplot(grid[:, 3:])
    steps = range(1, len(plain.losses) + 1)
    axes.plot(steps, plain.losses, color="tab:orange", linewidth=5, alpha=0.5, label="plain")
    axes.plot(steps, shielded.losses, color="tab:blue", linewidth=1.3, label="shielded")
    axes.set(xlabel="training step", ylabel="training loss (nats)", yscale="log")
    axes.set_title("the same training, shielded and plain")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def _tiles(matrix: np.ndarray) -> np.ndarray:
    """The first rows, each as a picture of the pixels that it belongs to."""
    rows = np.asarray(matrix)[: TILES * TILES, : SIDE * SIDE].reshape(TILES, TILES, SIDE, SIDE)
    return rows.transpose(0, 2, 1, 3).reshape(TILES * SIDE, TILES * SIDE)


if __name__ == "__main__":
    main()
