"""What an owner allows the host of its enclave to do with a program's arguments.

The defaults are the narrow ones; `Shielded.provision` says what each option gives up. The rules
that follow from them go to the enclave with the program (`enclave_runtime.protocol.tags`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from enclave_runtime.protocol.program import PUBLIC
from enclave_runtime.protocol.tags import MAX_RUNS, ArgumentRule, Rules
from tempo_jax.errors import UnsupportedError
from tempo_jax.planning.plan import Plan

Runs = int | None | Mapping[str, int | None] | Literal["auto"]
Tags = Mapping[str, str | Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Signed:
    """The names in one signature of a function.

    Attributes:
      function: its name.
      leaves: for each flat input its argument's name and its path in the argument.
      results: for each flat output its path in the result.
      host_chosen: names of the public arguments that the host chooses.
    """

    function: str
    leaves: Sequence[tuple[str, str]]
    results: Sequence[str]
    host_chosen: frozenset[str] = frozenset()

    @property
    def arguments(self) -> list[str]:
        """The arguments' names that have leaves, each once."""
        return list(dict.fromkeys(name for name, _ in self.leaves))


@dataclasses.dataclass(frozen=True)
class Allowance:
    """What `Shielded.provision` was told; see there."""

    tags: Tags = dataclasses.field(default_factory=dict)
    allow_any: Sequence[str] = ()
    allow_forks: bool = False
    runs_per_batch: Runs = "auto"
    retries: int = 8

    def check(self, signed: Signed) -> None:
        """Refuses names of no argument, and counts that are none.

        Raises:
          UnsupportedError: with the name of the option.
        """
        limits = self.runs_per_batch
        by_name = limits if isinstance(limits, Mapping) else {}
        for option, names in (
            ("tags", self.tags),
            ("allow_any", self.allow_any),
            ("runs_per_batch", by_name),
        ):
            unknown = [name for name in names if name not in signed.arguments]
            if isinstance(names, str) or unknown:
                named = repr(names) if isinstance(names, str) else ", ".join(map(repr, unknown))
                raise UnsupportedError(
                    f"provision: {option} names {named}, "
                    f"expected some of the arguments {', '.join(signed.arguments)}"
                )
        counts = by_name.values() if isinstance(limits, Mapping) else [limits]
        for count in counts:
            if not (count in (None, "auto") or _is_count(count, 1)):
                raise UnsupportedError(
                    f"provision: runs_per_batch is {count!r}, expected None or a whole number from "
                    "1 on, or a dict of them by arguments' names"
                )
        if not _is_count(self.retries, 0):
            raise UnsupportedError(
                f"provision: retries is {self.retries!r}, expected a whole number from 0 on"
            )

    def runs(self, name: str, trains: bool) -> int | None:
        """How many runs may use one value of an argument that carries no state."""
        limits = self.runs_per_batch
        if isinstance(limits, Mapping):
            limits = limits.get(name, "auto")
        if isinstance(limits, str):
            return 1 if trains else None
        return limits


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and least <= value < MAX_RUNS


def rules(signed: Signed, plan: Plan, allowance: Allowance | None) -> Rules:
    """The rules for a plan.

    Args:
      signed: the names of its inputs and outputs.
      plan: the plan.
      allowance: of the owner; None refuses nothing.
    """
    origin_of = {output: i for i, output in plan.request.carried.items()}
    outputs = []
    for position in plan.sealed:
        source = origin_of.get(position)
        place = f"result{signed.results[position]}"
        if source is not None:
            place = "".join(signed.leaves[source])
        outputs.append(f"{signed.function}.{place}")
    if allowance is None:
        return Rules(signed.function, tuple(outputs))
    grouped: dict[tuple[str, bool], list[int]] = {}
    for i, ((name, _), port) in enumerate(zip(signed.leaves, plan.program.inputs, strict=True)):
        grouped.setdefault((name, port.place == PUBLIC), []).append(i)
    return Rules(
        signed.function,
        tuple(outputs),
        tuple(
            _rule(signed, plan, allowance, name, positions, public)
            for (name, public), positions in grouped.items()
        ),
        allowance.retries,
    )


def _rule(
    signed: Signed,
    plan: Plan,
    allowance: Allowance,
    name: str,
    positions: Sequence[int],
    public: bool,
) -> ArgumentRule:
    trains = plan.request.carried.keys()
    carried = not public and not trains.isdisjoint(positions)
    named = allowance.tags.get(name, name)
    tags = [named] if isinstance(named, str) else list(named)
    if carried:
        tags.append(f"{signed.function}.{name}")
    texts = tuple(tuple(tag + signed.leaves[i][1] for tag in tags) for i in positions)
    runs = None if public else allowance.runs(name, bool(trains))
    if carried:
        runs = None if allowance.allow_forks else 1
    any_place = name in allowance.allow_any or (public and name in signed.host_chosen)
    return ArgumentRule(name, tuple(positions), None if any_place else texts, runs, carried)


@dataclasses.dataclass(frozen=True)
class Provision:
    """What `Shielded.provision` gave the enclave; print it.

    Attributes:
      digest: the program's hash, by which the host finds it.
      rules: what its arguments take; None on the host, where they are not known.
      public: names of the arguments that the host knows.
      host_chosen: names of those that it also chooses.
    """

    digest: str
    rules: Rules | None
    public: tuple[str, ...] = ()
    host_chosen: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"program {self.digest}"]
        if self.rules is None:
            return lines[0]
        if not self.rules.arguments:
            return f"{lines[0]}, launched by its host, which is refused nothing"
        for rule in self.rules.arguments:
            lines.append(f"  {rule.name}: {self._taken(rule)}")
        lines.append(f"  a value may be used by {self.rules.retries} more runs that fail")
        lines += [f"  note: {note}" for note in self._notes()]
        return "\n".join(lines)

    def _taken(self, rule: ArgumentRule) -> str:
        known = rule.name in self.public
        if rule.name in self.host_chosen or (known and rule.texts is None):
            return "public, what the host chooses"
        how_often = "in any number of runs" if rule.runs is None else f"runs on one: {rule.runs}"
        if rule.carried:
            how_often = "of any generation" if rule.runs is None else "each generation once"
        if rule.texts is None:
            return f"any sealed value of its types, {how_often}"
        first = [texts[0] for texts in rule.texts]
        if known:
            return f"public, what is published as `{first[0]}`{' …' if len(first) > 1 else ''}"
        names = [min(texts[k] for texts in rule.texts) for k in range(len(rule.texts[0]))]
        several = " …" if len(rule.inputs) > 1 else ""
        return f"what is tagged {' or '.join(f'`{n}`{several}' for n in names)}, {how_often}"

    def _notes(self) -> list[str]:
        assert self.rules is not None
        notes = []
        open_ones = [
            rule.name
            for rule in self.rules.arguments
            if rule.runs is None
            and not rule.carried
            and rule.name not in (*self.public, *self.host_chosen)
        ]
        if open_ones:
            notes.append(
                f"the host may run {', '.join(open_ones)} as often as it likes, each time under "
                "fresh blindings, which is what guesses are made from; `runs_per_batch` bounds it"
            )
        if self.host_chosen:
            notes.append(
                f"the host chooses {', '.join(self.host_chosen)} anew for each run: where that "
                "weighs examples, it reads what each of them reveals"
            )
        return notes
