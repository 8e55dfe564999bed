"""Measures what shielding a training step costs against plain JAX and against all in the enclave.

Run it from the repository's root: ``python -m benchmarks.overhead``. `README.md` beside this file
says what each column means. Every measurement runs in a process of its own, started by this module
with the same allocator settings for all, so that nothing that one of them compiled or allocated
shows up in another; what is compared step by step runs in one process, in turn.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr
from matplotlib.figure import Figure

import tempo_jax as tempo
from benchmarks.cases import BATCHES, CASES, Case, Step
from benchmarks.machine import Json, describe, environment
from enclave_runtime.environment import ALLOCATOR_ENVIRONMENT
from examples import common

PLAIN, SHIELDED, ENCLAVE = "plain", "shielded", "enclave"
VARIANTS = (PLAIN, SHIELDED, ENCLAVE)
# The value is `placement` as `tempo.shield` takes it.
PLACEMENTS = {SHIELDED: "auto", ENCLAVE: "enclave"}

WARM_UP_STEPS = 2  # after the first call, before the steps that count
# Batch norm and zero-initialized heads hide the weights from the first step's gradient.
CHECKED_STEPS = 3
NOISE = 1e-3

FIRST_CALL_GOAL = 3.0  # over plain's, for every model

QUICK_MODELS = ("resnet20", "transformer")

# What the processes that measure do


class Contender:
    """One of `VARIANTS`, with a state of its own that it trains.

    Attributes:
      step: compiled or shielded; not called yet.
      state: the state after the calls so far.
      seconds: wall time of each call so far.
    """

    def __init__(
        self,
        train_step: Step,
        state: Any,
        scheme: Any,
        variant: str,
        enclave: tempo.Enclave | None,
        offload: str = "auto",
        verify: bool = False,
    ):
        """Readies the step; an `enclave` is what every variant but `PLAIN` takes."""
        self.seconds: list[float] = []
        self._enclave = enclave
        if enclave is None:
            # A shielded function donates its state, and so must what it is compared with.
            self.step: Any = jax.jit(train_step, donate_argnums=0)
            self.state = jax.tree.map(jnp.copy, state)
        else:
            self.step = tempo.shield(
                train_step,
                enclave=enclave,
                scheme=scheme,
                placement=PLACEMENTS[variant],
                offload=offload,
                verify=verify,
            )
            self.state = enclave.seal(state)
        jax.block_until_ready(self.state)

    def run(self, batch: common.Batch) -> None:
        """Trains on one batch and waits for everything that comes of it."""
        started = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.step(self.state, batch))
        self.seconds.append(time.perf_counter() - started)

    def plain_state(self) -> Any:
        """Returns the state in the clear."""
        return self.state if self._enclave is None else self._enclave.open(self.state)


@contextlib.contextmanager
def _launched(variants: Sequence[str]) -> Iterator[dict[str, tempo.Enclave | None]]:
    """Launches an enclave for each variant that needs one."""
    with contextlib.ExitStack() as stack:
        yield {
            v: None if v == PLAIN else stack.enter_context(tempo.Enclave.launch()) for v in variants
        }


def measure_first_call(case: Case, scheme: Any, variant: str, steps: int) -> Json:
    """Times the first call in this fresh process and reads the peak memory after `steps` more.

    The first call holds tracing, planning, compiling and one step. Launching the enclave and
    sealing the state come before it.
    """
    # The peak that a process reports begins with its parent's size at the launch: launch first.
    with _launched([variant]) as enclaves:
        train_step, state = case.build()
        batches = case.batches(case.batch_size)
        contender = Contender(train_step, state, scheme, variant, enclaves[variant])
        del state
        for i in range(1 + steps):
            contender.run(batches[i % BATCHES])
        enclave = enclaves[variant]
        return {
            "seconds": contender.seconds[0],
            "host_peak_bytes": _peak_memory_bytes(),
            "enclave_peak_bytes": enclave.statistics()["peak_memory_bytes"] if enclave else 0,
        }


def _peak_memory_bytes() -> int:
    """Returns the most physical memory that this process has used."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # getrusage would include the parent that this process was started from.
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_steps(case: Case, scheme: Any, steps: int) -> Json:
    """Times `steps` steps of all variants in turn, and counts what crosses in a step."""
    with _launched(VARIANTS) as enclaves:
        train_step, state = case.build()
        batches = case.batches(case.batch_size)
        contenders = {v: Contender(train_step, state, scheme, v, enclaves[v]) for v in VARIANTS}
        before: dict[str, Json] = {}
        for i in range(1 + WARM_UP_STEPS + steps):
            if i == 1 + WARM_UP_STEPS:
                before = {v: _traffic(contenders[v], batches[0]) for v in PLACEMENTS}
            for contender in contenders.values():
                contender.run(batches[i % BATCHES])
        after = {v: _traffic(contenders[v], batches[0]) for v in PLACEMENTS}
        report = contenders[SHIELDED].step.explain(contenders[SHIELDED].state, batches[0])
        device = jax.devices()[0]
        return {
            "device": "cpu" if device.platform == "cpu" else device.device_kind,
            "seconds": {v: c.seconds[1 + WARM_UP_STEPS :] for v, c in contenders.items()},
            "traffic": {
                v: {name: (after[v][name] - count) / steps for name, count in before[v].items()}
                for v in PLACEMENTS
            },
            "batch_bytes": sum(x.nbytes for x in batches[0].values()),
            "state_bytes": sum(x.nbytes for x in jax.tree.leaves(contenders[PLAIN].state)),
            "device_resident_leaves": len(report.resident),
        }


