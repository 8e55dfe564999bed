"""A plan: everything that host and enclave need to run one shielded function.

Made once for each signature: trace, flatten, place, solve keys, cut, describe. Untrusted and pure;
the client encrypts its trusted part (`Plan.program` and the segments' code) to the enclave.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.export
import numpy as np

from enclave_runtime.protocol.memory import input_bytes
from enclave_runtime.protocol.program import (
    DEVICE,
    ENCLAVE,
    MAX_SOURCE,
    PUBLIC,
    ArrayType,
    Crossing,
    KeyClass,
    Layout,
    Port,
    Program,
    Segment,
    aligned,
)
from enclave_runtime.protocol.updates import AxisNumbers
from tempo_jax.errors import UnsupportedError
from tempo_jax.jaxprs import equations, flatten, primitives, trace
from tempo_jax.jaxprs import types as jaxpr_types
from tempo_jax.jaxprs.flatten import Flattening
from tempo_jax.jaxprs.products import KEPT, description, is_product, kept_products, work
from tempo_jax.jaxprs.types import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, array_type
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.following import Following, follow
from tempo_jax.planning.matrix_form import matrix_form, split_polarities, verifiable
from tempo_jax.planning.mesh import choose_sharded
from tempo_jax.planning.placement import Placement, Question, Side, place
from tempo_jax.planning.segments import Cut, TrustedSegment, cut
from tempo_jax.schemes import Group, Mixing, Scheme

CHECKING = 1.0  # nanoseconds for each element of a checked product, see `CostModel.checking`


@dataclasses.dataclass(frozen=True)
class Request:
    """What a plan is made for.

    Attributes:
      closed: the traced function on physical flat inputs (typed keys as their data).
      carried: for each input that is a leaf of the carried state, its output's position.
      public: inputs that the host may know.
      on_devices: inputs that already lie blinded on the devices.
      scheme: the blinding scheme.
      costs: the cost model; None offloads every product that can be.
      offload: whether anything is offloaded.
      workers: devices of the mesh, 1 without one.
      verify: whether the enclave checks every product that comes back.
    """

    closed: ClosedJaxpr
    carried: Mapping[int, int]
    public: frozenset[int]
    on_devices: frozenset[int]
    scheme: Scheme
    costs: CostModel | None
    offload: bool
    workers: int
    verify: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """A shielded function for one signature.

    Attributes:
      request: what it was made for.
      flat: the flat program with its closed-over constants.
      placement: where each equation runs.
      cut: its segments and the host's equations.
      program: what the enclave is told.
      revealed: positions of outputs that go to the host in the clear, with their variables.
      sealed: positions of the other outputs, in the order of `program.outputs`.
      sharded: key classes (numbers of `program.classes`) that are split over the workers.
      notes: what a reader of `explain` should know.
      layouts: how each value that exists on the host is blinded.
    """

    request: Request
    flat: ClosedJaxpr
    placement: Placement
    cut: Cut
    program: Program
    revealed: tuple[int, ...]
    sealed: tuple[int, ...]
    sharded: frozenset[int]
    notes: tuple[str, ...]
    layouts: Mapping[Var, Layout]

    @property
    def jaxpr(self) -> Jaxpr:
        """The flat program."""
        return self.flat.jaxpr

    def layout(self, variable: Any) -> Layout:
        """How a value is blinded on the host."""
        clear = Layout.clear(len(array_type(variable.aval).shape))
        return self.layouts.get(variable, clear)

    def blinded(self, variable: Any) -> ArrayType:
        """A value's type on the host."""
        array = array_type(variable.aval)
        return self.layout(variable).blinded(array, self.program.classes)


