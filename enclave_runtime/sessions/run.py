"""One run of a provisioned program: begin → segment 0 … n → commit.

Each segment runs once and in order, when every worker has brought its part. A worker
may ask again for the segment that just ran and gets the same answer if it brings the
same bytes; with other bytes, never. Nothing is kept until the commit, so a failed or
aborted run leaves the last committed state as it was. Every run draws its ephemeral
keys anew.

The host may ask for a segment while its devices are still at products of a later one, which is how
the two work at the same time. That gives it no choice: the program says what a segment takes, and
what is sent depends on nothing that comes later.

Where the workers are processes with memory of their own (`lanes`), each brings its parts, which are
joined, and gets its parts; and the run is committed when all of them have asked for it, so that
none goes on with what another lost.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.crypto.encryption import DecryptionError, authenticate, check_authentic
from enclave_runtime.crypto.keys import KeySchedule, KeyStream
from enclave_runtime.execution.executor import Executables
from enclave_runtime.protocol.memory import Arena
from enclave_runtime.protocol.program import DEVICE, ENCLAVE, Crossing, Layout, Port, Program
from enclave_runtime.schemes import Scheme
from enclave_runtime.schemes.contract import UnblindingError
from enclave_runtime.sessions.admission import Claim, Tag
from enclave_runtime.sessions.cargo import Cargo
from enclave_runtime.sessions.lanes import Lanes
from enclave_runtime.sessions.store import Blinded, KeyUses, Resident, Store
from enclave_runtime.verifying.checksum import NotComparableError, SpentSignsError
from enclave_runtime.verifying.follower import Follower
from enclave_runtime.verifying.integrity import (
    Verifier,
    WrongProductError,
    checks_of,
    computed_inside,
    private,
    private_copy,
)
from enclave_runtime.verifying.ring import RingVerifier


class RunError(Exception):
    """A request that does not fit the run's state."""


class ClassKeys:
    """The keys of a program's classes in one run: carried over by blinded inputs, else fresh."""

    def __init__(self, program: Program, scheme: Scheme, schedule: KeySchedule, number: int):
        self._program = program
        self._scheme = scheme
        self._schedule = schedule
        self._number = number
        self._keys: dict[int, Any] = {}
        self._uses: dict[int, KeyUses] = {}

    def adopt(self, port: Port, entry: Blinded) -> bool:
        """Takes over the keys under which a device-resident input lies.

        Returns:
          Whether they agree with the keys taken over before and with the port's layout, and may
          serve another run; if not, nothing changed and the array has to be blinded again.
        """
        if entry.scheme != self._scheme or entry.layout.parities != port.layout.parities:
            return False
        taken: dict[int, Any] = {}
        uses: dict[int, KeyUses] = {}
        for number, held in zip(port.layout.classes, entry.layout.classes, strict=True):
            if (number is None) != (held is None):
                return False
            if number is None or held is None:
                continue
            key = entry.keys[held]
            if entry.batches[held] != self._program.classes[number].batch:
                return False
            known = taken.get(number, self._keys.get(number, key))
            if known is not key or not self._may_serve(number, entry.uses[held]):
                return False
            taken[number] = key
            uses[number] = entry.uses[held]
        self._keys.update(taken)
        for number, use in uses.items():
            if number not in self._uses:
                # Counted now: a run that is aborted has shown as much as one that commits.
                use.count += 1
                self._uses[number] = use
        return True

    def _may_serve(self, number: int, uses: KeyUses) -> bool:
        budget = self._scheme.key_budget
        return budget is None or number in self._uses or uses.count < budget

    def __getitem__(self, number: int) -> Any:
        if number not in self._keys:
            stream = self._schedule.stream("class", self._number, number)
            self._keys[number] = self._scheme.draw(self._program.classes[number], stream)
        return self._keys[number]

    def of(self, layout: Layout) -> dict[int, Any]:
        """The keys of a layout's classes."""
        return {c: self[c] for c in layout.classes if c is not None}

    def uses(self, layout: Layout) -> dict[int, KeyUses]:
        """The counters of a layout's keys."""
        for c in self.of(layout):
            if c not in self._uses:
                self._uses[c] = KeyUses()
                self._uses[c].count = 1
        return {c: self._uses[c] for c in layout.classes if c is not None}


def _last_uses(program: Program) -> dict[int, int]:
    """For each operand of products the last segment that gets a product of it."""
    return {
        operand: index
        for index, s in enumerate(program.segments)
        for c in s.uploads
        for operand in c.operands or ()
    }


def _verifier(program: Program, scheme: Scheme) -> Verifier:
    return RingVerifier(program, scheme.fields) if scheme.exact else Verifier(program)


