"""A workload under SPU, in an interpreter of SPU's own environment; `benchmarks.peers` starts it.

Run as ``python -m benchmarks.peers.spu_process WORKLOAD FOLDER``. For every line on standard
input it takes one step from the first state and answers with a line of JSON: the seconds of the
slowest party, and for the first step the bytes that all parties sent. The first update goes to
``update.npz`` in the folder, SPU's own log to ``spu.log``.

Three parties under ABY3 in a ring of 64 bits, each a thread of this process that sends through
memory: SPU's simulator, without its compilation, its sharing of inputs and its joining of results,
none of which is counted. A real network would only add to it.
"""

import importlib.metadata
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from spu import api, libspu  # pyright: ignore[reportMissingImports]
from spu.utils import frontend  # pyright: ignore[reportMissingImports]

from benchmarks.peers.workloads import WORKLOADS, Workload

PARTIES = 3
# What SPU logs of a party's traffic where its profile is asked for.
SENT = re.compile(r"Link details: total send bytes (\d+)")


class Parties:
    """Shares of a workload's first state and batch, and the program for a step."""

    def __init__(self, workload: Workload):
        """Compiles the step and shares its inputs out."""
        arguments = workload.start()
        leaves = [np.asarray(x) for x in jax.tree_util.tree_leaves(arguments)]
        secret = libspu.Visibility.VIS_SECRET
        self._executable, output = frontend.compile(
            frontend.Kind.JAX,
            workload.step,
            arguments,
            {},
            [f"in{i}" for i in range(len(leaves))],
            [secret] * len(leaves),
            lambda flat: [f"out{i}" for i in range(len(flat))],
        )
        self._structure = jax.tree_util.tree_structure(output)
        self._config = libspu.RuntimeConfig(
            protocol=libspu.ProtocolKind.ABY3, field=libspu.FieldType.FM64
        )
        self._io = api.Io(PARTIES, self._config)
        self._shares = [self._io.make_shares(x, secret) for x in leaves]

    def step(self, profile: bool) -> tuple[float, Any]:
        """Seconds of the slowest party, and the state after the step."""
        links = libspu.link.Desc()
        for rank in range(PARTIES):
            links.add_party(f"party{rank}", f"thread{rank}")
        seconds: list[float] = [0.0] * PARTIES
        results: list[Any] = [None] * PARTIES
        ready = threading.Barrier(PARTIES)

        def work(rank: int) -> None:
            config = libspu.RuntimeConfig(self._config)
            config.enable_pphlo_profile = profile
            runtime = api.Runtime(libspu.link.create_mem(links, rank), config)
            for name, shares in zip(self._executable.input_names, self._shares, strict=True):
                runtime.set_var(name, shares[rank])
            ready.wait()
            start = time.perf_counter()
            runtime.run(self._executable)
            seconds[rank] = time.perf_counter() - start
            results[rank] = [runtime.get_var(name) for name in self._executable.output_names]

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(PARTIES)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if None in results:
            raise RuntimeError("a party failed")
        joined = [self._io.reconstruct(shares) for shares in zip(*results, strict=True)]
        return max(seconds), jax.tree_util.tree_unflatten(self._structure, joined)


def main() -> None:
    """Answers until standard input ends."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    log = folder / "spu.log"
    with log.open("w") as file:
        for descriptor in (1, 2):  # SPU writes there as it likes
            os.dup2(file.fileno(), descriptor)
    parties = Parties(WORKLOADS[name])
    first = True
    for _ in sys.stdin:
        seconds, state = parties.step(profile=first)
        answer: dict[str, Any] = {"seconds": seconds}
        if first:
            sent = [int(number) for number in SENT.findall(log.read_text())]
            if len(sent) != PARTIES:
                raise RuntimeError(f"SPU logged the traffic of {len(sent)} parties of {PARTIES}")
            answer["bytes"] = sum(sent)
            answer["versions"] = {p: importlib.metadata.version(p) for p in ("spu", "jax")}
            np.savez(folder / "update.npz", **state["momentum"])
        print(json.dumps(answer), file=answers, flush=True)
        first = False


if __name__ == "__main__":
    main()
