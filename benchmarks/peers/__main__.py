"""Runs the comparison with SPU; `README.md` in `benchmarks` says what each column means."""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import tempo_jax as tempo
from benchmarks.machine import Json, describe, environment
from benchmarks.peers.workloads import WORKLOADS, Workload, update_error
from enclave_runtime.environment import ALLOCATOR_ENVIRONMENT
from examples import common
from tempo_jax.cache import cache_directory

PLAIN, MIXING, SPU = "plain", "mixing", "spu"
PACKAGES = ("spu==0.9.5", "jax==0.4.34", "jaxlib==0.4.34", "numpy<2")
PYTHONS = ("3.11", "3.10")  # for which SPU has wheels
ROOT = pathlib.Path(__file__).parents[2]
FASTER, NEARER = 100, 1000  # the goals


def find_python(named: str | None) -> str:
    """An interpreter for which SPU has wheels.

    Args:
      named: by the user, or None to look for one.
    """
    if named is not None:
        return named
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here in PYTHONS:
        return sys.executable
    found = [path for version in PYTHONS if (path := shutil.which(f"python{version}"))]
    if not found:
        sys.exit(
            f"SPU 0.9.5 has wheels for Python {' and '.join(PYTHONS)}, this is {here}, and neither "
            "is on the PATH: name one with --python"
        )
    return found[0]


def make_environment(folder: pathlib.Path, python: str) -> pathlib.Path:
    """Makes SPU's environment unless it is there, and returns its interpreter."""
    complete = folder / "complete"
    inside = folder / "bin" / "python"
    if not complete.exists():
        print(f"making {folder} for {', '.join(PACKAGES)}", file=sys.stderr, flush=True)
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([inside, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        complete.touch()
    return inside


class Peer:
    """SPU's process for one workload."""

    def __init__(self, python: pathlib.Path, workload: str, folder: pathlib.Path):
        """Starts it; it compiles meanwhile."""
        self._log = folder / "spu.log"
        self._log.touch()
        self._folder = folder
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.peers.spu_process", workload, folder],
            cwd=ROOT,
            env=os.environ | ALLOCATOR_ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> Json:
        """Takes a step; see `spu_process`.

        Raises:
          RuntimeError: the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            log = self._log.read_text()
            raise RuntimeError(f"SPU's process ended with {self._process.wait()}:\n{log[-2000:]}")
        return json.loads(line)

    def update(self) -> dict[str, np.ndarray]:
        """Of the first step."""
        with np.load(self._folder / "update.npz") as arrays:
            return dict(arrays)

    def __enter__(self) -> "Peer":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()


def measure(name: str, python: pathlib.Path, steps: int) -> Json:
    """Takes steps of a workload in turn: plain, under `Mixing`, under SPU.

    Returns:
      `seconds` of each step that counts, `errors` of the first update against plain's, `bytes` of
      a step, each by who took it; `offloaded`, the share of the products' arithmetic that went
      out under `Mixing`; and SPU's `versions`.
    """
    workload: Workload = WORKLOADS[name]
    state, batch = workload.start()
    with (
        tempfile.TemporaryDirectory() as folder,
        Peer(python, name, pathlib.Path(folder)) as peer,
        tempo.Enclave.launch() as enclave,
    ):
        plain = jax.jit(workload.step, donate_argnums=0)
        shielded = tempo.shield(workload.step, enclave=enclave, offload="all")
        states: dict[str, Any] = {PLAIN: jax.device_put(state), MIXING: enclave.seal(state)}
        seconds: dict[str, list[float]] = {PLAIN: [], MIXING: [], SPU: []}
        told: Json = {}
        errors: dict[str, float] = {}
        crossed = 0
        for number in range(1 + steps):
            for who, step in ((PLAIN, plain), (MIXING, shielded)):
                start = time.perf_counter()
                states[who] = jax.block_until_ready(step(states[who], batch))
                seconds[who].append(time.perf_counter() - start)
            answer = peer.step()
            seconds[SPU].append(answer["seconds"])
            if not number:
                told = answer
                update = jax.device_get(states[PLAIN]["momentum"])
                opened = enclave.open(states[MIXING]["momentum"])
                errors = {
                    MIXING: update_error(opened, update),
                    SPU: update_error(peer.update(), update),
                }
                traffic = shielded.traffic(states[MIXING], batch)
                crossed = traffic.up + traffic.down
        outside, total = shielded.explain(states[MIXING], batch).offloaded_work
    return {
        "title": workload.title,
        "seconds": {who: taken[1:] for who, taken in seconds.items()},
        "errors": errors,
        "bytes": {MIXING: crossed, SPU: told["bytes"]},
        "offloaded": outside / total,
        "versions": told["versions"],
    }


def table(results: Json) -> str:
    """Returns the results as a line on the machine and a Markdown table."""
    spu = ", ".join(f"{name} {v}" for name, v in results["results"][0]["versions"].items())
    lines = [
        f"{describe(results['environment'])}; the peer's {spu}. Goals: SPU ÷ Mixing at least "
        f"{FASTER}, its error at least {NEARER} times Mixing's.",
        "",
        "| a training step of | plain, s | `Mixing` ÷ plain | SPU ÷ plain | SPU ÷ `Mixing` "
        "| arithmetic sent out | update's error: `Mixing` | SPU | MB sent: `Mixing` | SPU "
        "| steps |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results["results"]:
        plain, mixing, spu = (statistics.median(r["seconds"][who]) for who in (PLAIN, MIXING, SPU))
        lines.append(
            f"| {r['title']} | {plain:.2g} | {mixing / plain:.1f} | {spu / plain:.0f} "
            f"| {spu / mixing:.0f} | {r['offloaded']:.0%} | {r['errors'][MIXING]:.1g} "
            f"| {r['errors'][SPU]:.2g} | {r['bytes'][MIXING] / 1e6:.1f} "
            f"| {r['bytes'][SPU] / 1e6:.0f} | {len(r['seconds'][SPU])} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description="Compares a training step under Mixing with SPU's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--steps", type=common.positive, default=3, help="that count")
    parser.add_argument("--python", help=f"an interpreter of {' or '.join(PYTHONS)} for SPU")
    parser.add_argument(
        "--environment",
        type=pathlib.Path,
        metavar="DIR",
        default=cache_directory() / "peers" / PACKAGES[0].replace("==", "-"),
        help="of SPU; made if it is not there",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", default=pathlib.Path("."), help="for peers.json"
    )
    options = parser.parse_args(arguments)
    python = make_environment(options.environment.absolute(), find_python(options.python))
    results: Json = {"environment": environment(), "results": []}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.workloads:
        print(WORKLOADS[name].title, file=sys.stderr, flush=True)
        results["results"].append(measure(name, python, options.steps))
        (options.out / "peers.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
