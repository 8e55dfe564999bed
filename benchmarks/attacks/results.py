"""What an attack measured, and the tables, JSON and plot made of it."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One figure of one attack on one trace.

    Attributes:
      attack: `S1` to `S13`, `theft` or `information`.
      metric: what was counted.
      value: what the attack reached.
      chance: what guessing reaches.
      threshold: the scheme withstands the attack as long as `value` is at most this.
      passed: whether it did.
      note: anything a reader must know beside it.
      best: value of a perfect attack, for the plot.
      attainable: what the answer's form lets anyone reach who knows the other keys, if that is not
        `best`: under a dense key no column of the host's is one of the model's.
    """

    attack: str
    metric: str
    value: float
    chance: float
    threshold: float
    passed: bool
    note: str = ""
    best: float = 1.0
    attainable: float | None = None

    @property
    def applies(self) -> bool:
        """Whether the attack could have failed the scheme; else that it passes says nothing."""
        return self.attainable is None or not self.passed or self.attainable > self.threshold

    @property
    def leak(self) -> float:
        """Where the value lies between chance (0) and a perfect attack (1)."""
        if not self.applies:
            return 0.0
        span = self.best - self.chance
        return min(1.0, max(0.0, (self.value - self.chance) / span)) if span else 0.0


def measure(
    attack: str,
    metric: str,
    value: float,
    *,
    chance: float,
    threshold: float,
    note: str = "",
    best: float = 1.0,
    attainable: float | None = None,
) -> Measurement:
    """A measurement, judged against its threshold; what is not a number does not pass."""
    value = float(value)
    passed = bool(value <= threshold)
    return Measurement(
        attack,
        metric,
        value,
        float(chance),
        float(threshold),
        passed,
        note,
        best,
        None if attainable is None else float(attainable),
    )


def report(attack: str, metric: str, value: float, *, chance: float, note: str) -> Measurement:
    """A share that leaks and is not judged: nobody promised that it is hidden."""
    note = f"reported, not judged; {note}"
    return measure(attack, metric, value, chance=chance, threshold=1.0, note=note)


@dataclasses.dataclass(frozen=True)
class Row:
    """A measurement, and the trace it was made on.

    Attributes:
      scheme: name of the scheme or control.
      victim: key of `VICTIMS`.
      seed: of the trace.
      measurement: what was measured.
      recorded: whether the library made the trace, not the simulation.
    """

    scheme: str
    victim: str
    seed: int
    measurement: Measurement
    recorded: bool = False


@dataclasses.dataclass(frozen=True)
class Control:
    """What an attack must reach on a weak control, else the suite says nothing.

    Attributes:
      attack: `S1` to `S13`, `theft` or `information`.
      scheme: the weak control.
      victim: key of `VICTIMS`.
      metric: which of the attack's metrics.
      reach: the least value that counts.
      value: the worst of the seeds; not a number if nothing was measured.
    """

    attack: str
    scheme: str
    victim: str
    metric: str
    reach: float
    value: float = math.nan

    @property
    def reached(self) -> bool:
        """Whether the attack works; False if it was not measured."""
        return self.value >= self.reach


def worst(rows: Iterable[Row]) -> list[Row]:
    """The worst seed of every scheme, attack, metric and victim, in order of first appearance."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        m = row.measurement
        key = (row.scheme, m.attack, m.metric, row.victim)
        kept = found.get(key)
        if kept is None or _badness(m) > _badness(kept.measurement):
            found[key] = row
    return list(found.values())


def _badness(m: Measurement) -> float:
    margin = m.value - m.threshold
    return math.inf if math.isnan(margin) else margin


def table(rows: Sequence[Row], controls: Sequence[Control]) -> str:
    """Markdown: the controls, then every scheme, attack, metric and victim, worst of the seeds."""
    void = [c for c in controls if not c.reached]
    lines = []
    if controls:
        lines += ["| control | attack | victim | metric | reached | must reach | |"]
        lines += ["|:--|:--|:--|:--|--:|--:|:--|"]
        for c in controls:
            verdict = "ok" if c.reached else "**VOID**"
            lines.append(
                f"| {c.scheme} | {c.attack} | {c.victim} | {c.metric} | {c.value:.3g} "
                f"| ≥ {c.reach:.3g} | {verdict} |"
            )
        lines.append("")
    lines += ["| scheme | attack | victim | metric | value | chance | passes at | verdict | |"]
    lines += ["|:--|:--|:--|:--|--:|--:|--:|:--|:--|"]
    for row in worst(rows):
        m = row.measurement
        verdict = "passes" if m.passed else "**broken**"
        if not m.applies:
            verdict = f"cannot apply: {m.attainable:.2g} with keys known"
        lines.append(
            f"| {row.scheme} | {m.attack} | {row.victim} | {m.metric} | {m.value:.3g} "
            f"| {m.chance:.3g} | ≤ {m.threshold:.3g} | {verdict} | {m.note} |"
        )
    if void:
        names = sorted({c.attack for c in void})
        lines += ["", f"VOID: {', '.join(names)} did not succeed where it must."]
    return "\n".join(lines)


def to_json(rows: Sequence[Row], controls: Sequence[Control], environment: dict[str, Any]) -> str:
    """All rows, all seeds, as JSON."""
    return json.dumps(
        {
            "environment": environment,
            "void": not all(c.reached for c in controls),
            "controls": [dataclasses.asdict(c) | {"reached": c.reached} for c in controls],
            "rows": [
                {"scheme": r.scheme, "victim": r.victim, "seed": r.seed, "recorded": r.recorded}
                | dataclasses.asdict(r.measurement)
                | {"leak": r.measurement.leak, "applies": r.measurement.applies}
                for r in rows
            ],
        },
        indent=2,
    )


def leaks(rows: Sequence[Row]) -> dict[str, tuple[float, str]]:
    """For each scheme its worst leak, 0 to 1, and the attack that found it."""
    found: dict[str, tuple[float, str]] = {}
    for row in rows:
        m = row.measurement
        if row.scheme not in found or m.leak > found[row.scheme][0]:
            found[row.scheme] = (m.leak, m.attack)
    return found


def plot(rows: Sequence[Row], costs: dict[str, float], path: pathlib.Path) -> None:
    """Draws leak against cost, every scheme a point; the file's ending says the format.

    Args:
      rows: all measurements.
      costs: enclave nanoseconds for each blinded element, by scheme; others are left out.
      path: where to save.
    """
    # A figure of its own, without pyplot, draws with Agg and needs no display.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for scheme, (leak, attack) in leaks(rows).items():
        if scheme in costs:
            axes.plot(costs[scheme], leak, "o", markersize=9)
            axes.annotate(
                f"{scheme} ({attack})", (costs[scheme], leak), (6, 6), textcoords="offset points"
            )
    axes.set(
        xlabel="enclave time, ns per blinded element",
        ylabel="worst leak (0 chance, 1 all)",
        ylim=(-0.05, 1.1),
        title="What each scheme leaks, and what it costs",
    )
    axes.margins(x=0.3)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
