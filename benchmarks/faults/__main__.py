"""Counts after how many kills, cuts and full disks a training run goes on as if nothing had been.

Run it from the repository's root: ``python -m benchmarks.faults``.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence

import jax

from benchmarks.faults import enclave_faults, full_disk, host_faults
from benchmarks.faults.fuse import CHECKPOINT, STEP, Moment
from benchmarks.faults.tally import Tallies, Tally, table
from benchmarks.faults.training import SCHEMES
from benchmarks.machine import environment
from examples import common
from tempo_jax.transport import child

FAULTS = ("enclave", "host", "reset", "memory", "disk")


def measure(options: argparse.Namespace) -> Tallies:
    """Tries all the faults."""
    tallies: Tallies = {}

    def tally(kind: str, scheme: str) -> Tally:
        print(f"{kind}, {scheme} …", file=sys.stderr, flush=True)
        return tallies.setdefault((kind, scheme), Tally())

    kills = {STEP: options.points, CHECKPOINT: options.checkpoint_points}
    others = {STEP: options.other_points, CHECKPOINT: options.other_points}
    strikes = {
        "enclave": (enclave_faults.KILLED, enclave_faults.strike, kills),
        "host": (host_faults.KILLED, host_faults.strike, kills),
        "reset": (enclave_faults.RESET, enclave_faults.strike, others),
        "memory": (host_faults.TRUNCATED, host_faults.strike, others),
    }
    for name, scheme in itertools.product(strikes, options.schemes):
        if name in options.faults:
            kind, strike, counts = strikes[name]
            strike(kind, scheme, counts, tally(kind, scheme))
    if "disk" in options.faults:
        mount = full_disk.may_mount()
        where = "a full tmpfs" if mount else "RLIMIT_FSIZE"
        tallied = tally(f"{full_disk.FULL} ({where})", "mixing")
        full_disk.fill(options.other_points, tallied, mount)
    return tallies


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, or `arguments` in its place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--faults", nargs="+", choices=FAULTS, default=FAULTS, help="what to try; default: all"
    )
    parser.add_argument(
        "--schemes", nargs="+", choices=SCHEMES, default=SCHEMES, help="default: both"
    )
    parser.add_argument(
        "--points", type=common.positive, default=40, help="kills in a step, each of two kinds"
    )
    parser.add_argument(
        "--checkpoint-points", type=common.positive, default=20, help="kills in a checkpoint"
    )
    parser.add_argument(
        "--other-points", type=common.positive, default=10, help="of each of the other faults"
    )
    parser.add_argument("--out", type=pathlib.Path, help="file for the figures, JSON")
    # How this benchmark starts a host.
    parser.add_argument("--host", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--disk", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse_options(arguments)
    jax.config.update("jax_enable_x64", True)
    if options.host:
        folder, scheme, fault, *when = options.host
        moment = Moment(when[0], int(when[1]), float(when[2])) if when else None
        host_faults.run_host(pathlib.Path(folder), scheme, fault, moment)
        return
    if options.disk:
        folder, *limit = options.disk
        full_disk.run_host(pathlib.Path(folder), int(limit[0]) if limit else None)
        return
    # A broken connection is told from a dead enclave by waiting for it; none here needs long.
    child.STOP_SECONDS = 0.5
    tallies = measure(options)
    if options.out:
        figures = {
            f"{kind}, {scheme}": dataclasses.asdict(t) for (kind, scheme), t in tallies.items()
        }
        results = {"environment": environment(), "faults": figures}
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(tallies))
    failures = [
        f"{kind}, {scheme}: {f}" for (kind, scheme), t in tallies.items() for f in t.failures
    ]
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
