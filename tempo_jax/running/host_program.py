"""The host's program: an ordinary JAX function that visits the enclave between products.

It holds blinded values, scalars of the device-side update and revealed outputs, never a trusted
equation. A token threads through the visits, because JAX may drop, repeat or reorder a call into
Python that nothing ties down. On a mesh the function runs under `jax.shard_map`, and every worker
calls with its own shard: it brings its uploads, the workers meet in a collective, and it fetches
its downloads, so that no call waits for another worker's.

Where there are late products (see `planning.segments`), the enclave begins with what was brought
while the devices compute them, and they are brought before the downloads are fetched. Neither XLA's
scheduler nor a stream of an accelerator would order it so by itself: each late product is a branch
taken on the token that the first call returned, and the fetch is given an element of its result.
What the enclave sends ahead takes no call of its own: it comes with the next downloads. Untrusted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as prims
from jax.sharding import Mesh, PartitionSpec

from enclave_runtime.protocol.memory import sharded_axis
from enclave_runtime.protocol.program import DEVICE, ArrayType
from tempo_jax.jaxprs import equations
from tempo_jax.jaxprs.callbacks import call
from tempo_jax.jaxprs.products import contracted_axes, is_product
from tempo_jax.jaxprs.types import JaxprEqn, Literal, Var
from tempo_jax.planning.mesh import is_elementwise, local_shape
from tempo_jax.planning.plan import Plan, offloaded
from tempo_jax.planning.segments import HostEquation
from tempo_jax.running import integers
from tempo_jax.running.served import fetched_together

_MET = jax.ShapeDtypeStruct((), jnp.int32)  # what a token is


class Visits(Protocol):
    """What the host program does at each segment; all arrays are NumPy's.

    `run` is a run's number, `worker` a device's place in the mesh, `index` a segment's.
    """

    def bring(self, run: int, worker: int, index: int, uploads: Sequence[np.ndarray]) -> None:
        """Hands over one worker's parts of a segment's uploads."""

    def start(self, run: int, worker: int, index: int) -> None:
        """Has the enclave run a segment that every worker has brought, and does not wait."""

    def fetch(self, run: int, worker: int, index: int) -> Sequence[np.ndarray]:
        """One worker's parts of the downloads, when all have brought theirs.

        Behind those that were sent ahead of the segment.
        """
        ...


@dataclasses.dataclass(frozen=True)
class HostResult:
    """What one run gives the host.

    Attributes:
      revealed: the revealed outputs, in order.
      on_devices: the blinded outputs, in the order of the program's `DEVICE` outputs.
      observed: (operands, result) of every offloaded product in the order of `plan.offloaded`, if
        observation was asked for.
      token: depends on every visit of every worker.
    """

    revealed: list[Any]
    on_devices: list[Any]
    observed: list[tuple[list[Any], Any]]
    token: Any


jax.tree_util.register_dataclass(HostResult, ["revealed", "on_devices", "observed", "token"], [])


def build_host_program(
    plan: Plan, visits: Visits, mesh: Mesh | None, observe: bool
) -> Callable[..., HostResult]:
    """Builds the host's function.

    Args:
      plan: the plan.
      visits: to the enclave.
      mesh: devices to run on, with one axis.
      observe: whether to return every offloaded product's operands and result.

    Returns:
      A jittable function of the run's number, uint32[], and the device-resident leaves.
    """
    program = _HostProgram(plan, visits, mesh, observe)
    if mesh is None:
        return program.run
    (axis,) = mesh.axis_names
    return jax.shard_map(
        program.run,
        mesh=mesh,
        in_specs=(PartitionSpec(), leaf_specs(plan, axis)),
        out_specs=program.out_specs(axis),
        check_vma=False,
    )


def leaf_specs(plan: Plan, axis: str) -> list[PartitionSpec]:
    """How the device-resident leaves are spread over the mesh, in the order of their positions."""
    leaves = (plan.jaxpr.invars[i] for i in sorted(plan.placement.resident))
    return [_part_spec(plan.parts.get(v), axis) for v in leaves]


def _part_spec(split: int | None, axis: str) -> PartitionSpec:
    return PartitionSpec() if split is None else PartitionSpec(*[None] * split, axis)


class _Part(NamedTuple):
    """What one worker keeps of a value that is split along an axis."""

    array: Any
    axis: int


class _HostProgram:
    def __init__(self, plan: Plan, visits: Visits, mesh: Mesh | None, observe: bool):
        self.plan = plan
        self.visits = visits
        self.axis = None if mesh is None else mesh.axis_names[0]
        self.workers = 1 if mesh is None else mesh.size
        self.resident = [plan.jaxpr.invars[i] for i in sorted(plan.placement.resident)]
        self._observed = dict(offloaded(plan)) if observe else {}
        self.fetched = {
            index: tuple(v for i in together for v in plan.cut.segments[i].downloads)
            for index, together in fetched_together(plan.program).items()
        }
        self.revealed = [plan.jaxpr.outvars[i] for i in plan.revealed]
        self.on_devices = [
            plan.jaxpr.outvars[i]
            for i, port in zip(plan.sealed, plan.program.outputs, strict=True)
            if port.place == DEVICE
        ]

    # Shards

    def _local(self, v: Any) -> ArrayType:
        blinded = self.plan.blinded(v)
        plan = self.plan
        shape = local_shape(blinded.shape, plan.layout(v), plan.sharded, self.workers, plan.pools)
        return ArrayType(shape, blinded.dtype)

    def _spec(self, v: Any, axis: str) -> PartitionSpec:
        return _part_spec(
            sharded_axis(self.plan.layout(v), self.plan.sharded, self.plan.pools), axis
        )

    def out_specs(self, axis: str) -> HostResult:
        """How the results are spread over the mesh."""
        observed: list[tuple[list[Any], Any]] = []
        for eqn in self._observed.values():
            specs = [self._spec(v, axis) for v in eqn.invars]
            observed.append((specs, self._spec(eqn.outvars[0], axis)))
        return HostResult(
            [PartitionSpec() for _ in self.revealed],
            [
                _part_spec(self.plan.parts[v], axis)
                if v in self.plan.parts
                else self._spec(v, axis)
                for v in self.on_devices
            ],
            observed,
            PartitionSpec(),
        )

    # The function

    def run(self, run: Any, leaves: Sequence[Any]) -> HostResult:
        """One run; see `build_host_program`."""
        plan = self.plan
        worker = jnp.int32(0) if self.axis is None else lax.axis_index(self.axis)
        token = jnp.int32(0)
        values: dict[Any, Any] = {
            v: _Part(x, plan.parts[v]) if v in plan.parts else x
            for v, x in zip(self.resident, leaves, strict=True)
        }
        for eqn in plan.cut.constants:
            values.update(
                zip(eqn.outvars, equations.bind(eqn, _read(eqn.invars, values)), strict=True)
            )
        received: dict[Any, Any] = {}
        observed: dict[int, tuple[list[Any], Any]] = {}
        pending = list(plan.cut.host)
        evaluate = functools.partial(self._equations, values, received, observed)
        segments = plan.cut.segments
        for index, segment in enumerate(segments):
            if segment.beside or segment.ahead:
                continue  # brought with the one before, or fetched with the next
            ready = [e for e in pending if plan.cut.levels[e.eqn.outvars[0]] <= index]
            pending = [e for e in pending if plan.cut.levels[e.eqn.outvars[0]] > index]
            now, late = self._sorted(ready, segment.uploads)
            evaluate(now)
            uploads = [self._whole(values[v]) for v in segment.uploads]
            if not late:
                token, downloads = self._visit(index, run, worker, token, uploads)
            else:
                token = self._start(index, run, worker, token, uploads)
                evaluate(late, token)
                if index + 1 < len(segments) and segments[index + 1].beside:
                    uploads = [self._whole(values[v]) for v in segments[index + 1].uploads]
                    token = self._start(index + 1, run, worker, token, uploads)
                products = [e.eqn.outvars[0] for e in late if e.eqn.outvars[0] in plan.cut.late]
                computed = [values[v] for v in products]
                token, downloads = self._fetch(index, run, worker, token, computed)
            received.update(zip(self.fetched[index], downloads, strict=True))
        evaluate(pending)
        if self.axis is not None:  # a commit must not overtake another worker's last visit
            token = lax.psum(token, self.axis)
        return HostResult(
            [received[v] for v in self.revealed],
            [
                self._part(values[v], plan.parts[v]) if v in plan.parts else values[v]
                for v in self.on_devices
            ],
            [observed[number] for number in self._observed],
            token,
        )

    def _sorted(
        self, ready: Sequence[HostEquation], uploads: Sequence[Var]
    ) -> tuple[Sequence[HostEquation], Sequence[HostEquation]]:
        """Equations to evaluate before a segment, and those that the enclave need not wait for."""
        behind: set[Var] = set()
        now: list[HostEquation] = []
        late: list[HostEquation] = []
        for equation in ready:
            out = equation.eqn.outvars[0]
            operands = (v for v in equation.eqn.invars if isinstance(v, Var))
            if out in self.plan.cut.late or not behind.isdisjoint(operands):
                behind.add(out)
                late.append(equation)
            else:
                now.append(equation)
        return (now, late) if behind.isdisjoint(uploads) else (ready, ())

    # Visits

    def _visit(
        self, index: int, run: Any, worker: Any, token: Any, uploads: Sequence[Any]
    ) -> tuple[Any, Sequence[Any]]:
        """Brings a segment's uploads, and waits for its downloads."""
        bring, fetch = self._bringing(index), self._fetching(index)

        def visit(*arguments: Any) -> list[Any]:
            bring(*arguments)
            return fetch(*arguments[:3])

        if self.axis is None:
            token, *downloads = call(
                visit, [_MET, *self._types(index)], run, worker, token, *uploads
            )
            return token, downloads
        (token,) = call(bring, [_MET], run, worker, token, *uploads)
        return self._fetch(index, run, worker, token, ())

    def _start(self, index: int, run: Any, worker: Any, token: Any, uploads: Sequence[Any]) -> Any:
        """Brings a segment's uploads, and has the enclave begin; returns the token."""
        bring = self._bringing(index)

        def start(*arguments: Any) -> list[Any]:
            met = bring(*arguments)
            self.visits.start(int(arguments[0]), int(arguments[1]), index)
            return met

        (token,) = call(start, [_MET], run, worker, token, *uploads)
        return token

    def _fetch(
        self, index: int, run: Any, worker: Any, token: Any, computed: Sequence[Any]
    ) -> tuple[Any, Sequence[Any]]:
        """A segment's downloads, when `computed` is there and all workers have brought theirs."""
        corners = [_corner(x.array if isinstance(x, _Part) else x) for x in computed]
        if self.axis is not None:
            token = lax.psum(token, self.axis)
        fetch = self._fetching(index)
        token, *downloads = call(fetch, [_MET, *self._types(index)], run, worker, token, *corners)
        return token, downloads

    def _types(self, index: int) -> list[jax.ShapeDtypeStruct]:
        types = [self._local(v) for v in self.fetched[index]]
        return [jax.ShapeDtypeStruct(t.shape, np.dtype(t.dtype)) for t in types]

    def _bringing(self, index: int) -> Callable[..., list[Any]]:
        def bring(run: Any, worker: Any, _: Any, *uploads: np.ndarray) -> list[Any]:
            self.visits.bring(int(run), int(worker), index, uploads)
            return [np.zeros((), np.int32)]

        return bring

    def _fetching(self, index: int) -> Callable[..., list[Any]]:
        def fetch(run: Any, worker: Any, *_: Any) -> list[Any]:
            return [np.zeros((), np.int32), *self.visits.fetch(int(run), int(worker), index)]

        return fetch

    # Equations

    def _equations(
        self,
        values: dict[Any, Any],
        received: dict[Any, Any],
        observed: dict[int, tuple[list[Any], Any]],
        ready: Sequence[HostEquation],
        token: Any = None,
    ) -> None:
        """Evaluates equations, in order; late products not before there is a `token`."""
        for equation in ready:
            eqn = equation.eqn
            out = eqn.outvars[0]
            # A product sent with blinded constants must not meet their plain twins.
            first, second = (received, values) if equation.sent else (values, received)
            arguments = _read(eqn.invars, first, second)
            after = token if out in self.plan.cut.late else None
            values[out] = self._evaluate(eqn, arguments, after)
            if equation.number in self._observed:
                operands = [self._whole(x) for x in arguments]
                observed[equation.number] = operands, self._whole(values[out])

    # Parts of what lies on the devices

    def _whole(self, x: Any) -> Any:
        if not isinstance(x, _Part):
            return x
        return lax.all_gather(x.array, self.axis, axis=x.axis, tiled=True)

    def _part(self, x: Any, axis: int) -> Any:
        if isinstance(x, _Part) and x.axis == axis:
            return x.array
        whole = self._whole(x)
        size = whole.shape[axis] // self.workers
        return lax.dynamic_slice_in_dim(whole, lax.axis_index(self.axis) * size, size, axis)

    def _evaluate(self, eqn: JaxprEqn, arguments: list[Any], after: Any) -> Any:
        """An equation's result: what the worker has of it, a `_Part` where it keeps no more."""
        out = eqn.outvars[0]
        split = self.plan.parts.get(out)
        if split is not None and is_elementwise(eqn):
            parts = [
                self._part(x, split) if v.aval.shape else x
                for v, x in zip(eqn.invars, arguments, strict=True)
            ]
            (result,) = equations.bind(eqn, parts)
            return _Part(result, split)
        if split is not None and eqn.primitive is prims.transpose_p:
            source = eqn.params["permutation"][split]
            (result,) = equations.bind(eqn, [self._part(arguments[0], source)])
            return _Part(result, split)
        arguments = [self._whole(x) for x in arguments]
        changes: dict[str, Any] = {}
        for name in ("shape", "new_sizes"):
            if name in eqn.params:
                changes[name] = self._local(out).shape
        if is_product(eqn):
            multiply = functools.partial(_multiplied, eqn)
            product = functools.partial(self.plan.request.scheme.device_product, multiply)
            result = _behind(after, product, *arguments)
        else:
            (result,) = equations.bind(eqn, arguments, **changes)
        if self.axis is not None and self._is_contracted(eqn):
            if split is not None:
                summed = lax.psum_scatter(result, self.axis, scatter_dimension=split, tiled=True)
                return _Part(summed, split)
            result = lax.psum(result, self.axis)
        return result

    def _is_contracted(self, eqn: JaxprEqn) -> bool:
        """Whether a product sums over a class that the workers share out."""
        axes = contracted_axes(eqn)
        if not axes:
            return False
        split = sharded_axis(self.plan.layout(eqn.invars[0]), self.plan.sharded)
        return split is not None and split in axes


