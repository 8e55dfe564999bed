"""One run of a provisioned program: begin → segment 0 … n → commit.

Each segment runs once and in order, when every worker has brought its part. A worker
may ask again for the segment that just ran and gets the same answer if it brings the
same bytes; with other bytes, never. Nothing is kept until the commit, so a failed or
aborted run leaves the last committed state as it was. Every run draws its ephemeral
keys anew.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import jax
import numpy as np

from enclave_runtime.executor import Executor
from enclave_runtime.keys import KeySchedule
from enclave_runtime.memory import Arena
from enclave_runtime.program import DEVICE, ENCLAVE, ArrayType, Crossing, Port, Program
from enclave_runtime.schemes import SCHEMES
from enclave_runtime.store import Blinded, Resident, Store


class RunError(Exception):
    """A request that does not fit the run's state."""


class ClassKeys:
    """The keys of a program's classes in one run: carried over by blinded inputs, else fresh."""

    def __init__(self, program: Program, schedule: KeySchedule, number: int):
        self._program = program
        self._schedule = schedule
        self._number = number
        self._scheme = SCHEMES[program.scheme]
        self._keys: dict[int, Any] = {}

    def adopt(self, port: Port, entry: Blinded) -> bool:
        """Takes over the keys under which a device-resident input lies.

        Returns:
          Whether they agree with the keys taken over before and with the port's layout; if
          not, nothing changed and the array has to be blinded again.
        """
        if entry.scheme != self._program.scheme or entry.layout.weights != port.layout.weights:
            return False
        taken: dict[int, Any] = {}
        for number, held in zip(port.layout.classes, entry.layout.classes, strict=True):
            if (number is None) != (held is None):
                return False
            if number is None or held is None:
                continue
            key = entry.keys[held]
            if (key.signs is not None) != self._program.classes[number].signed:
                return False
            known = taken.get(number, self._keys.get(number, key))
            if known is not key:
                return False
            taken[number] = key
        self._keys.update(taken)
        return True

    def __getitem__(self, number: int) -> Any:
        if number not in self._keys:
            stream = self._schedule.stream("class", self._number, number)
            self._keys[number] = self._scheme.draw(self._program.classes[number], stream)
        return self._keys[number]

    def of(self, layout: Any) -> dict[int, Any]:
        """The keys of a layout's classes."""
        return {c: self[c] for c in layout.classes if c is not None}


