"""A plan: everything that host and enclave need to run one shielded function.

Made once for each signature, in passes that follow each other: flatten what was traced, rewrite it
for the scheme, place it, cut it, describe it. Untrusted and pure; the client encrypts its trusted
part (`Plan.program` and the segments' code) to the enclave.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from enclave_runtime.protocol.memory import sharded_axis
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout, Program
from tempo_jax.errors import UnsupportedError
from tempo_jax.jaxprs import equations, flatten, primitives
from tempo_jax.jaxprs.flatten import Flattening
from tempo_jax.jaxprs.products import KEPT, is_product, kept_products, work
from tempo_jax.jaxprs.types import ClosedJaxpr, Jaxpr, JaxprEqn, Var, array_type
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.failures import RunTimeCheck, revealing
from tempo_jax.planning.following import Following, follow
from tempo_jax.planning.matrix_form import matrix_form, split_polarities, verifiable
from tempo_jax.planning.mesh import choose_sharded, split_values
from tempo_jax.planning.placement import Placement, place
from tempo_jax.planning.program_writer import ProgramWriter
from tempo_jax.planning.request import Request
from tempo_jax.planning.segments import Cut, cut
from tempo_jax.planning.walk import Question, Side
from tempo_jax.schemes import Group

CHECKING = 1.0  # nanoseconds for each element of a checked product, see `CostModel.checking`


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
      parts: of what workers keep a part only, along which axis.
      notes: what a reader of `explain` should know.
      checks: what may fail; if there are any, the last of the revealed outputs, int32[2], says
        which failed first, and is none of the function's own.
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
    parts: Mapping[Var, int]
    notes: tuple[str, ...]
    checks: tuple[RunTimeCheck, ...]
    layouts: Mapping[Var, Layout]

    @property
    def jaxpr(self) -> Jaxpr:
        """The flat program."""
        return self.flat.jaxpr

    @property
    def pools(self) -> int:
        """Pools of devices that the workers of a mesh are; 1 without any."""
        return self.request.scheme.device_pools if self.request.workers > 1 else 1

    def layout(self, variable: Any) -> Layout:
        """How a value is blinded on the host."""
        clear = Layout.clear(len(array_type(variable.aval).shape))
        return self.layouts.get(variable, clear)

    def blinded(self, variable: Any) -> ArrayType:
        """A value's type on the host."""
        array, layout = array_type(variable.aval), self.layout(variable)
        blinded = layout.blinded(array, self.program.classes)
        if not layout.keyed:
            return blinded
        made = variable in self.placement.host
        return self.request.scheme.representation(blinded, product=made)


def make_plan(request: Request) -> Plan:
    """Plans a traced program: flatten → rewrite → place → cut → describe.

    Raises:
      UnsupportedError: the program calls back into Python, which the enclave cannot run.
    """
    return describe(cut_apart(assign(rewrite(flatten_calls(request)))))


# Flatten


@dataclasses.dataclass(frozen=True)
class Flat:
    """A program without calls.

    Attributes:
      request: what is planned.
      closed: the program.
      notes: what a reader of `explain` should know.
      checks: what it reveals the failure of.
    """

    request: Request
    closed: ClosedJaxpr
    notes: tuple[str, ...]
    checks: tuple[RunTimeCheck, ...]


def flatten_calls(request: Request) -> Flat:
    """Inlines calls, and dissolves control flow that holds work worth offloading."""
    costs = request.costs
    _refuse_callbacks(request.closed.jaxpr, request.reveal_checks)
    notes = [
        f"the debugging callback `{eqn.primitive.name}` at {equations.source(eqn)} is left out: "
        "it would show values"
        for eqn in equations.debugging(request.closed.jaxpr)
    ]
    if not request.reveal_checks and equations.checks(request.closed.jaxpr):
        notes.append(flatten.CHECKS_GIVE_NAN)

    def worth(eqn: JaxprEqn) -> bool:
        if not (request.offload and is_product(eqn)):
            return False
        return costs is None or costs.inside(eqn) > costs.latency

    def too_dear(eqn: JaxprEqn) -> str | None:
        return None if costs is None else costs.branches_too_dear(eqn, request.scheme)

    closed, checks = request.closed, ()
    if request.reveal_checks:
        closed, checks = revealing(flatten.without_references(closed))
    options = Flattening(worth, notes, too_dear, request.unroll_while)
    closed = flatten.flatten(closed, options)
    if checks:
        notes.append(
            f"each call reveals which of {len(checks)} checks failed first, if one did "
            "(`reveal_checks=True`)"
        )
    return Flat(request, closed, tuple(notes), checks)