class Run:
    """The state of one run. Its methods are called under the session's order, see `Session`."""

    def __init__(
        self,
        program: Program,
        scheme: Scheme,
        constants: dict[int, jax.Array],
        arena: Arena,
        workers: int,
        number: int,
        schedule: KeySchedule,
        executables: Executables,
        claim: Claim,
        lanes: Lanes | None = None,
    ):
        self.program = program
        self.arena = arena
        self.keys = ClassKeys(program, scheme, schedule, number)
        self.handles: list[str | None] = [None] * len(program.inputs)
        self.awaiting: set[int] = set()  # inputs that the host still has to bring
        self.busy_seconds = 0.0
        self.blindings = 0
        self.lied = False  # whether a wrong product came back; the session counts it and resets
        self._values = dict(constants)
        self._workers = workers
        self._executables = executables
        self._claim = claim
        self._lanes = lanes
        self._scheme = scheme
        self._schedule = schedule
        self._number = number
        self._tensors: dict[int, Any] = {}  # what was drawn for each blinded value alone
        self._verifier = _verifier(program, scheme) if program.verify else None
        self._products = checks_of(program) if scheme.describes_products else {}
        self._follower = Follower(program) if program.verify else None
        self._last_uses = _last_uses(program)
        self._next = 0
        self._executing = False
        self._arrived: set[int] = set()
        self._ready = 0  # of the arrived, those whose parts were taken
        self._agreed: set[int] = set()  # workers that asked for the commit
        self._committed = False
        # Tags of what the last segment was brought.
        self._brought: list[list[bytes]] = []
        self._repeat_key = schedule.stream("repeat", number).words(4).tobytes()
        self._doomed: list[int] = []
        self._failure: BaseException | None = None
        self._condition = threading.Condition()

    # Crossings

    def blind(self, port: Port, value: jax.Array, offset: int) -> None:
        """Writes an input that is to lie on the devices to the arena."""
        start = time.perf_counter()
        out = self.arena.view(port.array, offset)
        stream = functools.partial(self._schedule.stream, "port", self._number, port.value)
        keys = self.keys.of(port.layout)
        own = out if self._follower is None else private(port.array)
        self._scheme.blind(value, port.layout, keys, own, stream)
        if self._follower is not None:
            np.copyto(out, own)
            self._follower.blinded(port, own, functools.partial(self._signs_stream, port))
        self.blindings += 1
        self.busy_seconds += time.perf_counter() - start

    def _signs_stream(self, port: Port, axes: tuple[int, ...]) -> KeyStream:
        return self._schedule.stream("checksum", self._number, port.value, *axes)

    def adopt(self, port: Port, entry: Blinded) -> bool:
        """Takes over the keys and the checksum of a device-resident input.

        Returns:
          Whether they serve this run; if not, the array has to be brought in and blinded again.
        """
        follower, held = self._follower, entry.checksum
        if follower is None:
            return self.keys.adopt(port, entry)
        assert held is not None, "the session refuses others"
        if not (follower.may_adopt(port, held) and self.keys.adopt(port, entry)):
            return False
        follower.adopt(port, held)
        return True

    def _send_all(self, index: int) -> None:
        """Blinds and lays out a segment's downloads."""
        for position, crossing in enumerate(self.program.segments[index].downloads):
            self._raise_failure()  # an abort is heard between the steps
            if self._lanes is None:
                self._send(crossing, self.arena.view(crossing.blinded, crossing.offset))
                continue
            whole = private(crossing.blinded)
            self._send(crossing, whole)
            self._lanes.put(index, position, whole)

    def _send(self, crossing: Crossing, out: np.ndarray) -> None:
        value, layout = self._values[crossing.value], crossing.layout
        if not layout.keyed:
            self._claim.show()
            np.copyto(out, np.asarray(value))
            if self._follower is not None:
                self._follower.keep(crossing, np.asarray(value))
            return
        # The same stream for a repeat of the same segment: its bytes must be the same.
        use = ("tensor", self._number, crossing.value)
        stream = functools.partial(self._schedule.stream, *use)
        keys = self.keys.of(layout)
        own = out if self._verifier is None else private(crossing.blinded)
        self._tensors[crossing.value] = self._scheme.blind(value, layout, keys, own, stream)
        if self._verifier is not None:
            np.copyto(out, own)
            self._verifier.keep(crossing, own)
        if self._follower is not None:
            self._follower.keep(crossing, own)
        self.blindings += 1

    def _private(self, crossing: Crossing) -> np.ndarray:
        """What lies in the arena for a crossing."""
        # The host may change shared memory while it is being used, and afterwards.
        return private_copy(self.arena.view(crossing.blinded, crossing.offset))

    def _taken(self, index: int) -> Iterator[np.ndarray]:
        """What was brought of a segment's uploads, one by one, out of the host's reach."""
        if self._lanes is not None:
            yield from self._lanes.taken(index)
            return
        self._brought = []
        for crossing in self.program.segments[index].uploads:
            own = self._private(crossing)
            self._brought.append(authenticate(self._repeat_key, own))
            yield own

    def _receive(self, crossing: Crossing, own: np.ndarray) -> jax.Array:
        """Takes in a value that the host brings."""
        if not crossing.layout.keyed:
            return jnp.asarray(own)
        operands = None
        if crossing.operands is not None:
            left, right = crossing.operands
            operands = (self._tensors.get(left), self._tensors.get(right))
            alone = self._scheme.inside(operands)
            if alone is not None:
                return computed_inside(self._products[crossing.value])(*alone)
        if self._verifier is not None and self._follower is not None:
            use = ("check", self._number, crossing.value)
            stream = functools.partial(self._schedule.stream, *use)
            try:
                if any(map(self._follower.is_leaf, crossing.operands or ())):
                    self._follower.check(crossing, own)
                else:
                    own = self._verifier.checked(crossing, own, stream)
            except SpentSignsError as error:
                raise RunError(str(error)) from error
            except WrongProductError as error:
                # At once, so that no other request tries again, and no abort hides it.
                self.lied, self._failure = not isinstance(error, NotComparableError), error
                raise
        keys = self.keys.of(crossing.layout)
        try:
            plain = self._scheme.unblind(own, crossing.layout, keys, operands)
        except UnblindingError as error:
            raise RunError(f"{crossing.source or 'a product'}: {error}") from error
        return plain.astype(crossing.array.dtype)

    def join(self, worker: int, arena: Arena | None) -> None:
        """Takes the memory of a process of the host; returns when all have brought theirs.

        So none begins to work with others that never come.

        Raises:
          RunError: the run awaits none, or has ended.
          ArenaError: it does not await this one, or the memory is too small.
        """
        with self._condition:
            self._raise_failure()
            if self._lanes is None:
                raise RunError("the workers of this run share their memory")
            lanes = self._lanes
            lanes.join(worker, arena)
            self._condition.notify_all()
            self._condition.wait_for(lambda: lanes.complete or self._failure)
            self._raise_failure()

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

    def fail(self, failure: BaseException) -> bool:
        """Ends the run; everyone who waits for it gets `failure`.

        Returns:
          Whether it has ended. A segment that is running ends it as soon as it can, and nobody
          waits for that.
        """
        with self._condition:
            self._failure = self._failure or failure
            self._condition.notify_all()
            return not self._executing

    def segment(
        self, index: Any, worker: Any, timed: bool = False, cargo: Cargo | None = None
    ) -> tuple[float, ...]:
        """Brings one worker's part of a segment; returns when the segment has run.

        Args:
          index: of the segment.
          worker: that brings.
          timed: whether each part of the work is waited for before the next, to tell them apart.
          cargo: what comes with the request, and takes what goes with its reply, where the worker
            shares no memory.

        Returns:
          Seconds that unblinding (and checking), computing and blinding took, if this request
          ran the segment; of a repeat, or where another worker's request ran it, nothing.

        Raises:
          RunError: out of order, an unknown worker, or a repeat with other bytes.
          WireError: what comes with the request is not this worker's part.
          WrongProductError: a product is wrong.
        """
        cargo = cargo or Cargo()
        with self._condition:
            self._raise_failure()
            if self.awaiting:
                raise RunError(f"the run still awaits {len(self.awaiting)} of its inputs")
            if not 0 <= worker < self._workers:
                raise RunError(f"worker {worker} of a run with {self._workers}")
            if self._lanes is None and cargo.size:
                raise RunError("the workers of this run share their memory, and bytes follow")
            if self._lanes is not None and not self._lanes.complete:
                raise RunError("not all workers have joined the run")
            repeated = 0 <= index == self._next - 1
            if not repeated:
                if index == self._next == len(self.program.segments):
                    raise RunError(f"segment {index} was asked for after the last")
                if index != self._next or worker in self._arrived:
                    raise RunError(f"segment {index} was asked for, segment {self._next} is next")
                self._arrived.add(worker)
        if self._lanes is not None and not repeated:
            self._lanes.take(index, worker, self._repeat_key, cargo)
        with self._condition:
            self._raise_failure()
            if not repeated:
                self._ready += 1
                if self._ready < self._workers:
                    self._condition.wait_for(lambda: self._next > index or self._failure)
                    self._raise_failure()
                    self._load(cargo, index, worker)
                    return ()
            # One at a time; an abort need not wait for it, so the lock is not held meanwhile.
            self._condition.wait_for(lambda: not self._executing)
            self._raise_failure()
            self._executing = True
        seconds: tuple[float, ...] = ()
        try:
            if repeated:
                self._repeat(index, worker, cargo)
            else:
                seconds = self._execute(index, timed)
        except BaseException as error:
            self._failure = self._failure or error
            raise
        finally:
            with self._condition:
                self._executing = False
                if not repeated:
                    self._arrived, self._ready = set(), 0
                    self._next = index + 1
                self._condition.notify_all()
        self._raise_failure()
        self._load(cargo, index, worker)
        return seconds

    def _load(self, cargo: Cargo, index: int, worker: int) -> None:
        if self._lanes is not None:
            cargo.load(self._lanes.outgoing(index, worker))

    def _raise_failure(self) -> None:
        if isinstance(self._failure, WrongProductError):
            raise self._failure  # every worker says what was wrong
        if self._failure is not None:
            raise RunError("the run has failed or was aborted") from self._failure

    def _execute(self, index: int, timed: bool) -> tuple[float, float, float]:
        start = time.perf_counter()
        segment = self.program.segments[index]
        for value in self._doomed:
            del self._values[value]
        if self._verifier is not None:
            self._verifier.forget(index)
        if self._follower is not None:
            self._follower.advance()
            self._follower.forget(index)
        for value, last in self._last_uses.items():
            if last == index - 1 and value in self._tensors:  # what was sent, not a leaf
                self._tensors[value] = self._scheme.let_go(self._tensors[value])
        brought = zip(segment.uploads, self._taken(index), strict=True)
        uploads = [self._receive(crossing, own) for crossing, own in brought]
        self._values.update(zip((c.value for c in segment.uploads), uploads, strict=True))
        self._raise_failure()  # an abort is heard between the steps
        if timed:
            jax.block_until_ready(uploads)
        unblinded = time.perf_counter()
        inputs = [self._values[v] for v in segment.inputs]
        outputs = self._executables.run(segment.executable, inputs)
        self._values.update(zip(segment.outputs, outputs, strict=True))
        if timed or not segment.downloads:  # it is counted with this segment, not with the next
            jax.block_until_ready(outputs)
        computed = time.perf_counter()
        self._send_all(index)
        if self._follower is not None and index == len(self.program.segments) - 1:
            self._follower.advance()
        jax.block_until_ready(uploads)  # unblinding is this segment's work
        self._doomed = [v for v in segment.dead if v in self._values]
        end = time.perf_counter()
        self.busy_seconds += end - start
        return unblinded - start, computed - unblinded, end - computed

    def _repeat(self, index: int, worker: int, cargo: Cargo) -> None:
        # As they came: values would not tell bytes apart where a product is set to zeros or
        # computed inside, whatever was brought.
        try:
            if self._lanes is not None:
                self._lanes.check(index, worker, self._repeat_key, cargo)
            else:
                uploads = self.program.segments[index].uploads
                for crossing, tags in zip(uploads, self._brought, strict=True):
                    check_authentic(self._repeat_key, self._private(crossing), tags)
        except DecryptionError as error:
            raise RunError(f"segment {index} was asked for again with other bytes") from error
        self._send_all(index)

    def commit(self, store: Store, worker: int = 0) -> list[str]:
        """Keeps the outputs and returns their handles.

        Where the workers are processes, this waits until all have asked; all but the first get
        no handles.

        Raises:
          RunError: not every segment has run, or there is no such worker.
          RefusedInputError: another run on the same values counted meanwhile.
        """
        with self._condition:
            self._raise_failure()
            if self._next != len(self.program.segments):
                raise RunError(
                    f"commit after {self._next} of {len(self.program.segments)} segments"
                )
            if not 0 <= worker < (1 if self._lanes is None else self._workers):
                raise RunError(f"worker {worker} asks for the commit of another's run")
            if self._lanes is not None:
                self._agreed.add(worker)
                self._condition.notify_all()
                everyone = range(self._workers) if worker == 0 else ()
                self._condition.wait_for(
                    lambda: (
                        self._committed
                        or self._failure
                        or (everyone and self._agreed.issuperset(everyone))
                    )
                )
                if worker and self._committed:
                    return []
                self._raise_failure()
            tags = self._claim.commit()
            self._committed = True
            self._condition.notify_all()
            self._failure = RunError("the run was committed")
            ports = zip(self.program.outputs, tags, strict=True)
            return [store.put(self._output(port, tag)) for port, tag in ports]

    def _output(self, port: Port, tag: Tag) -> Resident | Blinded:
        if port.place == DEVICE:
            layout = port.layout
            keys, uses = self.keys.of(layout), self.keys.uses(layout)
            batches = {c: self.program.classes[c].batch for c in keys}
            held = Blinded(port.array, tag, self._scheme, layout, keys, batches, uses)
            if self._follower is None:
                return held
            checksum, source = self._follower.checksum(port), self._follower.source(port)
            return held._replace(checksum=checksum, source=source)
        assert port.place == ENCLAVE
        return Resident(port.array, self._values[port.value], tag)