class Run:
    """The state of one run. Its methods are called under the session's order, see `Session`."""

    def __init__(
        self,
        program: Program,
        constants: dict[int, jax.Array],
        arena: Arena,
        workers: int,
        number: int,
        schedule: KeySchedule,
        executor: Executor,
    ):
        self.program = program
        self.arena = arena
        self.keys = ClassKeys(program, schedule, number)
        self.handles: list[str | None] = [None] * len(program.inputs)
        self.awaiting: set[int] = set()  # inputs that the host still has to bring
        self.busy_seconds = 0.0
        self._values = dict(constants)
        self._workers = workers
        self._executor = executor
        self._scheme = SCHEMES[program.scheme]
        self._next = 0
        self._arrived: set[int] = set()
        self._last_uploads: list[jax.Array] = []
        self._doomed: list[int] = []
        self._failure: BaseException | None = None
        self._condition = threading.Condition()

    # Crossings

    def blind(self, value: jax.Array, array: ArrayType, layout: Any, offset: int) -> None:
        """Writes a value, blinded, to the arena."""
        if layout.keyed:
            value = self._scheme.blind(value, layout, self.keys.of(layout))
        np.copyto(self.arena.view(array, offset), np.asarray(value))

    def unblind(self, array: ArrayType, layout: Any, offset: int, keys: dict[int, Any]):
        """Reads a blinded value from the arena into private memory."""
        return self._scheme.unblind(self.arena.view(array, offset), layout, keys)

    def set(self, port: Port, value: jax.Array) -> None:
        """Gives the run one of its inputs."""
        self._values[port.value] = value

    def settle(self, index: int) -> None:
        """Notes that the host brings an input now.

        Raises:
          RunError: it was not asked for, or was brought before: blinding other bytes under the
            same keys would give the host chosen plaintexts.
        """
        if index not in self.awaiting:
            raise RunError(f"input {index} is not awaited")
        self.awaiting.remove(index)

    # The state machine

    def fail(self, failure: BaseException) -> None:
        """Ends the run; everyone who waits for it gets `failure`."""
        with self._condition:
            self._failure = self._failure or failure
            self._condition.notify_all()

    def segment(self, index: int, worker: int) -> None:
        """Brings one worker's part of a segment; returns when the segment has run.

        Raises:
          RunError: out of order, an unknown worker, or a repeat with other bytes.
        """
        with self._condition:
            self._raise_failure()
            if self.awaiting:
                raise RunError(f"the run still awaits {len(self.awaiting)} of its inputs")
            if not 0 <= worker < self._workers:
                raise RunError(f"worker {worker} of a run with {self._workers}")
            if index == self._next - 1:
                self._repeat(index)
                return
            if index != self._next or worker in self._arrived:
                raise RunError(f"segment {index} was asked for, segment {self._next} is next")
            self._arrived.add(worker)
            if len(self._arrived) < self._workers:
                self._condition.wait_for(lambda: self._next > index or self._failure)
                self._raise_failure()
                return
            try:
                self._execute(index)
            except BaseException as error:
                self._failure = error
                raise
            finally:
                self._arrived = set()
                self._next = index + 1
                self._condition.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RunError("the run has failed or was aborted") from self._failure

    def _uploads(self, index: int) -> list[jax.Array]:
        return [
            self.unblind(c.array, c.layout, c.offset, self.keys.of(c.layout))
            for c in self.program.segments[index].uploads
        ]

    def _downloads(self, crossings: tuple[Crossing, ...]) -> None:
        for c in crossings:
            self.blind(self._values[c.value], c.array, c.layout, c.offset)

    def _execute(self, index: int) -> None:
        start = time.perf_counter()
        segment = self.program.segments[index]
        for value in self._doomed:
            del self._values[value]
        self._last_uploads = self._uploads(index)
        self._values.update(
            zip((c.value for c in segment.uploads), self._last_uploads, strict=True)
        )
        inputs = [self._values[v] for v in segment.inputs]
        outputs = self._executor.run(segment.executable, inputs)
        self._values.update(zip(segment.outputs, outputs, strict=True))
        self._downloads(segment.downloads)
        # The host may now overwrite the arena, so nothing may still be reading from it.
        jax.block_until_ready(self._last_uploads)
        self._doomed = [v for v in segment.dead if v in self._values]
        self.busy_seconds += time.perf_counter() - start

    def _repeat(self, index: int) -> None:
        for old, new in zip(self._last_uploads, self._uploads(index), strict=True):
            if np.asarray(old).tobytes() != np.asarray(new).tobytes():
                raise RunError(f"segment {index} was asked for again with other bytes")
        self._downloads(self.program.segments[index].downloads)

    def commit(self, store: Store) -> list[str]:
        """Keeps the outputs and returns their handles.

        Raises:
          RunError: not every segment has run.
        """
        with self._condition:
            self._raise_failure()
            if self._next != len(self.program.segments):
                raise RunError(
                    f"commit after {self._next} of {len(self.program.segments)} segments"
                )
            self._failure = RunError("the run was committed")
            return [store.put(self._output(port)) for port in self.program.outputs]

    def _output(self, port: Port) -> Resident | Blinded:
        if port.place == DEVICE:
            keys = self.keys.of(port.layout)
            return Blinded(port.array, self.program.scheme, port.layout, keys)
        assert port.place == ENCLAVE
        return Resident(port.array, self._values[port.value])
