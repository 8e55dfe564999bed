"""What the suite runs: attacks, the victims and steps each is given, and the controls it must beat.

An attack that does not succeed on its weak control proves nothing where it fails, so a missed
control makes the whole run void.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning

import tempo_jax as tempo
from benchmarks.attacks import (
    blinding,
    checkpoint,
    congruence,
    exactness,
    few_shot,
    information,
    inputs,
    labels,
    linkage,
    plaintext,
    rows,
    scales,
    spectra,
    steps,
    store,
    structure,
    theft,
    traces,
)
from benchmarks.attacks.results import Control, Measurement, Row, measure
from benchmarks.attacks.traces import Trace

Run = Callable[[Trace, np.random.Generator], list[Measurement]]

SCHEMES: dict[str, Callable[[], tempo.schemes.Scheme]] = {
    "signed_permutation": tempo.schemes.SignedPermutation,
    "tempo": tempo.schemes.Tempo,
    "orthogonal": tempo.schemes.Orthogonal,
    "mixing": tempo.schemes.Mixing,
}
DEFAULT = "mixing"
MLPS = ("mlp", "mlp_bn", "mlp_ln")
ALL = (*MLPS, "cnn", "transformer")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a trace is made.

    Attributes:
      steps: recorded steps.
      batch: examples in a step; the victim's own if None.
      repeat: whether all steps see one batch; such traces are always simulated.
      simulate: whether the trace is simulated in any case, for the form of its keys.
    """

    steps: int
    batch: int | None = None
    repeat: bool = False
    simulate: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """One attack of the suite.

    Attributes:
      attack: `S1` to `S10`, `theft` or `information`.
      run: the attack.
      victims: on which it runs.
      setting: of the traces.
      controls: (control, victim, metric, reach) for each metric that must reach a value on a weak
        control; a metric's beginning is enough.
      schemes: the only ones that have what it attacks; None for all.
    """

    attack: str
    run: Run
    victims: tuple[str, ...]
    setting: Setting
    controls: tuple[tuple[str, str, str, float], ...] = ()
    schemes: tuple[str, ...] | None = None


