"""Measures the enclave's own work under each scheme against computing everything inside.

Run it from the repository's root: ``python -m benchmarks.placement``. `README.md` beside this file
says what each column means. For every width and scheme a multilayer perceptron trains in turn under
`jax.jit`, under `tempo.shield`, and with ``placement="enclave"``, in one process.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import tempo_jax as tempo
from benchmarks.overhead import ENCLAVE, PLAIN, SHIELDED, Contender, Json, environment
from examples import common
from tempo_jax import Enclave

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
QUICK_WIDTHS = (64, 256, 1024)
ROWS = 1024  # examples in a step
CLASSES = 10
LAYERS = 3  # of the width, before the classifier
WARM_UP_STEPS = 2
GOAL = 1.05  # the enclave's busy time over that of computing everything inside


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


def measure(width: int, scheme_name: str, steps: int, enclaves: dict[str, Enclave]) -> Json:
    """Trains one width under one scheme, all variants in turn.

    Returns:
      Medians: `busy`, the enclave's seconds in a step for both placements; `seconds`, of a whole
      step for all variants; `offloaded`, the share of the products' arithmetic that goes out.
    """
    train_step, state = build(width)
    rng = np.random.default_rng(1)
    batch = {
        "x": rng.normal(size=(ROWS, width)).astype(np.float32),
        "y": rng.integers(0, CLASSES, ROWS).astype(np.int32),
    }
    scheme = common.SCHEMES[scheme_name]()
    contenders = {
        variant: Contender(train_step, state, scheme, variant, enclaves.get(variant))
        for variant in (PLAIN, SHIELDED, ENCLAVE)
    }
    busy: dict[str, list[float]] = {v: [] for v in enclaves}
    for _ in range(1 + WARM_UP_STEPS + steps):
        for variant, contender in contenders.items():
            enclave = enclaves.get(variant)
            before = enclave.statistics()["busy_seconds"] if enclave else 0.0
            contender.run(batch)
            if enclave:
                busy[variant].append(enclave.statistics()["busy_seconds"] - before)
    report = contenders[SHIELDED].step.explain(contenders[SHIELDED].state, batch)
    outside, total = report.offloaded_work
    first = 1 + WARM_UP_STEPS
    return {
        "width": width,
        "scheme": scheme_name,
        "busy": {v: float(np.median(s[first:])) for v, s in busy.items()},
        "seconds": {v: float(np.median(c.seconds[first:])) for v, c in contenders.items()},
        "offloaded": outside / total,
    }


def busy_ratio(result: Json) -> float:
    """The enclave's busy time over that of computing everything inside."""
    return result["busy"][SHIELDED] / result["busy"][ENCLAVE]


def table(results: Json) -> str:
    """Returns the results as a line on the machine and a Markdown table."""
    where = results["environment"]
    versions = (f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"{where['processor']}, {where['cores']} cores; {', '.join(versions)}; {ROWS} rows, "
        f"medians of {results['steps']} steps. Goal for the enclave's work: at most {GOAL}.",
        "",
        "| scheme | width | enclave's work ÷ all inside | products' arithmetic sent out "
        "| step ÷ plain's | all inside ÷ plain's |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for r in results["results"]:
        plain = r["seconds"][PLAIN]
        lines.append(
            f"| {r['scheme']} | {r['width']} | {busy_ratio(r):.2f} | {r['offloaded']:.0%} "
            f"| {r['seconds'][SHIELDED] / plain:.2f} | {r['seconds'][ENCLAVE] / plain:.2f} |"
        )
    return "\n".join(lines)


def plot(results: Json, path: pathlib.Path) -> None:
    """Draws the enclave's work against the width; the file's ending says the format."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for scheme in results["schemes"]:
        points = [(r["width"], busy_ratio(r)) for r in results["results"] if r["scheme"] == scheme]
        axes.plot(*zip(*points, strict=True), marker="o", label=scheme)
    axes.axhline(GOAL, color="black", linestyle=":", label="goal")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="width", ylabel="enclave's work ÷ all inside", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--widths", nargs="+", type=common.positive, default=list(WIDTHS))
    parser.add_argument(
        "--schemes", nargs="+", choices=sorted(common.SCHEMES), default=sorted(common.SCHEMES)
    )
    parser.add_argument("--steps", type=common.positive, default=5, help="steps that count")
    parser.add_argument("--quick", action="store_true", help="fewer widths, 3 steps")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="DIR",
        default=pathlib.Path("."),
        help="folder for placement.json and placement.png",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.widths, options.steps = list(QUICK_WIDTHS), 3
    results: Json = {
        "environment": environment(),
        "rows": ROWS,
        "steps": options.steps,
        "schemes": options.schemes,
        "results": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for width in options.widths:
        for scheme in options.schemes:
            print(f"width {width}: {scheme}", file=sys.stderr, flush=True)
            with Enclave.launch() as shielded, Enclave.launch() as inside:
                enclaves = {SHIELDED: shielded, ENCLAVE: inside}
                results["results"].append(measure(width, scheme, options.steps, enclaves))
            text = json.dumps(results, indent=2) + "\n"
            (options.out / "placement.json").write_text(text)
    plot(results, options.out / "placement.png")
    print(table(results))


if __name__ == "__main__":
    main()