def _traffic(contender: Contender, batch: common.Batch) -> Json:
    traffic = contender.step.traffic(contender.state, batch)
    return {
        "bytes_up": traffic.up,
        "bytes_down": traffic.down,
        "round_trips": traffic.round_trips,
    }


def measure_error(case: Case, scheme: Any) -> Json:
    """Compares the state after `CHECKED_STEPS` shielded steps with plain's, in float64.

    A leaf's error is ``max|shielded - plain| / max|plain|``. Plain JAX on the same examples in
    another order shows what reordering a float sum does. Some leaves are zero but for rounding
    (softmax ignores the key's bias, so its gradient is); they have no relative error, and are
    told by their own reordered one, above `NOISE`. What they differ by is given as it is.
    """
    assert jax.config.read("jax_enable_x64")
    train_step, state = case.build()
    state = _to_float64(state)
    batches = [_to_float64(b) for b in case.batches(case.checked_batch_size)[:CHECKED_STEPS]]
    narrowing = _narrowing(jax.make_jaxpr(train_step)(state, batches[0]).jaxpr)
    if narrowing:
        raise TypeError(f"a step in float64 loses precision in {', '.join(sorted(narrowing))}.")

    reordered = [{name: x[::-1] for name, x in batch.items()} for batch in batches]
    with _launched([SHIELDED]) as enclaves:
        states = []
        for variant, given in ((PLAIN, batches), (PLAIN, reordered), (SHIELDED, batches)):
            enclave = enclaves.get(variant)
            # A small batch makes fewer products worth sending out; send all that the real one does.
            contender = Contender(train_step, state, scheme, variant, enclave, offload="all")
            for batch in given:
                contender.run(batch)
            states.append(jax.tree_util.tree_leaves_with_path(contender.plain_state()))

    errors, reordering_errors, noise = {}, {}, {}
    for (path, plain), (_, other), (_, shielded) in zip(*states, strict=True):
        name = jax.tree_util.keystr(path)
        if _relative_error(other, plain) > NOISE:
            noise[name] = float(np.abs(np.asarray(shielded) - np.asarray(plain)).max())
        else:
            errors[name] = _relative_error(shielded, plain)
            reordering_errors[name] = _relative_error(other, plain)
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return {
        "batch_size": case.checked_batch_size,
        "steps": CHECKED_STEPS,
        "error": errors[worst],
        "worst_leaf": worst,
        "reordering_error": float(np.max([*reordering_errors.values()])),
        "leaves": len(errors),
        "leaves_of_noise": noise,
    }


