"""Runs a plan: begin, the host program with its visits to the enclave, commit.

Untrusted. Two ways lead here: a call outside `jit`, which runs the compiled host program on a
thread (so that Ctrl-C is heard at once) and commits when it has succeeded; and a call inside the
user's own `jit` or `scan`, where begin and commit are callbacks as well. A failed, interrupted or
abandoned run commits nothing.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from enclave_runtime.protocol.memory import Arena, input_bytes
from enclave_runtime.protocol.program import DEVICE, ArrayType
from enclave_runtime.protocol.wire import Kind
from tempo_jax.enclave.enclave import Enclave
from tempo_jax.errors import EnclaveError, TempoError
from tempo_jax.jaxprs import opaque
from tempo_jax.jaxprs import types as jaxpr_types
from tempo_jax.planning.mesh import local_shape, sharded_axis
from tempo_jax.planning.plan import Plan, offloaded
from tempo_jax.running.host_program import HostResult, build_host_program
from tempo_jax.running.observation import HostView, Product
from tempo_jax.running.provisioning import provisioned
from tempo_jax.sealing.array import (
    BLINDED,
    ENCRYPTED,
    RESIDENT,
    SealedArray,
    handle_array,
    handle_text,
    handle_words,
    is_sealed,
)


@dataclasses.dataclass
class _Run:
    """A run in progress, as the host knows it."""

    number: int
    arena: Arena
    raises: bool
    views: Sequence[HostView] = ()
    failure: BaseException | None = None
    reserved: tuple[str, Arena] | None = None


@dataclasses.dataclass
class Traffic:
    """Tensor bytes that crossed since the plan was made.

    Attributes:
      up: bytes from the host to the enclave.
      down: bytes from the enclave to the host.
      round_trips: visits to the enclave.
      runs: committed runs.
    """

    up: int = 0
    down: int = 0
    round_trips: int = 0
    runs: int = 0


class Runtime:
    """A provisioned plan."""

    def __init__(self, plan: Plan, enclave: Enclave, mesh: Mesh | None):
        self.plan = plan
        self.traffic = Traffic()
        self._enclave = enclave
        self._mesh = mesh
        self._workers = 1 if mesh is None else mesh.size
        self._device = _default_device() if mesh is None else mesh.devices.flat[0]
        self._runs: dict[int, _Run] = {}
        self._compiled: dict[bool, Any] = {}
        self._lock = threading.Lock()
        self._threads = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="tempo_jax")
        self._program, self._number = provisioned(plan, enclave)
        weakref.finalize(self, enclave.release, self._number)

    @property
    def digest(self) -> str:
        """The hash of what the enclave was told."""
        return self._program.digest

    # The host program

    def _host_program(self, observe: bool) -> Any:
        with self._lock:
            if observe not in self._compiled:
                # XLA holds what a program calls, out of the collector's sight.
                this = weakref.proxy(self)
                function = build_host_program(
                    self.plan, lambda *visit: this._exchange(*visit), self._mesh, observe
                )
                run = jax.ShapeDtypeStruct((), np.uint32)
                leaves = [
                    jax.ShapeDtypeStruct(p.array.shape, np.dtype(p.array.dtype))
                    for p in self._program.inputs
                    if p.place == DEVICE
                ]
                jitted = jax.jit(function, in_shardings=self._sharding(), keep_unused=True)
                self._compiled[observe] = jitted.lower(run, leaves).compile()
            return self._compiled[observe]

    def _sharding(self) -> Any:
        if self._mesh is None:
            return jax.sharding.SingleDeviceSharding(self._device)
        return NamedSharding(self._mesh, PartitionSpec())

    def _exchange(
        self, number: int, worker: int, index: int, uploads: Sequence[np.ndarray]
    ) -> Sequence[np.ndarray]:
        """One worker's visit; see `_host_program.Exchange`.

        JAX leaves an exception inside a callback undefined, so outside a user's jit a failure
        is remembered, the result poisoned, and the error raised when the program has ended.
        """
        run = self._runs.get(number)
        segment = self._program.segments[index]
        try:
            if run is None:
                raise EnclaveError("the run is over; JAX repeated one of its callbacks too late")
            if run.failure is not None:
                raise run.failure
            return self._visit(run, worker, index, uploads)
        except BaseException as error:
            if run is None:
                raise
            if run.raises:
                self._abort(run)
                if run.reserved is not None:
                    # Not given back: another worker may still write to it.
                    self._enclave.connection.discard(run.reserved)
                raise
            run.failure = run.failure or error
            # Wakes the other workers, who wait in the enclave for this one.
            self._tell_aborted(run)
            return [_poison(self._local(c.blinded, c.layout)) for c in segment.downloads]

    def _local(self, array: ArrayType, layout: Any) -> ArrayType:
        shape = local_shape(array.shape, layout, self.plan.sharded, self._workers)
        return ArrayType(shape, array.dtype)

    def _part(self, run: _Run, crossing: Any, worker: int) -> tuple[np.ndarray, bool]:
        """A worker's part of a crossing in shared memory, and whether it is split at all."""
        view = run.arena.view(crossing.blinded, crossing.offset)
        axis = sharded_axis(crossing.layout, self.plan.sharded)
        if axis is None:
            return view, False
        size = crossing.blinded.shape[axis] // self._workers
        part = slice(worker * size, (worker + 1) * size)
        return view[(slice(None),) * axis + (part,)], True

    def _visit(
        self, run: _Run, worker: int, index: int, uploads: Sequence[np.ndarray]
    ) -> Sequence[np.ndarray]:
        segment = self._program.segments[index]
        for crossing, array in zip(segment.uploads, uploads, strict=True):
            part, split = self._part(run, crossing, worker)
            if split or worker == 0:
                np.copyto(part, array)
                self.traffic.up += part.nbytes
        fields = {"run": run.number, "segment": index, "worker": worker}
        self._enclave.connection.request(Kind.SEGMENT, fields)
        downloads = []
        for crossing in segment.downloads:
            part, split = self._part(run, crossing, worker)
            # The CPU backend copies before the callback's memory is reused; others may not.
            downloads.append(part if self._device.platform == "cpu" else part.copy())
            if split or worker == 0:
                self.traffic.down += part.nbytes
        if worker == 0:
            self.traffic.round_trips += 1
            for view in run.views:
                for c in (*segment.uploads, *segment.downloads):
                    view.crossings.append((view.steps, run.arena.view(c.blinded, c.offset).copy()))
        return downloads

    # Begin and commit

    def _begin(
        self, name: str, arena: Arena, inputs: Sequence[Any], raises: bool
    ) -> tuple[_Run, dict[int, np.ndarray]]:
        """Starts a run.

        Args:
          name: the shared memory's name.
          arena: the shared memory.
          inputs: for each port a `SealedArray` of concrete children, or a public array.
          raises: whether visits raise, as they must inside a user's jit.

        Returns:
          The run, and device-resident inputs that the enclave blinded, by position.
        """
        given: list[dict[str, Any]] = []
        offsets, offset = [], 0
        for port, x in zip(self._program.inputs, inputs, strict=True):
            offsets.append(offset)
            offset += input_bytes(port.array)
            if is_sealed(x) and x.form != ENCRYPTED:
                given.append({"handle": handle_text(x.handle)})
                continue
            content = np.asarray(x.content) if is_sealed(x) else np.asarray(x)
            place = ArrayType(content.shape, content.dtype.name)
            np.copyto(arena.view(place, offsets[-1]), content)
            given.append({"offset": offsets[-1]})
        request = self._enclave.connection.request
        fields = {"program": self._number, "arena": name, "workers": self._workers}
        reply = request(Kind.BEGIN, {**fields, "inputs": given, "blind_at": offsets})
        run = _Run(reply["run"], arena, raises)
        self._runs[run.number] = run
        try:
            blinded = self._take(arena, reply["download"], offsets)
            if reply["upload"]:
                blinded.update(self._settle(run, inputs, reply["upload"], offsets))
        except BaseException:
            self._abort(run)
            raise
        return run, blinded

    def _settle(
        self, run: _Run, inputs: Sequence[Any], positions: Sequence[int], offsets: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """Brings leaves that lie on the devices but are wanted inside, or under other keys."""
        moving = {str(i): offsets[i] for i in positions}
        for i in positions:
            port = self._program.inputs[i]
            np.copyto(run.arena.view(port.array, offsets[i]), np.asarray(inputs[i].content))
        fields = {"run": run.number, "offsets": moving, "blind_at": moving}
        reply = self._enclave.connection.request(Kind.SETTLE, fields)
        return self._take(run.arena, reply["download"], offsets)

    def _take(
        self, arena: Arena, positions: Sequence[int], offsets: Sequence[int]
    ) -> dict[int, np.ndarray]:
        inputs = self._program.inputs
        return {i: arena.view(inputs[i].array, offsets[i]).copy() for i in positions}

    def _commit(self, run: _Run, donated: Sequence[int]) -> list[str]:
        fields = {"run": run.number, "donate": list(donated)}
        handles = self._enclave.connection.request(Kind.COMMIT, fields)["handles"]
        self._runs.pop(run.number, None)
        self.traffic.runs += 1
        return handles

    def _abort(self, run: _Run) -> None:
        run.failure = run.failure or EnclaveError("the run was aborted")
        self._tell_aborted(run)
        self._runs.pop(run.number, None)

    def _tell_aborted(self, run: _Run) -> None:
        with contextlib.suppress(TempoError):
            self._enclave.connection.request(Kind.ABORT, {"run": run.number})

    # A call outside jit

    def call(
        self, inputs: Sequence[Any], types: Sequence[Any], views: Sequence[HostView]
    ) -> list[Any]:
        """Runs the plan on concrete inputs.

        Args:
          inputs: one for each port: `SealedArray`, or the array itself where public.
          types: abstract values of the flat outputs.
          views: recordings to fill.

        Returns:
          The flat outputs: arrays where revealed, else `SealedArray`.
        """
        self._enclave.free_dropped()
        program = self._host_program(observe=bool(views))
        with self._enclave.arena(self._program.arena_bytes) as (name, arena):
            run, blinded = self._begin(name, arena, inputs, raises=False)
            run.views = views
            try:
                leaves = [
                    jax.device_put(blinded[i] if i in blinded else x.content, self._sharding())
                    for i, (port, x) in enumerate(zip(self._program.inputs, inputs, strict=True))
                    if port.place == DEVICE
                ]
                result = self._run_interruptibly(program, run, leaves)
                handles = self._commit(run, ())
            except BaseException:
                self._abort(run)
                raise
        for view in views:
            self._record(view, result, leaves)
        return self._outputs(result, [handle_array(h) for h in handles], types)

    def _run_interruptibly(self, program: Any, run: _Run, leaves: list[Any]) -> HostResult:
        """Runs on another thread: the main thread could not hear Ctrl-C inside XLA."""
        future = self._threads.submit(
            lambda: jax.block_until_ready(program(np.uint32(run.number), leaves))
        )
        try:
            result = future.result()
        except BaseException:
            # Wakes the program, which may be waiting for the enclave, and lets it run out. The run
            # stays known meanwhile: a visit that does not find it would have to raise.
            run.failure = run.failure or EnclaveError("the run was interrupted")
            self._tell_aborted(run)
            while not future.done():
                # A second Ctrl-C must not leave it running on memory that is given away.
                with contextlib.suppress(KeyboardInterrupt):
                    concurrent.futures.wait([future])
            raise
        if run.failure is not None:
            raise run.failure
        return result

    def _outputs(
        self, result: HostResult, handles: Sequence[Any], types: Sequence[Any]
    ) -> list[Any]:
        outputs: list[Any] = [None] * len(types)
        for position, value in zip(self.plan.revealed, result.revealed, strict=True):
            outputs[position] = jaxpr_types.from_physical(value, types[position])
        blinded = iter(result.on_devices)
        for position, port, handle in zip(
            self.plan.sealed, self._program.outputs, handles, strict=True
        ):
            aval = types[position]
            on_device = port.place == DEVICE
            children = (next(blinded), handle) if on_device else (handle,)
            outputs[position] = SealedArray(
                children,
                BLINDED if on_device else RESIDENT,
                aval.shape,
                aval.dtype,
                aval.weak_type,
                self._enclave.session,
            )
        return outputs

    def _record(self, view: HostView, result: HostResult, leaves: Sequence[Any]) -> None:
        eqns = {number: eqn for number, eqn in offloaded(self.plan)}
        order = [e.number for e in self.plan.cut.host if e.number in eqns]
        # The host program evaluates by level, so its order need not be the program's.
        order.sort(key=lambda n: self.plan.cut.levels[eqns[n].outvars[0]])
        for number, (operands, product) in zip(order, result.observed, strict=True):
            eqn = eqns[number]
            lhs, rhs = (np.asarray(x) for x in operands)
            params = dict(eqn.params)
            view.products.append(
                Product(view.steps, number, eqn.primitive, params, (lhs, rhs), np.asarray(product))
            )
        view.revealed += [(view.steps, np.asarray(x)) for x in result.revealed]
        view.leaves += [(view.steps, np.asarray(x)) for x in leaves]
        view.steps += 1

    # A call inside the user's own jit or scan

    def trace(
        self, inputs: Sequence[Any], types: Sequence[Any], donated: Sequence[int]
    ) -> list[Any]:
        """Stages the plan into the surrounding trace; see `call`.

        Args:
          inputs: one for each port: `SealedArray` of tracers, or a public tracer.
          types: abstract values of the flat outputs.
          donated: positions of inputs that the run consumes.
        """
        leaves, structure = jax.tree.flatten(list(inputs))
        leaves = [opaque.words_of(x) for x in leaves]
        ports = self._program.inputs
        # Keys with a budget may run out in any run, and checksums do; the leaves come back anew.
        request = self.plan.request
        renewed = request.verify or request.scheme.key_budget is not None
        arriving = [
            i
            for i, (port, x) in enumerate(zip(ports, inputs, strict=True))
            if port.place == DEVICE and (x.form != BLINDED or renewed)
        ]
        results = (
            jax.ShapeDtypeStruct((), np.uint32),
            *(
                jax.ShapeDtypeStruct(ports[i].array.shape, np.dtype(ports[i].array.dtype))
                for i in arriving
            ),
        )

        def begin(*flat: Any) -> tuple[Any, ...]:
            concrete = jax.tree.unflatten(structure, [np.asarray(x) for x in flat])
            self._enclave.free_dropped()
            reserved: tuple[str, Arena] = self._enclave.connection.reserve(
                self._program.arena_bytes
            )
            try:
                run, blinded = self._begin(*reserved, concrete, raises=True)
            except BaseException:
                self._enclave.connection.give_back(reserved)
                raise
            run.reserved = reserved
            given = {i: concrete[i].content for i in arriving if concrete[i].form == BLINDED}
            blinded = given | blinded
            if set(blinded) != set(arriving):
                self._abort(run)
                self._enclave.connection.give_back(reserved)
                raise EnclaveError(
                    "a device-resident leaf lies under keys that do not fit this function's other "
                    "leaves. Call the function once outside jit, which blinds it again."
                )
            return np.uint32(run.number), *(blinded[i] for i in arriving)

        number, *blinded = jax.pure_callback(begin, results, *leaves)
        fresh = dict(zip(arriving, blinded, strict=True))
        resident = [
            fresh[i] if i in fresh else x.content
            for i, (port, x) in enumerate(zip(ports, inputs, strict=True))
            if port.place == DEVICE
        ]
        function = build_host_program(self.plan, self._exchange, self._mesh, observe=False)
        result = function(number, resident)

        def commit(number: Any, token: Any, *revealed: Any) -> Any:
            run = self._runs.get(int(number))
            if run is None:
                raise EnclaveError("the run is over; JAX repeated one of its callbacks too late")
            assert run.reserved is not None
            try:
                handles = self._commit(run, donated)
            except BaseException:
                self._abort(run)
                raise
            finally:
                # No worker is under way any more.
                self._enclave.connection.give_back(run.reserved)
            named = np.stack(
                [handle_words(h) for h in handles] or [np.zeros(opaque.WORDS, np.uint32)]
            )
            return named, *(np.asarray(x) for x in revealed)

        count = max(1, len(self._program.outputs))
        # What is revealed passes through: JAX drops a callback on which nothing depends.
        handles, *revealed = jax.pure_callback(
            commit,
            (
                jax.ShapeDtypeStruct((count, opaque.WORDS), np.uint32),
                *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in result.revealed),
            ),
            number,
            result.token,
            *result.revealed,
        )
        result = dataclasses.replace(result, revealed=list(revealed))
        named = [
            opaque.opaque(lax.index_in_dim(handles, i, keepdims=False))
            for i in range(len(self._program.outputs))
        ]
        return self._outputs(result, named, types)


def _poison(array: ArrayType) -> np.ndarray:
    dtype = np.dtype(array.dtype)
    floating = jnp.issubdtype(dtype, jnp.floating)
    return np.full(array.shape, np.nan if floating else 0, dtype)


def _default_device() -> Any:
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]