def plans(*, quick: bool) -> list[Plan]:
    """All attacks, in the order in which the table shows them.

    What holds for perceptrons need not hold for what convolutions and attention show, so attacks
    have controls on each kind of victim, where one of them is weak enough.
    """
    few = Setting(2) if quick else Setting(6)
    many = Setting(12) if quick else Setting(60)
    # A step of the wider victims is tens of megabytes.
    several = Setting(12)
    large = Setting(2 if quick else 4, batch=1024)
    repeated = Setting(2 if quick else 4, batch=1024, repeat=True)
    some = ("mlp",) if quick else ALL
    mlps = ("mlp",) if quick else MLPS
    wider = ("transformer",) if quick else ("cnn", "transformer")
    dense = ("mlp",) if quick else (*MLPS, "mlp_large")
    align: Run = congruence.attack
    shoot: Run = few_shot.attack
    if quick:
        align = functools.partial(congruence.attack, lengths=(4,), restarts=3, singles=2)
        shoot = functools.partial(few_shot.attack, restarts=4, steps=4)
    # To align 128 columns with 576 takes many times as long.
    align_wide: Run = functools.partial(congruence.attack, lengths=(4, 10), restarts=4, singles=1)
    permuted = {
        "mlp": "signed_permutation",
        "cnn": "signed_patches",
        "transformer": "signed_permutation",
    }
    found = [
        Plan(
            "S1",
            linkage.attack,
            mlps,
            many,
            (("signed_permutation", "mlp", "columns linked", 0.9),),
        ),
        Plan(
            "S1",
            linkage.attack,
            wider,
            several,
            (
                ("signed_patches", "cnn", "columns linked", 0.5),
                ("signed_permutation", "transformer", "columns linked", 0.9),
            ),
        ),
        Plan(
            "S1",
            scales.attack,
            mlps,
            many,
            (("tempo", "mlp", "scales of columns", 0.5),),
            schemes=("tempo",),
        ),
        Plan("S2", rows.attack, dense, few, (("permuted_rows", "mlp", "stolen", 0.905),)),
        *([] if quick else _stealing_from_wider(few)),
        Plan("S3", align, mlps, many, (("kept_orthogonal", "mlp", "stolen, max", 0.85),)),
        Plan(
            "S3",
            align_wide,
            () if quick else wider,
            several,
            (
                ("kept_orthogonal", "cnn", "directions linked", 5),
                ("kept_orthogonal", "cnn", "stolen, max", 0.8),
                ("kept_orthogonal", "transformer", "stolen, max", 0.345),
            ),
        ),
        Plan(
            "S4",
            spectra.attack if not quick else functools.partial(spectra.attack, others=1, draws=8),
            mlps,
            many,
            (("fresh_orthogonal", "mlp", "spectrum told from near ones, T = 1", 0.9),),
        ),
        Plan(
            "S4",
            functools.partial(structure.attack_library, sizes=(96, 192))
            if quick
            else structure.attack_library,
            ("mlp",),
            dataclasses.replace(few, simulate=True),
            (("mixing_two_rounds", "mlp", "blocks of keys of 192", 0.9),),
        ),
        Plan(
            "S4",
            steps.attack,
            some,
            few,
            (
                ("fresh_orthogonal", "mlp", "w directions linked by rank", 30),
                ("fresh_orthogonal", "cnn", "w directions linked by rank", 30),
                ("fresh_orthogonal", "cnn", "gram directions linked by rank", 2),
                ("fresh_orthogonal", "transformer", "w directions linked by rank", 30),
                ("fresh_orthogonal", "transformer", "attention w subspace", 0.6),
            ),
        ),
        Plan(
            "S4",
            steps.attack,
            ("mlp",),
            large,
            (("mixing_without_decoys", "mlp", "dual subspace", 0.93),),
        ),
        Plan(
            "S4",
            steps.attack,
            ("mlp",),
            repeated,
            (("mixing_without_decoys", "mlp", "eig directions linked by oracle", 15),),
        ),
        Plan(
            "S4",
            structure.attack,
            some,
            dataclasses.replace(few, simulate=True),
            (("mixing_two_rounds", "mlp", "blocks of row keys", 0.9),),
        ),
        Plan(
            "S5",
            checkpoint.attack,
            some,
            few,
            (
                *(
                    control
                    for victim, scheme in permuted.items()
                    for control in (
                        (scheme, victim, "key rows and columns, 0%", 0.9),
                        ("fresh_orthogonal", victim, "w directions by rank, 0%", 30),
                        ("fresh_orthogonal", victim, "key directions with signs, 0%", 120),
                    )
                ),
                ("fresh_orthogonal", "transformer", "dual directions by rank, 0%", 2),
                ("direct_convolution", "cnn", "taps", 0.95),
            ),
        ),
        Plan(
            "S6",
            inputs.attack,
            some,
            few,
            (
                ("signed_permutation", "mlp", "columns matched, dense1", 0.9),
                ("signed_patches", "cnn", "columns matched, conv1", 0.9),
                ("signed_permutation", "transformer", "columns matched, qkv", 0.9),
                ("signed_permutation", "mlp", "images by matching", 0.95),
                ("signed_permutation", "mlp", "labels by nearest image", 0.9),
                ("permuted_rows", "mlp", "columns separated, dense1", 0.1),
            ),
        ),
        Plan(
            "S7",
            labels.attack,
            some,
            few,
            (
                ("signed_permutation", "mlp", "labels", 0.4),
                ("signed_patches", "cnn", "labels", 0.9),
                ("signed_permutation", "transformer", "labels", 0.6),
            ),
        ),
        *(
            Plan(
                "S8",
                plaintext.attack,
                victims,
                setting,
                (
                    *(
                        control
                        for victim in controlled
                        for control in (
                            ("fresh_orthogonal", victim, "key directions, 127", 26),
                            ("fresh_orthogonal", victim, "membership", 0.99),
                        )
                    ),
                    # The rows of a convolution are too wide for the secular equation.
                    *(
                        ("fresh_orthogonal", victim, "missing row", 0.95)
                        for victim in controlled
                        if victim != "cnn"
                    ),
                ),
            )
            for victims, setting, controlled in (
                (mlps, many, ("mlp",)),
                (() if quick else wider, several, ("cnn", "transformer")),
            )
        ),
        Plan(
            "S9",
            shoot,
            dense,
            many if quick else few,
            (("fresh_orthogonal", "mlp", "stolen", 0.20),),
        ),
        Plan("S10", exactness.attack, some[:1] if quick else ("mlp", "transformer"), few),
        Plan(
            "theft",
            theft.attack,
            some[:1] if quick else MLPS,
            few,
            (("signed_permutation", "mlp", "substitute's accuracy", 0.95),),
        ),
        Plan(
            "information",
            information.attack,
            some,
            few,
            tuple(
                (scheme, victim, "bits, sorted columns", 3) for victim, scheme in permuted.items()
            ),
        ),
    ]
    return [_without_idle_controls(plan) for plan in found if plan.victims]


def _without_idle_controls(plan: Plan) -> Plan:
    """The same plan without controls on kinds of victim that it does not attack."""
    return dataclasses.replace(
        plan, controls=tuple(c for c in plan.controls if c[1] in plan.victims)
    )


def _stealing_from_wider(few: Setting) -> list[Plan]:
    """S2, S9 and theft on victims that are no perceptrons."""
    # Fewer frames, since gains are trained through all pixels and characters.
    shoot = functools.partial(few_shot.attack, restarts=2, steps=2)
    return [
        Plan(
            "S2",
            rows.attack,
            ("cnn", "transformer"),
            few,
            (
                ("permuted_rows", "cnn", "stolen", 0.6),
                ("shared_rows", "cnn", "stolen", 0.75),
                ("permuted_rows", "transformer", "stolen", 0.35),
            ),
        ),
        Plan(
            "S9",
            shoot,
            ("cnn", "transformer"),
            few,
            (
                ("fresh_orthogonal", "cnn", "stolen", 0.2),
                ("kept_orthogonal", "transformer", "stolen", 0.025),
            ),
        ),
        Plan(
            "theft",
            theft.attack,
            ("cnn",),
            few,
            (("plain_features", "cnn", "substitute's accuracy", 0.85),),
        ),
    ]


def restrict(plan: Plan, victims: Sequence[str]) -> Plan:
    """The same attack on those of its victims that are named; its controls stay."""
    return dataclasses.replace(plan, victims=tuple(v for v in plan.victims if v in victims))


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
    if scheme in blinding.CONTROLS or simulate or setting.repeat or setting.simulate:
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
