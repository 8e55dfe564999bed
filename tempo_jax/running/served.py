"""A program that the enclave has, as its runs on the host share it: lines, layout, what crossed.

Untrusted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from enclave_runtime.protocol.memory import Lane, Shares
from enclave_runtime.protocol.program import ArrayType, Crossing, Program
from tempo_jax.enclave.processes import Processes
from tempo_jax.planning.mesh import local_shape
from tempo_jax.running.expectation import Expectation
from tempo_jax.transport.loopback import Loopback, Shipment


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

    @functools.cached_property
    def fetched(self) -> dict[int, tuple[int, ...]]:
        """See `fetched_together`."""
        return fetched_together(self.program)

    def ahead(self, index: int) -> int | None:
        """The segment that the enclave runs when a segment's downloads are fetched, if any does."""
        segments = self.program.segments
        following = (i for i in range(index + 1, len(segments)) if segments[i].downloads)
        then = next(following, None)
        return then if then in self.program.ahead else None

    def poison(self, index: int) -> list[np.ndarray]:
        """What a worker gets of a segment's downloads when the run has failed."""
        segments = (self.program.segments[i] for i in self.fetched[index])
        return [_poison(self.local(c)) for s in segments for c in s.downloads]


def fetched_together(program: Program) -> dict[int, tuple[int, ...]]:
    """For each segment that is waited for, whose downloads are fetched with its own: in order.

    Those that went ahead of it, and itself.
    """
    found, waiting = {}, ()
    for index in range(len(program.segments)):
        waiting = (*waiting, index)
        if index not in program.ahead:
            found[index], waiting = waiting, ()
    return found


def _poison(array: ArrayType) -> np.ndarray:
    dtype = np.dtype(array.dtype)
    floating = jnp.issubdtype(dtype, jnp.floating)
    return np.full(array.shape, np.nan if floating else 0, dtype)