def _narrowing(jaxpr: Any) -> set[str]:
    """Returns the primitives that take float64 and put out a narrower float, at any depth."""
    found = set()
    for eqn in jaxpr.eqns:
        parameters = jax.tree.leaves(list(eqn.params.values()))
        inner = [getattr(x, "jaxpr", x) for x in parameters]
        inner = [x for x in inner if isinstance(x, Jaxpr)]
        for x in inner:
            found |= _narrowing(x)
        if not inner and any(v.aval.dtype == jnp.float64 for v in eqn.invars):
            outputs = (v.aval.dtype for v in eqn.outvars)
            if any(jnp.issubdtype(d, jnp.floating) and d != jnp.float64 for d in outputs):
                found.add(eqn.primitive.name)
    return found


def _to_float64(tree: Any) -> Any:
    def convert(x: Any) -> Any:
        x = jnp.asarray(x)
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(convert, tree)


def _relative_error(actual: Any, expected: Any) -> float:
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    difference, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    return float(difference / scale) if scale else float(difference and np.inf)


# What the process that starts them does


def _measure(model: str, part: str, options: argparse.Namespace) -> Json:
    """Runs one part of a model's measurements, here."""
    case, scheme = CASES[model], common.SCHEMES[options.scheme]()
    if part == "steps":
        return measure_steps(case, scheme, options.steps)
    if part == "error":
        return measure_error(case, scheme)
    return measure_first_call(case, scheme, part, WARM_UP_STEPS)


def _measure_in_child(model: str, part: str, options: argparse.Namespace) -> Json:
    """Runs one part of a model's measurements in a fresh process."""
    print(f"{CASES[model].title}: {part}", file=sys.stderr, flush=True)
    environment = os.environ | ALLOCATOR_ENVIRONMENT | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    if part == "error":
        environment["JAX_ENABLE_X64"] = "true"
    command = [sys.executable, "-m", "benchmarks.overhead", "--part", model, part]
    command += ["--steps", str(options.steps), "--scheme", options.scheme]
    output = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def measure_model(model: str, options: argparse.Namespace) -> Json:
    """Measures one model, and reduces what was measured to medians and ratios.

    Args:
      model: a key of `CASES`.
      options: from `parse_options`.
    """
    case = CASES[model]
    steps = _measure_in_child(model, "steps", options)
    first: dict[str, list[Json]] = {v: [] for v in VARIANTS}
    for _ in range(options.first_calls):
        for variant in VARIANTS:
            first[variant].append(_measure_in_child(model, variant, options))
    first_seconds = {v: [x["seconds"] for x in runs] for v, runs in first.items()}
    return {
        "title": case.title,
        "batch_size": case.batch_size,
        **{name: steps[name] for name in ("device", "batch_bytes", "state_bytes")},
        "device_resident_leaves": steps["device_resident_leaves"],
        "step": _summary(steps["seconds"], case.goal),
        "first_call": _summary(first_seconds, FIRST_CALL_GOAL),
        "traffic": steps["traffic"],
        "host_peak_bytes": _medians(first, "host_peak_bytes"),
        "enclave_peak_bytes": _medians(first, "enclave_peak_bytes"),
        "float64": _measure_in_child(model, "error", options),
    }


def _medians(runs: dict[str, list[Json]], name: str) -> dict[str, float]:
    return {v: float(np.median([run[name] for run in runs[v]])) for v in VARIANTS}


def _summary(seconds: dict[str, list[float]], goal: float) -> Json:
    """Reduces each variant's times to quartiles, and to what they are of plain's."""
    quartiles = {v: np.percentile(s, (25, 50, 75)).tolist() for v, s in seconds.items()}
    by_round = {v: np.divide(seconds[v], seconds[PLAIN]) for v in PLACEMENTS}
    return {
        "seconds": seconds,
        "quartiles": quartiles,
        "ratio_of_medians": {v: quartiles[v][1] / quartiles[PLAIN][1] for v in PLACEMENTS},
        "quartiles_of_ratios": {
            v: np.percentile(ratios, (25, 50, 75)).tolist() for v, ratios in by_round.items()
        },
        "goal": goal,
    }