def make_plan(request: Request) -> Plan:
    """Flattens, places, keys and cuts a traced program.

    Raises:
      UnsupportedError: the program calls back into Python, which the enclave cannot run.
    """
    notes: list[str] = []
    costs = request.costs

    def worth(eqn: JaxprEqn) -> bool:
        if not (request.offload and is_product(eqn)):
            return False
        return costs is None or costs.inside(eqn) > costs.latency

    if costs is not None and request.verify:
        costs = dataclasses.replace(costs, checking=CHECKING)
    _refuse_callbacks(request.closed.jaxpr)
    for eqn in equations.debugging(request.closed.jaxpr):
        notes.append(
            f"the debugging callback at {equations.source(eqn)} is left out: it would show values"
        )
    flat = flatten.flatten(request.closed, Flattening(worth, notes))
    scheme = request.scheme
    stays: Sequence[str | None] | None = None
    decoys: dict[Var, int] = {}
    if request.offload and scheme.keys_per_product:
        assert isinstance(scheme, Mixing), "the only scheme with keys per product"
        form = matrix_form(flat, scheme, costs, request.carried)
        flat, stays = form.closed, form.stays
        flat = verifiable(flat) if request.verify else flat
        products = [eqn for eqn in flat.jaxpr.eqns if is_product(eqn)]
        for eqn, count in zip(products, form.decoys, strict=True):
            if count:
                decoys[eqn.invars[0]] = count
    elif request.offload:
        flat = flat if scheme.group.orthogonal else split_polarities(flat)
        flat = verifiable(flat) if request.verify else flat
    jaxpr = flat.jaxpr
    if stays is None:
        kept = kept_products(jaxpr) if request.offload else frozenset()
        numbers = (n for n, eqn in enumerate(jaxpr.eqns) if is_product(eqn))
        stays = [KEPT if n in kept else None for n in numbers]
    question = Question(
        jaxpr,
        request.carried,
        request.on_devices,
        scheme,
        costs,
        request.offload,
        stays,
        request.verify,
    )
    placement, following = _place(question)
    notes += _notes(jaxpr)
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    outputs: list[Var] = [v for v in jaxpr.outvars if isinstance(v, Var)]
    assert len(outputs) == len(jaxpr.outvars), "flattening leaves no literal output"
    revealed = tuple(i for i, v in enumerate(outputs) if primitives.is_revealed(v, made_by))
    sealed = tuple(i for i in range(len(outputs)) if i not in set(revealed))
    on_device: set[Var] = set()
    # Keys per product end with the step.
    if following is not None:
        on_device = {outputs[i] for i in sealed if i in following.outputs}
    elif not scheme.keys_per_product:
        on_device = {outputs[i] for i in sealed if _stays_blinded(outputs[i], placement)}
    parts = cut(
        jaxpr,
        placement,
        [outputs[i] for i in revealed],
        [outputs[i] for i in sealed if outputs[i] not in on_device],
    )
    layouts, classes = _layouts(placement, decoys)
    program = _describe(
        request, jaxpr, placement, parts, sealed, on_device, layouts, classes, following
    )
    resident = [layouts[jaxpr.invars[i]] for i in placement.resident]
    values = [(layouts[v], layouts[v].blinded(array_type(v.aval), classes).nbytes) for v in layouts]
    sharded = choose_sharded(classes, values, resident, request.workers)
    return Plan(
        request, flat, placement, parts, program, revealed, sealed, sharded, tuple(notes), layouts
    )


def _place(question: Question) -> tuple[Placement, Following | None]:
    """Places a program, so that what stays on the devices can be followed where that is asked."""
    jaxpr = question.jaxpr
    while True:
        placement = place(question)
        if not question.verify:
            return placement, None
        resident = sorted(placement.resident)
        stays = {jaxpr.invars[i] for i in resident}
        stays |= {jaxpr.outvars[o] for i, o in question.carried.items() if i in placement.resident}
        kept = [o for o, v in enumerate(jaxpr.outvars) if v in stays]
        sides = zip(jaxpr.eqns, placement.sides, strict=True)
        host = [eqn for eqn, side in sides if side is Side.HOST]
        following = follow(jaxpr, host, resident, question.carried, kept, described)
        if not following.failing:
            return placement, following
        barred = {**question.barred, **following.failing}
        question = dataclasses.replace(question, barred=barred)


def _notes(jaxpr: Jaxpr) -> list[str]:
    """What control flow that runs in the enclave whole takes with it."""
    notes = []
    for eqn in jaxpr.eqns:
        inside = [e for body in equations.subjaxprs(eqn) for e in equations.equations(body)]
        if not inside:
            continue
        where = f"`{eqn.primitive.name}` at {equations.source(eqn)}"
        products = sum(map(is_product, inside))
        if products:
            notes.append(f"{where} runs in the enclave whole, with {products} products in its body")
        if any(e.primitive is primitives.reveal_p for e in inside):
            notes.append(f"`reveal` inside {where} has no effect: reveal the result outside")
    return notes


