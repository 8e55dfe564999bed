"""Measures the default at sizes that pay: the enclave's work, and what host and enclave hold.

Run it from the repository's root: ``python -m benchmarks.large``. `README.md` beside this file
says what each column means. Every variant of a case runs in a process of its own with an enclave of
its own, one after the other, so that their peaks of memory are theirs and only one is held at once.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tempo_jax as tempo
from benchmarks import perceptron
from benchmarks.machine import Json, describe, environment
from benchmarks.overhead import ENCLAVE, PLACEMENTS, PLAIN, SHIELDED, VARIANTS
from enclave_runtime.environment import ALLOCATOR_ENVIRONMENT
from examples import common, models, transformer

VOCABULARY, BLOCKS, WIDTH, HEADS, LENGTH = 256, 4, 1024, 16, 256
MEMORY_GOAL = 1.3  # host's and enclave's peak over plain's


@dataclasses.dataclass(frozen=True)
class LargeCase:
    """What is run.

    Attributes:
      title: names it in the table, with its size for `{}`.
      size: rows or tokens in a call.
      carries: whether the first argument comes back as the first part of the result.
      build: gives for so many rows or tokens the function and its two arguments.
    """

    title: str
    size: int
    carries: bool
    build: Callable[[int], tuple[Callable[..., Any], Any, Any]]


def _perceptron(rows: int) -> tuple[Callable[..., Any], Any, Any]:
    step, state = perceptron.build(2048)
    return step, state, perceptron.batch(2048, rows)


def _model() -> models.Transformer:
    return models.Transformer(
        VOCABULARY, BLOCKS, WIDTH, HEADS, sequence_length=LENGTH, dropout_rate=0.0
    )


def _tokens(count: int) -> common.Batch:
    rng = np.random.default_rng(0)
    drawn = rng.integers(VOCABULARY, size=(-(-count // LENGTH), LENGTH + 1), dtype=np.int32)
    return {"token": drawn[:, :-1], "label": drawn[:, 1:]}


def _training(tokens: int) -> tuple[Callable[..., Any], Any, Any]:
    state = transformer.create_state(_model(), optax.constant_schedule(1e-4), seed=0)
    return transformer.train_step, state, _tokens(tokens)


def _inference(tokens: int) -> tuple[Callable[..., Any], Any, Any]:
    model = _model()
    first = jnp.zeros((1, LENGTH), jnp.int32)
    params = model.init(jax.random.PRNGKey(0), first, train=False)["params"]

    def predict(params: Any, batch: common.Batch) -> tuple[Any, jax.Array]:
        logits = model.apply({"params": params}, batch["token"], train=False)
        # The enclave does not time what it computes after its answer, and this it answers.
        return logits, tempo.reveal(jnp.mean(jnp.asarray(logits)))

    return predict, params, {"token": _tokens(tokens)["token"]}


_OF_MODEL = f"transformer, {BLOCKS} blocks of width {WIDTH}"
CASES = {
    "perceptron": LargeCase("perceptron of width 2048, momentum, {} rows", 4096, True, _perceptron),
    "training": LargeCase(f"{_OF_MODEL}, AdamW, {{}} tokens", 8192, True, _training),
    "inference": LargeCase(f"{_OF_MODEL}, forward only, {{}} tokens", 4096, False, _inference),
}


def measure(case: LargeCase, variant: str, size: int, steps: int) -> Json:
    """Runs a variant here; see the module.

    Returns:
      `seconds` of the calls that count; `busy`, those that the enclave was, and `processor`, those
      of all its threads; `offloaded`, the share of the products' arithmetic that goes out;
      `expected`, the seconds that the plan expects the enclave to be busy; `peak_bytes` of this
      process and its enclave, shared memory counted once.
    """
    with contextlib.ExitStack() as stack:
        enclave = None if variant == PLAIN else stack.enter_context(tempo.Enclave.launch())
        function, state, batch = case.build(size)
        if enclave is None:
            call: Any = jax.jit(function, donate_argnums=0 if case.carries else ())
        else:
            call = tempo.shield(function, enclave=enclave, placement=PLACEMENTS[variant])
            state = enclave.seal(state)
        seconds, busy, processor = [], [], []
        for _ in range(1 + steps):
            before = _used(enclave)
            start = time.perf_counter()
            result = jax.block_until_ready(call(state, batch))
            seconds.append(time.perf_counter() - start)
            for found, now, then in zip((busy, processor), _used(enclave), before, strict=True):
                found.append(now - then)
            if case.carries:
                state = result[0]
            del result
        told: Json = {"seconds": seconds[1:], "busy": busy[1:], "processor": processor[1:]}
        processes = [os.getpid()]
        if enclave:
            report = call.explain(state, batch)
            outside, total = report.offloaded_work
            told |= {"offloaded": outside / total, "expected": report.busy_seconds}
            processes.append(enclave.statistics()["process"])
        return told | {"peak_bytes": peak_bytes([_status(process) for process in processes])}


def _used(enclave: tempo.Enclave | None) -> tuple[float, float]:
    """Seconds that the enclave was busy so far, and those of its threads."""
    if enclave is None:
        return 0.0, 0.0
    told = enclave.statistics()
    return told["busy_seconds"], told["processor_seconds"]


def _status(process: int) -> str:
    return pathlib.Path(f"/proc/{process}/status").read_text()


def peak_bytes(statuses: Sequence[str]) -> int:
    """The most memory that processes held, if all were at their peak at once.

    Args:
      statuses: ``/proc/PID/status`` of each, which share the memory that is shared at all.
    """

    def told(name: str) -> list[int]:
        lines = [re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE) for text in statuses]
        return [int(line[1]) * 1024 if line else 0 for line in lines]

    shared = told("RssShmem")
    return sum(told("VmHWM")) - (sum(shared) - max(shared))


def _measure_in_child(name: str, variant: str, size: int, steps: int) -> Json:
    print(f"{name}: {variant}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.large", "--part", name, variant, str(size), str(steps)],
        env=os.environ | ALLOCATOR_ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(results: Json) -> str:
    """Returns the results as a line on the machine and a Markdown table."""
    lines = [
        f"{describe(results['environment'])}; the least of all calls, to "
        f"which other work on the machine only adds. Goal for the memory: at most {MEMORY_GOAL}.",
        "",
        "| a call of | enclave's work ÷ all inside | its processor time ÷ all inside "
        "| largest possible gain | arithmetic sent out "
        "| call ÷ plain's | all inside ÷ plain's | enclave busy, s (all inside; expected) "
        "| host's and enclave's peak ÷ plain's (all inside) | plain's, GB | calls |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results["results"]:
        seconds = {v: min(r[v]["seconds"]) for v in VARIANTS}
        busy = {v: min(r[v]["busy"]) for v in PLACEMENTS}
        used = {v: min(r[v]["processor"]) for v in PLACEMENTS}
        peak = {v: r[v]["peak_bytes"] for v in VARIANTS}
        ratio, plain = busy[SHIELDED] / busy[ENCLAVE], seconds[PLAIN]
        lines.append(
            f"| {r['title']} | {ratio:.2f} | {used[SHIELDED] / used[ENCLAVE]:.2f} "
            f"| {1 / ratio:.1f} | {r[SHIELDED]['offloaded']:.0%} "
            f"| {seconds[SHIELDED] / plain:.2f} | {seconds[ENCLAVE] / plain:.2f} "
            f"| {busy[SHIELDED]:.2g} ({busy[ENCLAVE]:.2g}; {r[SHIELDED]['expected']:.2g}) "
            f"| {peak[SHIELDED] / peak[PLAIN]:.2f} ({peak[ENCLAVE] / peak[PLAIN]:.2f}) "
            f"| {peak[PLAIN] / 1e9:.2f} | {len(r[SHIELDED]['busy'])} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--size", type=common.positive, help="rows or tokens, of every case")
    parser.add_argument("--steps", type=common.positive, default=3, help="calls that count")
    parser.add_argument("--part", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", default=pathlib.Path("."), help="for large.json"
    )
    options = parser.parse_args(arguments)
    if options.part:
        name, variant, size, steps = options.part
        print(json.dumps(measure(CASES[name], variant, int(size), int(steps))))
        return
    results: Json = {"environment": environment(), "results": []}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.cases:
        size = options.size or CASES[name].size
        run = functools.partial(_measure_in_child, name, size=size, steps=options.steps)
        title = CASES[name].title.format(f"{size:,}")
        results["results"].append({"title": title} | {v: run(v) for v in VARIANTS})
        (options.out / "large.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
