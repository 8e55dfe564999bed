"""Runs a plan: begin, the host program with its visits to the enclave, commit.

Untrusted. Two ways lead here: a call outside `jit`, which runs the compiled host program on a
thread (so that Ctrl-C is heard at once) and commits when it has succeeded; and a call inside the
user's own `jit` or `scan`, where begin and commit are calls into Python as well. Both work on one
`running.host_run.HostRun`, which owns the shared memory. A failed, interrupted or abandoned run
commits nothing.

Inside the user's program a visit that fails raises, unless the program runs on a mesh: there a
worker that raised alone would be missed in the next collective. So its visits go on with poison,
and all workers raise together when the run is to commit, see `running.together`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from enclave_runtime.protocol.memory import Shares
from enclave_runtime.protocol.program import DEVICE
from enclave_runtime.protocol.tags import Rules
from tempo_jax.enclave.enclave import Enclave
from tempo_jax.errors import CheckError, EnclaveError, UnsupportedError, remember
from tempo_jax.jaxprs import opaque
from tempo_jax.jaxprs import types as jaxpr_types
from tempo_jax.jaxprs.callbacks import call as call_python
from tempo_jax.jaxprs.trace import local_settings, mesh_around, without_internals, without_mesh
from tempo_jax.planning.plan import Plan, offloaded
from tempo_jax.running.expectation import Expectation
from tempo_jax.running.host_program import HostResult, build_host_program, leaf_specs
from tempo_jax.running.host_run import HostRun
from tempo_jax.running.observation import HostView, Product, add_product
from tempo_jax.running.provisioning import provisioned
from tempo_jax.running.served import Served, Traffic
from tempo_jax.running.spanning import devices_of, spread, started
from tempo_jax.running.together import Together
from tempo_jax.sealing.array import (
    BLINDED,
    RESIDENT,
    SealedArray,
    handle_array,
    handle_words,
    is_sealed,
    no_handle,
)
from tempo_jax.sealing.handles import Lying

_RUN_OUT_SECONDS = 0.5  # that an interrupted program gets to end while its caller waits

# What runs keep for callbacks that come late is little, and names no memory.
_OVER = "the run is over; JAX repeated one of its callbacks too late"


class Runtime:
    """A provisioned plan.

    Attributes:
      plan: the plan.
      provisioned: its program in the enclave.
    """

    def __init__(
        self,
        plan: Plan,
        enclave: Enclave,
        mesh: Mesh | None,
        labels: Callable[[], Sequence[str]],
        rules: Rules,
        expectation: Expectation,
    ):
        """Provisions a plan under `rules`; see `Served` for `labels` and `expectation`."""
        self.plan = plan
        self._enclave = enclave
        self._mesh = mesh
        self._device = first_device(mesh)
        self._runs: dict[int, HostRun] = {}
        self._compiled: dict[bool, Any] = {}
        self._lock = threading.Lock()
        self._call_python = call_python if mesh is None else Together(mesh).call
        self.provisioned = provisioned(plan, enclave, rules)
        self._program, number = self.provisioned.program, self.provisioned.number
        self._processes = enclave.processes
        weakref.finalize(self, enclave.release, number)
        shares = None
        if self._processes is not None and mesh is not None:
            shares = Shares(plan.sharded, devices_of(mesh, self._processes), plan.pools)
        self._served = Served(
            enclave.connection,
            self._program,
            number,
            plan.sharded,
            1 if mesh is None else mesh.size,
            self._device.platform == "cpu",
            labels,
            plan.request.scheme.device_pools,
            shares,
            self._processes,
            expectation,
        )

    @property
    def digest(self) -> str:
        """The hash of what the enclave was told."""
        return self._program.digest

    @property
    def traffic(self) -> Traffic:
        """What crossed in this plan's runs."""
        return self._served.traffic

    # The host program

    def _host_program(self, observe: bool) -> Any:
        with self._lock:
            if observe not in self._compiled:
                # XLA holds what a program calls, out of the collector's sight.
                visits = _Poisoned(weakref.proxy(self))
                function = build_host_program(self.plan, visits, self._mesh, observe)
                run = jax.ShapeDtypeStruct((), np.uint32)
                leaves = [
                    jax.ShapeDtypeStruct(p.array.shape, np.dtype(p.array.dtype))
                    for p in self._program.inputs
                    if p.place == DEVICE
                ]
                jitted = jax.jit(function, in_shardings=self._shardings(), keep_unused=True)
                with without_mesh():  # its own is in its shardings
                    self._compiled[observe] = jitted.lower(run, leaves).compile()
            return self._compiled[observe]

    def _sharding(self) -> Any:
        if self._mesh is None:
            return jax.sharding.SingleDeviceSharding(self._device)
        return NamedSharding(self._mesh, PartitionSpec())

    def _shardings(self) -> tuple[Any, list[Any]]:
        """Of the run's number, and of each device-resident leaf."""
        if self._mesh is None:
            return self._sharding(), [self._sharding()] * len(self.plan.placement.resident)
        (axis,) = self._mesh.axis_names
        specs = leaf_specs(self.plan, axis)
        return self._sharding(), [NamedSharding(self._mesh, spec) for spec in specs]

    # Visits, see `running.host_program.Visits`

    def _bring(self, run: HostRun, worker: int, index: int, uploads: Sequence[np.ndarray]) -> None:
        run.bring(worker, index, uploads)

    def _fetch(self, run: HostRun, worker: int, index: int) -> Sequence[np.ndarray]:
        return run.fetch(worker, index)

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
        if views and self._processes is not None:
            raise UnsupportedError(
                "host_view records what one process sees; look at the step with a mesh of one "
                "process's devices and an enclave of its own"
            )
        program = self._host_program(observe=bool(views))
        for view in views:
            missing = self._served.pools - len(view.pools) if self._served.pools > 1 else 0
            view.pools += [HostView() for _ in range(missing)]
        run = HostRun(self._served, views)
        try:
            blinded = started(run, inputs, self.digest, self._processes)
            result, leaves = self._run_interruptibly(
                program, run, lambda: self._placed(inputs, blinded)
            )
            self._raise_failed_check(result.revealed)
            handles = [handle_array(h) for h in run.commit(())]
        except BaseException as error:
            run.abort(error)
            if self._processes is None or (found := self._processes.explain(error)) is error:
                raise
            raise found from error
        for view in views:
            self._record(view, result, leaves)
        if self._processes is not None and self._processes.leads:
            self._processes.forget_calls()
        return self._outputs(
            result, handles or [no_handle() for _ in self._program.outputs], types, {}
        )

    def _placed(
        self, inputs: Sequence[Any], blinded: Mapping[int, np.ndarray | None]
    ) -> list[jax.Array]:
        """The device-resident inputs on the devices."""
        leaves = []
        shardings = iter(self._shardings()[1])
        for i, (port, x) in enumerate(zip(self._program.inputs, inputs, strict=True)):
            if port.place != DEVICE:
                continue
            sharding = next(shardings)
            if i in blinded and self._processes is not None and self._mesh is not None:
                leaves.append(spread(self._mesh, port.array, blinded[i], sharding))
            else:
                content = blinded[i] if i in blinded else x.content
                leaves.append(jax.device_put(content, sharding))
        return leaves

    def _run_interruptibly(
        self, program: Any, run: HostRun, place: Callable[[], list[jax.Array]]
    ) -> tuple[HostResult, list[jax.Array]]:
        """Runs on another thread: the main thread could not hear Ctrl-C inside XLA.

        An interrupted program runs out on its own, with poisoned values, and is waited for only
        briefly; its run stays known meanwhile, since a visit that does not find it has to raise.
        """
        self._runs[run.number] = run
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        settings = local_settings()

        def work() -> None:
            try:
                with settings():
                    leaves = place()
                    result = jax.block_until_ready(program(np.uint32(run.number), leaves))
                future.set_result((result, leaves))
            except BaseException as error:
                future.set_exception(without_internals(error))
            finally:
                self._runs.pop(run.number, None)

        self._enclave.runs(future)
        try:
            # No pool: its threads would outlive the function, and keep the interpreter from ending.
            threading.Thread(target=work, name="tempo_jax run", daemon=True).start()
            either: list[concurrent.futures.Future[Any]] = [future, run.failed]
            concurrent.futures.wait(either, return_when="FIRST_COMPLETED")
            failure = run.failure
            if failure is None:
                return future.result()
        except BaseException as error:
            failure = error
            run.abort(error)
        concurrent.futures.wait([future], _RUN_OUT_SECONDS)
        raise failure

    def _raise_failed_check(self, revealed: Sequence[Any]) -> None:
        """Raises what a check of the program found, before anything is committed.

        Raises:
          CheckError: one failed.
        """
        if not self.plan.checks:
            return
        number, message = map(int, np.asarray(revealed[-1]))
        if number:
            check = self.plan.checks[number - 1]
            raise CheckError(
                f"shield: the check at {check.where} failed: {check.message(message)!r}. Nothing "
                "was committed; the arguments are as they were"
            )

    def _outputs(
        self,
        result: HostResult,
        handles: Sequence[Any],
        types: Sequence[Any],
        alike: Mapping[int, SealedArray],
    ) -> list[Any]:
        """The flat outputs; those in `alike` are declared as the values there are."""
        outputs: list[Any] = [None] * len(types)
        for position, value in zip(self.plan.revealed, result.revealed, strict=True):
            if position == len(types):  # what the checks found
                continue
            outputs[position] = jaxpr_types.from_physical(value, types[position])
        blinded = iter(result.on_devices)
        for position, port, handle in zip(
            self.plan.sealed, self._program.outputs, handles, strict=True
        ):
            aval = types[position]
            on_device = port.place == DEVICE
            content = next(blinded) if on_device else None
            if position in alike:
                outputs[position] = alike[position].declared_alike(content, handle)
                continue
            children = (content, handle) if on_device else (handle,)
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
        for (number, eqn), (operands, product) in zip(
            offloaded(self.plan), result.observed, strict=True
        ):
            lhs, rhs = (np.asarray(x) for x in operands)
            params = dict(eqn.params)
            add_product(
                view,
                Product(view.steps, number, eqn.primitive, params, (lhs, rhs), np.asarray(product)),
            )
        view.revealed += [(view.steps, np.asarray(x)) for x in result.revealed]
        view.leaves += [(view.steps, np.asarray(x)) for x in leaves]
        view.steps += 1
        for pool in view.pools:
            pool.revealed, pool.steps = view.revealed, view.steps

    # A call inside the user's own jit or scan

    def trace(
        self, inputs: Sequence[Any], types: Sequence[Any], donated: Sequence[int]
    ) -> list[Any]:
        """Stages the plan into the surrounding trace; see `call`.

        Args:
          inputs: one for each port: `SealedArray` of tracers, or a public tracer.
          types: abstract values of the flat outputs.
          donated: positions of inputs that the run consumes.

        Raises:
          UnsupportedError: the mesh spans processes, or the program runs on a mesh and this not.
        """
        if self._mesh is None and (devices := mesh_around()) > 1:
            raise UnsupportedError(
                f"shield: inside jit, scan or another transformation under `jax.set_mesh` of "
                f"{devices} devices a shielded function needs a mesh as well. Give it that mesh, "
                "`tempo.shield(..., mesh=mesh)`, or call it outside jit, in a Python loop"
            )
        if self._processes is not None:
            raise UnsupportedError(
                "shield: inside jit, scan or another transformation a mesh is one process's, and "
                f"this one spans {self._processes.count}. Call the shielded function outside, in a "
                "Python loop: it is compiled as it is"
            )
        carried = {o: i for i, o in self.plan.request.carried.items() if is_sealed(inputs[i])}
        alike = {o: inputs[carried[o]] for o in self.plan.sealed if o in carried}
        number, resident = self._stage_begin(inputs, alike)
        visits = _Raising(self) if self._mesh is None else _Poisoned(self)
        function = build_host_program(self.plan, visits, self._mesh, observe=False)
        result = function(number, resident)
        result, handles = self._stage_commit(number, result, types, donated, alike)
        return self._outputs(result, handles, types, alike)

    def _stage_begin(
        self, inputs: Sequence[Any], alike: Mapping[int, SealedArray]
    ) -> tuple[Any, list[Any]]:
        """The run's number, and its device-resident inputs, as tracers."""
        leaves, structure = jax.tree.flatten(list(inputs))
        leaves = [opaque.words_of(x) for x in leaves]
        # Keys with a budget may run out in any run, and checksums do; the leaves come back anew.
        request = self.plan.request
        renewed = request.verify or request.scheme.key_budget is not None
        resident = {i: x for i, x in enumerate(inputs) if self._is_on_devices(i)}
        # What returns to the enclave, declared as what it was, comes from there the next time.
        places = dict(zip(self.plan.sealed, (p.place for p in self._program.outputs), strict=True))
        leaving = {i for i, o in request.carried.items() if o in alike and places[o] != DEVICE}
        arriving = [i for i, x in resident.items() if x.form != BLINDED or renewed or i in leaving]
        arrays = [self._program.inputs[i].array for i in arriving]
        results = [jax.ShapeDtypeStruct(a.shape, np.dtype(a.dtype)) for a in arrays]

        def begin(*flat: np.ndarray) -> list[np.ndarray]:
            concrete = jax.tree.unflatten(structure, flat)
            run, blinded = self._begin(concrete, arriving)
            return [np.asarray(run.number, np.uint32), *(blinded[i] for i in arriving)]

        number, *blinded = self._call_python(
            begin, [jax.ShapeDtypeStruct((), np.uint32), *results], *leaves
        )
        fresh = dict(zip(arriving, blinded, strict=True))
        return number, [fresh.get(i, x.content) for i, x in resident.items()]

    def _is_on_devices(self, position: int) -> bool:
        return self._program.inputs[position].place == DEVICE

    def _begin(
        self, inputs: Sequence[Any], arriving: Sequence[int]
    ) -> tuple[HostRun, dict[int, np.ndarray]]:
        """Starts a run; returns it with the device-resident inputs that are to arrive."""
        self._enclave.free_dropped()
        try:
            run = HostRun(self._served)
        except BaseException as error:
            remember(error)
            raise
        with self._ending(run):
            blinded = run.begin(inputs)
            given = {i: inputs[i].content for i in arriving if inputs[i].form == BLINDED}
            blinded = given | blinded
            if set(blinded) != set(arriving):
                raise EnclaveError(
                    "a device-resident leaf lies under keys that do not fit this function's other "
                    "leaves. Call the function once outside jit, which blinds it again."
                )
            self._runs[run.number] = run
        for text in run.handles.values():
            self._enclave.handles.used(text)
        return run, blinded

    def _stage_commit(
        self,
        number: Any,
        result: HostResult,
        types: Sequence[Any],
        donated: Sequence[int],
        alike: Mapping[int, SealedArray],
    ) -> tuple[HostResult, list[Any]]:
        """The result, and the sealed outputs' handles, as tracers that depend on the commit."""
        ports = self._program.outputs
        blinded = iter(result.on_devices)
        contents = {i: next(blinded) for i, port in enumerate(ports) if port.place == DEVICE}
        # What its array is not declared to be; blinded content that has no room there comes along.
        lying = {}
        for i, position in enumerate(self.plan.sealed):
            found = BLINDED if i in contents else RESIDENT, types[position].weak_type
            if position in alike and not alike[position].declares(*found):
                lying[i] = Lying(*found)
        given = {
            i: x
            for i, x in contents.items()
            if i in lying and not alike[self.plan.sealed[i]].has_room
        }

        def commit(number: np.ndarray, _: Any, *arrays: np.ndarray) -> list[np.ndarray]:
            run = self._known(int(number))
            revealed = arrays[len(given) :]
            with self._ending(run):
                self._raise_failed_check(revealed)
                handles = run.commit(donated)
            self._runs.pop(run.number, None)
            kept = {i: x.copy() for i, x in zip(given, arrays, strict=False)}
            for i in donated:
                if i in run.handles:
                    self._enclave.handles.donated(run.handles[i])
            self._enclave.handles.made(
                {h: port.array.nbytes for h, port in zip(handles, ports, strict=True)},
                {
                    handles[i]: dataclasses.replace(found, content=kept.get(i))
                    for i, found in lying.items()
                },
            )
            named = np.stack(
                [handle_words(h) for h in handles] or [np.zeros(opaque.WORDS, np.uint32)]
            )
            return [named, *revealed]

        count = len(ports)
        # What is revealed passes through: JAX drops a call on which nothing depends.
        handles, *revealed = self._call_python(
            commit,
            [
                jax.ShapeDtypeStruct((max(1, count), opaque.WORDS), np.uint32),
                *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in result.revealed),
            ],
            number,
            result.token,
            *given.values(),
            *result.revealed,
        )
        named = [opaque.opaque(lax.index_in_dim(handles, i, keepdims=False)) for i in range(count)]
        return dataclasses.replace(result, revealed=list(revealed)), named

    def _known(self, number: int) -> HostRun:
        run = self._runs.get(number)
        if run is None:
            raise EnclaveError(_OVER)
        return run

    @contextlib.contextmanager
    def _ending(self, run: HostRun) -> Any:
        """Inside a user's jit: what fails ends the run, and is remembered for `original_errors`."""
        try:
            if run.failure is not None:
                raise run.failure
            yield
        except BaseException as error:
            run.abort(error)
            self._runs.pop(run.number, None)
            remember(error)
            raise