def _refuse_callbacks(jaxpr: Jaxpr) -> None:
    for eqn in equations.equations(jaxpr):
        if primitives.is_callback(eqn):
            raise UnsupportedError(
                f"shield: `{eqn.primitive.name}` at {equations.source(eqn)} calls back into "
                "Python, and the enclave runs only compiled programs. Pass what the callback "
                "computes as an argument, or return its operand through `tempo.reveal` and call "
                "it outside."
            )


def _stays_blinded(v: Var, placement: Placement) -> bool:
    """Whether an output is on the host under a key, so that it may stay there."""
    return v in placement.host and any(c is not None for c in placement.classes(v))


def _layouts(
    placement: Placement, decoys: Mapping[Var, int]
) -> tuple[dict[Var, Layout], tuple[KeyClass, ...]]:
    """Layouts of all values that exist on the host, with classes numbered from 0.

    Args:
      placement: where everything is.
      decoys: values to which rows are appended, along the axis before the last.
    """
    keying = placement.keying
    rows = {placement.classes(v)[-2]: count for v, count in decoys.items()}
    per_copy = keying.group is Group.INVERTIBLE
    numbers: dict[int, int] = {}
    classes: list[KeyClass] = []
    layouts = {}
    for v in placement.axes:
        shape = v.aval.shape
        copies = shape[0] if per_copy and len(shape) == 3 else 1
        ids: list[int | None] = []
        for root in placement.classes(v):
            if root is not None and root not in numbers:
                numbers[root] = len(classes)
                batch = keying.batch(root)
                classes.append(KeyClass(keying.size(root), batch, rows.get(root, 0), copies))
            ids.append(None if root is None else numbers[root])
        layouts[v] = Layout(tuple(ids), placement.parities(v))
    return layouts, tuple(classes)


def _describe(
    request: Request,
    jaxpr: Jaxpr,
    placement: Placement,
    parts: Cut,
    sealed: Sequence[int],
    on_device: set[Any],
    layouts: Mapping[Var, Layout],
    classes: tuple[KeyClass, ...],
    following: Following | None,
) -> Program:
    """Writes the enclave's part down in the protocol's terms."""
    numbers: dict[Any, int] = {}

    def number(v: Any) -> int:
        v = v if following is None else following.name(v)
        return numbers.setdefault(v, len(numbers))

    def layout(v: Any) -> Layout:
        array = array_type(v.aval)
        return layouts.get(v, Layout.clear(len(array.shape)))

    def port(v: Any, place: str, projections: tuple[AxisNumbers, ...] = ()) -> Port:
        array = array_type(v.aval)
        where = layout(v) if place == DEVICE else Layout.clear(len(array.shape))
        return Port(number(v), array, place, where, projections)

    arriving = {} if following is None else following.inputs
    leaving = {} if following is None else following.outputs

    constants = tuple(port(v, ENCLAVE) for v in jaxpr.constvars)
    inputs = []
    for i, v in enumerate(jaxpr.invars):
        public = PUBLIC if i in request.public else ENCLAVE
        place = DEVICE if i in placement.resident else public
        inputs.append(port(v, place, arriving.get(i, ())))
    outputs = tuple(
        port(jaxpr.outvars[i], DEVICE, leaving.get(i, ()))
        if jaxpr.outvars[i] in on_device
        else port(jaxpr.outvars[i], ENCLAVE)
        for i in sealed
    )
    kept = {number(jaxpr.outvars[i]) for i in sealed}
    last_use: dict[int, int] = {}
    for index, part in enumerate(parts.segments):
        for v in (*part.inputs, *part.uploads, *part.outputs, *part.downloads):
            last_use[number(v)] = index

    # Downloads and uploads lie apart: a worker of a mesh that is ahead may bring its uploads while
    # another still copies its downloads of the segment before.
    def room(values: Sequence[Var]) -> int:
        types = (layout(v).blinded(array_type(v.aval), classes) for v in values)
        return sum(aligned(t.nbytes) for t in types)

    above = max((room(part.downloads) for part in parts.segments), default=0)
    arena = above + max((room(part.uploads) for part in parts.segments), default=0)
    made_by = {v: e.eqn for e in parts.host for v in e.eqn.outvars}

    def crossings(values: Sequence[Any], offset: int) -> tuple[Crossing, ...]:
        out = []
        for v in values:
            array = array_type(v.aval)
            blinded = layout(v).blinded(array, classes)
            operands = product = None
            source = ""
            if v in made_by and (request.scheme.keys_per_product or request.verify):
                left, right = map(number, made_by[v].invars)
                operands = (left, right)
            if v in made_by and request.verify:
                product, source = description(made_by[v]), described(made_by[v])
            out.append(
                Crossing(number(v), array, blinded, layout(v), offset, operands, product, source)
            )
            offset += aligned(blinded.nbytes)
        return tuple(out)

    segments = []
    for index, part in enumerate(parts.segments):
        segments.append(
            Segment(
                executable="",
                inputs=tuple(map(number, part.inputs)),
                outputs=tuple(map(number, part.outputs)),
                uploads=crossings(part.uploads, above),
                downloads=crossings(part.downloads, 0),
                dead=tuple(v for v, use in last_use.items() if use == index and v not in kept),
            )
        )
    # Inputs cross once, before segment 0: ciphertext, or a leaf on its way to the devices.
    arena = max(arena, sum(input_bytes(p.array) for p in (*constants, *inputs)), 1)
    return Program(
        request.scheme.name,
        request.scheme.parameters,
        classes,
        constants,
        tuple(inputs),
        outputs,
        tuple(segments),
        aligned(arena),
        request.verify,
        tuple(
            dataclasses.replace(u, value=number(u.value), operands=tuple(map(number, u.operands)))
            for u in (following.updates if following is not None else ())
        ),
    )


