"""Measures how long a new enclave process compiles each scheme's kernels.

Run it from the repository's root: ``python -m benchmarks.startup``. `README.md` beside this file
says what each column means. Every measurement is a process of its own with the variables of an
enclave, which imports the enclave's code alone and has one scheme ready its kernels: once with an
empty cache, as in an enclave that may read no machine code; once with what Numba cached then, as
in the development enclave after its first start; and once with the library that the staging command
compiles ahead of time.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks.machine import Json, describe, environment
from enclave_runtime.environment import ENCLAVE_ENVIRONMENT

SHAPES = ((1024, 512), (512, 2048))  # of the first value, and of another one
NEW, CACHED, AHEAD = "new", "cached", "ahead"
WAYS = (NEW, CACHED, AHEAD)
NONE = "none"  # where no library is


def measure(name: str, library: pathlib.Path) -> list[float]:
    """Seconds until a scheme's kernels are ready for a value of each of `SHAPES`, here."""
    import jax

    from enclave_runtime.compiled import kernel
    from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
    from enclave_runtime.schemes import SCHEMES

    kernel.LIBRARY = library
    jax.block_until_ready(jax.numpy.zeros(1))  # the backend's start is not the kernels'
    scheme, seconds = SCHEMES[name](), []
    for rows, width in SHAPES:
        classes = KeyClass(rows, decoys=scheme.decoys(rows)), KeyClass(width)
        start = time.perf_counter()
        scheme.warm_up(ArrayType((rows, width), "float32"), Layout((0, 1), (1, 1)), classes)
        seconds.append(time.perf_counter() - start)
    return seconds


def _in_child(name: str, library: str, cache: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", "--part", name, library],
        env=os.environ | ENCLAVE_ENVIRONMENT | {"NUMBA_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(results: Json) -> str:
    """Returns the results as a line on the machine and a Markdown table."""
    ahead = results["building_seconds"]
    lines = [
        f"{describe(results['environment'])}; medians of {results['launches']} processes; the "
        + (f"library takes {ahead:.0f} s to build." if ahead else "machine has no linker."),
        "",
        "| scheme | new process, s | Numba's cache, s | ahead of time, s "
        "| a value of another shape, s |",
        "|:--|--:|--:|--:|--:|",
    ]
    for name, ways in results["results"].items():
        medians = {
            way: [statistics.median(values) for values in zip(*runs, strict=True)]
            for way, runs in ways.items()
            if runs
        }
        cells = [f"{medians[way][0]:.2f}" if way in medians else "–" for way in WAYS]
        lines.append(f"| {name} | {' | '.join(cells)} | {medians[NEW][1]:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--launches", type=int, default=3, help="processes of each kind")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        name, library = options.part
        print(json.dumps(measure(name, pathlib.Path(library))))
        return
    from enclave_runtime.gramine import staging
    from enclave_runtime.schemes import SCHEMES

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        built = staging.compile_kernels(staging.find_source(), pathlib.Path(folder) / "kernels.so")
        results: Json = {
            "environment": environment(),
            "launches": options.launches,
            "building_seconds": built and time.perf_counter() - start,
            "results": {},
        }
        for name in SCHEMES:
            print(name, file=sys.stderr, flush=True)
            runs: dict[str, list[list[float]]] = {way: [] for way in WAYS}
            for _ in range(options.launches):
                with tempfile.TemporaryDirectory() as cache:
                    runs[NEW].append(_in_child(name, NONE, cache))
                    runs[CACHED].append(_in_child(name, NONE, cache))
                    if built:
                        runs[AHEAD].append(_in_child(name, str(built), cache))
            results["results"][name] = runs
    print(table(results))


if __name__ == "__main__":
    main()
