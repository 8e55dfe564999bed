"""Holds a host to the owner's rules: which value goes where, and how often; see `protocol.tags`.

Counts are kept with the origin of a value. What a run made is named by handles alone, so that its
counts go with it. What the owner sealed is bytes that the host may bring at any time, so its counts
are kept as long as the session.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

from enclave_runtime.protocol.tags import (
    NOWHERE,
    ORIGIN_BYTES,
    ArgumentRule,
    Rules,
    Seal,
    TagRecord,
    place_of,
)

MAX_COUNTED_SEALS = 1 << 20  # of one session, a few hundred bytes each
_CARRIED = ("", "")  # the counts of a carried state are those of all programs together


class RefusedInputError(Exception):
    """A value that its owner did not allow there, or not so often; the text goes to the peer."""


class Uses:
    """Runs on one origin under one rule.

    Attributes:
      begun: whatever became of them.
      counted: that were committed or showed something.
      shown: what identifies the inputs of those that showed something and are not committed.
    """

    __slots__ = ("begun", "counted", "shown")

    def __init__(self) -> None:
        self.begun = 0
        self.counted = 0
        self.shown: set[bytes] = set()


class Origin:
    """What made a value: one seal of the owner, or one committed run.

    Attributes:
      identifier: 16 bytes.
      uses: for a program's name and an argument's.
    """

    __slots__ = ("identifier", "uses")

    def __init__(self, identifier: bytes):
        self.identifier = identifier
        self.uses: dict[tuple[str, str], Uses] = {}

    @classmethod
    def new(cls) -> Origin:
        """The origin of what is being made."""
        return cls(os.urandom(ORIGIN_BYTES))


class Tag(NamedTuple):
    """The tag of a value that the enclave holds or was given; see `protocol.tags`."""

    place: bytes
    origin: Origin
    generation: int

    def record(self) -> TagRecord:
        """What a checkpoint keeps of it."""
        return TagRecord(self.place, self.origin.identifier, self.generation)


class _Count(NamedTuple):
    """What one run uses of one origin, and how often that is allowed."""

    uses: Uses
    rule: ArgumentRule
    runs: int

    def refuse(self, function: str, retries: int, inputs: bytes, beginning: bool) -> None:
        """Refuses a run that is one too many.

        Raises:
          RefusedInputError: it is.
        """
        uses, name = self.uses, self.rule.name
        if beginning and uses.begun >= self.runs + retries:
            raise RefusedInputError(
                f"`{name}` of `{function}`: {uses.begun} runs were begun on this value, of which "
                f"{self.runs} may count and {retries} may fail. Its owner allows more with "
                "`provision(..., retries=...)`"
            )
        if inputs in uses.shown or uses.counted < self.runs:
            return
        if uses.shown:
            raise RefusedInputError(
                f"`{name}` of `{function}`: a run on this value showed its results and was not "
                "committed. It may be repeated with the same inputs, and with no others"
            )
        if self.rule.carried:
            raise RefusedInputError(
                f"`{name}` of `{function}`: a run was committed on this value, and what it "
                "returned takes its place. Its owner allows other successors with "
                "`provision(..., allow_forks=True)`"
            )
        raise RefusedInputError(
            f"`{name}` of `{function}`: {self.runs} of the {self.runs} runs that are allowed on "
            "this value took place. Its owner allows more with `provision(..., runs_per_batch=...)`"
        )


class Claim:
    """A run's claim on what it uses."""

    def __init__(
        self,
        lock: threading.Lock,
        rules: Rules,
        counts: Sequence[_Count],
        inputs: bytes,
        generation: int,
    ):
        """Takes what `Admission.admit` found.

        Args:
          lock: over all counts.
          rules: of the program.
          counts: what the run uses that is counted.
          inputs: identifies all of its inputs.
          generation: of what it returns.
        """
        self._lock = lock
        self._rules = rules
        self._counts = counts
        self._inputs = inputs
        self._generation = generation

    def begin(self) -> None:
        """Counts the run as begun; under the lock."""
        for count in self._counts:
            count.refuse(self._rules.function, self._rules.retries, self._inputs, beginning=True)
        for count in self._counts:
            count.uses.begun += 1

    def show(self) -> None:
        """Makes the run count, before it shows the host something in the clear.

        Raises:
          RefusedInputError: another run counted meanwhile.
        """
        if self._counts:
            with self._lock:
                self._count()

    def _count(self) -> None:
        for count in self._counts:
            count.refuse(self._rules.function, self._rules.retries, self._inputs, beginning=False)
        for count in self._counts:
            if self._inputs not in count.uses.shown:
                count.uses.counted += 1
                count.uses.shown.add(self._inputs)

    def commit(self) -> list[Tag]:
        """Makes the run count, for good; returns the tags of its outputs.

        Raises:
          RefusedInputError: another run counted meanwhile.
        """
        if self._counts:
            with self._lock:
                self._count()
                for count in self._counts:
                    count.uses.shown.discard(self._inputs)
        origin = Origin.new()
        return [Tag(place_of(text), origin, self._generation) for text in self._rules.outputs]