def described(eqn: JaxprEqn) -> str:
    """An equation in an error's text: its operands' types and where it comes from."""
    operands = " × ".join(v.aval.str_short() for v in eqn.invars)
    return f"{eqn.primitive.name} {operands} at {equations.line(eqn)}"[:MAX_SOURCE]


# The segments' code


def _function(segment: TrustedSegment) -> Callable[..., list[Any]]:
    def run(*arguments: Any) -> list[Any]:
        env = {
            v: jaxpr_types.from_physical(x, v.aval)
            for v, x in zip(segment.inputs, arguments, strict=True)
        }
        outputs = equations.evaluate(segment.eqns, env, segment.outputs)
        return [jaxpr_types.to_physical(x) for x in outputs]

    return run


def _structure(segment: TrustedSegment) -> Any:
    """Equal for segments that compute the same function; unequal ones may share none."""
    names: dict[Any, int] = {v: i for i, v in enumerate(segment.inputs)}

    def name(v: Any) -> Any:
        if isinstance(v, Literal):
            value = np.asarray(v.val)
            return ("literal", value.dtype, value.shape, value.tobytes(), v.aval.weak_type)
        return names.setdefault(v, len(names))

    eqns = tuple(
        (
            eqn.primitive,
            tuple(sorted(eqn.params.items())),
            tuple(name(v) for v in eqn.invars),
            tuple((name(v), v.aval.shape, v.aval.dtype) for v in eqn.outvars),
        )
        for eqn in segment.eqns
    )
    types = tuple((v.aval.shape, v.aval.dtype) for v in segment.inputs)
    return types, eqns, tuple(name(v) for v in segment.outputs)


def export_segments(parts: Cut) -> Iterator[bytes]:
    """Serialized StableHLO of each segment, in order; equal segments are exported once."""
    exported: dict[Any, bytes] = {}
    for segment in parts.segments:
        try:
            key = _structure(segment)
            hash(key)
        except TypeError:
            key = object()  # a parameter that cannot be compared: no other segment is equal
        if key not in exported:
            avals = [jaxpr_types.physical(v.aval) for v in segment.inputs]
            run = jax.jit(_function(segment), keep_unused=True)
            with trace.without_locations():
                module = jax.export.export(run, platforms=["cpu"])(*avals)
            if module.nr_devices != 1:
                raise UnsupportedError(
                    f"shield: the function spreads trusted work over {module.nr_devices} devices "
                    "(`shard_map`), but the enclave is one processor. Shield a function for one "
                    "device, and pass `mesh=` to `shield` to spread the blinded products."
                )
            exported[key] = bytes(module.serialize())
        yield exported[key]


def offloaded(plan: Plan) -> list[tuple[int, JaxprEqn]]:
    """The products that the host computes."""
    return [
        (number, eqn)
        for number, (eqn, side) in enumerate(
            zip(plan.jaxpr.eqns, plan.placement.sides, strict=True)
        )
        if side is Side.HOST and is_product(eqn)
    ]


def offloaded_work(plan: Plan) -> tuple[int, int]:
    """Floating-point operations of the offloaded products, and of all products."""
    outside = sum(work(eqn) for _, eqn in offloaded(plan))
    return outside, sum(work(e) for e in plan.jaxpr.eqns if is_product(e))