class _Poisoned:
    """Visits outside a user's jit, or on a mesh.

    JAX leaves an exception inside a call into Python undefined, so a failure ends the run, the
    result is poisoned, and whoever would commit raises the error.
    """

    def __init__(self, runtime: Runtime):
        self._runtime = runtime

    def _run(self, number: int) -> HostRun:
        run = self._runtime._runs.get(number)
        if run is None:
            raise EnclaveError(_OVER)
        return run

    def bring(self, run: int, worker: int, index: int, uploads: Sequence[np.ndarray]) -> None:
        """See `running.host_program.Visits`."""
        self._attempt(run, lambda known: self._runtime._bring(known, worker, index, uploads))

    def start(self, run: int, worker: int, index: int) -> None:
        """See `running.host_program.Visits`."""
        self._attempt(run, lambda known: known.start(worker, index))

    def fetch(self, run: int, worker: int, index: int) -> Sequence[np.ndarray]:
        """See `running.host_program.Visits`."""
        found = self._attempt(run, lambda known: self._runtime._fetch(known, worker, index))
        return self._run(run).served.poison(index) if found is None else found

    def _attempt(self, number: int, action: Callable[[HostRun], Any]) -> Any:
        run = self._run(number)
        if run.failure is None:
            try:
                return action(run)
            except BaseException as error:
                run.abort(error)
        return None


class _Raising:
    """Visits on one device inside a user's jit, whose caller only hears of what they raise."""

    def __init__(self, runtime: Runtime):
        self._runtime = runtime

    def bring(self, run: int, worker: int, index: int, uploads: Sequence[np.ndarray]) -> None:
        """See `running.host_program.Visits`."""
        known = self._runtime._known(run)
        with self._runtime._ending(known):
            self._runtime._bring(known, worker, index, uploads)

    def start(self, run: int, worker: int, index: int) -> None:
        """See `running.host_program.Visits`."""
        known = self._runtime._known(run)
        with self._runtime._ending(known):
            known.start(worker, index)

    def fetch(self, run: int, worker: int, index: int) -> Sequence[np.ndarray]:
        """See `running.host_program.Visits`."""
        known = self._runtime._known(run)
        with self._runtime._ending(known):
            return self._runtime._fetch(known, worker, index)


def first_device(mesh: Mesh | None) -> Any:
    """The device that visits come from, or the first of a mesh."""
    if mesh is not None:
        return mesh.devices.flat[0]
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]