class Admission:
    """The counts of one session."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sealed: dict[bytes, Origin] = {}  # that something was counted for

    def admit(self, rules: Rules, program: str, given: Sequence[Tag | Seal | bytes]) -> Claim:
        """Admits a run to its inputs, and counts it as begun.

        Args:
          rules: of the program.
          program: its digest.
          given: for each input the tag of what the enclave holds, the seal of what came as
            ciphertext, or the hash of what came in the clear.

        Raises:
          RefusedInputError: the rules refuse a value, or a run too many.
        """
        with self._lock:
            tags: list[Tag | None] = []
            names = hashlib.sha256(f"tempo_jax/inputs|{program}|".encode())
            for value in given:
                tag = self._tag(value)
                tags.append(tag)
                # Of equal length, so that no two rows of inputs give the same bytes.
                if tag is not None:
                    names.update(tag.place + tag.origin.identifier)
                elif isinstance(value, bytes):
                    names.update(value + bytes(16))
            for rule in rules.arguments:
                _check_places(rules.function, rule, [tags[i] for i in rule.inputs])
            _check_together(rules, tags)
            generation = 1 + max((t.generation for t in tags if t is not None), default=0)
            counts = self._counts(rules, tags)
            claim = Claim(self._lock, rules, counts, names.digest(), generation)
            claim.begin()
        return claim

    def _tag(self, value: Tag | Seal | bytes) -> Tag | None:
        if isinstance(value, Seal):
            return Tag(value.place, self._sealed.get(value.origin) or Origin(value.origin), 0)
        return value if isinstance(value, Tag) else None

    def _counts(self, rules: Rules, tags: Sequence[Tag | None]) -> list[_Count]:
        counts: dict[int, _Count] = {}
        for rule in rules.arguments:
            if rule.runs is None:
                continue
            key = _CARRIED if rule.carried else (rules.function, rule.name)
            for tag in (tags[i] for i in rule.inputs):
                if tag is not None:
                    uses = self._remembered(tag).uses.setdefault(key, Uses())
                    counts[id(uses)] = _Count(uses, rule, rule.runs)
        return list(counts.values())

    def _remembered(self, tag: Tag) -> Origin:
        """The origin of a value, kept for the session if the owner sealed it."""
        if tag.generation:
            return tag.origin
        identifier = tag.origin.identifier
        # Forgetting one would let it serve again.
        if identifier not in self._sealed and len(self._sealed) >= MAX_COUNTED_SEALS:
            raise RefusedInputError(
                f"an enclave counts the uses of {MAX_COUNTED_SEALS} sealed values: start another"
            )
        return self._sealed.setdefault(identifier, tag.origin)


def _check_places(function: str, rule: ArgumentRule, tags: Sequence[Tag | None]) -> None:
    """Holds an argument's leaves to their places and to one origin."""
    if rule.texts is None:
        return
    for tag, texts in zip(tags, rule.texts, strict=True):
        places = " or ".join(f"`{text}`" for text in texts)
        if tag is None:
            raise RefusedInputError(
                f"`{rule.name}` of `{function}` is public, and takes what its owner published with "
                f"`enclave.publish(tree, tag=...)`, tagged {places}. What the host may choose is "
                "named in `shield(..., host_chosen=...)`"
            )
        if tag.place not in map(place_of, texts):
            found = "has no tag" if tag.place == NOWHERE else "is tagged otherwise"
            raise RefusedInputError(
                f"`{rule.name}` of `{function}` takes here a value tagged {places}, and this one "
                f"{found}. Its owner says with `enclave.seal(tree, tag=...)` what a value is, and "
                "with `provision(..., tags=...)` what an argument takes"
            )
    if len({tag.origin.identifier for tag in tags if tag is not None}) > 1:
        raise RefusedInputError(
            f"the leaves of `{rule.name}` of `{function}` come from several seals or runs, and "
            "have to come from one"
        )


def _check_together(rules: Rules, tags: Sequence[Tag | None]) -> None:
    """Holds carried arguments to one run, once one of them was returned by a run."""
    carried = [
        tag
        for rule in rules.arguments
        if rule.carried and rule.texts is not None
        for tag in (tags[i] for i in rule.inputs)
        if tag is not None
    ]
    origins = {tag.origin.identifier for tag in carried}
    if len(origins) > 1 and any(tag.generation for tag in carried):
        names = ", ".join(f"`{rule.name}`" for rule in rules.arguments if rule.carried)
        raise RefusedInputError(
            f"{names} of `{rules.function}` come from several runs: what a run returned is "
            "passed on together"
        )
