"""One run of a plan in the enclave, as the host knows it: begin, bring and fetch, commit or abort.

A run owns its shared memory from begin to its end: a run that commits gives it back for the next
one, a run that fails discards it, since a device may still be writing. On a mesh every worker first
*brings* its parts of a segment's uploads, and *fetches* its parts of the downloads when all have
brought theirs (the program has a barrier between). Whoever fetches first asks the enclave to run
the segment; the others wait for that request alone, which needs none of them. So no visit ever
waits for one that has not begun, whatever threads the runtime has.

A segment that is *started* when all have brought theirs runs while the devices compute on: a thread
asks for it, behind those before it, since the enclave runs segments in their order. Who fetches its
downloads, brings what shall lie in its memory, or commits, waits for it. A segment that sends
*ahead* is started by whoever fetches the downloads of the one before, and its own are fetched with
those of the next.

On a mesh that spans processes each process brings and fetches the parts of its own devices in
memory of its own (`Lane`), and the enclave, which joins the parts, is where the processes meet. The
first begins the run, the others `join` it. The parts of a process that shares no memory with the
enclave travel with its requests for segments (`Shipment`). Untrusted.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from enclave_runtime.protocol.memory import Arena, Piece, input_bytes, sharded_axis
from enclave_runtime.protocol.program import ArrayType, Crossing
from enclave_runtime.protocol.wire import Kind, Label
from tempo_jax.errors import EnclaveError, TempoError
from tempo_jax.running import timeline, watchdog
from tempo_jax.running.observation import HostView, add_crossing
from tempo_jax.running.served import Served
from tempo_jax.sealing.array import HELD_WHOLE, PUBLISHED, handle_text, is_sealed
from tempo_jax.transport.loopback import Calls, Shipment

# Gives the contents of the inputs at some positions whole, one after another.
Contents = Callable[[Sequence[int]], contextlib.AbstractContextManager[Iterator[np.ndarray]]]

ABORT_SECONDS = 0.6  # how long an abort waits until the enclave, which may be stopped, has heard it


class HostRun:
    """A run in progress.

    Attributes:
      number: by which the enclave knows it.
      arena: its shared memory.
      handles: of its inputs that have one, by position.
      failure: why it failed, if it did; visits after that do nothing.
      failed: done when the run has been aborted.
      views: recordings that its visits fill.
    """

    def __init__(self, served: Served, views: Sequence[HostView] = ()):
        """Reserves shared memory; `begin` starts the run.

        Raises:
          SharedMemoryError: there is too little.
        """
        self.served = served
        self.views = views
        self.failure: BaseException | None = None
        self.failed: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.number = 0
        self.handles: dict[int, str] = {}
        recording = timeline.active()
        self._track = None if recording is None else recording.track(served.labels())
        self._reserved: tuple[str | None, Arena] | None = served.lines.reserve(served.memory)
        self.arena = self._reserved[1]
        self._calls = Calls()
        self._name = secrets.token_hex(8)  # by which it is aborted while its number is unknown
        self._committing = False
        self._lock = threading.Lock()
        self._brought: dict[int, set[int]] = {}
        self._first: dict[int, float] = {}  # when the first worker came to a segment
        self._segments: dict[int, concurrent.futures.Future[None]] = {}
        self._started: set[int] = set()

    def _noted(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._track is None else self._track.request(name)

    def _request(self, kind: Kind, fields: dict[str, Any], shipment: Shipment | None = None) -> Any:
        fields = {"run": self.number, **fields}
        return self.served.lines.request(kind, fields, calls=self._calls, shipment=shipment)

    # Begin

    def begin(
        self, inputs: Sequence[Any], contents: Contents | None = None
    ) -> dict[int, np.ndarray]:
        """Starts the run.

        Args:
          inputs: for each port a `SealedArray` of concrete children, or a public array.
          contents: of inputs that lie on the devices, where this process has not all of them.

        Returns:
          Device-resident inputs that the enclave blinded, by position.
        """
        served, (name, arena) = self.served, self._require_memory()
        given: list[dict[str, Any]] = []
        offsets, offset = [], 0
        for i, (port, x) in enumerate(zip(served.program.inputs, inputs, strict=True)):
            offsets.append(offset)
            offset += input_bytes(port.array)
            if is_sealed(x) and x.form not in HELD_WHOLE:
                self.handles[i] = handle_text(x.handle)
                given.append({"handle": self.handles[i]})
                continue
            content = np.asarray(x.content) if is_sealed(x) else np.asarray(x)
            place = ArrayType(content.shape, content.dtype.name)
            np.copyto(arena.view(place, offsets[-1]), content)
            published = is_sealed(x) and x.form == PUBLISHED
            given.append({"published" if published else "offset": offsets[-1]})
        # The workers of one process meet here, so that the enclave serves one.
        fields: dict[str, Any] = {"program": served.number, "name": self._name}
        fields |= {"arena": name, "workers": 1}
        if served.shares is not None:
            devices = list(served.shares.devices)
            fields |= {"workers": len(devices), "devices": devices}
            fields["sharded"] = sorted(served.shares.sharded)
        fields |= {"inputs": given, "blind_at": offsets}
        with self._noted("begin"):
            reply = served.lines.request(Kind.BEGIN, fields, calls=self._calls)
        self.number = reply["run"]
        if served.workers > 1:
            watchdog.watch(self)
        blinded = self._take(reply["download"], offsets)
        if reply["upload"]:
            contents = contents or functools.partial(_contents, inputs)
            blinded |= self._settle(contents, reply["upload"], offsets)
        return blinded

    def join(self, number: int) -> None:
        """Takes part in a run with other processes; returns when all do."""
        name, _ = self._require_memory()
        self.number = number
        watchdog.watch(self)
        if self.served.processes is not None:
            self.served.processes.came_to(number, -1)
        fields = {} if name is None else {"arena": name}
        self._request(Kind.JOIN, {"worker": self.served.process, **fields})

    def _require_memory(self) -> tuple[str | None, Arena]:
        if self._reserved is None:
            raise EnclaveError("the run is over") from self.failure
        return self._reserved

    def _settle(
        self, contents: Contents, positions: Sequence[int], offsets: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """Brings leaves that lie on the devices but are wanted inside, or under other keys."""
        moving = {str(i): offsets[i] for i in positions}
        with contents(positions) as found:
            for i, content in zip(positions, found, strict=True):
                port = self.served.program.inputs[i]
                np.copyto(self.arena.view(port.array, offsets[i]), content)
        reply = self._request(Kind.SETTLE, {"offsets": moving, "blind_at": moving})
        return self._take(reply["download"], offsets)

    def _take(self, positions: Sequence[int], offsets: Sequence[int]) -> dict[int, np.ndarray]:
        inputs = self.served.program.inputs
        return {i: self.arena.view(inputs[i].array, offsets[i]).copy() for i in positions}

    # Visits

    def _part(
        self, crossing: Crossing, piece: Piece | None, worker: int
    ) -> tuple[np.ndarray, bool]:
        """A worker's part of a crossing in shared memory, and whether it is split at all.

        Args:
          crossing: what crosses.
          piece: this process's part of it, where the mesh spans processes.
          worker: a device's place in the mesh.
        """
        own = self.served.own
        if piece is None:
            view = self.arena.view(crossing.blinded, crossing.offset)
            axis = sharded_axis(crossing.layout, self.served.sharded, self.served.apart)
        else:
            view, axis = self.arena.view(piece.array, piece.offset), piece.axis
        if axis is None:
            return view, False
        size = view.shape[axis] // len(own)
        first = (worker - own.start) * size
        return view[(slice(None),) * axis + (slice(first, first + size),)], True

    def bring(self, worker: int, index: int, uploads: Sequence[np.ndarray]) -> None:
        """Lays one worker's parts of a segment's uploads into shared memory."""
        with self._lock:
            if index in self._started:
                return  # repeated by JAX; the memory may be in use for a later one
            earlier = [(i, done) for i, done in self._segments.items() if i < index]
        segments = self.served.program.segments
        for i, done in earlier:
            alike = bool(segments[i].downloads) == bool(segments[index].downloads)
            if segments[i].uploads and alike:
                done.result()  # its uploads lie in the same memory, see `ProgramWriter`
        crossings, lane = segments[index].uploads, self.served.lane
        pieces = [None] * len(crossings) if lane is None else lane.uploads[index]
        start = time.perf_counter()
        for crossing, piece, array in zip(crossings, pieces, uploads, strict=True):
            if lane is not None and piece is None:
                continue  # whole, and another process's to bring
            part, split = self._part(crossing, piece, worker)
            if split or worker == 0:
                np.copyto(part, array)
                self.served.traffic.up += part.nbytes
        if self._track is not None:
            self._track.brought(worker, index, start)
        with self._lock:
            self._first.setdefault(index, time.monotonic())
            self._brought.setdefault(index, set()).add(worker)
            all_came = len(self._brought[index]) == len(self.served.own)
        if all_came and self.served.processes is not None:
            self.served.processes.came_to(self.number, index)

    def late(self, seconds: float) -> tuple[int, list[int]] | None:
        """The segment that some workers have waited at for so long, and who has not come."""
        everyone = set(self.served.own)
        with self._lock:
            for index, first in self._first.items():
                missing = everyone - self._brought[index]
                if missing and time.monotonic() - first > seconds:
                    return index, sorted(missing)
        return None

    def lost(self) -> BaseException | None:
        """What befell the processes that take part, if any of them is lost."""
        processes = self.served.processes
        # One that has committed may go, and the others have only to hear that they have.
        if processes is None or (self._committing and not processes.broken):
            return None
        return processes.failure

    def fetch(self, worker: int, index: int) -> list[np.ndarray]:
        """One worker's parts of a segment's downloads; the first to ask has the segment run.

        Behind what was sent ahead of it.
        """
        asked = time.perf_counter()
        self._run_once(index)
        ahead = self.served.ahead(index)
        if ahead is not None:
            self._start(ahead)
        traffic, first = self.served.traffic, worker == self.served.own.start
        downloads, start = [], time.perf_counter()
        for crossing, piece in self._fetched(index):
            part, split = self._part(crossing, piece, worker)
            downloads.append(part if self.served.lends else part.copy())
            if split or first:
                traffic.down += part.nbytes
        if self._track is not None:
            self._track.fetched(worker, index, asked, start)
        return downloads

    def _fetched(self, index: int) -> Iterator[tuple[Crossing, Piece | None]]:
        """What is fetched with a segment, and this process's parts of it."""
        lane = self.served.lane
        for i in self.served.fetched[index]:
            crossings = self.served.program.segments[i].downloads
            pieces = [None] * len(crossings) if lane is None else lane.downloads[i]
            yield from zip(crossings, pieces, strict=True)

    def start(self, worker: int, index: int) -> None:
        """Has the enclave run a segment if all workers here have brought theirs."""
        if self._track is not None:
            self._track.goes_on(worker)
        with self._lock:
            complete = len(self._brought.get(index, ())) == len(self.served.own)
        if complete:
            self._start(index)

    def _start(self, index: int) -> None:
        """Has the enclave run a segment, once, and does not wait for it."""
        with self._lock:
            if index in self._started:
                return
            self._started.add(index)
            self._segments[index] = concurrent.futures.Future()

        def work() -> None:
            with contextlib.suppress(BaseException):  # whoever waits for the segment hears of it
                self._ask(index)

        threading.Thread(target=work, name="tempo_jax segment", daemon=True).start()

    def _run_once(self, index: int) -> None:
        """Has the enclave run a segment, unless a worker did or is about to."""
        with self._lock:
            # A single worker that comes again was repeated by JAX; the enclave compares what it
            # brings. On a mesh the others may have gone on, and so may one that started it.
            alone = len(self.served.own) == 1 and index not in self._started
            # What alone went ahead since has left its downloads as they are, and the enclave would
            # not repeat what came before it.
            ahead = self.served.ahead(index)
            alone = alone and not (ahead in self._started and ahead == max(self._segments))
            first = alone or index not in self._segments
            if first:
                self._segments[index] = concurrent.futures.Future()
            done = self._segments[index]
        if first:
            self._ask(index)
        else:
            done.result()

    def _ask(self, index: int) -> None:
        """Asks the enclave for a segment, when those before it have run."""
        with self._lock:
            done = self._segments[index]
            before = [earlier for i, earlier in self._segments.items() if i < index]
        try:
            for earlier in before:
                earlier.result()
            fields: dict[str, Any] = {"segment": index, "worker": self.served.process}
            shipment = self._shipment(index)
            if shipment is not None:
                fields["carried"] = shipment.up_bytes
            if self._track is None:
                self._request(Kind.SEGMENT, fields, shipment)
            else:
                start = time.perf_counter()
                reply = self._request(Kind.SEGMENT, fields | {"timed": 1}, shipment)
                self._track.ran(index, start, reply["seconds"])
            self.served.traffic.round_trips += 1
            if shipment is not None:
                self.served.traffic.count(shipment)
            self._show(index)
        except BaseException as error:
            done.set_exception(error)
            raise
        done.set_result(None)

    def _show(self, index: int) -> None:
        """Records what crossed for a segment."""
        segment = self.served.program.segments[index]
        for view in self.views:
            for c in (*segment.uploads, *segment.downloads):
                array = self.arena.view(c.blinded, c.offset).copy()
                add_crossing(view, array, self.served.pools if c.layout.keyed else 1)

    def _shipment(self, index: int) -> Shipment | None:
        """This process's parts of a segment, if they have to travel."""
        lane = self.served.lane
        if lane is None or not self.served.lines.carries:
            return None
        up = [self.arena.view(p.array, p.offset) for p in lane.uploads[index] if p is not None]
        down = [self.arena.view(p.array, p.offset) for p in lane.downloads[index]]
        return Shipment(Label(self.number, index, self.served.process), up, down)

    # The end

    def commit(self, donated: Sequence[int]) -> list[str]:
        """Keeps the outputs and returns their handles; the shared memory serves the next run.

        Of several processes all commit, and all but the first get no handles.
        """
        for done in list(self._segments.values()):
            done.result()
        self._committing = True
        with self._noted("commit"):
            fields = {"donate": list(donated), "worker": self.served.process}
            reply = self._request(Kind.COMMIT, fields)
        if self._track is not None:
            self._track.ended()
        watchdog.unwatch(self)
        self.served.traffic.runs += 1
        with self._lock:
            reserved, self._reserved = self._reserved, None
        if reserved is not None:
            self.served.lines.give_back(reserved)
        if self.served.expectation is not None and "busy_seconds" in reply:
            self.served.expectation.ran(reply["busy_seconds"])
        return reply["handles"]

    def abort(self, failure: BaseException) -> None:
        """Ends the run at once, whatever the enclave is doing; nothing is committed.

        Visits that wait for the enclave are woken. The shared memory is not used again: a worker
        may be writing to it. An enclave that does not hear of it soon is told in the background.
        """
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
            reserved, self._reserved = self._reserved, None
        watchdog.unwatch(self)
        self._calls.cancel()
        try:
            args = (reserved,)
            telling = threading.Thread(target=self._tell_of_abort, args=args, daemon=True)
            telling.start()
            telling.join(ABORT_SECONDS)
        finally:
            self.failed.set_result(None)

    def _tell_of_abort(self, reserved: tuple[str | None, Arena] | None) -> None:
        """Tells the enclave until it has heard: a run left open keeps its values and its place."""
        lines = self.served.lines
        with contextlib.suppress(TempoError):
            lines.insist(Kind.ABORT, {"run": self.number} if self.number else {"name": self._name})
        if reserved is not None:
            lines.discard(reserved)


@contextlib.contextmanager
def _contents(inputs: Sequence[Any], positions: Sequence[int]) -> Iterator[Iterator[np.ndarray]]:
    yield (np.asarray(inputs[i].content) for i in positions)
