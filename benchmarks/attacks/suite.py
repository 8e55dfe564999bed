"""Runs the attacks on the schemes and on the weak controls that they must beat.

An attack that does not succeed on its weak control proves nothing where it fails, so a missed
control makes the whole run void.
"""

from __future__ import annotations

import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning

import tempo_jax as tempo
from benchmarks.attacks import blinding, store, traces
from benchmarks.attacks.plans import Plan, Setting
from benchmarks.attacks.results import Control, Measurement, Row, measure
from benchmarks.attacks.traces import Trace

SCHEMES: dict[str, Callable[[], tempo.schemes.Scheme]] = {
    "signed_permutation": tempo.schemes.SignedPermutation,
    "tempo": tempo.schemes.Tempo,
    "orthogonal": tempo.schemes.Orthogonal,
    "mixing": tempo.schemes.Mixing,
}
# Always simulated: what is recorded of one pool, `tests/running/test_pool_view.py` looks at.
SIMULATED = ("secret_shares",)
DEFAULT = "mixing"


def make_trace(
    scheme: str,
    victim: str,
    seed: int,
    setting: Setting,
    cache: pathlib.Path | None,
    *,
    simulate: bool,
) -> Trace:
    """Records a scheme of the library, or simulates it, or a control.

    Args:
      scheme: key of `blinding.BLINDINGS`.
      victim: key of `VICTIMS`.
      seed: of the trace.
      setting: how it is made.
      cache: folder for traces, or None.
      simulate: whether schemes of the library are simulated, too.
    """
    unrecorded = scheme in blinding.CONTROLS or scheme in SIMULATED
    if unrecorded or simulate or setting.repeat or setting.simulate:
        return traces.simulate(
            victim,
            scheme,
            seed,
            setting.steps,
            batch=setting.batch,
            repeat=setting.repeat,
            cache=cache,
        )
    return store.recorded(
        victim, SCHEMES[scheme](), seed, setting.steps, batch=setting.batch, cache=cache
    )


def _check_complete(trace: Trace) -> None:
    """Refuses a trace of the default scheme without a product that its policy sends out.

    Raises:
      RuntimeError: the product was not found among what the host saw, or its keys are not known.
    """
    if trace.scheme != DEFAULT:
        return
    for name in trace.names:
        truth = trace.truth[0][name]
        inside = traces.stays_inside(trace.model, name, truth.x, truth.w)
        if not inside and not all(name in views for views in trace.views):
            raise RuntimeError(
                f"{trace.victim}, {name}: not in every step of the trace, so no attack would see it"
            )


def run_attack(plan: Plan, trace: Trace) -> list[Row]:
    """Runs one attack on one trace; chance in it depends on the trace's seed alone."""
    started = time.perf_counter()
    with warnings.catch_warnings():
        # An attack that did not converge has failed, which its figure says.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = plan.run(trace, np.random.default_rng([trace.seed, 9]))
    seconds = time.perf_counter() - started
    print(
        f"{plan.attack} {trace.victim} {trace.scheme} seed {trace.seed}: {seconds:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    batch, size = trace.model.batch, len(trace.inputs[0])
    victim = trace.victim if size == batch else f"{trace.victim}, batch {size}"
    if len(trace.inputs) > 1 and np.array_equal(trace.inputs[0], trace.inputs[1]):
        victim += ", repeated"
    return [Row(trace.scheme, victim, trace.seed, m, trace.recorded) for m in found]


def _jobs(
    chosen: Sequence[Plan], schemes: Sequence[str]
) -> Iterator[tuple[str, str, Setting, list[Plan]]]:
    """Groups plans that share traces, so that every trace is made once."""
    groups: dict[tuple[str, str, Setting], list[Plan]] = {}
    for plan in chosen:
        having = [s for s in schemes if plan.schemes is None or s in plan.schemes]
        wanted = {(scheme, victim) for scheme in having for victim in plan.victims}
        wanted |= {(control[0], control[1]) for control in plan.controls}
        for scheme, victim in sorted(wanted):
            groups.setdefault((scheme, victim, plan.setting), []).append(plan)
    for (scheme, victim, setting), members in groups.items():
        yield scheme, victim, setting, members


def run(
    chosen: Sequence[Plan],
    schemes: Sequence[str],
    seeds: Sequence[int],
    cache: pathlib.Path | None,
    *,
    simulate: bool,
    keep: Callable[[list[Row], list[Control]], None] | None = None,
) -> tuple[list[Row], list[Control]]:
    """Runs attacks on schemes and on their controls.

    Args:
      chosen: the attacks.
      schemes: keys of `SCHEMES`.
      seeds: of the traces.
      cache: folder for traces, or None.
      simulate: whether schemes of the library are simulated, too.
      keep: gets all that was found so far after each group of traces, so that hours of attacks
        outlive a crash; controls that have not run yet count as missed.

    Returns:
      What was measured on the schemes, and the controls with the worst seed's value.
    """
    found: list[Row] = []
    reached: dict[tuple[int, int], list[float]] = {}
    numbers = {id(plan): i for i, plan in enumerate(chosen)}
    for scheme, victim, setting, members in _jobs(chosen, schemes):
        for seed in seeds:
            trace = make_trace(scheme, victim, seed, setting, cache, simulate=simulate)
            _check_complete(trace)
            for plan in members:
                made = run_attack(plan, trace)
                if scheme == DEFAULT and not made:
                    # Silence must not pass for safety.
                    nothing = measure(
                        plan.attack, "nothing measured", np.nan, chance=0, threshold=0
                    )
                    made = [Row(scheme, victim, seed, nothing, trace.recorded)]
                if scheme in schemes and victim in plan.victims:
                    found += made
                for i, control in enumerate(plan.controls):
                    if control[:2] == (scheme, victim):
                        values = [
                            _strength(plan, r.measurement)
                            for r in made
                            if r.measurement.metric.startswith(control[2])
                        ]
                        reached.setdefault((numbers[id(plan)], i), []).extend(values or [np.nan])
        if keep:
            keep(found, _controls(chosen, reached))
    return found, _controls(chosen, reached)


def _strength(plan: Plan, m: Measurement) -> float:
    """What a control is judged by: the value, for S9 what it gains on random frames."""
    return m.value - m.chance if plan.attack == "S9" else m.value


def _controls(chosen: Sequence[Plan], reached: dict[tuple[int, int], list[float]]) -> list[Control]:
    found = []
    for number, plan in enumerate(chosen):
        for i, (scheme, victim, metric, reach) in enumerate(plan.controls):
            least = float(np.min(reached.get((number, i), [np.nan])))
            found.append(Control(plan.attack, scheme, victim, metric, reach, least))
    return found
