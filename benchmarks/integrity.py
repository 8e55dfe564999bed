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
from typing import Any

import numpy as np

from benchmarks.overhead import SHIELDED, Contender, Json, environment
from benchmarks.placement import CLASSES, ROWS, build
from examples import common
from tempo_jax import Enclave

WIDTHS = (256, 512, 1024)
QUICK_WIDTHS = (512,)
SCHEMES = ("mixing", "signed-permutation")
WARM_UP_STEPS = 2
UNVERIFIED, VERIFIED = "unverified", "verified"


def measure(width: int, scheme_name: str, steps: int, enclaves: dict[str, Enclave]) -> Json:
    """Trains one width under one scheme, with and without verification in turn.

    Every product that the scheme lets out goes out (``offload="all"``), so that both send the same
    ones; by default verification's cost keeps some inside.

    Returns:
      `busy`, the enclave's seconds in each step; `seconds`, of each whole step; `first`, of the
      first call; `products`, how many are checked; `kept`, bytes of the copies that the enclave
      keeps for the checks; `crossing`, bytes that cross in a step.
    """
    train_step, state = build(width)
    rng = np.random.default_rng(1)
    batch = {
        "x": rng.normal(size=(ROWS, width)).astype(np.float32),
        "y": rng.integers(0, CLASSES, ROWS).astype(np.int32),
    }
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
    busy: dict[str, list[float]] = {v: [] for v in contenders}
    first = 1 + WARM_UP_STEPS
    for _ in range(first + steps):
        for variant, contender in contenders.items():
            before = enclaves[variant].statistics()["busy_seconds"]
            contender.run(batch)
            busy[variant].append(enclaves[variant].statistics()["busy_seconds"] - before)
    report = contenders[VERIFIED].step.explain(contenders[VERIFIED].state, batch)
    return {
        "width": width,
        "scheme": scheme_name,
        "busy": {v: s[first:] for v, s in busy.items()},
        "seconds": {v: c.seconds[first:] for v, c in contenders.items()},
        "first": {v: c.seconds[:1] for v, c in contenders.items()},
        "products": len(report.checked),
        "kept": report.bytes_kept,
        "crossing": report.bytes_down + report.bytes_up,
    }


def ratio(samples: dict[str, list[float]]) -> float:
    """The median with verification over the median without."""
    medians: dict[str, Any] = {v: np.median(s) for v, s in samples.items()}
    return float(medians[VERIFIED] / medians[UNVERIFIED])


def table(results: Json) -> str:
    """Returns the results as a line on the machine and a Markdown table."""
    where = results["environment"]
    versions = (f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"{where['processor']}, {where['cores']} cores; {', '.join(versions)}; {ROWS} rows, "
        f"float32, medians of {results['steps']} alternating steps.",
        "",
        "| scheme | width | step ÷ unverified's | enclave's work ÷ unverified's "
        "| first call ÷ unverified's | products checked | copies kept, MB (crossing in a step) |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results["results"]:
        ratios = " | ".join(f"{ratio(r[name]):.2f}" for name in ("seconds", "busy", "first"))
        kept, crossing = r["kept"] / 1e6, r["crossing"] / 1e6
        lines.append(
            f"| {r['scheme']} | {r['width']} | {ratios} | {r['products']} "
            f"| {kept:.1f} ({crossing:.1f}) |"
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
    parser.add_argument("--steps", type=common.positive, default=9, help="steps that count")
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
