"""Measures the enclave's busy time of one checkout: a script that `placement --against` runs.

It runs in an interpreter of its own whose path begins with that checkout, which may be older than
this file: ``python -P busy.py WIDTH ROWS SCHEME STEPS``. It prints a JSON object with the
seconds that the enclave was busy in each step that counts, and of all its threads' processor
time, which other work on the machine changes less.
"""

import inspect
import json
import pathlib
import sys

import numpy as np

import tempo_jax
from benchmarks import perceptron
from benchmarks.overhead import SHIELDED, Contender
from examples import common
from tempo_jax import Enclave


def processor_seconds(process: int) -> float:
    """What a process has used so far, in units of the system's clock ticks: 10 ms.

    `Enclave.statistics` says it more finely, but not in older checkouts.
    """
    with open(f"/proc/{process}/stat") as status:
        fields = status.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def measure(width: int, rows: int, scheme: str, steps: int) -> dict[str, list[float]]:
    """Trains the perceptron shielded; see the module."""
    train_step, state = perceptron.build(width)
    if "rows" in inspect.signature(perceptron.batch).parameters:
        examples = perceptron.batch(width, rows)
    else:
        examples = {
            name: np.resize(part, (rows, *part.shape[1:]))
            for name, part in perceptron.batch(width).items()
        }
    found: dict[str, list[float]] = {"busy": [], "processor": []}
    with Enclave.launch() as enclave:
        contender = Contender(train_step, state, common.SCHEMES[scheme](), SHIELDED, enclave)
        for _ in range(perceptron.FIRST + steps):
            told = enclave.statistics()
            used = processor_seconds(told["process"])
            contender.run(examples)
            found["processor"].append(processor_seconds(told["process"]) - used)
            found["busy"].append(enclave.statistics()["busy_seconds"] - told["busy_seconds"])
    return {name: values[perceptron.FIRST :] for name, values in found.items()}


if __name__ == "__main__":
    if not pathlib.Path(tempo_jax.__file__).is_relative_to(pathlib.Path.cwd()):
        # An installed one would be measured in its place.
        sys.exit(
            f"{pathlib.Path.cwd()} is no checkout of tempo_jax: it has no package of that name"
        )
    width, rows, scheme, steps = sys.argv[1:]
    print(json.dumps(measure(int(width), int(rows), scheme, int(steps))))
