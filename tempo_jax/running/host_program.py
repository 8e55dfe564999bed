"""The host's program: an ordinary JAX function that visits the enclave between products.

It holds blinded values, scalars of the device-side update and revealed outputs, never a trusted
equation. A token threads through the visits, because JAX may drop, repeat or reorder a call into
Python that nothing ties down. On a mesh the function runs under `jax.shard_map`, and every worker
calls with its own shard: it brings its uploads, the workers meet in a collective, and it fetches
its downloads, so that no call waits for another worker's. Untrusted.
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
from tempo_jax.running import integers


class Visits(Protocol):
    """What the host program does at each segment; all arrays are NumPy's.

    `run` is a run's number, `worker` a device's place in the mesh, `index` a segment's.
    """

    def bring(self, run: int, worker: int, index: int, uploads: Sequence[np.ndarray]) -> None:
        """Hands over one worker's parts of a segment's uploads."""

    def fetch(self, run: int, worker: int, index: int) -> Sequence[np.ndarray]:
        """One worker's parts of the downloads, when all have brought theirs."""
        ...


@dataclasses.dataclass(frozen=True)
class HostResult:
    """What one run gives the host.

    Attributes:
      revealed: the revealed outputs, in order.
      on_devices: the blinded outputs, in the order of the program's `DEVICE` outputs.
      observed: (operands, result) of every offloaded product, if observation was asked for.
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
        self.observe = observe
        self.resident = [plan.jaxpr.invars[i] for i in sorted(plan.placement.resident)]
        self.products = {number for number, _ in offloaded(plan)}
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
        if self.observe:
            for equation in self.plan.cut.host:
                if equation.number in self.products:
                    eqn = equation.eqn
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
        observed: list[tuple[list[Any], Any]] = []
        pending = list(plan.cut.host)
        for index, segment in enumerate(plan.cut.segments):
            pending = self._equations(pending, index, values, received, observed)
            uploads = [self._whole(values[v]) for v in segment.uploads]
            token, downloads = self._visit(index, run, worker, token, uploads)
            received.update(zip(segment.downloads, downloads, strict=True))
        self._equations(pending, len(plan.cut.segments), values, received, observed)
        if self.axis is not None:  # a commit must not overtake another worker's last visit
            token = lax.psum(token, self.axis)
        return HostResult(
            [received[v] for v in self.revealed],
            [
                self._part(values[v], plan.parts[v]) if v in plan.parts else values[v]
                for v in self.on_devices
            ],
            observed,
            token,
        )

    def _visit(
        self, index: int, run: Any, worker: Any, token: Any, uploads: Sequence[Any]
    ) -> tuple[Any, Sequence[Any]]:
        types = [self._local(v) for v in self.plan.cut.segments[index].downloads]
        results = [jax.ShapeDtypeStruct(t.shape, np.dtype(t.dtype)) for t in types]
        met = jax.ShapeDtypeStruct((), jnp.int32)

        def bring(run: Any, worker: Any, _: Any, *uploads: np.ndarray) -> list[Any]:
            self.visits.bring(int(run), int(worker), index, uploads)
            return [np.zeros((), np.int32)]

        def fetch(run: Any, worker: Any, _: Any) -> list[Any]:
            return [np.zeros((), np.int32), *self.visits.fetch(int(run), int(worker), index)]

        def visit(*arguments: Any) -> list[Any]:
            bring(*arguments)
            return fetch(*arguments[:3])

        if self.axis is None:
            token, *downloads = call(visit, [met, *results], run, worker, token, *uploads)
        else:
            (token,) = call(bring, [met], run, worker, token, *uploads)
            token = lax.psum(token, self.axis)
            token, *downloads = call(fetch, [met, *results], run, worker, token)
        return token, downloads

    def _equations(
        self,
        pending: list[Any],
        index: int,
        values: dict[Any, Any],
        received: dict[Any, Any],
        observed: list[tuple[list[Any], Any]],
    ) -> list[Any]:
        """Evaluates what segment `index` can read; returns the rest."""
        later = []
        for equation in pending:
            eqn = equation.eqn
            out = eqn.outvars[0]
            if self.plan.cut.levels[out] > index:
                later.append(equation)
                continue
            # A product sent with blinded constants must not meet their plain twins.
            first, second = (received, values) if equation.sent else (values, received)
            arguments = _read(eqn.invars, first, second)
            values[out] = self._evaluate(eqn, arguments)
            if self.observe and equation.number in self.products:
                operands = [self._whole(x) for x in arguments]
                observed.append((operands, self._whole(values[out])))
        return later

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

    def _evaluate(self, eqn: JaxprEqn, arguments: list[Any]) -> Any:
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
            result = self.plan.request.scheme.device_product(multiply, *arguments)
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
