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

import numpy as np
from matplotlib.figure import Figure

from benchmarks.machine import Json, describe, environment
from benchmarks.overhead import ENCLAVE, PLAIN, SHIELDED, Contender
from benchmarks.perceptron import ROWS, batch, build, train_in_turn
from examples import common
from tempo_jax import Enclave

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
QUICK_WIDTHS = (64, 256, 1024)
GOAL = 1.05  # the enclave's busy time over that of computing everything inside


def measure(width: int, scheme_name: str, steps: int, launches: int) -> Json:
    """Trains one width under one scheme, all variants in turn, in enclaves launched several times.

    Processes differ in speed for as long as they live, so one launch does not tell.

    Returns:
      Medians of the launches' medians: `busy`, the enclave's seconds in a step for both
      placements; `seconds`, of a whole step for all variants. `offloaded`: the share of the
      products' arithmetic that goes out.
    """
    train_step, state = build(width)
    examples = batch(width)
    scheme = common.SCHEMES[scheme_name]()
    seconds: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}
    share = 0.0
    for _ in range(launches):
        with Enclave.launch() as shielded, Enclave.launch() as inside:
            enclaves = {SHIELDED: shielded, ENCLAVE: inside}
            contenders = {
                variant: Contender(train_step, state, scheme, variant, enclaves.get(variant))
                for variant in (PLAIN, SHIELDED, ENCLAVE)
            }
            made = train_in_turn(contenders, enclaves, examples, steps)
            for kept, found in zip((seconds, busy), made, strict=True):
                for variant, values in found.items():
                    kept.setdefault(variant, []).append(float(np.median(values)))
            report = contenders[SHIELDED].step.explain(contenders[SHIELDED].state, examples)
            outside, total = report.offloaded_work
            share = outside / total
    return {
        "width": width,
        "scheme": scheme_name,
        "busy": {v: float(np.median(s)) for v, s in busy.items()},
        "seconds": {v: float(np.median(s)) for v, s in seconds.items()},
        "offloaded": share,
    }


def busy_ratio(result: Json) -> float:
    """The enclave's busy time over that of computing everything inside."""
    return result["busy"][SHIELDED] / result["busy"][ENCLAVE]


def table(results: Json) -> str:
    """Returns the results as a line on the machine and a Markdown table."""
    lines = [
        f"{describe(results['environment'])}; {ROWS} rows, "
        f"medians of {results['steps']} steps in each of {results['launches']} launches. "
        f"Goal for the enclave's work: at most {GOAL}.",
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
    parser.add_argument("--launches", type=common.positive, default=3, help="of the enclaves")
    parser.add_argument("--quick", action="store_true", help="fewer widths, 3 steps, one launch")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="DIR",
        default=pathlib.Path("."),
        help="folder for placement.json and placement.png",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.widths, options.steps, options.launches = list(QUICK_WIDTHS), 3, 1
    results: Json = {
        "environment": environment(),
        "rows": ROWS,
        "steps": options.steps,
        "launches": options.launches,
        "schemes": options.schemes,
        "results": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for width in options.widths:
        for scheme in options.schemes:
            print(f"width {width}: {scheme}", file=sys.stderr, flush=True)
            results["results"].append(measure(width, scheme, options.steps, options.launches))
            text = json.dumps(results, indent=2) + "\n"
            (options.out / "placement.json").write_text(text)
    plot(results, options.out / "placement.png")
    print(table(results))


if __name__ == "__main__":
    main()