def _refuse_callbacks(jaxpr: Jaxpr, reveals_checks: bool) -> None:
    for eqn in equations.equations(jaxpr):
        if primitives.is_callback(eqn) and not (reveals_checks and primitives.raises(eqn)):
            raise UnsupportedError(
                f"shield: `{eqn.primitive.name}` at {equations.source(eqn)} calls back into "
                "Python, and the enclave runs only compiled programs. Pass what the callback "
                "computes as an argument, or return its operand through `tempo.reveal` and call "
                "it outside. A check that raises may give NaN instead (Equinox's `error_if` does "
                "under EQX_ON_ERROR=nan), or be revealed where it is Equinox's "
                "(`tempo.shield(..., reveal_checks=True)`)."
            )


# Rewrite


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A flat program in which every blinded operand is a variable of its own.

    Attributes:
      request: what is planned.
      closed: the program.
      costs: the cost model, with what checking products costs where they are checked.
      stays: for each product in order why it stays inside whatever it costs, else None.
      decoys: for each variable to whose rows decoys are appended, how many.
      notes: what a reader of `explain` should know.
      checks: what it reveals the failure of.
    """

    request: Request
    closed: ClosedJaxpr
    costs: CostModel | None
    stays: tuple[str | None, ...]
    decoys: Mapping[Var, int]
    notes: tuple[str, ...]
    checks: tuple[RunTimeCheck, ...]


def rewrite(flat: Flat) -> Rewritten:
    """Rewrites a program for the scheme, and for checks."""
    request, closed, scheme = flat.request, flat.closed, flat.request.scheme
    costs = request.costs
    if costs is not None and request.verify:
        costs = dataclasses.replace(costs, checking=CHECKING)
    stays: tuple[str | None, ...] | None = None
    counts: tuple[int, ...] = ()
    if request.offload:
        if scheme.keys_per_product:
            form = matrix_form(closed, scheme, costs, request.carried)
            closed, stays, counts = form.closed, form.stays, form.decoys
        elif not scheme.group.orthogonal:
            closed = split_polarities(closed)
        if request.verify or scheme.exact:
            closed = verifiable(closed)
    products = {n: eqn for n, eqn in enumerate(closed.jaxpr.eqns) if is_product(eqn)}
    if stays is None:
        kept = kept_products(closed.jaxpr) if request.offload else frozenset()
        stays = tuple(KEPT if n in kept else None for n in products)
    decoys = {
        eqn.invars[0]: count
        for eqn, count in zip(products.values(), counts, strict=bool(counts))
        if count
    }
    return Rewritten(request, closed, costs, stays, decoys, flat.notes, flat.checks)


# Place


@dataclasses.dataclass(frozen=True)
class Placed:
    """A program of which it is known what runs where.

    Attributes:
      rewritten: the program.
      placement: where each equation runs.
      following: what the enclave follows on the devices, where it checks products.
    """

    rewritten: Rewritten
    placement: Placement
    following: Following | None

    @property
    def request(self) -> Request:
        """What is planned."""
        return self.rewritten.request

    @property
    def jaxpr(self) -> Jaxpr:
        """The flat program."""
        return self.rewritten.closed.jaxpr


def assign(rewritten: Rewritten) -> Placed:
    """Places a program, so that what stays on the devices can be followed where that is asked."""
    request, jaxpr = rewritten.request, rewritten.closed.jaxpr
    question = Question(
        jaxpr,
        request.carried,
        request.on_devices,
        request.scheme,
        rewritten.costs,
        request.offload,
        rewritten.stays,
        request.verify,
    )
    while True:
        placement = place(question)
        if not request.verify:
            return Placed(rewritten, placement, None)
        resident = sorted(placement.resident)
        stays = {jaxpr.invars[i] for i in resident}
        stays |= {jaxpr.outvars[o] for i, o in request.carried.items() if i in placement.resident}
        kept = [o for o, v in enumerate(jaxpr.outvars) if v in stays]
        sides = zip(jaxpr.eqns, placement.sides, strict=True)
        host = [eqn for eqn, side in sides if side is Side.HOST]
        following = follow(jaxpr, host, resident, request.carried, kept)
        if not following.failing:
            return Placed(rewritten, placement, following)
        barred = {**question.barred, **following.failing}
        question = dataclasses.replace(question, barred=barred)


# Cut


@dataclasses.dataclass(frozen=True)
class Severed:
    """A placed program in segments.

    Attributes:
      placed: the program.
      cut: its segments and the host's equations.
      revealed: positions of outputs that go to the host in the clear.
      sealed: positions of the others.
      on_device: sealed outputs that stay on the devices.
    """

    placed: Placed
    cut: Cut
    revealed: tuple[int, ...]
    sealed: tuple[int, ...]
    on_device: frozenset[Var]


def cut_apart(placed: Placed) -> Severed:
    """Sorts the outputs by where they go, and cuts the enclave's part into segments."""
    jaxpr, placement, following = placed.jaxpr, placed.placement, placed.following
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    outputs: list[Var] = [v for v in jaxpr.outvars if isinstance(v, Var)]
    assert len(outputs) == len(jaxpr.outvars), "flattening leaves no literal output"
    open_ones = {i for i, v in enumerate(outputs) if primitives.is_revealed(v, made_by)}
    sealed = tuple(i for i in range(len(outputs)) if i not in open_ones)
    on_device: set[Var] = set()
    if following is not None:
        on_device = {outputs[i] for i in sealed if i in following.outputs}
    elif not placed.request.scheme.products_alone:  # what it gives ends with the step
        on_device = {outputs[i] for i in sealed if _stays_blinded(outputs[i], placement)}
    revealed = tuple(sorted(open_ones))
    inside = [outputs[i] for i in sealed if outputs[i] not in on_device]
    costs, scheme = placed.rewritten.costs, placed.request.scheme

    def may_be_late(v: Var) -> bool:
        return costs is None or costs.deserves_request(v.aval, scheme)

    def may_go_ahead(v: Var) -> bool:
        # What goes out whatever it costs is small as a rule, and not worth twice the visits.
        return (costs or CostModel()).may_go_ahead(v.aval, scheme)

    shown = [outputs[i] for i in revealed]
    parts = cut(jaxpr, placement, shown, inside, may_be_late, may_go_ahead)
    return Severed(placed, parts, revealed, sealed, frozenset(on_device))


