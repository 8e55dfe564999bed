"""Moments of a training run, and a fuse that does something at one of them."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

STEP, CHECKPOINT = "step", "checkpoint"  # the two parts in which a fault strikes
PHASES = tuple(i / 6 for i in range(7))


class Moment(NamedTuple):
    """When a fault strikes.

    Attributes:
      part: `STEP` or `CHECKPOINT`.
      call: which of the watched calls in that part, from 0.
      phase: 0 before the call, 1 after it, between them that share of its usual time later.
    """

    part: str
    call: int
    phase: float


class Fuse:
    """Watches calls and does something at one moment.

    Attributes:
      durations: seconds of each watched call in each part, from when nothing was armed.
      burnt: whether the moment came.
    """

    def __init__(self) -> None:
        self.durations: dict[str, list[float]] = {STEP: [], CHECKPOINT: []}
        self.burnt = False
        self._armed: tuple[Moment, Callable[[], None]] | None = None
        self._part = ""
        self._call = 0

    def arm(self, moment: Moment, action: Callable[[], None]) -> None:
        """Sets what to do when; once."""
        self._armed, self.burnt = (moment, action), False

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Counts calls anew for a part of the training run."""
        self._part, self._call = part, 0
        if self._armed is None and not self.burnt:
            self.durations[part] = []
        yield
        self._part = ""

    def _strike(self, delay: float) -> None:
        assert self._armed is not None
        action, self._armed, self.burnt = self._armed[1], None, True
        if delay:
            threading.Timer(delay, action).start()
        else:
            action()

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            call, self._call = self._call, self._call + 1
            due = None
            if self._armed is not None and self._armed[0][:2] == (self._part, call):
                due = self._armed[0].phase
            if due is not None and due < 1:
                self._strike(due * self.durations[self._part][call])
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if due == 1:
                    self._strike(0)
                elif self._part and self._armed is None and not self.burnt:
                    self.durations[self._part].append(time.perf_counter() - started)

        return watched


def moments(fuse: Fuse, part: str, count: int) -> list[Moment]:
    """`count` moments spread evenly over the watched calls of a part; one lies in the middle."""
    calls = len(fuse.durations[part])
    every = [Moment(part, call, phase) for call in range(calls) for phase in PHASES]
    if count == 1:
        return [every[len(every) // 2]]
    chosen = np.unique(np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int))
    return [every[i] for i in chosen]
