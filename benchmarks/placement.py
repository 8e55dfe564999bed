"""Measures the enclave's own work under each scheme against computing everything inside.

Run it from the repository's root: ``python -m benchmarks.placement``. `README.md` beside this file
says what each column means. For every width, number of rows and scheme a multilayer perceptron
trains in turn under `jax.jit`, under `tempo.shield`, and with ``placement="enclave"``, in one
process; ``--against DIR`` compares the enclave's work with that of another checkout, in turn.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import subprocess
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


def measure(width: int, rows: int, scheme_name: str, steps: int, launches: int) -> Json:
    """Trains one size under one scheme, all variants in turn, in enclaves launched several times.

    Processes differ in speed for as long as they live, so one launch does not tell.

    Returns:
      Medians of the launches' medians: `busy`, the enclave's seconds in a step for both
      placements, and `processor`, of all its threads; `seconds`, of a whole step for all
      variants. `offloaded`: the share of the products' arithmetic that goes out.
    """
    train_step, state = build(width)
    examples = batch(width, rows)
    scheme = common.SCHEMES[scheme_name]()
    seconds: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    share = 0.0
    for _ in range(launches):
        with Enclave.launch() as shielded, Enclave.launch() as inside:
            enclaves = {SHIELDED: shielded, ENCLAVE: inside}
            contenders = {
                variant: Contender(train_step, state, scheme, variant, enclaves.get(variant))
                for variant in (PLAIN, SHIELDED, ENCLAVE)
            }
            made = train_in_turn(contenders, enclaves, examples, steps)
            for kept, found in zip((seconds, busy, processor), made, strict=True):
                for variant, values in found.items():
                    kept.setdefault(variant, []).append(float(np.median(values)))
            report = contenders[SHIELDED].step.explain(contenders[SHIELDED].state, examples)
            outside, total = report.offloaded_work
            share = outside / total
    return {
        "width": width,
        "rows": rows,
        "scheme": scheme_name,
        "busy": {v: float(np.median(s)) for v, s in busy.items()},
        "processor": {v: float(np.median(s)) for v, s in processor.items()},
        "seconds": {v: float(np.median(s)) for v, s in seconds.items()},
        "offloaded": share,
    }


def compare(
    other: pathlib.Path, width: int, rows: int, scheme: str, steps: int, launches: int
) -> Json:
    """The enclave's work in this checkout and in another one, launched in turn.

    Returns:
      For `busy` and `processor`, see `benchmarks.busy`, the least seconds of a step of both: other
      work on the machine only adds to them.

    Raises:
      CalledProcessError: the other checkout does not run.
    """
    script = pathlib.Path(__file__).with_name("busy.py")
    checkouts = {"here": script.parent.parent, "there": other.absolute()}
    least: Json = {"busy": {}, "processor": {}}
    for _ in range(launches):
        for name, root in checkouts.items():
            done = subprocess.run(
                [sys.executable, "-P", str(script), *map(str, (width, rows, scheme, steps))],
                cwd=root,
                env={**os.environ, "PYTHONPATH": str(root)},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            for what, seconds in json.loads(done.stdout).items():
                least[what][name] = min(seconds + [least[what].get(name, math.inf)])
    return least


def work_ratio(result: Json, what: str = "busy") -> float:
    """The enclave's busy time, or its processors', over that of computing everything inside."""
    return result[what][SHIELDED] / result[what][ENCLAVE]


def table(results: Json) -> str:
    """Returns the results as a line on the machine and a Markdown table."""
    lines = [
        f"{describe(results['environment'])}; medians of {results['steps']} steps in each of "
        f"{results['launches']} launches. "
        f"Goal for the enclave's work: at most {GOAL}.",
        "",
        "| scheme | width | rows | enclave's work ÷ all inside | its processor time ÷ all inside "
        "| largest possible gain | products' arithmetic sent out | step ÷ plain's "
        "| all inside ÷ plain's |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results["results"]:
        plain, ratio, used = r["seconds"][PLAIN], work_ratio(r), work_ratio(r, "processor")
        lines.append(
            f"| {r['scheme']} | {r['width']} | {r['rows']} | {ratio:.2f} | {used:.2f} "
            f"| {1 / ratio:.1f} "
            f"| {r['offloaded']:.0%} | {r['seconds'][SHIELDED] / plain:.2f} "
            f"| {r['seconds'][ENCLAVE] / plain:.2f} |"
        )
    compared = [r for r in results["results"] if "against" in r]
    if compared:
        lines += [
            "",
            f"Against {results['against']}, least times of steps in launches in turn:",
            "",
            "| scheme | width | rows | enclave's work ÷ the other's "
            "| processor time ÷ the other's |",
            "|:--|--:|--:|--:|--:|",
        ]
    for r in compared:
        busy, used = (r["against"][what] for what in ("busy", "processor"))
        lines.append(
            f"| {r['scheme']} | {r['width']} | {r['rows']} | {busy['here'] / busy['there']:.2f} "
            f"| {used['here'] / max(used['there'], 0.01):.2f} |"
        )
    return "\n".join(lines)


def plot(results: Json, path: pathlib.Path) -> None:
    """Draws the enclave's work against the width; the file's ending says the format."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for scheme in results["schemes"]:
        for rows in results["rows"]:
            points = [
                (r["width"], work_ratio(r))
                for r in results["results"]
                if (r["scheme"], r["rows"]) == (scheme, rows)
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{scheme}, {rows} rows")
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
        "--rows", nargs="+", type=common.positive, default=[ROWS], help="examples in a step"
    )
    parser.add_argument(
        "--against",
        type=pathlib.Path,
        metavar="DIR",
        help="another checkout, with which the enclave's work is compared in turn",
    )
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
        options.widths = list(QUICK_WIDTHS)
        options.steps, options.launches = 3, 1
    results: Json = {
        "environment": environment(),
        "rows": options.rows,
        "against": options.against and options.against.name,
        "steps": options.steps,
        "launches": options.launches,
        "schemes": options.schemes,
        "results": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for scheme in options.schemes:
        for width, rows in itertools.product(options.widths, options.rows):
            print(f"{scheme}: width {width}, {rows} rows", file=sys.stderr, flush=True)
            size = width, rows, scheme, options.steps, options.launches
            result = measure(*size)
            if options.against:
                result["against"] = compare(options.against, *size)
            results["results"].append(result)
            text = json.dumps(results, indent=2) + "\n"
            (options.out / "placement.json").write_text(text)
    plot(results, options.out / "placement.png")
    print(table(results))


if __name__ == "__main__":
    main()
