"""What a session may ask of the enclave: map, compile, provision, run, open, keep, free.

A session lasts as long as the process. Programs and executables come encrypted by the
client, so the enclave runs no code that the client did not provision; the host starts
runs of those programs and carries the tensors. Errors leave as short texts that name
shapes and numbers of the program, never values; the detail goes to the enclave's log.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.crypto import encryption
from enclave_runtime.crypto.encryption import SessionKeys
from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.execution import timing
from enclave_runtime.execution.executor import Compilation, Executor
from enclave_runtime.protocol.memory import Arena
from enclave_runtime.protocol.program import DEVICE, PUBLIC, ArrayType, Port, Program
from enclave_runtime.protocol.wire import Frame, Kind
from enclave_runtime.schemes import make_scheme
from enclave_runtime.sessions.checkpointing import Checkpointing
from enclave_runtime.sessions.programs import Programs, Provisioned, RequestError
from enclave_runtime.sessions.run import Run, RunError
from enclave_runtime.sessions.store import Blinded, Resident, Store
from enclave_runtime.verifying import checksum, follower, integrity
from enclave_runtime.verifying.checksum import NotComparableError
from enclave_runtime.verifying.integrity import MAX_WRONG_PRODUCTS, IntegrityError, private_copy

# A reply's fields, with its attachment where it has one.
Answer = dict[str, Any] | tuple[dict[str, Any], bytes]


class Session:
    """State shared by all connections of one session."""

    def __init__(self, keys: SessionKeys, identity: str):
        self._keys = keys
        self._identity = identity
        self._schedule = KeySchedule()
        self._executor = Executor()
        self._store = Store()
        self._programs = Programs()
        self._costs: dict[str, Any] | None = None
        self._measuring = threading.Lock()
        self._arenas: dict[str, Arena] = {}
        self._runs: dict[int, Run] = {}
        self._run_numbers = itertools.count(1)
        self._checkpoints = Checkpointing(self._store, self._arena, self._decrypt, self._value)
        self._lock = threading.Lock()
        self._busy_seconds = 0.0
        self._blindings = 0
        self._wrong_products = 0
        self._comparing = 0  # leaves that are being held to their checksums
        self._adopting = threading.Lock()
        self._handlers: dict[Kind, Callable[[dict[str, Any], bytes], Answer]] = {
            Kind.MAP: self._map,
            Kind.UNMAP: self._unmap,
            Kind.COMPILE: self._compile,
            Kind.PROVISION: self._provision,
            Kind.BEGIN: self._begin,
            Kind.SETTLE: self._settle,
            Kind.SEGMENT: self._segment,
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
        }

    def handle(self, frame: Frame) -> tuple[dict[str, Any], bytes]:
        """Answers one request, with the reply's fields and attachment.

        Raises:
          Exception: the request was refused or failed; see `server` for what leaves.
        """
        handler = self._handlers.get(frame.kind)
        if handler is None:
            raise RequestError(f"a frame of kind {frame.kind.name} is not a request")
        answer = handler(frame.fields, frame.attachment)
        return answer if isinstance(answer, tuple) else (answer, b"")

    # Shared memory

    def _map(self, fields: dict[str, Any], _: bytes) -> dict[str, Any]:
        name, size = fields["name"], fields["size"]
        if not isinstance(name, str) or type(size) is not int or not 0 < size < 1 << 48:
            raise RequestError("a mapping needs a name and a size")
        self._arenas[name] = Arena(name, size)
        return {}

    def _unmap(self, fields: dict[str, Any], _: bytes) -> dict[str, Any]:
        self._arenas.pop(fields["name"], None)
        return {}

    def _arena(self, fields: dict[str, Any]) -> Arena:
        arena = self._arenas.get(fields["arena"])
        if arena is None:
            raise RequestError("no such shared memory is mapped")
        return arena

    # Programs

    def _decrypt(self, attachment: bytes, purpose: str) -> bytes:
        context = f"{purpose}|{self._identity}".encode()
        return encryption.decrypt_bytes(self._keys.to_enclave, attachment, context)

    def _compile(self, _: dict[str, Any], attachment: bytes) -> dict[str, Any]:
        return {"executable": self._executor.compile(self._decrypt(attachment, "compile"))}

    def _provision(self, fields: dict[str, Any], attachment: bytes) -> dict[str, Any]:
        """Takes a program and its constants: from the arena, or behind the program itself.

        A client on another machine shares no memory; it says in `program_bytes` where in the
        attachment its constants begin.
        """
        separate = "program_bytes" in fields
        size = fields["program_bytes"] if separate else len(attachment)
        description, inline = _split(attachment, size)
        program = Program.decode(json.loads(self._decrypt(description, "provision")))
        scheme = make_scheme(program.scheme, program.parameters)
        for segment in program.segments:
            if not self._executor.has(segment.executable):
                raise RequestError("a segment's executable was not provisioned")
        kernels: list[Compilation] = []
        if program.verify:
            follower.check_program(program)
            kernels += integrity.prepare(program, self._executor)
        constants = {}
        if separate:
            for port in program.constants:
                own, inline = _split(inline, port.array.nbytes + encryption.OVERHEAD_BYTES)
                constants[port.value] = self._decrypted_copy(
                    np.frombuffer(own, np.uint8), port.array
                )
            if inline:
                raise RequestError("more bytes follow the program's constants")
        elif program.constants:
            arena = self._arena(fields)
            offsets = fields["offsets"]
            for port, offset in zip(program.constants, offsets, strict=True):
                constants[port.value] = self._decrypted(arena, port.array, offset)
        crossings = [c for s in program.segments for c in (*s.uploads, *s.downloads)]
        for c in crossings:
            kernels += self._executor.warm_up(scheme, c.array, c.layout, program.classes)
        for port in program.inputs:
            if port.place == DEVICE:
                kernels += self._executor.warm_up(scheme, port.array, port.layout, program.classes)
        executables = self._executor.hold((s.executable for s in program.segments), kernels)
        digest = program.digest
        provisioned = Provisioned(program, digest, scheme, constants, executables)
        return {"program": self._programs.keep(provisioned), "digest": digest}

    def _find(self, fields: dict[str, Any], _: bytes) -> dict[str, Any]:
        """The number of the program that the client provisioned under this digest."""
        return {"program": self._programs.find(fields["digest"])}

    def _release(self, fields: dict[str, Any], _: bytes) -> dict[str, Any]:
        """Frees programs that the client needs no more; runs of them that are open go on."""
        for number in fields["programs"]:
            self._programs.release(number)
        return {}

    def _decrypted(self, arena: Arena, array: ArrayType, offset: Any) -> jax.Array:
        if type(offset) is not int:
            raise RequestError("an offset is not a number")
        size = array.nbytes + encryption.OVERHEAD_BYTES
        # A private copy first: the host may change shared memory while it is being decrypted.
        own = private_copy(arena.view(ArrayType((size,), "uint8"), offset))
        return self._decrypted_copy(own, array)

    def _decrypted_copy(self, private: np.ndarray, array: ArrayType) -> jax.Array:
        plain = encryption.decrypt_array(
            self._keys.to_enclave, private, self._identity, array.shape, np.dtype(array.dtype)
        )
        return jnp.array(plain)

    # Runs

    def _begin(self, fields: dict[str, Any], _: bytes) -> dict[str, Any]:
        """Starts a run on its inputs.

        Each entry of `inputs` says in which form an input comes: {"handle": h} or
        {"offset": o}, an offset alone meaning ciphertext (or plaintext where the port is
        public). The reply's `upload` lists inputs that have to be brought by `SETTLE` because
        they lie on the devices but are wanted inside, or under other keys; `download` maps
        inputs that now lie blinded at `blind_at[i]`.
        """
        provisioned = self._programs.use(fields["program"])
        program, executables = provisioned.program, provisioned.executables
        self._refuse_after_lies(program)
        workers = fields["workers"]
        if type(workers) is not int or not 0 < workers <= 4096:
            raise RequestError("a run needs between 1 and 4096 workers")
        inputs, blind_at = fields["inputs"], fields["blind_at"]
        if not len(inputs) == len(program.inputs) == len(blind_at):
            raise RequestError(f"the program takes {len(program.inputs)} inputs")
        executables.wait()
        arena = self._arena(fields)
        number = next(self._run_numbers)
        scheme, constants = provisioned.scheme, provisioned.constants
        run = Run(program, scheme, constants, arena, workers, number, self._schedule, executables)
        upload, blind = [], []
        for index, (port, given) in enumerate(zip(program.inputs, inputs, strict=True)):
            if "handle" in given:
                run.handles[index] = given["handle"]
                entry = self._store.get(given["handle"])
                if entry.array != port.array:
                    raise RequestError(
                        f"input {index} is {entry.array.dtype}{list(entry.array.shape)}, expected "
                        f"{port.array.dtype}{list(port.array.shape)}"
                    )
                if isinstance(entry, Resident):
                    value = entry.value
                elif program.verify and entry.checksum is None:
                    raise IntegrityError(
                        f"input {index} lies blinded on the devices, where nothing checks it, and "
                        "verify=True takes nothing unchecked. Have the function that made it "
                        "verify as well, or accept the value as it is: "
                        "`enclave.seal(enclave.open(x))`."
                    )
                elif port.place == DEVICE and self._adopted(run, port, entry):
                    continue
                else:
                    upload.append(index)
                    continue
            elif port.place == PUBLIC:
                value = jnp.asarray(private_copy(arena.view(port.array, given["offset"])))
            else:
                value = self._decrypted(arena, port.array, given["offset"])
            if port.place == DEVICE:
                blind.append((index, value))
            else:
                run.set(port, value)
        # Blinded last: by now every key that another input carries over is known.
        for index, value in blind:
            run.blind(program.inputs[index], value, blind_at[index])
        run.awaiting = set(upload)
        self._admit(number, run)
        return {"run": number, "upload": upload, "download": [index for index, _ in blind]}

    def _adopted(self, run: Run, port: Port, entry: Blinded) -> bool:
        """As `Run.adopt`, which looks whether keys and signs may serve and then counts the use."""
        with self._adopting:
            return run.adopt(port, entry)

    def _run(self, fields: dict[str, Any]) -> Run:
        run = self._runs.get(fields["run"])
        if run is None:
            raise RunError("no such run: it was committed, failed or was aborted")
        return run

    def _settle(self, fields: dict[str, Any], _: bytes) -> dict[str, Any]:
        """Takes inputs that lie on the devices from the arena, blinding again where wanted."""
        run = self._run(fields)
        with self._failing(fields["run"], run):
            return {"download": self._settled(run, fields)}

    def _settled(self, run: Run, fields: dict[str, Any]) -> list[int]:
        """Gives a run the inputs that are brought; returns those that it blinded again."""
        download = []
        for key, offset in fields["offsets"].items():
            index = int(key)
            run.settle(index)
            port, handle = run.program.inputs[index], run.handles[index]
            entry = self._store.get(handle) if handle else None
            if not isinstance(entry, Blinded):
                raise RequestError(f"input {index} does not lie on the devices")
            value = self._unblinded(entry, private_copy(run.arena.view(entry.array, offset)))
            if port.place == DEVICE:
                run.blind(port, value, fields["blind_at"][key])
                download.append(index)
            else:
                run.set(port, value)
        return download

    def _segment(self, fields: dict[str, Any], _: bytes) -> dict[str, Any]:
        run = self._run(fields)
        with self._failing(fields["run"], run):
            self._refuse_after_lies(run.program)
            run.segment(fields["segment"], fields["worker"])
        return {}

    @contextlib.contextmanager
    def _failing(self, number: int, run: Run) -> Iterator[None]:
        """Ends the run if what is inside fails."""
        try:
            yield
        except BaseException as error:
            if run.fail(error):
                self._end(number, run)
            raise

    def _admit(self, number: int, run: Run) -> None:
        """Opens a run; no more that verify than there may still be wrong products.

        Each open run may bring one, so runs at the same time are no more tries than runs in turn.

        Raises:
          IntegrityError: the host tried its luck too often.
          RequestError: too many runs that verify are open.
        """
        with self._lock:
            if run.program.verify:
                self._refuse_beyond_attempts()
            self._runs[number] = run

    @contextlib.contextmanager
    def _attempt(self) -> Iterator[None]:
        """Admits one comparison of a leaf like a run, and counts it if it fails.

        Raises:
          IntegrityError: the host tried its luck too often.
          RequestError: too much that may still fail is going on.
        """
        with self._lock:
            self._refuse_beyond_attempts()
            self._comparing += 1
        wrong = True
        try:
            yield
            wrong = False
        except NotComparableError:
            wrong = False
            raise
        finally:
            with self._lock:
                self._comparing -= 1
                self._wrong_products += wrong

    def _refuse_beyond_attempts(self) -> None:
        """Bounds how many wrong values may come back, counting what is going on; under the lock.

        Raises:
          IntegrityError: the host tried its luck too often.
          RequestError: too much that may still fail is going on.
        """
        if self._wrong_products >= MAX_WRONG_PRODUCTS:
            raise IntegrityError(self._too_many_lies)
        verifying = sum(run.program.verify for run in self._runs.values())
        if self._wrong_products + verifying + self._comparing >= MAX_WRONG_PRODUCTS:
            leaves = f", {self._comparing} leaves are being compared" if self._comparing else ""
            raise RequestError(
                f"{verifying} runs that verify are open and {self._wrong_products} wrong "
                f"products came back{leaves}, together at most {MAX_WRONG_PRODUCTS}: commit or "
                "abort a run first"
            )

    def _end(self, number: int, run: Run) -> None:
        """Forgets a run. A wrong product counts once, whichever request ends its run first."""
        with self._lock:
            self._runs.pop(number, None)
            self._wrong_products += run.lied
            run.lied = False

    def _refuse_after_lies(self, program: Program) -> None:
        """Bounds how often a host may try its luck against the checks.

        Raises:
          IntegrityError: it tried too often in this session.
        """
        if program.verify and self._wrong_products >= MAX_WRONG_PRODUCTS:
            raise IntegrityError(self._too_many_lies)

    @property
    def _too_many_lies(self) -> str:
        return (
            f"{self._wrong_products} wrong products came back in this session: it runs nothing "
            "that verifies any more. Find out which device lies, and launch a new enclave"
        )

    def _commit(self, fields: dict[str, Any], _: bytes) -> dict[str, Any]:
        run = self._run(fields)
        donate = fields["donate"]
        if not isinstance(donate, list) or not all(_is_index(i, len(run.handles)) for i in donate):
            raise RequestError("a commit donates inputs by their positions")
        self._refuse_after_lies(run.program)
        handles = run.commit(self._store)
        for index in donate:
            handle = run.handles[index]
            if handle is not None:
                self._store.free(handle)
        self._end(fields["run"], run)
        with self._lock:
            self._busy_seconds += run.busy_seconds
            self._blindings += run.blindings
        return {"handles": handles}

    def _abort(self, fields: dict[str, Any], _: bytes) -> dict[str, Any]:
        run = self._runs.get(fields["run"])
        if run is not None:
            # A check that is going on counts first; only then is the run's place free.
            if run.fail(RunError("the host aborted the run")):
                self._end(fields["run"], run)
        return {}

    # Values

    def _open(self, fields: dict[str, Any], attachment: bytes) -> Answer:
        """Encrypts a value to the client, at `offset`; a blinded one is read there first.

        Without an arena both travel as attachments: a client on another machine shares no memory,
        and brings a blinded value from the file in which the host sent it.
        """
        if "arena" not in fields:
            return {}, self._opened(self._store.get(fields["handle"]), attachment)
        arena, offset = self._arena(fields), fields["offset"]
        value = self._value(fields, self._store.get(fields["handle"]).array)
        encrypted = encryption.encrypt_array(self._keys.to_client, value, self._identity)
        np.copyto(arena.view(ArrayType(encrypted.shape, "uint8"), offset), encrypted)
        return {}

    def _opened(self, entry: Resident | Blinded, content: bytes) -> bytes:
        """A value encrypted to the client; the content of a blinded one comes from it."""
        if isinstance(entry, Blinded):
            if len(content) != entry.array.nbytes:
                raise RequestError(
                    f"a blinded value of {entry.array.nbytes} bytes comes with {len(content)}"
                )
            blinded = np.frombuffer(content, np.dtype(entry.array.dtype)).reshape(entry.array.shape)
            value = self._unblinded(entry, blinded)
        else:
            value = entry.value
        return encryption.encrypt_array(
            self._keys.to_client, np.asarray(value), self._identity
        ).tobytes()

    def _value(self, fields: dict[str, Any], array: ArrayType) -> np.ndarray:
        """A sealed value in the clear, whatever its form; what the host holds of it is at `offset`.

        Args:
          fields: of the request; without a `handle`, the value is the client's ciphertext.
          array: its shape and dtype.
        """
        arena, offset = self._arena(fields), fields["offset"]
        if "handle" not in fields:
            return np.asarray(self._decrypted(arena, array, offset))
        entry = self._store.get(fields["handle"])
        if entry.array != array:
            raise RequestError(
                f"a sealed value is {entry.array.dtype}{list(entry.array.shape)}, expected "
                f"{array.dtype}{list(array.shape)}"
            )
        if isinstance(entry, Blinded):
            return np.asarray(self._unblinded(entry, private_copy(arena.view(entry.array, offset))))
        return np.asarray(entry.value)

    def _unblinded(self, entry: Blinded, blinded: np.ndarray) -> jax.Array:
        """A value that comes back from the devices, held to its checksum if it has one.

        Args:
          entry: its keys.
          blinded: a private copy: the host may change shared memory after it was checked.

        Raises:
          IntegrityError: it is another one, or too many wrong ones came back before.
          RequestError: too much that may bring a wrong one is going on.
        """
        if entry.checksum is not None:
            with self._attempt():
                checksum.check_leaf(entry.checksum, blinded, entry.source)
        return entry.scheme.unblind(blinded, entry.layout, entry.keys, operands=None)

    def _free(self, fields: dict[str, Any], _: bytes) -> dict[str, Any]:
        for handle in fields["handles"]:
            self._store.free(handle)
        return {}

    def _calibrate(self, _: dict[str, Any], __: bytes) -> dict[str, Any]:
        # Once: client and host must make the same plan from the same figures.
        with self._measuring:
            if self._costs is None:
                self._costs = timing.measure()
            return self._costs

    def _statistics(self, _: dict[str, Any], __: bytes) -> dict[str, Any]:
        return {
            "handles": len(self._store),
            "runs": len(self._runs),
            "programs": len(self._programs),
            "peak_memory_bytes": _peak_memory(),
            "busy_seconds": self._busy_seconds,
            "blindings": self._blindings,
            "wrong_products": self._wrong_products,
            "process": os.getpid(),
        }


def _peak_memory(path: str = "/proc/self/status") -> int:
    """Most resident memory so far, in bytes; `getrusage` would start from the parent's size."""
    with open(path) as status:
        fields = dict(line.split(":", 1) for line in status)
    # Gramine tells the most that was mapped, and nothing else.
    return int((fields.get("VmHWM") or fields["VmPeak"]).split()[0]) * 1024


def _split(content: bytes, size: Any) -> tuple[bytes, bytes]:
    """The first `size` bytes, and the rest."""
    if not _is_index(size, len(content) + 1):
        raise RequestError("an attachment is shorter than what it is said to hold")
    return content[:size], content[size:]


def _is_index(value: Any, count: int) -> bool:
    return type(value) is int and 0 <= value < count
