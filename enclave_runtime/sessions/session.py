"""What a session may ask of the enclave: map, compile, provision, run, open, keep, free.

A session lasts as long as the process. Programs and executables come encrypted by the
client, so the enclave runs no code that the client did not provision; the host starts
runs of those programs and carries the tensors. Errors leave as short texts that name
shapes and numbers of the program, never values; the detail goes to the enclave's log.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.crypto import encryption
from enclave_runtime.crypto.encryption import SessionKeys
from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.execution import timing
from enclave_runtime.execution.executor import Compilation, Executor
from enclave_runtime.protocol import requests
from enclave_runtime.protocol.memory import Arena, Shares
from enclave_runtime.protocol.program import DEVICE, PUBLIC, ArrayType, Port, Program
from enclave_runtime.protocol.requests import (
    AbortRequest,
    BeatRequest,
    BeginRequest,
    CommitRequest,
    EmptyRequest,
    FindRequest,
    FreeRequest,
    HeldInput,
    JoinRequest,
    MapRequest,
    OpenRequest,
    PrepareRequest,
    ProvisionRequest,
    PublishedInput,
    ReleaseRequest,
    RequestError,
    SegmentRequest,
    SettleRequest,
    UnmapRequest,
    WrittenInput,
)
from enclave_runtime.protocol.tags import (
    Rules,
    Seal,
    published_array,
)
from enclave_runtime.protocol.wire import Frame, Kind, Label
from enclave_runtime.schemes import SCHEMES, check_program, make_scheme
from enclave_runtime.sessions.admission import Admission, Tag
from enclave_runtime.sessions.attempts import Attempts
from enclave_runtime.sessions.cargo import Cargo
from enclave_runtime.sessions.checkpointing import Checkpointing
from enclave_runtime.sessions.lanes import Lanes, Presence
from enclave_runtime.sessions.open_runs import OpenRuns
from enclave_runtime.sessions.programs import Programs, Provisioned
from enclave_runtime.sessions.run import Run
from enclave_runtime.sessions.store import Blinded, Resident, Store
from enclave_runtime.sessions.value_reader import ValueReader
from enclave_runtime.verifying import follower, integrity, ring
from enclave_runtime.verifying.integrity import WrongProductError, private_copy

# A reply's fields, with its attachment where it has one.
Answer = dict[str, Any] | tuple[dict[str, Any], bytes]


class Session:
    """State shared by all connections of one session."""

    def __init__(self, keys: SessionKeys, identity: str):
        self._schedule = KeySchedule()
        self._executor = Executor()
        self._store = Store()
        self._programs = Programs()
        self._costs: dict[str, Any] | None = None
        self._measuring = threading.Lock()
        self._arenas: dict[str, Arena] = {}
        self._run_numbers = itertools.count(1)
        self._attempts = Attempts()
        self._runs = OpenRuns(self._attempts)
        self._values = ValueReader(keys, identity, self._store, self._attempts)
        self._checkpoints = Checkpointing(self._store, self._arena, self._values)
        self._lock = threading.Lock()
        self._busy_seconds = 0.0
        self._blindings = 0
        self._admission = Admission()
        self._adopting = threading.Lock()
        self._presence = Presence()
        self._handlers: dict[Kind, Callable[[Any, bytes], Answer]] = {
            Kind.MAP: self._map,
            Kind.UNMAP: self._unmap,
            Kind.COMPILE: self._compile,
            Kind.PROVISION: self._provision,
            Kind.BEGIN: self._begin,
            Kind.JOIN: self._join,
            Kind.BEAT: self._beat,
            Kind.SETTLE: self._settle,
            Kind.COMMIT: self._commit,
            Kind.ABORT: self._abort,
            Kind.OPEN: self._open,
            Kind.FREE: self._free,
            Kind.STATISTICS: self._statistics,
            Kind.CALIBRATE: self._calibrate,
            Kind.CHECKPOINT_KEY: self._checkpoints.provision,
            Kind.CHECKPOINT: self._checkpoints.begin,
            Kind.CHECKPOINT_LEAF: self._checkpoints.write,
            Kind.RESTORE: self._checkpoints.begin_restoring,
            Kind.RESTORE_LEAF: self._checkpoints.read,
            Kind.FIND: self._find,
            Kind.RELEASE: self._release,
            Kind.PREPARE: self._prepare,
        }

    def handle(self, frame: Frame, cargo: Cargo | None = None) -> tuple[dict[str, Any], bytes]:
        """Answers one request, with the reply's fields and attachment.

        Args:
          frame: the request.
          cargo: takes what comes behind it, and what goes behind the reply.

        Raises:
          Exception: the request was refused or failed; see `server` for what leaves.
        """
        request = requests.decode(frame)
        if frame.kind is Kind.SEGMENT:
            return self._segment(request, cargo or Cargo()), b""
        answer = self._handlers[frame.kind](request, frame.attachment)
        return answer if isinstance(answer, tuple) else (answer, b"")

    # Shared memory

    def _map(self, asked: MapRequest, _: bytes) -> dict[str, Any]:
        self._arenas[asked.name] = Arena(asked.name, asked.size)
        return {}

    def _unmap(self, asked: UnmapRequest, _: bytes) -> dict[str, Any]:
        self._arenas.pop(asked.name, None)
        return {}

    def _arena(self, name: str | None) -> Arena:
        arena = None if name is None else self._arenas.get(name)
        if arena is None:
            raise RequestError("no such shared memory is mapped")
        return arena

    # Programs

    def _compile(self, _: EmptyRequest, attachment: bytes) -> dict[str, Any]:
        return {"executable": self._executor.compile(self._values.decrypt(attachment, "compile"))}

    def _provision(self, asked: ProvisionRequest, attachment: bytes) -> dict[str, Any]:
        """Takes a program and its constants: from the arena, or behind the program itself.

        A client on another machine shares no memory; it says in `program_bytes` where in the
        attachment its constants begin.
        """
        size = asked.program_bytes
        description, inline = _split(attachment, len(attachment) if size is None else size)
        described = json.loads(self._values.decrypt(description, "provision"))
        program = Program.decode(described["program"])
        scheme = make_scheme(program.scheme, program.parameters)
        rules = Rules.decode(described["rules"], len(program.inputs), len(program.outputs))
        for segment in program.segments:
            if not self._executor.has(segment.executable):
                raise RequestError("a segment's executable was not provisioned")
        kernels: list[Compilation] = []
        if program.verify or scheme.describes_products:
            follower.check_program(program)
        check_program(program, scheme)
        if program.verify:
            kernels += (
                ring.prepare(program, scheme.fields, self._executor)
                if scheme.exact
                else integrity.prepare(program, self._executor)
            )
        constants = {}
        if size is not None:
            for port in program.constants:
                own, inline = _split(inline, encryption.encrypted_bytes(port.array.nbytes))
                constants[port.value] = self._values.decrypted_copy(
                    np.frombuffer(own, np.uint8), port.array
                )
            if inline:
                raise RequestError("more bytes follow the program's constants")
        elif program.constants:
            arena = self._arena(asked.arena)
            if len(asked.offsets) != len(program.constants):
                raise RequestError(f"the program has {len(program.constants)} constants")
            for port, offset in zip(program.constants, asked.offsets, strict=True):
                constants[port.value] = self._values.decrypted(arena, port.array, offset)
        crossings = [c for s in program.segments for c in (*s.uploads, *s.downloads)]
        for c in crossings:
            kernels += self._executor.warm_up(scheme, c.array, c.layout, program.classes)
        for port in program.inputs:
            if port.place == DEVICE:
                kernels += self._executor.warm_up(scheme, port.array, port.layout, program.classes)
        executables = self._executor.hold((s.executable for s in program.segments), kernels)
        digest = program.digest
        provisioned = Provisioned(program, rules, digest, scheme, constants, executables)
        return {"program": self._programs.keep(provisioned), "digest": digest}

    def _find(self, asked: FindRequest, _: bytes) -> dict[str, Any]:
        """The number of the program that the client provisioned under this digest."""
        return {"program": self._programs.find(asked.digest)}

    def _prepare(self, asked: PrepareRequest, _: bytes) -> dict[str, Any]:
        """Has a scheme's kernels ready by the time that its client has planned."""
        if asked.scheme not in SCHEMES:
            raise RequestError(f"the scheme is not one of {', '.join(sorted(SCHEMES))}")
        self._executor.load(SCHEMES[asked.scheme])
        return {}

    def _release(self, asked: ReleaseRequest, _: bytes) -> dict[str, Any]:
        """Frees programs that the client needs no more; runs of them that are open go on."""
        for number in asked.programs:
            self._programs.release(number)
        return {}

    # Runs

    def _begin(self, asked: BeginRequest, _: bytes) -> dict[str, Any]:
        """Starts a run on its inputs.

        The reply's `upload` lists inputs that have to be brought by `SETTLE` because they lie on
        the devices but are wanted inside, or under other keys; `download` maps inputs that now
        lie blinded at `blind_at[i]`.
        """
        provisioned = self._programs.use(asked.program)
        program, executables = provisioned.program, provisioned.executables
        if program.verify:
            self._attempts.refuse_after_lies()
        if not len(asked.inputs) == len(program.inputs) == len(asked.blind_at):
            raise RequestError(f"the program takes {len(program.inputs)} inputs")
        executables.wait()
        arena = self._arena(asked.arena)
        lanes = None
        if asked.devices:
            if len(asked.devices) != asked.workers:
                raise RequestError(f"{len(asked.devices)} shares of {asked.workers} workers")
            pools = provisioned.scheme.device_pools
            lanes = Lanes(program, Shares(frozenset(asked.sharded), asked.devices, pools))
        ports = zip(program.inputs, asked.inputs, strict=True)
        taken = [self._taken(arena, *one, program.verify) for one in enumerate(ports)]
        # Before anything is blinded, which is what a run too many would show.
        tags = [tag for tag, _ in taken]
        claim = self._admission.admit(provisioned.rules, provisioned.digest, tags)
        number = next(self._run_numbers)
        run = Run(
            program,
            provisioned.scheme,
            provisioned.constants,
            arena,
            asked.workers,
            number,
            self._schedule,
            executables,
            claim,
            lanes,
        )
        upload, blind = [], []
        for index, (port, given) in enumerate(zip(program.inputs, asked.inputs, strict=True)):
            run.handles[index] = given.handle if isinstance(given, HeldInput) else None
            value = taken[index][1]
            if isinstance(value, Blinded):
                if port.place != DEVICE or not self._adopted(run, port, value):
                    upload.append(index)
            elif port.place == DEVICE:
                blind.append((index, value))
            else:
                run.set(port, value)
        # Blinded last: by now every key that another input carries over is known.
        for index, value in blind:
            run.blind(program.inputs[index], value, asked.blind_at[index])
        run.awaiting = set(upload)
        self._runs.admit(number, run, asked.name)
        return {"run": number, "upload": upload, "download": [index for index, _ in blind]}

    def _join(self, asked: JoinRequest, _: bytes) -> dict[str, Any]:
        with self._runs.failing(asked.run) as run:
            run.join(asked.worker, None if asked.arena is None else self._arena(asked.arena))
        return {}

    def _beat(self, asked: BeatRequest, _: bytes) -> dict[str, Any]:
        signs = self._presence.beat(asked)
        return {"silent": signs.silent, "left": signs.left, "at": signs.at}

    def _taken(
        self,
        arena: Arena,
        index: int,
        arrived: tuple[Port, HeldInput | WrittenInput | PublishedInput],
        verify: bool,
    ) -> tuple[Tag | Seal | bytes, jax.Array | Blinded]:
        """An input and its tag, as `Admission.admit` takes them.

        Raises:
          RequestError: it is of another type than the program's port.
          WrongProductError: the program verifies, and nothing checks this value.
        """
        port, given = arrived
        if port.place == PUBLIC and isinstance(given, HeldInput):
            raise RequestError(f"input {index} is public, and what the enclave holds is not")
        if isinstance(given, HeldInput):
            entry = self._held(port, index, given.handle, verify)
            return entry.tag, entry if isinstance(entry, Blinded) else entry.value
        if isinstance(given, PublishedInput):
            if port.place != PUBLIC:
                raise RequestError(f"input {index} is secret, and what is published is not")
            return self._values.unsealed(arena, port.array, given.offset, published_array)
        if port.place == PUBLIC:
            own = private_copy(arena.view(port.array, given.offset))
            return hashlib.sha256(own.tobytes()).digest(), jnp.asarray(own)
        return self._values.unsealed(arena, port.array, given.offset)

    def _held(self, port: Port, index: int, handle: str, verify: bool) -> Resident | Blinded:
        """What the enclave holds of an input; see `_taken`."""
        entry = self._store.get(handle)
        if entry.array != port.array:
            raise RequestError(
                f"input {index} is {entry.array.dtype}{list(entry.array.shape)}, expected "
                f"{port.array.dtype}{list(port.array.shape)}"
            )
        if isinstance(entry, Blinded) and verify and entry.checksum is None:
            raise WrongProductError(
                f"input {index} lies blinded on the devices, where nothing checks it, and "
                "verify=True takes nothing unchecked. Have the function that made it verify as "
                "well, or accept the value as it is: `enclave.seal(enclave.open(x))`."
            )
        return entry

    def _adopted(self, run: Run, port: Port, entry: Blinded) -> bool:
        """As `Run.adopt`, which looks whether keys and signs may serve and then counts the use."""
        with self._adopting:
            return run.adopt(port, entry)

    def _settle(self, asked: SettleRequest, _: bytes) -> dict[str, Any]:
        """Takes inputs that lie on the devices from the arena, blinding again where wanted.

        The reply's `download` lists those that were blinded again.
        """
        download = []
        with self._runs.failing(asked.run) as run:
            for index, offset in asked.offsets.items():
                if self._settled(run, index, offset, asked.blind_at.get(index)):
                    download.append(index)
        return {"download": download}

    def _settled(self, run: Run, index: int, offset: int, blind_at: int | None) -> bool:
        """Gives a run an input that is brought; returns whether it was blinded again."""
        run.settle(index)
        port, handle = run.program.inputs[index], run.handles[index]
        entry = self._store.get(handle) if handle else None
        if not isinstance(entry, Blinded):
            raise RequestError(f"input {index} does not lie on the devices")
        value = self._values.unblinded(entry, private_copy(run.arena.view(entry.array, offset)))
        if port.place != DEVICE:
            run.set(port, value)
            return False
        if blind_at is None:
            raise RequestError(f"input {index} has to be blinded again, and has no place for that")
        run.blind(port, value, blind_at)
        return True

    def _segment(self, asked: SegmentRequest, cargo: Cargo) -> dict[str, Any]:
        cargo.announce(Label(asked.run, asked.segment, asked.worker), asked.carried)
        with self._runs.failing(asked.run) as run:
            if run.program.verify:
                self._attempts.refuse_after_lies()
            seconds = run.segment(asked.segment, asked.worker, asked.timed == 1, cargo)
        # Nothing new to the host: it sees when shared memory is read, and when it is written.
        return {"seconds": seconds} if asked.timed else {}

    def _commit(self, asked: CommitRequest, _: bytes) -> dict[str, Any]:
        run = self._runs[asked.run]
        if not all(0 <= index < len(run.handles) for index in asked.donate):
            raise RequestError("a commit donates inputs by their positions")
        if run.program.verify:
            self._attempts.refuse_after_lies()
        handles = run.commit(self._store, asked.worker)
        if asked.worker:
            return {"handles": []}
        for index in asked.donate:
            handle = run.handles[index]
            if handle is not None:
                self._store.free(handle)
        self._runs.end(asked.run, run)
        with self._lock:
            self._busy_seconds += run.busy_seconds
            self._blindings += run.blindings
        return {"handles": handles, "busy_seconds": run.busy_seconds}

    def _abort(self, asked: AbortRequest, _: bytes) -> dict[str, Any]:
        if asked.run is None and asked.name is None:
            raise RequestError("an abort names its run")
        self._runs.abort(asked.run, asked.name)
        return {}

    # Values

    def _open(self, asked: OpenRequest, attachment: bytes) -> Answer:
        """Encrypts a value to the client, at `offset`; a blinded one is read there first.

        Without an arena both travel as attachments: a client on another machine shares no memory,
        and brings a blinded value from the file in which the host sent it.
        """
        entry = self._store.get(asked.handle)
        if asked.arena is None:
            return {}, self._values.opened(entry, attachment)
        arena = self._arena(asked.arena)
        _, value = self._values.value(arena, asked.offset, asked.handle, entry.array)
        encrypted = self._values.encrypted(value)
        np.copyto(arena.view(ArrayType(encrypted.shape, "uint8"), asked.offset), encrypted)
        return {}

    def _free(self, asked: FreeRequest, _: bytes) -> dict[str, Any]:
        for handle in asked.handles:
            self._store.free(handle)
        return {}

    def _calibrate(self, _: EmptyRequest, __: bytes) -> dict[str, Any]:
        # Once: client and host must make the same plan from the same figures.
        with self._measuring:
            if self._costs is None:
                self._costs = timing.measure()
            return self._costs

    def _statistics(self, _: EmptyRequest, __: bytes) -> dict[str, Any]:
        return {
            "handles": len(self._store),
            "runs": len(self._runs),
            "programs": len(self._programs),
            "peak_memory_bytes": _peak_memory(),
            "busy_seconds": self._busy_seconds,
            "processor_seconds": time.process_time(),
            "blindings": self._blindings,
            "wrong_products": self._attempts.wrong,
            "process": os.getpid(),
        }


def _peak_memory(path: str = "/proc/self/status") -> int:
    """Most resident memory so far, in bytes; `getrusage` would start from the parent's size."""
    with open(path) as status:
        fields = dict(line.split(":", 1) for line in status)
    # Gramine tells the most that was mapped, and nothing else; without SGX, who launched the
    # enclave can tell better.
    return int((fields.get("VmHWM") or fields["VmPeak"]).split()[0]) * 1024


def _split(content: bytes, size: int) -> tuple[bytes, bytes]:
    """The first `size` bytes, and the rest."""
    if not 0 <= size <= len(content):
        raise RequestError("an attachment is shorter than what it is said to hold")
    return content[:size], content[size:]
