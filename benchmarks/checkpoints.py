"""Measures what a sealed checkpoint costs against a training step of plain JAX.

Run it from the repository's root: ``python -m benchmarks.checkpoints``. `README.md` beside this
file says what each column means. Everything runs in one process with one enclave, in turn.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

import tempo_jax as tempo
from benchmarks.cases import CASES
from benchmarks.machine import Json, describe, environment
from benchmarks.overhead import PLAIN, SHIELDED, WARM_UP_STEPS, Contender
from examples import common
from tempo_jax.sealing import ledger

MODELS = ("transformer", "resnet20")
PARTS = ("sealing", "writing", "restoring")


def measure(model: str, scheme: str, rounds: int) -> Json:
    """Trains one model and takes a checkpoint after every step.

    Returns:
      Medians of seconds, each with its quartiles: `plain` and `shielded` steps, and `PARTS`;
      `bytes` of the checkpoint and of the state's arrays; `leaves`.
    """
    case = CASES[model]
    train_step, state = case.build()
    key = tempo.CheckpointKey.generate()
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    with tempo.Enclave.launch(checkpoint_key=key) as enclave, _folder() as folder:
        batches = case.batches(case.batch_size)
        arguments = train_step, state, common.SCHEMES[scheme]()
        plain = Contender(*arguments, PLAIN, None)
        shielded = Contender(*arguments, SHIELDED, enclave)
        for number in range(1 + WARM_UP_STEPS + rounds):
            for contender in (plain, shielded):
                contender.run(batches[number % len(batches)])
            with _timed(seconds["sealing"]):
                data = enclave.checkpoint(shielded.state)
            with _timed(seconds["writing"]):
                ledger.write(folder / "state", data)
            with _timed(seconds["restoring"]):
                jax.block_until_ready(enclave.restore(data, like=shielded.state))
    seconds |= {"plain": plain.seconds, "shielded": shielded.seconds}
    arrays = [x for x in jax.tree.leaves(state) if hasattr(x, "nbytes")]
    return {
        **{name: statistics.quantiles(values[-rounds:], n=4) for name, values in seconds.items()},
        "bytes": len(data),
        "state_bytes": sum(x.nbytes for x in arrays),
        "leaves": len(jax.tree.leaves(state)),
    }


@contextlib.contextmanager
def _folder() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory(dir=".") as name:
        yield pathlib.Path(name)


@contextlib.contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - started)


def table(results: Json) -> str:
    """Returns a line on the machine and a Markdown table of ratios to plain's step."""
    lines = [
        f"{describe(results['environment'])}; {results['scheme']}, medians of "
        f"{results['rounds']} rounds.",
        "",
        "| model (batch) | sealing ÷ plain step | quartiles | writing ÷ plain step | "
        "restoring ÷ plain step | shielded step ÷ plain step | leaves | checkpoint, MB "
        "(its arrays) |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for model, measured in results["models"].items():
        step = measured["plain"][1]
        sealing, writing, restoring, shielded = (
            measured[name][1] / step for name in (*PARTS, "shielded")
        )
        low, high = (measured["sealing"][i] / step for i in (0, 2))
        lines.append(
            f"| {CASES[model].title} ({CASES[model].batch_size}) | {sealing:.2f} | "
            f"{low:.2f}–{high:.2f} | {writing:.2f} | {restoring:.2f} | {shielded:.2f} | "
            f"{measured['leaves']} | {measured['bytes'] / 1e6:.2f} "
            f"({measured['state_bytes'] / 1e6:.2f}) |"
        )
    return "\n".join(lines)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, or `arguments` in its place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=MODELS)
    parser.add_argument("--rounds", type=common.positive, default=11, help="that count")
    parser.add_argument("--scheme", choices=sorted(common.SCHEMES), default="signed-permutation")
    parser.add_argument("--out", type=pathlib.Path, help="file for the figures, JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse_options(arguments)
    models: dict[str, Any] = {}
    for model in options.models:
        print(f"{model} …", file=sys.stderr, flush=True)
        models[model] = measure(model, options.scheme, options.rounds)
    results = {
        "environment": environment(),
        "scheme": options.scheme,
        "rounds": options.rounds,
        "models": models,
    }
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