def table(results: Json) -> str:
    """Returns the results as a line on the machine and a Markdown table."""
    devices = sorted({m["device"] for m in results["models"].values()} - {"cpu"})
    columns = {
        "model (batch)": ":--",
        "step ÷ plain's": "--:",
        "all in enclave ÷ plain's": "--:",
        "first call ÷ plain's": "--:",
        "round trips": "--:",
        "MB up": "--:",
        "MB down": "--:",
        "host peak, GB (plain's)": "--:",
        "enclave peak, GB (all in enclave)": "--:",
        "float64 error (plain reordered)": "--:",
    }
    lines = [
        f"{describe(results['environment'], devices)}; {results['scheme']}, median of "
        f"{results['steps']} steps. In brackets behind a ratio: the goal on 2 cores.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'|'.join(columns.values())}|",
    ]
    for model in results["models"].values():
        traffic, float64 = model["traffic"][SHIELDED], model["float64"]
        host, inside = model["host_peak_bytes"], model["enclave_peak_bytes"]
        cells = [
            f"{model['title']} ({model['batch_size']})",
            *_ratios(model["step"]),
            _ratios(model["first_call"])[0],
            f"{traffic['round_trips']:.0f}",
            f"{traffic['bytes_up'] / 1e6:.0f}",
            f"{traffic['bytes_down'] / 1e6:.0f}",
            f"{host[SHIELDED] / 1e9:.2f} ({host[PLAIN] / 1e9:.2f})",
            f"{inside[SHIELDED] / 1e9:.2f} ({inside[ENCLAVE] / 1e9:.2f})",
            f"{float64['error']:.0e} ({float64['reordering_error']:.0e})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratios(summary: Json) -> tuple[str, str]:
    ratios = summary["ratio_of_medians"]
    return f"{ratios[SHIELDED]:.2f} (≤ {summary['goal']:g})", f"{ratios[ENCLAVE]:.2f}"


def plot(results: Json, path: pathlib.Path) -> None:
    """Draws the step ratios of every model; the file's ending says the format."""
    # A figure of its own, without pyplot, draws with Agg and needs no display.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    summaries = [model["step"] for model in results["models"].values()]
    places = np.arange(len(summaries))
    styles = {SHIELDED: ("shielded", "tab:blue"), ENCLAVE: ("all in the enclave", "tab:gray")}
    for offset, (variant, (label, color)) in zip((-0.2, 0.2), styles.items(), strict=True):
        ratios = np.array([s["ratio_of_medians"][variant] for s in summaries])
        low, _, high = np.array([s["quartiles_of_ratios"][variant] for s in summaries]).T
        # The ratio of the medians need not lie between the quartiles of the ratios.
        spread = np.maximum([ratios - low, high - ratios], 0)
        bars = axes.bar(places + offset, ratios, 0.38, yerr=spread, label=label, color=color)
        axes.bar_label(bars, fmt="%.2f", padding=2)
    goals = [s["goal"] for s in summaries]
    axes.plot(places - 0.2, goals, "_", color="black", markersize=24, label="goal on 2 cores")
    axes.axhline(1.0, color="tab:orange", label="plain JAX")
    axes.set_xticks(places, [m["title"] for m in results["models"].values()])
    axes.set(ylabel="step time ÷ plain JAX's", title=f"{results['environment']['processor']}")
    axes.margins(y=0.15)
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, or `arguments` in its place."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--models", nargs="+", choices=CASES, default=argparse.SUPPRESS, help="default: all"
    )
    parser.add_argument("--steps", type=common.positive, default=10, help="steps that count")
    parser.add_argument(
        "--first-calls", type=common.positive, default=3, help="fresh processes for each first call"
    )
    parser.add_argument(
        "--scheme",
        choices=sorted(common.SCHEMES),
        default="signed-permutation",
        help="how operands are blinded",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"3 steps, one first call, --models {' '.join(QUICK_MODELS)} if none are named",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="DIR",
        default=pathlib.Path("."),
        help="folder for overhead.json and overhead.png",
    )
    # How this module asks itself, in a fresh process, for one part of one model.
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.first_calls = 3, 1
    if "models" not in options:
        options.models = list(QUICK_MODELS if options.quick else CASES)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse_options(arguments)
    if options.part:
        model, part = options.part
        print(json.dumps(_measure(model, part, options)))
        return
    results: Json = {
        "environment": environment(),
        "scheme": options.scheme,
        "steps": options.steps,
        "first_calls": options.first_calls,
        "models": {},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        results["models"][model] = measure_model(model, options)
        # After every model, so that one that fails does not take the others with it.
        (options.out / "overhead.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, options.out / "overhead.png")
    print(table(results))


if __name__ == "__main__":
    main()
