"""What the suite runs: attacks, the victims and steps each is given, and the controls to reach."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.attacks import (
    candidates,
    checkpoint,
    congruence,
    coordinates,
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
    structure,
    theft,
)
from benchmarks.attacks.results import Measurement
from benchmarks.attacks.traces import Trace
from benchmarks.attacks.victims import WIDER

Run = Callable[[Trace, np.random.Generator], list[Measurement]]

MLPS = ("mlp", "mlp_bn", "mlp_ln")
ALL = (*MLPS, "cnn", "transformer")
ROWS = "cnn_rows"


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
      attack: `S1` to `S13`, `theft` or `information`.
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


def all_plans(*, quick: bool) -> list[Plan]:
    """All attacks, in the order in which the table shows them.

    What holds for perceptrons need not hold for what convolutions and attention show, so attacks
    have controls on each kind of victim, where one of them is weak enough.
    """
    few = Setting(2) if quick else Setting(6)
    many = Setting(12) if quick else Setting(60)
    # A step of the wider victims is tens of megabytes.
    several = Setting(12)
    hundred = many if quick else Setting(100)
    large = Setting(2 if quick else 4, batch=1024)
    repeated = Setting(2 if quick else 4, batch=1024, repeat=True)
    some = ("mlp",) if quick else ALL
    # Its layers' outputs are sums of what was multiplied, so that nothing links adjacent columns.
    in_rows = () if quick else (ROWS,)
    mlps = ("mlp",) if quick else MLPS
    wider = ("transformer",) if quick else ("cnn", "transformer")
    dense = ("mlp",) if quick else (*MLPS, "mlp_large")
    align: Run = congruence.attack
    shoot: Run = few_shot.attack
    if quick:
        align = functools.partial(congruence.attack, lengths=(4,), restarts=2, singles=2)
        shoot = functools.partial(few_shot.attack, restarts=3, steps=3)
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
            coordinates.evened_out(linkage.attack),
            mlps,
            hundred,
            (("signed_permutation", "mlp", "columns linked", 0.9),),
        ),
        Plan(
            "S1",
            coordinates.evened_out(linkage.attack),
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
        Plan(
            "S3",
            align,
            mlps,
            many,
            (
                ("kept_orthogonal", "mlp", "stolen, max", 0.85),
                # Whose Grams have to be whitened first.
                *([] if quick else [("kept_invertible", "mlp", "stolen, max", 0.85)]),
            ),
        ),
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
            coordinates.scored_twice(steps.attack),
            (*some, *in_rows),
            few,
            (
                ("fresh_orthogonal", "mlp", "w directions linked by rank", 30),
                ("fresh_orthogonal", "mlp", "w subspace", 0.99),
                ("fresh_orthogonal", "cnn", "w directions linked by rank", 30),
                ("fresh_orthogonal", "cnn", "gram directions linked by rank", 2),
                ("fresh_orthogonal", ROWS, "w directions linked by rank", 30),
                ("fresh_orthogonal", "transformer", "w directions linked by rank", 30),
                ("fresh_orthogonal", "transformer", "attention w subspace", 0.6),
            ),
        ),
        Plan(
            "S4",
            coordinates.scored_twice(steps.attack),
            ("mlp",),
            large,
            (("mixing_without_decoys", "mlp", "dual subspace", 0.93),),
        ),
        Plan(
            "S4",
            coordinates.scored_twice(steps.attack),
            ("mlp",),
            repeated,
            (("mixing_without_decoys", "mlp", "eig directions linked by oracle", 15),),
        ),
        Plan(
            "S4",
            structure.attack,
            (*some, *in_rows),
            dataclasses.replace(few, simulate=True),
            (("mixing_two_rounds", "mlp", "blocks of row keys", 0.9),),
        ),
        Plan(
            "S5",
            coordinates.scored_twice(checkpoint.attack),
            (*some, *in_rows),
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
                ("fresh_orthogonal", ROWS, "w directions by rank, 0%", 30),
                ("fresh_orthogonal", ROWS, "key directions with signs, 0%", 120),
                ("fresh_orthogonal", "transformer", "dual directions by rank, 0%", 2),
                ("direct_convolution", "cnn", "taps", 0.95),
            ),
        ),
        Plan(
            "S6",
            coordinates.scored_twice(inputs.attack),
            (*some, *in_rows),
            few,
            (
                ("signed_permutation", "mlp", "columns matched, dense1", 0.9),
                ("signed_patches", "cnn", "columns matched, conv1", 0.9),
                ("signed_permutation", ROWS, "columns matched, conv1", 0.9),
                ("signed_permutation", "transformer", "columns matched, qkv", 0.9),
                ("signed_permutation", "mlp", "images by matching", 0.95),
                ("signed_permutation", "mlp", "labels by nearest image", 0.9),
                ("permuted_rows", "mlp", "columns separated, dense1", 0.1),
                ("permuted_rows", "mlp", "images by pca", 0.85),
                ("permuted_rows", "mlp", "labels by nearest image", 0.9),
            ),
        ),
        Plan(
            "S7",
            coordinates.evened_out(labels.attack),
            (*some, *in_rows),
            few,
            (
                ("signed_permutation", "mlp", "labels", 0.4),
                ("signed_patches", "cnn", "labels", 0.9),
                ("signed_permutation", ROWS, "labels", 0.9),
                ("signed_permutation", "transformer", "labels", 0.6),
            ),
        ),
        *(
            Plan(
                "S8",
                coordinates.evened_out(plaintext.attack),
                victims,
                setting,
                (
                    *(
                        control
                        for victim in controlled
                        for control in (
                            ("fresh_orthogonal", victim, "key directions, 127", 26),
                            ("fresh_orthogonal", victim, "membership", 0.99),
                            ("fresh_orthogonal", victim, "batch told by likelihood, all", 0.99),
                        )
                    ),
                    # The rows of a convolution are too wide for the secular equation.
                    *(
                        ("fresh_orthogonal", victim, "missing row", 0.95)
                        for victim in controlled
                        if victim not in ("cnn", ROWS)
                    ),
                ),
            )
            for victims, setting, controlled in (
                (mlps, many, ("mlp",)),
                (() if quick else (*wider, ROWS), several, ("cnn", ROWS, "transformer")),
            )
        ),
        Plan(
            "S9",
            shoot,
            dense,
            many if quick else few,
            (("fresh_orthogonal", "mlp", "stolen", 0.20),),
        ),
        *_telling(mlps, many, several, quick=quick),
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
            coordinates.evened_out(information.attack),
            (*some, *in_rows),
            few,
            tuple(
                (scheme, victim, "bits, sorted columns", 3)
                for victim, scheme in (permuted | {ROWS: "signed_permutation"}).items()
            ),
        ),
    ]
    return [_without_idle_controls(plan) for plan in found if plan.victims]


def _telling(
    mlps: tuple[str, ...],
    many: Setting,
    several: Setting,
    *,
    quick: bool,
) -> list[Plan]:
    """S11 to S13, whose controls are what `Mixing` was without masks of full rank."""
    old = "mixing_decoys"
    schemes = ("mixing",) if quick else None
    few = {"draws": 150, "products": 1} if quick else {}
    fewer = {"count": 2} if quick else {}
    text: Run = functools.partial(candidates.attack, **few)
    if quick:
        text = functools.partial(text, kinds=("sequence",))
    return [
        Plan(
            "S11",
            functools.partial(candidates.attack, **few),
            mlps,
            many,
            (
                (old, "mlp", "batch from G, T = 1", 0.9),
                (old, "mlp", "batch from X, T = 100", 0.85),
                (old, "mlp", "batch from G, found again", 0.6),
            ),
            schemes,
        ),
        Plan(
            "S11",
            text,
            ("transformer",),
            several,
            (
                (old, "transformer", "sequence from X, T = 12", 0.9),
                (old, "transformer", "sequence from attention, T = 12", 0.9),
            ),
            schemes,
        ),
        *([] if quick else _telling_wider(several)),
        *(
            Plan(attack, run, mlps, many, controls, schemes)
            for attack, run, controls in (
                (
                    "S12",
                    candidates.attack_ranks,
                    tuple(
                        (old, "mlp", f"ranks told: {what}", 0.75)
                        for what in ("rows that are no", "rows in the loss", "columns that")
                    ),
                ),
                (
                    "S13",
                    functools.partial(candidates.attack_weights, **few, **fewer),
                    (("fresh_orthogonal", "mlp", "weights told from a tenth off, T = 1", 0.95),),
                ),
            )
        ),
    ]


def _telling_wider(several: Setting) -> list[Plan]:
    """S11 to S13 on a CNN and on wider perceptrons, from fewer draws the longer one takes."""
    old, four = "mixing_decoys", Setting(4)
    found = [
        Plan(
            "S11",
            functools.partial(candidates.attack, draws=150),
            ("cnn", ROWS),
            several,
            tuple(
                (old, victim, metric, least)
                for victim in ("cnn", ROWS)
                for metric, least in (("batch from G, T = 1", 0.9), ("batch from X, T = 100", 0.85))
            ),
        ),
        Plan(
            "S12",
            candidates.attack_ranks,
            ("cnn", ROWS, "transformer"),
            several,
            tuple(
                (old, victim, f"ranks told: {what}", 0.75)
                for victim in ("cnn", ROWS, "transformer")
                for what in ("rows that are no", "columns that")
            ),
        ),
        Plan(
            "S13",
            functools.partial(candidates.attack_weights, draws=150, count=2),
            ("cnn", ROWS, "transformer"),
            several,
            tuple(
                ("fresh_orthogonal", victim, "weights told from a tenth off, T = 1", 0.95)
                for victim in ("cnn", ROWS, "transformer")
            ),
        ),
    ]
    for width, draws, count in zip(WIDER, (150, 60, 40), (2, 2, 1), strict=True):
        victims = (f"mlp_{width}",)
        weights: Run = functools.partial(candidates.attack_weights, draws=draws, count=count)
        found += [
            Plan(
                "S11",
                functools.partial(candidates.attack, draws=200),
                victims,
                four,
                ((old, "mlp_512", "batch from G, T = 1", 0.9),),
            ),
            Plan("S12", candidates.attack_ranks, victims, four),
            Plan("S13", weights, victims, four),
        ]
    return [dataclasses.replace(plan, schemes=("mixing",)) for plan in found]


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
            ("cnn", "transformer"),
            few,
            (
                ("plain_features", "cnn", "substitute's accuracy", 0.85),
                ("plain_features", "transformer", "substitute's accuracy", 0.33),
            ),
        ),
    ]


def restrict(chosen: Sequence[Plan], victims: Sequence[str]) -> list[Plan]:
    """The same attacks on those of their victims that are named.

    Controls on these stay; for metrics that have none there, those on other victims speak.
    """
    found = []
    for plan in chosen:
        kept = tuple(v for v in plan.victims if v in victims)
        near = {_what(c) for c in plan.controls if c[1] in kept}
        controls = tuple(c for c in plan.controls if c[1] in kept or _what(c) not in near)
        found.append(dataclasses.replace(plan, victims=kept, controls=controls))
    return [plan for plan in found if plan.victims]


def _what(control: tuple[str, str, str, float]) -> str:
    """The metric of a control, without the product that it names."""
    return control[2].partition(",")[0]
