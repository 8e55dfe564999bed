"""Measures what checking every product costs: ``verify=True`` against ``verify=False``.

Run it from the repository's root: ``python -m benchmarks.integrity``. `README.md` beside this file
says what each column means. For every scheme and width a multilayer perceptron trains in turn with
and without verification, in one process with two enclaves.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from benchmarks.machine import Json, describe, environment
from benchmarks.overhead import SHIELDED, Contender
from benchmarks.perceptron import ROWS, batch, build, train_in_turn
from examples import common
from tempo_jax import Enclave

WIDTHS = (256, 512, 1024)
QUICK_WIDTHS = (512,)
SCHEMES = ("mixing", "orthogonal", "signed-permutation")
UNVERIFIED, VERIFIED = "unverified", "verified"


def measure(width: int, scheme_name: str, steps: int, enclaves: dict[str, Enclave]) -> Json:
    """Trains one width under one scheme, with and without verification in turn.

    Every product that the scheme lets out goes out (``offload="all"``), so that both send the same
    ones; by default verification's cost keeps some inside.

    Returns:
      `busy`, the enclave's seconds in each step; `seconds`, of each whole step; `first`, of the
      first call; `products`, how many are checked; `resident`, leaves on the devices, by variant;
      `checksum_runs`, after how many steps those that are verified are blinded anew; `kept`, bytes
      of the copies that the enclave keeps for the checks; `crossing`, bytes that cross in a step.
    """
    train_step, state = build(width)
    examples = batch(width)
    contenders = {
        variant: Contender(
            train_step,
            state,
            common.SCHEMES[scheme_name](),
            SHIELDED,
            enclaves[variant],
            offload="all",
            verify=variant == VERIFIED,
        )
        for variant in (UNVERIFIED, VERIFIED)
    }
    seconds, busy, _ = train_in_turn(contenders, enclaves, examples, steps)
    reports = {v: c.step.explain(c.state, examples) for v, c in contenders.items()}
    report = reports[VERIFIED]
    return {
        "width": width,
        "scheme": scheme_name,
        "busy": busy,
        "seconds": seconds,
        "first": {v: c.seconds[:1] for v, c in contenders.items()},
        "products": len(report.checked),
        "resident": {v: len(r.resident) for v, r in reports.items()},
        "checksum_runs": report.checksum_runs,
        "kept": report.bytes_kept,
        "crossing": report.bytes_down + report.bytes_up,
    }


def ratios(samples: dict[str, list[float]]) -> str:
    """The median with verification over the median without, and the same of the means."""
    middle, mean = (
        float(average(samples[VERIFIED]) / average(samples[UNVERIFIED]))
        for average in (np.median, np.mean)
    )
    return f"{middle:.2f} ({mean:.2f})"


def table(results: Json) -> str:
    """Returns the results as a line on the machine and a Markdown table."""
    lines = [
        f"{describe(results['environment'])}; {ROWS} rows, float32, medians of "
        f"{results['steps']} alternating steps (in brackets: means).",
        "",
        "| scheme | width | step ÷ unverified's | enclave's work ÷ unverified's "
        "| first call ÷ unverified's | products checked | leaves on the devices (unverified), "
        "blinded anew after | copies kept, MB (crossing in a step) |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results["results"]:
        first = r["first"][VERIFIED][0] / r["first"][UNVERIFIED][0]
        leaves = f"{r['resident'][VERIFIED]} ({r['resident'][UNVERIFIED]})"
        if r["checksum_runs"]:
            leaves += f", {r['checksum_runs']} steps"
        lines.append(
            f"| {r['scheme']} | {r['width']} | {ratios(r['seconds'])} | {ratios(r['busy'])} "
            f"| {first:.2f} | {r['products']} | {leaves} "
            f"| {r['kept'] / 1e6:.1f} ({r['crossing'] / 1e6:.1f}) |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--widths", nargs="+", type=common.positive, default=list(WIDTHS))
    parser.add_argument(
        "--schemes", nargs="+", choices=sorted(common.SCHEMES), default=list(SCHEMES)
    )
    parser.add_argument("--steps", type=common.positive, default=16, help="steps that count")
    parser.add_argument("--quick", action="store_true", help="one width, 5 steps")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="for the samples, JSON")
    options = parser.parse_args(arguments)
    if options.quick:
        options.widths, options.steps = list(QUICK_WIDTHS), 5
    results: Json = {"environment": environment(), "steps": options.steps, "results": []}
    for width in options.widths:
        for scheme in options.schemes:
            print(f"width {width}: {scheme}", file=sys.stderr, flush=True)
            with Enclave.launch() as unverified, Enclave.launch() as verified:
                enclaves = {UNVERIFIED: unverified, VERIFIED: verified}
                results["results"].append(measure(width, scheme, options.steps, enclaves))
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
