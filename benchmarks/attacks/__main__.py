"""Runs the attack suite: ``python -m benchmarks.attacks`` from the repository's root.

Exit status: 0 if the default scheme withstands everything, 1 if an attack beats it, 2 if the run is
void because an attack did not succeed on its weak control.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

import threadpoolctl

from benchmarks.attacks import plans, suite, traces
from benchmarks.attacks.exactness import blinding_costs
from benchmarks.attacks.results import Control, Row, plot, table, to_json
from benchmarks.machine import environment
from examples.common import positive

ATTACKS = (*(f"S{i}" for i in range(1, 14)), "theft", "information")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, or `arguments` in its place."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one seed, fewer victims and steps")
    parser.add_argument(
        "--schemes",
        nargs="+",
        choices=[*suite.SCHEMES, *suite.SIMULATED],
        default=list(suite.SCHEMES),
        help="to attack",
    )
    parser.add_argument(
        "--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="to run"
    )
    parser.add_argument(
        "--victims", nargs="+", choices=traces.VICTIMS, default=argparse.SUPPRESS, help="to train"
    )
    parser.add_argument("--seeds", type=positive, default=3, help="runs; the worst is reported")
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="blind with the suite's own NumPy instead of the library",
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="all measurements, written as they come"
    )
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="leak against cost")
    parser.add_argument(
        "--cache",
        type=pathlib.Path,
        metavar="DIR",
        default=traces.CACHE,
        help="folder for traces, which are kept for later runs: 5 GB with --quick, tens of GB in "
        "all. Remove the folder to have the space back",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds = 1
    return options


def status(rows: Sequence[Row], controls: Sequence[Control]) -> int:
    """Exit status, see the module's docstring."""
    if not all(control.reached for control in controls):
        return 2
    broken = [r for r in rows if r.scheme == suite.DEFAULT and not r.measurement.passed]
    return 1 if broken else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite and returns the exit status."""
    options = parse_options(arguments)
    chosen = [p for p in plans.all_plans(quick=options.quick) if p.attack in options.attacks]
    if "victims" in options:
        chosen = plans.restrict(chosen, options.victims)

    def save(rows: Sequence[Row], controls: Sequence[Control]) -> None:
        if options.json:
            options.json.write_text(to_json(rows, controls, environment()) + "\n")

    # Small matrices: BLAS's threads would wait for each other, and for the enclave's.
    with threadpoolctl.threadpool_limits(1, "blas"):
        rows, controls = suite.run(
            chosen,
            options.schemes,
            range(options.seeds),
            options.cache,
            simulate=options.simulate,
            keep=save,
        )
    print(table(rows, controls))
    if options.plot:
        plot(rows, blinding_costs(), options.plot)
    return status(rows, controls)


if __name__ == "__main__":
    sys.exit(main())
