"""Measures what a step costs the enclave, the wire and the host when more workers multiply.

Run it from the repository's root: ``python -m benchmarks.workers``. `README.md` beside this file
says what each column means. The perceptron of `benchmarks.placement` trains on a mesh of so many
simulated devices of one process, or with ``--processes`` of so many processes with one device each.
The workers share this machine's cores, so the figures say what more of them cost; how many would
help is computed from what the plan costs the enclave.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import tempo_jax as tempo
from benchmarks.machine import Json, describe, environment
from benchmarks.perceptron import FIRST, batch, build
from examples import common
from examples.workers import free_port
from tempo_jax.reporting.report import Report

COUNTS = (1, 2, 4, 8)
WIDTH, ROWS = 1024, 4096
LIMIT = 1024  # workers beyond which nobody asks
# A doubling that makes a step shorter by less does not help.
HELPS = 0.05
# How many times faster than the enclave a device multiplies; about a CPU, and two sizes of GPUs.
RATES = (1, 10, 100)
TRANSFERS = 2  # the row of transfers in a recording of `tempo.profile`


def step_seconds(workers: int, enclave: float, devices: float, visiting: float) -> float:
    """What a step takes: the enclave's work, the devices' shared out, and each worker's visits.

    Args:
      workers: how many.
      enclave: seconds that it is busy in a step, whoever brings what.
      devices: seconds that one device would take for all products of a step.
      visiting: seconds that the visits of one more worker cost.
    """
    return enclave + devices / workers + visiting * (workers - 1)


def useful_workers(enclave: float, devices: float, visiting: float) -> int:
    """The first power of two whose double makes a step shorter by less than `HELPS`.

    The arguments are those of `step_seconds`.
    """
    workers = 1
    while workers < LIMIT:
        now, then = (step_seconds(n, enclave, devices, visiting) for n in (workers, 2 * workers))
        if then > (1 - HELPS) * now:
            break
        workers *= 2
    return workers


def limits(report: Report) -> Json:
    """From how many workers on more stop helping, by the devices' rate; from the cost model.

    Args:
      report: what `explain` says of a plan.
    """
    costs, model = report.costs, report.model
    enclave = costs.inside_seconds + costs.blinding_seconds
    inside = report.offloaded_work[0] / model.dot_flops
    visiting = report.round_trips * model.latency
    return {
        "enclave": enclave,
        "visiting": visiting,
        "workers": {str(r): useful_workers(enclave, inside / r, visiting) for r in RATES},
    }


def measure(width: int, rows: int, scheme: str, steps: int) -> Json:
    """Trains on all devices there are; every process of a cluster calls this.

    Returns:
      `seconds`, `busy`: of each step that counts, what it took and what of it the enclave was
      busy; `transfers`: seconds that this process copied its parts in one more step; `up`, `down`,
      `round_trips`: of this process in a step; `limits`, see there.
    """
    train_step, state = build(width)
    examples = batch(width, rows)
    mesh = Mesh(np.array(jax.devices()), ("workers",))
    first = jax.process_index() == 0
    with tempo.Enclave.across_processes() as enclave:
        shielded: Any = tempo.shield(
            train_step,
            enclave=enclave,
            scheme=common.SCHEMES[scheme](),
            offload="all",
            mesh=mesh,
        )
        sealed = enclave.seal(state)
        seconds, busy = [], []
        for _ in range(FIRST + steps):
            told = enclave.statistics()["busy_seconds"] if first else 0.0
            began = time.perf_counter()
            sealed, _ = shielded(sealed, examples)
            jax.block_until_ready(sealed)
            seconds.append(time.perf_counter() - began)
            busy.append(enclave.statistics()["busy_seconds"] - told if first else 0.0)
        traffic = shielded.traffic(sealed, examples)
        found = {
            "seconds": seconds[FIRST:],
            "busy": busy[FIRST:],
            "up": traffic.up / traffic.runs,
            "down": traffic.down / traffic.runs,
            "round_trips": traffic.round_trips / traffic.runs,
            "limits": limits(shielded.explain(sealed, examples)),
        }
        with tempfile.TemporaryDirectory(prefix="tempo_jax-workers-") as folder:
            path = pathlib.Path(folder, "timeline.json")
            with tempo.profile(path):
                sealed, _ = shielded(sealed, examples)
                jax.block_until_ready(sealed)
            events = json.loads(path.read_text())["traceEvents"]
        copied = (e["dur"] for e in events if e["ph"] == "X" and e["tid"] == TRANSFERS)
        return found | {"transfers": sum(copied) * 1e-6}


def _point(workers: int, scheme: str, options: argparse.Namespace) -> Json:
    """Measures one number of workers, in fresh processes."""
    processes = workers if options.processes else 1
    port = free_port()
    sizes = (options.width, options.rows, options.steps)
    command = [sys.executable, "-m", "benchmarks.workers", "--point", scheme, *map(str, sizes)]
    flags = f"--xla_force_host_platform_device_count={workers // processes}"
    variables = {**os.environ, "JAX_PLATFORMS": "cpu"}
    variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    started = [
        subprocess.Popen(
            [*command, str(port), str(processes), str(index)],
            env=variables,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        printed = [process.communicate()[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(process.returncode for process in started):
        raise SystemExit(f"{workers} workers under {scheme}: a process failed, see above")
    every = [json.loads(text.splitlines()[-1]) for text in printed]
    return summary(workers, scheme, every)


def summary(workers: int, scheme: str, every: Sequence[Json]) -> Json:
    """What the processes of one point measured: least times, and shares of one worker.

    Other work on the machine only adds to a time.

    Args:
      workers: devices of all processes together.
      scheme: its name.
      every: what `measure` returned in each process.
    """
    first = every[0]
    step, busy = (min(first[name]) for name in ("seconds", "busy"))
    return {
        "workers": workers,
        "scheme": scheme,
        "step": step,
        "busy": busy,
        "up": sum(found["up"] for found in every) / workers,
        "down": sum(found["down"] for found in every) / workers,
        "round_trips": first["round_trips"],
        "transfers": sum(found["transfers"] for found in every) / workers,
        "limits": first["limits"],
    }


def better(first: Json | None, second: Json) -> Json:
    """The least times of two launches of one point; all else is the second's."""
    if first is None:
        return second
    return second | {n: min(first[n], second[n]) for n in ("step", "busy", "transfers")}


