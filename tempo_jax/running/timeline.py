"""A timeline of shielded calls: what enclave, transfers and devices do when, as a Chrome trace.

The enclave says how long unblinding, computing and blinding took; everything else is what the host
sees of itself. Untrusted.

References:
  Trace Event Format, complete events, which Perfetto and `chrome://tracing` read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tempo_jax.errors import UnsupportedError

_CALLS, _ENCLAVE, _TRANSFER, _DEVICE = 0, 1, 2, 3  # rows; further devices follow
_PARTS = ("unblind", "compute", "blind")


class Timeline:
    """A recording; `profile` makes one."""

    def __init__(self) -> None:
        self._origin = time.perf_counter()
        self._events: list[dict[str, Any]] = []
        self._rows = {_CALLS: "calls", _ENCLAVE: "enclave", _TRANSFER: "transfer"}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def track(self, labels: Sequence[str]) -> Track:
        """Where one call is recorded.

        Args:
          labels: for each segment the layers whose products devices compute after it.
        """
        return Track(self, next(self._numbers), labels)

    def add(self, row: int, name: str, start: float, end: float, **details: Any) -> None:
        """Notes that something took from `start` to `end`, by `time.perf_counter`."""
        with self._lock:
            if row >= _DEVICE:
                self._rows[row] = f"device {row - _DEVICE}"
            self._events.append(
                {
                    "ph": "X",
                    "name": name,
                    "ts": 1e6 * (start - self._origin),
                    "dur": 1e6 * max(end - start, 0.0),
                    "pid": 0,
                    "tid": row,
                    "args": details,
                }
            )

    def to_json(self) -> str:
        """The recording in Chrome's trace format; times are microseconds."""
        named = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "tempo_jax"}}]
        with self._lock:
            for row, name in sorted(self._rows.items()):
                about = {"ph": "M", "pid": 0, "tid": row}
                named.append(about | {"name": "thread_name", "args": {"name": name}})
                named.append(about | {"name": "thread_sort_index", "args": {"sort_index": row}})
            return json.dumps({"traceEvents": named + self._events, "displayTimeUnit": "ms"})


class Track:
    """The recording of one call."""

    def __init__(self, timeline: Timeline, number: int, labels: Sequence[str]):
        """Begins; `Timeline.track` makes one."""
        self._timeline = timeline
        self._number = number
        self._labels = labels
        self._start = time.perf_counter()
        self._left: dict[int, tuple[float, int]] = {}  # when a worker went on, and after what
        self._after: dict[int, int] = {}  # whose downloads it fetched last
        self._came: dict[int, float] = {}  # when it came back

    def _label(self, index: int) -> str:
        return self._labels[index] if 0 <= index < len(self._labels) else ""

    def _add(self, row: int, name: str, start: float, end: float, index: int) -> None:
        details = {"call": self._number, "segment": index, "layers": self._label(index)}
        self._timeline.add(row, name, start, end, **details)

    @contextlib.contextmanager
    def request(self, name: str) -> Iterator[None]:
        """Notes a request other than for a segment: the enclave begins or commits."""
        start = time.perf_counter()
        yield
        self._timeline.add(_ENCLAVE, name, start, time.perf_counter(), call=self._number)

    def brought(self, worker: int, index: int, start: float) -> None:
        """A worker has laid a segment's uploads into shared memory since `start`."""
        self._computed(worker, start)
        self._came[worker] = time.perf_counter()
        self._add(_TRANSFER, "up", start, self._came[worker], index)

    def goes_on(self, worker: int) -> None:
        """A worker that has brought something does not wait for the enclave yet."""
        self._left[worker] = time.perf_counter(), self._after.get(worker, -1)

    def _computed(self, worker: int, end: float) -> None:
        """A worker's device has computed until `end`, if the worker went on."""
        left, after = self._left.pop(worker, (end, -1))
        name = self._label(after)
        if name and left < end:
            self._add(_DEVICE + worker, name, left, end, after)

    def ran(self, index: int, start: float, seconds: Sequence[float]) -> None:
        """The enclave has run a segment, asked at `start`, in parts of so many seconds."""
        end = time.perf_counter()
        # What of the request was no work of the enclave's is the way there and back.
        at = end - sum(seconds)
        if at > start:
            self._add(_ENCLAVE, "waiting", start, at, index)
        label = self._label(index)
        for part, length in zip(_PARTS, seconds, strict=False):
            name = f"{part} for {label}" if label else part
            self._add(_ENCLAVE, name, at, at + length, index)
            at += length

    def fetched(self, worker: int, index: int, asked: float, start: float) -> None:
        """A worker that came at `asked` has taken a segment's downloads since `start`."""
        end = time.perf_counter()
        went_on = worker in self._left
        self._computed(worker, asked)
        self._left[worker], self._after[worker] = (end, index), index
        came = asked if went_on else self._came.get(worker, start)
        self._add(_DEVICE + worker, "waiting for the enclave", came, start, index)
        self._add(_TRANSFER, "down", start, end, index)

    def ended(self) -> None:
        """The call has committed."""
        end = time.perf_counter()
        self._timeline.add(_CALLS, f"call {self._number}", self._start, end, call=self._number)


_active: Timeline | None = None
_lock = threading.Lock()


def active() -> Timeline | None:
    """The recording that is going on, if any."""
    return _active


@contextlib.contextmanager
def profile(path: str | os.PathLike[str]) -> Iterator[Timeline]:
    """Records what enclave, transfers and devices do in shielded calls, and writes a timeline.

    Open the file at https://ui.perfetto.dev or in `chrome://tracing`. Rows are the calls, the
    enclave (unblind, compute, blind, waiting), transfers through shared memory, and each device
    with the layers that it computes. While it records, the enclave finishes each part of its work
    before the next, which costs a little. The first call of a signature compiles before it runs,
    so record one that comes later.

    Args:
      path: of the file, written when the context ends, however it does.

    Raises:
      UnsupportedError: another recording is going on in this process.

    Example:
      >>> import tempfile, tempo_jax as tempo
      >>> with tempo.Enclave.launch() as enclave, tempfile.TemporaryDirectory() as folder:
      ...     double = tempo.shield(lambda x: tempo.reveal(2 * x), enclave=enclave)
      ...     with tempo.profile(f"{folder}/trace.json"):
      ...         float(double(3.0))
      6.0
    """
    global _active
    with _lock:
        if _active is not None:
            raise UnsupportedError("profile: this process is recording already; end that first")
        _active = timeline = Timeline()
    try:
        yield timeline
    finally:
        _active = None
        with open(path, "w", encoding="utf-8") as file:
            file.write(timeline.to_json())
