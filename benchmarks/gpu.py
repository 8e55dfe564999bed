"""Runs all that needs a GPU, unattended and in under nine minutes, and writes what came of it.

Run it from the repository's root on a machine with an NVIDIA GPU: ``python -m benchmarks.gpu``.
`README.md` beside this file says what each column means. Every part runs in a process of its own
with a budget of seconds; one that takes longer is ended with all that it started, the result says
so, and what it had measured by then counts. ``--small`` takes small sizes and any device.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

import tempo_jax as tempo
from benchmarks.cases import BATCHES, LARGE, SMALL, Case
from benchmarks.machine import Json, describe, environment
from benchmarks.overhead import ENCLAVE, PLAIN, SHIELDED, Contender
from enclave_runtime.environment import ALLOCATOR_ENVIRONMENT
from examples import common

SECONDS = 525.0  # that all parts together get, with finding the device
SPARE = 0.8  # of a part's budget, after which no round of steps begins
LOOKING = 60.0  # seconds that finding the device may take
ROUNDS = 30
# Contenders of a model, in the order of their first calls: the dearest comes last.
SCHEMES = ("signed-permutation", "mixing")
CONTENDERS = (PLAIN, *SCHEMES, ENCLAVE)
# How many times faster a step is to be than all of it in the enclave.
GOALS = {("transformer-1024", "mixing"): 4.0, ("resnet50", "signed-permutation"): 10.0}

# Tests of what runs on the device. Those of meshes ask for eight devices.
TESTS = (
    "tests/running/test_integers.py",
    "tests/running/test_host_view.py",
    "tests/jaxprs/test_callbacks.py",
    "tests/api/test_optimizers.py",
    "tests/api/test_models.py",
)
SMALL_TESTS = ("tests/running/test_integers.py",)


@dataclasses.dataclass(frozen=True)
class Part:
    """A command with a budget.

    Attributes:
      name: of the part, in the table.
      budget: seconds that it gets at least, if those before it keep to theirs.
      command: what runs, a folder for its files given.
      result: the file in that folder that it writes, more with every step; None for none.
    """

    name: str
    budget: float
    command: Callable[[pathlib.Path, float], list[str]]
    result: str | None = None


# One model, in a process of its own


def measure(case: Case, path: pathlib.Path, seconds: float, rounds: int, offload: str) -> None:
    """Trains a model under every contender, in turn, until its time is nearly over.

    Args:
      case: the model.
      path: a JSON file, written anew after every step.
      seconds: from the start of which no further round begins after `SPARE` of them.
      rounds: after the first calls, at most.
      offload: what goes out, as `tempo.shield` takes it.
    """
    started = time.monotonic()
    train_step, state = case.build()
    batches = case.batches(case.batch_size)
    device = jax.devices()[0]
    results: Json = {
        "title": case.title,
        "batch_size": case.batch_size,
        "device": "cpu" if device.platform == "cpu" else device.device_kind,
        "variants": {},
    }
    running: dict[str, tuple[Contender, tempo.Enclave | None]] = {}

    def train(variant: str, number: int) -> None:
        contender, enclave = running[variant]
        told = enclave.statistics() if enclave else {}
        contender.run(batches[number % BATCHES])
        found = results["variants"].setdefault(variant, {"seconds": [], "busy": []})
        found["seconds"].append(contender.seconds[-1])
        if enclave:
            now = enclave.statistics()
            found["busy"].append(now["busy_seconds"] - told["busy_seconds"])
        if enclave and "outside" not in found:
            report = contender.step.explain(contender.state, batches[0])
            outside, total = report.offloaded_work
            found["outside"] = outside / total if total else 0.0
            found |= {"up": report.bytes_up, "down": report.bytes_down}
            found["round_trips"] = report.round_trips
        _write(path, results)

    with contextlib.ExitStack() as stack:
        for variant in CONTENDERS:
            scheme = common.SCHEMES.get(variant, common.SCHEMES["mixing"])()
            enclave = None
            if variant != PLAIN:
                enclave = stack.enter_context(tempo.Enclave.launch())
            kind = variant if variant in (PLAIN, ENCLAVE) else SHIELDED
            running[variant] = (
                Contender(train_step, state, scheme, kind, enclave, offload),
                enclave,
            )
            train(variant, 0)  # tracing, planning and compiling are in it
        for number in range(1, 1 + rounds):
            if time.monotonic() - started > SPARE * seconds:
                break
            for variant in CONTENDERS:
                train(variant, number)


def _write(path: pathlib.Path, results: Json) -> None:
    """Replaces the file at once: its reader may come at any time."""
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(results))
    os.replace(aside, path)


# All parts


def parts(small: bool) -> list[Part]:
    """The parts, the most telling first."""
    module = (sys.executable, "-m")

    def model(name: str, budget: float) -> Part:
        def command(folder: pathlib.Path, seconds: float) -> list[str]:
            how = ["--model", name, str(folder / "model.json"), str(seconds)]
            return [*module, "benchmarks.gpu", *how, *(["--small"] if small else [])]

        return Part(name, budget, command, "model.json")

    def benchmark(name: str, budget: float, *options: str) -> Part:
        def command(folder: pathlib.Path, _: float) -> list[str]:
            return [*module, f"benchmarks.{name}", *options, "--out", str(folder)]

        return Part(name, budget, command, f"{name}.json")

    def tests(folder: pathlib.Path, seconds: float) -> list[str]:
        # It ends by itself a little earlier, and then says how many passed.
        chosen = SMALL_TESTS if small else TESTS
        limit = f"--session-timeout={max(1, int(SPARE * seconds))}"
        return [*module, "pytest", "-q", "-n", "0" if small else "4", limit, *chosen]

    widths = ["128"] if small else ["1024", "2048"]
    placement = ["--widths", *widths, "--rows", "256" if small else "4096", "--launches", "1"]
    placement += ["--steps", "1" if small else "3", "--schemes", *SCHEMES[::-1]]
    # Simulated devices of the CPU: one GPU has no workers to share the products out to.
    workers = ["--width", widths[0], "--rows", "256" if small else "4096", "--schemes", SCHEMES[1]]
    workers += ["--steps", "1" if small else "2", "--launches", "1", "--workers", "1", "2"]
    workers += [] if small else ["4", "8"]
    overhead = ["--models", "resnet20" if small else "transformer", "--first-calls", "1"]
    overhead += ["--steps", "1" if small else "3", "--scheme", SCHEMES[0]]
    return [
        model("transformer-1024", 120.0),
        model("resnet50", 90.0),
        model("vit-b", 70.0),
        Part("tests", 60.0, tests),
        benchmark("placement", 50.0, *placement),
        benchmark("workers", 50.0, *workers),
        benchmark("overhead", 85.0, *overhead),
    ]


def run(part: Part, seconds: float) -> Json:
    """Runs a part; ends it, and every process of its group, after so many seconds.

    Returns:
      `status`: ``done``, ``failed`` or ``timed out``; `seconds` that it took; `result`, what it
      wrote, or None; `said`, the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="tempo_jax-gpu-") as name:
        folder, began = pathlib.Path(name), time.monotonic()
        # JAX would take most of the GPU's memory for the first process alone.
        variables = {**os.environ, **ALLOCATOR_ENVIRONMENT}
        variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        with open(folder / "said", "w+") as said:
            process = subprocess.Popen(
                part.command(folder, seconds),
                env=variables,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = "failed" if process.wait(seconds) else "done"
            except subprocess.TimeoutExpired:
                status = "timed out"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            said.seek(0)
            text = said.read()
        result = folder / part.result if part.result else None
        return {
            "status": status,
            "budget": round(seconds, 1),
            "seconds": round(time.monotonic() - began, 1),
            "result": json.loads(result.read_text()) if result and result.exists() else None,
            "said": text[-4000:],
        }


def allowed(chosen: Sequence[Part], index: int, left: float) -> float:
    """Seconds that a part gets: all that those after it do not need."""
    later = sum(part.budget for part in chosen[index + 1 :])
    return max(left - later, min(chosen[index].budget, left), 1.0)


# What is written


def _step(found: Json) -> float | None:
    """Median seconds of a step, without the first call; None if there was no other."""
    later = found["seconds"][1:]
    return float(np.median(later)) if later else None


def _busy(found: Json) -> float | None:
    later = found["busy"][1:]
    return float(np.median(later)) if later else None


def _over(first: float | None, second: float | None) -> str:
    return "–" if first is None or not second else f"{first / second:.2f}"


def table(results: Json) -> str:
    """A line on the machine, a line a part, a Markdown table of the models, and what others say."""
    lines = [describe(results["environment"], [results["device"]]), ""]
    for name, part in results["parts"].items():
        line = f"* {name}: {part['status']} after {part['seconds']:.0f} of {part['budget']:.0f} s"
        if name == "tests":
            counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", part["said"])
            line += f"; {', '.join(counts) or 'nobody said how many passed'}"
        elif part["result"] is None:
            line += "; nothing was measured"
        lines.append(line)
    lines += [
        "",
        "| model (batch) | variant | steps | step ÷ plain's | all in the enclave ÷ this (goal) "
        "| enclave's work ÷ all inside | arithmetic sent out | round trips | MB up | MB down |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, part in results["parts"].items():
        if not part["result"] or "variants" not in part["result"]:
            continue
        variants = part["result"]["variants"]
        plain, inside = (variants.get(v, {"seconds": [], "busy": []}) for v in (PLAIN, ENCLAVE))
        title = f"{part['result']['title']} ({part['result']['batch_size']})"
        for variant, found in variants.items():
            goal = GOALS.get((name, variant))
            gain = _over(_step(inside), _step(found)) + (f" (≥ {goal:g})" if goal else "")
            cells = [title, variant, str(len(found["seconds"]) - 1)]
            cells += [_over(_step(found), _step(plain)), gain, _over(_busy(found), _busy(inside))]
            if "outside" in found:
                cells += [f"{found['outside']:.0%}", str(found["round_trips"])]
                cells += [f"{found[way] / 1e6:.0f}" for way in ("up", "down")]
            else:
                cells += ["–"] * 4
            lines.append(f"| {' | '.join(cells)} |")
    for name, part in results["parts"].items():
        printed = [line for line in part["said"].splitlines() if line.startswith("|")]
        if printed:
            lines += ["", f"`benchmarks.{name}`:", "", *printed]
    return "\n".join(lines)


def _device() -> tuple[str, str]:
    """Platform and kind of this machine's device; asked in another process, which holds it."""
    ask = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", ask], check=True, stdout=subprocess.PIPE, text=True, timeout=LOOKING
    )
    platform, kind = done.stdout.split("\n")[-3:-1]
    return platform, kind


def main(arguments: Sequence[str] | None = None, chosen: Sequence[Part] | None = None) -> None:
    """Runs the parts, by default all; see the module."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--small", action="store_true", help="small sizes, on any device")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", default=pathlib.Path("."))
    # How this module asks itself, in a fresh process, for one model.
    parser.add_argument("--model", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.model:
        name, path, seconds = options.model
        # Of a small model nothing would go out by itself.
        cases, rounds, offload = (SMALL, 2, "all") if options.small else (LARGE, ROUNDS, "auto")
        measure(cases[name], pathlib.Path(path), float(seconds), rounds, offload)
        return
    chosen = parts(options.small) if chosen is None else chosen
    names = [part.name for part in chosen]
    if unknown := set(options.parts or ()) - set(names):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {names}")
    chosen = [part for part in chosen if not options.parts or part.name in options.parts]
    deadline = time.monotonic() + options.seconds
    platform, device = _device()
    if platform != "gpu" and not options.small:
        parser.error(
            f"JAX's device here is {platform!r}, not a GPU; install tempo-jax[cuda12] or [cuda13], "
            "or pass --small to try the command on this machine"
        )
    results: Json = {"environment": environment(), "device": device, "parts": {}}
    results["small"] = options.small
    options.out.mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(chosen):
        seconds = allowed(chosen, index, deadline - time.monotonic())
        print(f"{part.name}: up to {seconds:.0f} s", file=sys.stderr, flush=True)
        results["parts"][part.name] = run(part, seconds)
        (options.out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
        (options.out / "gpu.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