def _stays_blinded(v: Var, placement: Placement) -> bool:
    """Whether an output is on the host under a key, so that it may stay there."""
    return v in placement.host and any(c is not None for c in placement.classes(v))


# Describe


def describe(severed: Severed) -> Plan:
    """Numbers the key classes and writes the enclave's part down."""
    placed, parts = severed.placed, severed.cut
    request, jaxpr, placement = placed.request, placed.jaxpr, placed.placement
    layouts, classes = _layouts(placement, placed.rewritten.decoys)
    writer = ProgramWriter(request, parts, layouts, classes, placed.following)
    program = writer.write(jaxpr, placement.resident, severed.sealed, severed.on_device)
    resident = [layouts[jaxpr.invars[i]] for i in placement.resident]
    values = [(layouts[v], layouts[v].blinded(array_type(v.aval), classes).nbytes) for v in layouts]
    sharded: frozenset[int] = frozenset()
    if request.scheme.device_pools == 1:
        sharded = choose_sharded(classes, values, resident, request.workers)
    kept: Mapping[Var, int] = {}
    if request.shard_weights:
        kept = _parts(severed, layouts, classes, sharded)
    return Plan(
        request=request,
        flat=placed.rewritten.closed,
        placement=placement,
        cut=parts,
        program=program,
        revealed=severed.revealed,
        sealed=severed.sealed,
        sharded=sharded,
        parts=kept,
        notes=placed.rewritten.notes,
        checks=placed.rewritten.checks,
        layouts=layouts,
    )


def _parts(
    severed: Severed,
    layouts: Mapping[Var, Layout],
    classes: tuple[KeyClass, ...],
    sharded: frozenset[int],
) -> Mapping[Var, int]:
    """Of what workers keep a part, and along which axis.

    Raises:
      UnsupportedError: nothing lies on the devices.
    """
    jaxpr, resident = severed.placed.jaxpr, severed.placed.placement.resident
    leaves = [jaxpr.invars[i] for i in sorted(resident)]
    if not leaves:
        reasons = sorted(set(severed.placed.placement.reasons.values()))
        why = f" ({reasons[0]})" if reasons else ""
        raise UnsupportedError(
            "shield: shard_weights splits weights and optimizer state that lie on the devices, and "
            f"none does in this step{why}. Wrap the optimizer in `tempo.cheap_update`, take a "
            'scheme that keeps keys and `offload="all"` where the step is small, or leave '
            "`shard_weights` out"
        )

    def shape(v: Any) -> tuple[int, ...]:
        layout = layouts.get(v) if isinstance(v, Var) else None
        if layout is None or sharded_axis(layout, sharded) is not None:
            return ()
        return layout.blinded(array_type(v.aval), classes).shape

    kept = [jaxpr.outvars[i] for i in severed.sealed]
    leaves += [v for v in kept if isinstance(v, Var) and v in severed.on_device]
    host = [equation.eqn for equation in severed.cut.host]
    return split_values(leaves, host, shape, severed.placed.request.workers)


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