def _behind(token: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, which is not begun before there is the token, if there is one."""
    if token is None:
        return function(*arguments)
    out = jax.eval_shape(function, *arguments)
    # A token is 0. XLA knows no other order that survives its optimizations on every backend, and
    # of the branches only the one that is taken costs anything.
    return lax.cond(token == 0, function, lambda *_: jnp.zeros(out.shape, out.dtype), *arguments)


def _corner(x: Any) -> Any:
    """One element."""
    return lax.slice(x, (0,) * x.ndim, tuple(min(1, n) for n in x.shape))


def _multiplied(eqn: JaxprEqn, lhs: Any, rhs: Any) -> Any:
    """A product of other operands; of 8-bit integers in int32."""
    if lhs.dtype == jnp.int8:
        return integers.multiply(eqn, lhs, rhs)
    changes: dict[str, Any] = {}
    if any(x.dtype != v.aval.dtype for x, v in zip((lhs, rhs), eqn.invars, strict=True)):
        # Operands that cross in fewer bits: no precision is theirs, and their sums have all bits.
        dtype = eqn.outvars[0].aval.dtype
        changes = {"precision": None, "preferred_element_type": dtype}
    (result,) = equations.bind(eqn, [lhs, rhs], **changes)
    return result


def _read(
    variables: Sequence[Var | Literal], first: dict[Any, Any], second: dict[Any, Any] | None = None
) -> list[Any]:
    values = []
    for v in variables:
        if isinstance(v, Literal):
            values.append(v.val)
        else:
            values.append(first[v] if second is None or v in first else second[v])
    return values
