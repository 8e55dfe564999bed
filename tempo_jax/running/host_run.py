"""One run of a plan in the enclave, as the host knows it: begin, bring and fetch, commit or abort.

A run owns its shared memory from begin to its end: a run that commits gives it back for the next
one, a run that fails discards it, since a device may still be writing. On a mesh every worker first
*brings* its parts of a segment's uploads, and *fetches* its parts of the downloads when all have
brought theirs (the program has a barrier between). Whoever fetches first asks the enclave to run
the segment; the others wait for that request alone, which needs none of them. So no visit ever
waits for one that has not begun, whatever threads the runtime has.

On a mesh that spans processes each process brings and fetches the parts of its own devices in
memory of its own (`Lane`), and the enclave, which joins the parts, is where the processes meet. The
first begins the run, the others `join` it. The parts of a process that shares no memory with the
enclave travel with its requests for segments (`Shipment`). Untrusted.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from enclave_runtime.protocol.memory import Arena, Lane, Piece, Shares, input_bytes, sharded_axis
from enclave_runtime.protocol.program import ArrayType, Crossing, Program
from enclave_runtime.protocol.wire import Kind, Label
from tempo_jax.enclave.processes import Processes
from tempo_jax.errors import EnclaveError, TempoError
from tempo_jax.planning.mesh import local_shape
from tempo_jax.running import timeline, watchdog
from tempo_jax.running.expectation import Expectation
from tempo_jax.running.observation import HostView, add_crossing
from tempo_jax.sealing.array import HELD_WHOLE, PUBLISHED, handle_text, is_sealed
from tempo_jax.transport.loopback import Calls, Loopback, Shipment

ABORT_SECONDS = 0.3  # what an enclave that may be stopped gets to hear of an abort


@dataclasses.dataclass
class Traffic:
    """Tensor bytes that crossed since the plan was made.

    Attributes:
      up: bytes from the host to the enclave.
      down: bytes from the enclave to the host.
      round_trips: visits to the enclave.
      runs: committed runs.
      sent: of the bytes up, those that travelled over TCP; with their headers.
      received: of the bytes down, likewise.
      sending_seconds: that they took: until the system had accepted the last of a visit's.
      receiving_seconds: from a visit's first to its last.
    """

    up: int = 0
    down: int = 0
    round_trips: int = 0
    runs: int = 0
    sent: int = 0
    received: int = 0
    sending_seconds: float = 0.0
    receiving_seconds: float = 0.0

    def count(self, shipment: Shipment) -> None:
        """Adds what travelled in one visit."""
        self.sent += shipment.up_bytes
        self.received += shipment.down_bytes
        self.sending_seconds += shipment.up_seconds
        self.receiving_seconds += shipment.down_seconds

    @property
    def rates(self) -> tuple[float, float]:
        """Bytes a second that travelled up and down while any did; NaN where none did."""
        up = self.sent / self.sending_seconds if self.sending_seconds else math.nan
        down = self.received / self.receiving_seconds if self.receiving_seconds else math.nan
        return up, down


@dataclasses.dataclass(frozen=True)
class Served:
    """A program that the enclave has, and how its crossings are spread over the host's workers.

    Attributes:
      lines: to the enclave.
      program: what it was told.
      number: by which it knows the program.
      sharded: key classes that are split over the workers.
      pools: into how many pools' parts blinded values fall; on a mesh each worker has one's.
      workers: devices of the mesh, 1 without one.
      lends: whether results may be views of shared memory: the CPU backend copies them before the
        run goes on, others may not.
      labels: for each segment, the layers whose products the devices compute after it.
      shares: how the mesh is shared out among processes, where it spans several.
      processes: those.
      expectation: hears of each run how long it took the enclave.
      traffic: what its runs carried.
    """

    lines: Loopback
    program: Program
    number: int
    sharded: frozenset[int]
    workers: int
    lends: bool
    labels: Callable[[], Sequence[str]]
    pools: int = 1
    shares: Shares | None = None
    processes: Processes | None = None
    expectation: Expectation | None = None
    traffic: Traffic = dataclasses.field(default_factory=Traffic)

    @property
    def process(self) -> int:
        """This process's place among them."""
        return 0 if self.processes is None else self.processes.index

    @functools.cached_property
    def lane(self) -> Lane | None:
        """Where this process's parts lie; None where the mesh is one process's."""
        if self.shares is None:
            return None
        return Lane(self.program, self.shares, self.process)

    @functools.cached_property
    def own(self) -> range:
        """The workers that are this process's."""
        if self.shares is None:
            return range(self.workers)
        first = sum(self.shares.devices[: self.process])
        return range(first, first + self.shares.devices[self.process])

    @property
    def memory(self) -> int:
        """Bytes of shared memory that a run needs here."""
        if self.lane is None:
            return self.program.arena_bytes
        # Inputs and constants go through the first process's.
        return max(self.lane.size, 0 if self.process else self.program.arena_bytes)

    @property
    def apart(self) -> int:
        """Pools that the workers are, 1 without a mesh."""
        return self.pools if self.workers > 1 else 1

    def local(self, crossing: Crossing) -> ArrayType:
        """The type of one worker's part of a crossing."""
        array = crossing.blinded
        shape = local_shape(array.shape, crossing.layout, self.sharded, self.workers, self.apart)
        return ArrayType(shape, array.dtype)

    def poison(self, index: int) -> list[np.ndarray]:
        """What a worker gets of a segment's downloads when the run has failed."""
        return [_poison(self.local(c)) for c in self.program.segments[index].downloads]


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
        self._committing = False
        self._lock = threading.Lock()
        self._brought: dict[int, set[int]] = {}
        self._first: dict[int, float] = {}  # when the first worker came to a segment
        self._segments: dict[int, concurrent.futures.Future[None]] = {}

    def _noted(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._track is None else self._track.request(name)

    def _request(self, kind: Kind, fields: dict[str, Any], shipment: Shipment | None = None) -> Any:
        fields = {"run": self.number, **fields}
        return self.served.lines.request(kind, fields, calls=self._calls, shipment=shipment)

    # Begin

    def begin(self, inputs: Sequence[Any]) -> dict[int, np.ndarray]:
        """Starts the run.

        Args:
          inputs: for each port a `SealedArray` of concrete children, or a public array.

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
        fields: dict[str, Any] = {"program": served.number, "arena": name, "workers": 1}
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
            blinded |= self._settle(inputs, reply["upload"], offsets)
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
        self, inputs: Sequence[Any], positions: Sequence[int], offsets: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """Brings leaves that lie on the devices but are wanted inside, or under other keys."""
        moving = {str(i): offsets[i] for i in positions}
        for i in positions:
            port = self.served.program.inputs[i]
            np.copyto(self.arena.view(port.array, offsets[i]), np.asarray(inputs[i].content))
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
        crossings, lane = self.served.program.segments[index].uploads, self.served.lane
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
        """One worker's parts of a segment's downloads; the first to ask has the segment run."""
        self._run_once(index)
        segment, traffic = self.served.program.segments[index], self.served.traffic
        lane, first = self.served.lane, worker == self.served.own.start
        pieces = [None] * len(segment.downloads) if lane is None else lane.downloads[index]
        downloads, start = [], time.perf_counter()
        for crossing, piece in zip(segment.downloads, pieces, strict=True):
            part, split = self._part(crossing, piece, worker)
            downloads.append(part if self.served.lends else part.copy())
            if split or first:
                traffic.down += part.nbytes
        if self._track is not None:
            self._track.fetched(worker, index, start)
        if first:
            traffic.round_trips += 1
            for view in self.views:
                for c in (*segment.uploads, *segment.downloads):
                    array = self.arena.view(c.blinded, c.offset).copy()
                    add_crossing(view, array, self.served.pools if c.layout.keyed else 1)
        return downloads

    def _run_once(self, index: int) -> None:
        """Has the enclave run a segment, unless a worker did or is about to."""
        with self._lock:
            alone = len(self.served.own) == 1
            # A single worker that comes again was repeated by JAX; the enclave compares what it
            # brings. On a mesh the others may have gone on.
            first = alone or index not in self._segments
            if first:
                self._segments[index] = concurrent.futures.Future()
            done = self._segments[index]
        if not first:
            done.result()
            return
        try:
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
            if shipment is not None:
                self.served.traffic.count(shipment)
        except BaseException as error:
            done.set_exception(error)
            raise
        done.set_result(None)

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
        may be writing to it.
        """
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
            reserved, self._reserved = self._reserved, None
        watchdog.unwatch(self)
        self._calls.cancel()
        lines = self.served.lines
        with contextlib.suppress(TempoError):
            if self.number:
                lines.request(Kind.ABORT, {"run": self.number}, seconds=ABORT_SECONDS)
        if reserved is not None:
            lines.discard(reserved, seconds=ABORT_SECONDS)
        self.failed.set_result(None)


def _poison(array: ArrayType) -> np.ndarray:
    dtype = np.dtype(array.dtype)
    floating = jnp.issubdtype(dtype, jnp.floating)
    return np.full(array.shape, np.nan if floating else 0, dtype)