def table(results: Json) -> str:
    """Returns a line on the machine and a Markdown table."""
    how = "processes with one device each" if results["processes"] else "devices of one process"
    lines = [
        f"{describe(results['environment'])}; {how}; width {results['width']}, "
        f"{results['rows']} rows, least of {results['steps']} steps in each of "
        f"{results['launches']} launches in turn.",
        "",
        "| scheme | workers | enclave busy ÷ the first's | step ÷ the first's "
        "| enclave's share of the step | MB up, a worker | MB down, a worker | round trips "
        "| host's copies, ms a worker |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    alone = {r["scheme"]: r for r in reversed(results["results"])}  # the first of each
    for r in results["results"]:
        one = alone[r["scheme"]]
        cells = [r["scheme"], str(r["workers"])]
        cells += [f"{r['busy'] / one['busy']:.2f}", f"{r['step'] / one['step']:.2f}"]
        cells += [f"{r['busy'] / r['step']:.0%}", f"{r['up'] / 1e6:.1f}", f"{r['down'] / 1e6:.1f}"]
        cells += [f"{r['round_trips']:.0f}", f"{r['transfers'] * 1e3:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for scheme, r in {r["scheme"]: r for r in results["results"]}.items():
        counts = [str(r["limits"]["workers"][str(rate)]) for rate in RATES]
        lines.append(
            f"{scheme}: more stop helping from {', '.join(counts)} workers on, with devices "
            f"{', '.join(map(str, RATES))} times as fast as the enclave (cost model)."
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--workers", nargs="+", type=common.positive, default=list(COUNTS))
    parser.add_argument(
        "--schemes",
        nargs="+",
        choices=sorted(common.SCHEMES),
        default=["mixing", "signed-permutation"],
    )
    parser.add_argument("--width", type=common.positive, default=WIDTH)
    parser.add_argument("--rows", type=common.positive, default=ROWS, help="examples in a step")
    parser.add_argument("--steps", type=common.positive, default=5, help="steps that count")
    parser.add_argument("--launches", type=common.positive, default=3, help="of each point")
    parser.add_argument("--processes", action="store_true", help="a process for each worker")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="DIR",
        default=pathlib.Path("."),
        help="folder for workers.json",
    )
    # How this module asks itself: scheme, width, rows, steps; port, processes, index.
    parser.add_argument("--point", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.point:
        scheme, *numbers = options.point
        width, rows, steps, port, processes, index = map(int, numbers)
        if processes > 1:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
        print(json.dumps(measure(width, rows, scheme, steps)), flush=True)
        return
    results: Json = {
        "environment": environment(),
        "width": options.width,
        "rows": options.rows,
        "steps": options.steps,
        "launches": options.launches,
        "processes": options.processes,
        "results": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, int], Json] = {}
    for _ in range(options.launches):
        for point in itertools.product(options.schemes, options.workers):
            scheme, workers = point
            print(f"{scheme}: {workers} workers", file=sys.stderr, flush=True)
            found[point] = better(found.get(point), _point(workers, scheme, options))
            results["results"] = [found[p] for p in sorted(found)]
            (options.out / "workers.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
