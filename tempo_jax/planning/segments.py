"""Cuts the enclave's part of a placed program into segments.

The segment of a value is the number of visits to the host on the longest path to it, so that one
round trip serves everything that can go out together. A value that a later segment needs is either
kept or computed again: a minimum cut between what is there anyway and what is needed decides,
weighing bytes kept against elements recomputed (as rematerialization does for the memory of
training, Chen et al., arXiv 1604.06174).

A product that nothing sent depends on, as the gradient of a weight that is updated inside, need not
hold up what is sent: it is *late*. The devices compute it while the enclave runs the segment that
could have read it, and what the enclave makes of it is a segment of its own behind that one, which
runs while the devices are at the next products.

The other way round, a value whose products need another one that is sent later, as the weight of a
layer whose input is still to be computed, need not hold up what goes out with it: it is sent
*ahead*, by a segment of its own that runs while the devices are at the products before. Untrusted
and pure.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import numpy as np

from tempo_jax.jaxprs.equations import forward_only
from tempo_jax.jaxprs.primitives import HEAVY, LIGHT, blind_p
from tempo_jax.jaxprs.products import is_product, variables
from tempo_jax.jaxprs.types import Jaxpr, JaxprEqn, Var, nbytes
from tempo_jax.planning.placement import Placement
from tempo_jax.planning.walk import Side

_HEAVY_BYTES = 8  # bytes of keeping that one transcendental element is worth
# Reading a value that is kept anyway, over keeping another of its size: more than half, so that a
# sum over all layers is not added up anew in each of them.
_READING = 2 / 3
_UNIT = 1024  # bytes; capacities are integers of 32 bits
_INFINITE = 1 << 30
# Until `_Cutter.cut` counts segments, the n-th that the host waits for has the number _STAGE * n.
_STAGE = 3
_BESIDE = 1  # the one behind it that takes what comes late
_AHEAD = 2  # the one behind it that sends ahead


@dataclasses.dataclass(frozen=True)
class TrustedSegment:
    """A run of equations that executes inside the enclave between two visits of the host.

    Attributes:
      eqns: the equations, in order; nothing in them leaves the enclave.
      uploads: values that come from the host before it.
      downloads: values that go to the host after it, blinded unless scalar or revealed.
      inputs: values it reads, uploads included.
      outputs: values it makes that are sent, kept or read later.
      beside: whether its uploads need nothing that the segment before sends, and nobody waits for
        downloads of its own: the host brings them while the enclave runs that one.
      ahead: whether it has no uploads, and no product before the next segment's needs what it
        sends: the enclave runs it while the devices compute, and the host fetches its downloads
        with that one's.
    """

    eqns: tuple[JaxprEqn, ...]
    uploads: tuple[Var, ...]
    downloads: tuple[Var, ...]
    inputs: tuple[Var, ...]
    outputs: tuple[Var, ...]
    beside: bool = False
    ahead: bool = False


@dataclasses.dataclass(frozen=True)
class HostEquation:
    """An equation that the host runs.

    Attributes:
      eqn: the equation.
      number: its position in the flat program.
      sent: whether operands come blinded from the enclave even where the host could compute
        their plain value (constants).
    """

    eqn: JaxprEqn
    number: int
    sent: bool


@dataclasses.dataclass(frozen=True)
class Cut:
    """A program in segments.

    Attributes:
      segments: the enclave's part, in order.
      levels: for each value on the host the first segment that can read it.
      host: the host's equations, in order.
      constants: equations of known constants that the host evaluates for itself.
      late: results of products that the devices compute while the enclave runs a segment.
    """

    segments: tuple[TrustedSegment, ...]
    levels: dict[Var, int]
    host: tuple[HostEquation, ...]
    constants: tuple[JaxprEqn, ...]
    late: frozenset[Var]


def cut(
    jaxpr: Jaxpr,
    placement: Placement,
    revealed: Iterable[Var],
    sealed_inside: Iterable[Var],
    may_be_late: Callable[[Var], bool],
    may_go_ahead: Callable[[Var], bool],
) -> Cut:
    """Cuts a placed program.

    Args:
      jaxpr: the flat program.
      placement: where each equation runs.
      revealed: outputs that go to the host in the clear.
      sealed_inside: outputs that stay in the enclave.
      may_be_late: whether a product is large enough for a request of its own.
      may_go_ahead: whether a value to be sent is.
    """
    cutter = _Cutter(jaxpr, placement, revealed, sealed_inside, may_be_late)
    cutter.send_ahead(may_go_ahead)
    return cutter.cut()


def _late(jaxpr: Jaxpr, placement: Placement, may_be_late: Callable[[Var], bool]) -> frozenset[Var]:
    """Results of the host's products that nothing that is sent depends on."""
    needed: set[Var] = set()
    late: set[Var] = set()
    for eqn, side in zip(reversed(jaxpr.eqns), reversed(placement.sides), strict=True):
        host = side is Side.HOST
        if (
            host
            and is_product(eqn)
            and eqn.outvars[0] not in needed
            and may_be_late(eqn.outvars[0])
        ):
            late.add(eqn.outvars[0])
        is_needed = not needed.isdisjoint(eqn.outvars)
        for v in variables(eqn):
            if is_needed or (host and v not in placement.host):
                needed.add(v)
    return frozenset(late)


class _Cutter:
    def __init__(
        self,
        jaxpr: Jaxpr,
        placement: Placement,
        revealed: Iterable[Var],
        sealed_inside: Iterable[Var],
        may_be_late: Callable[[Var], bool],
    ):
        self.late = _late(jaxpr, placement, may_be_late)
        self.made_by: dict[Var, JaxprEqn] = {}  # values made inside
        self.order: dict[int, int] = {}
        self.home: dict[Var, int] = {}  # the segment of a value inside
        self.level: dict[Var, int] = {}  # the first segment that can read a value on the host
        self.sent: dict[Var, None] = dict.fromkeys(revealed)
        self.revealed = frozenset(self.sent)
        self.ahead: dict[Var, int] = {}  # what is sent by another segment than it is made in
        self.sealed = dict.fromkeys(sealed_inside)
        self.host: list[HostEquation] = []
        self.anyone: set[Var] = set()
        self.first_reader: dict[Var, int] = {}  # the first segment that may read an upload
        self.read: set[Var] = set()  # by an equation inside
        self.brought: set[Var] = set()  # values inside that come from the host or are made of such
        resident = {jaxpr.invars[i] for i in placement.resident}
        for v in (*jaxpr.constvars, *jaxpr.invars):
            (self.level if v in resident else self.home)[v] = 0
        known = []
        for number, (eqn, side) in enumerate(zip(jaxpr.eqns, placement.sides, strict=True)):
            self.order[id(eqn)] = number
            if side is Side.HOST:
                self._place_on_host(eqn, number, number in placement.sent)
                continue
            if side is Side.ANYONE:
                self.anyone |= set(eqn.outvars)
                known.append(eqn)
            ready = [self._ready(v) for v in variables(eqn)]
            home = max(ready, default=0)
            for v in eqn.outvars:
                self.home[v] = home
                self.made_by[v] = eqn
            for v in variables(eqn):
                self.read.add(v)
                if v in self.level:
                    self.first_reader[v] = min(home, self.first_reader.get(v, home))
                if v in self.level or v in self.brought:
                    self.brought |= set(eqn.outvars)
        plain = [v for e in self.host if not e.sent for v in e.eqn.invars]
        self.constants = forward_only(known, plain)

    def _ready(self, v: Var) -> int:
        """The first segment that can read `v`."""
        return self.home[v] if v in self.home else self.level[v]

    def _place_on_host(self, eqn: JaxprEqn, number: int, sent: bool) -> None:
        level = 0
        for v in variables(eqn):
            if v in self.level:
                level = max(level, self.level[v])
            elif sent or v not in self.anyone:
                level = max(level, (self.home[v] // _STAGE + 1) * _STAGE)
                self.sent[v] = None
        if eqn.outvars[0] in self.late:
            level = level // _STAGE * _STAGE + _BESIDE
        self.level[eqn.outvars[0]] = level
        self.host.append(HostEquation(eqn, number, sent))

    def send_ahead(self, may_go_ahead: Callable[[Var], bool]) -> None:
        """Sends what is needed later by segments of its own, those of inputs as late as may be."""
        needed: dict[Var, int] = {}
        operands: set[Var] = set()
        for equation in self.host:
            stage = self.level[equation.eqn.outvars[0]] // _STAGE
            for v in variables(equation.eqn):
                needed[v] = min(stage, needed.get(v, stage))
                if is_product(equation.eqn):
                    operands.add(v)
        for v in self.sent:
            if v in self.revealed or v not in operands:
                continue
            home, last = self.home[v], needed[v] - 2  # it is fetched with the stage behind the last
            if last < home // _STAGE or not may_go_ahead(v):
                continue
            eqn = self.made_by.get(v)
            if eqn is None:
                self.ahead[v] = last * _STAGE + _AHEAD
            elif v in self.brought or v in self.read or eqn.primitive not in LIGHT | {blind_p}:
                # Made where it was: it would be kept inside for as long as it waits.
                self.ahead[v] = home // _STAGE * _STAGE + _AHEAD
            else:
                self.home[v] = last * _STAGE + _AHEAD

    def cut(self) -> Cut:
        wanted: dict[int, dict[Var, None]] = {0: {}}
        for v in (*self.sent, *self.sealed):
            wanted.setdefault(self._ready(v), {})[v] = None
        for v, index in self.ahead.items():
            wanted.setdefault(index, {})[v] = None
        materialized = {*self.sent, *self.sealed}
        segments: dict[int, TrustedSegment] = {}
        for index in reversed(range(1 + max(wanted))):
            if index not in wanted:
                continue
            roots = wanted[index]
            frontier = self._frontier(roots, index)
            was_there = functools.partial(self._was_there, index=index)
            again = _recomputed(frontier, self.made_by, materialized, was_there)
            eqns, inputs = self._collect(roots, index, again)
            for v in inputs:
                materialized.add(v)
                if v in self.made_by:
                    wanted.setdefault(self.home[v], {})[v] = None
            segments[index] = TrustedSegment(
                eqns=tuple(eqns),
                uploads=tuple(v for v in (*inputs, *roots) if v in self.level),
                downloads=tuple(v for v in roots if v in self.sent and self._sender(v) == index),
                inputs=tuple(inputs),
                outputs=tuple(v for v in roots if v in self.made_by and self.home[v] == index),
                ahead=index % _STAGE == _AHEAD,
            )
        numbers = sorted(segments)
        inorder = [
            dataclasses.replace(
                segments[n],
                beside=n % _STAGE == _BESIDE and n - 1 in segments and not segments[n].downloads,
            )
            for n in numbers
        ]
        levels = {
            v: bisect.bisect_left(numbers, n // _STAGE * _STAGE) for v, n in self.level.items()
        }
        return Cut(
            _upload_once(inorder), levels, tuple(self.host), tuple(self.constants), self.late
        )

    def _sender(self, v: Var) -> int:
        """The segment that sends `v`."""
        return self.ahead.get(v, self._ready(v))

    def _frontier(self, roots: Iterable[Var], index: int) -> list[Var]:
        """Values that this segment reads and that were there for earlier ones."""
        pending, seen, frontier = list(roots), set(), []
        while pending:
            v = pending.pop()
            if v in seen:
                continue
            seen.add(v)
            if self._was_there(v, index):
                frontier.append(v)
            elif v in self.made_by:
                pending.extend(variables(self.made_by[v]))
        return frontier

    def _was_there(self, v: Var, index: int) -> bool:
        """Whether a value was made before this segment, or came from the host for another."""
        if v in self.made_by:
            return self.home[v] < index
        return self.first_reader.get(v, index) < index

    def _collect(
        self, roots: Iterable[Var], index: int, again: set[Var]
    ) -> tuple[list[JaxprEqn], list[Var]]:
        """The equations of a segment in order, and the values it reads."""
        chosen: dict[int, JaxprEqn] = {}
        inputs: dict[Var, None] = {}
        pending, seen = list(roots), set()
        while pending:
            v = pending.pop()
            if v in seen:
                continue
            seen.add(v)
            eqn = self.made_by.get(v)
            if eqn is None:
                # An input that is only sent or sealed is not read by the segment's equations.
                continue
            if self.home[v] == index or v in again:
                chosen[self.order[id(eqn)]] = eqn
                pending.extend(variables(eqn))
        eqns = [chosen[number] for number in sorted(chosen)]
        made: set[Var] = set()
        for eqn in eqns:
            inputs.update(dict.fromkeys(v for v in variables(eqn) if v not in made))
            made |= set(eqn.outvars)
        return eqns, list(inputs)


def _recomputed(
    frontier: Sequence[Var],
    made_by: Mapping[Var, JaxprEqn],
    materialized: Container[Var],
    was_there: Callable[[Var], bool],
) -> set[Var]:
    """Values of earlier segments to compute again: a minimum cut.

    Each value is an edge whose capacity is what keeping it costs, or reading it where it is
    kept anyway; values that cannot be computed again are tied to the source, the segment's
    needs to the sink. What ends on the sink's side of the cut is computed again.

    Args:
      frontier: values that the segment reads and that were there before it.
      made_by: the equation of each value that is made inside.
      materialized: values that are kept anyway.
      was_there: whether a value was made before the segment, or brought for another.
    """

    def is_tied(v: Var) -> bool:
        eqn = made_by.get(v)
        return eqn is None or v in materialized or eqn.primitive not in LIGHT | HEAVY

    nodes: dict[Var, int] = {}
    edges: list[tuple[int, int, int]] = []
    pending = list(frontier)
    while pending:
        v = pending.pop()
        if v in nodes:
            continue
        nodes[v] = number = 2 + 2 * len(nodes)
        size = nbytes(v) // _UNIT
        cost = int(size * _READING) + 1 if v in materialized else size + 2
        edges.append((number, number + 1, cost))
        if is_tied(v):
            edges.append((0, number, _INFINITE))
            continue
        eqn = made_by[v]
        if eqn.primitive in HEAVY:
            size = math.prod(v.aval.shape)
            edges.append((0, number, size * _HEAVY_BYTES // _UNIT + 1))
        pending.extend(u for u in variables(eqn) if was_there(u))
    if not nodes:
        return set()
    # A quarter of what importing this library would take, and not every program comes here.
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    for v, number in nodes.items():
        if not is_tied(v):
            for u in set(variables(made_by[v])):
                if u in nodes:
                    edges.append((nodes[u] + 1, number, _INFINITE))
    edges += [(nodes[v] + 1, 1, _INFINITE) for v in frontier]
    start, end, capacity = (np.array(column, np.int64) for column in zip(*edges, strict=True))
    size = 2 + 2 * len(nodes)
    graph = csr_array((capacity, (start, end)), shape=(size, size))
    # Parallel edges add up; the sum must stay within 32 bits.
    graph.data = np.minimum(graph.data, _INFINITE)
    graph = graph.astype(np.int32)
    residual = (graph - maximum_flow(graph, 0, 1).flow).tocsr()
    residual.data = np.maximum(residual.data, 0)
    residual.eliminate_zeros()
    reached = set(breadth_first_order(residual, 0, return_predecessors=False).tolist())
    return {v for v, number in nodes.items() if number not in reached}


def _upload_once(segments: list[TrustedSegment]) -> tuple[TrustedSegment, ...]:
    """Leaves each upload with the first segment that reads it."""
    seen: set[Var] = set()
    once = []
    for segment in segments:
        uploads = tuple(dict.fromkeys(v for v in segment.uploads if v not in seen))
        seen |= set(uploads)
        once.append(dataclasses.replace(segment, uploads=uploads))
    return tuple(once)
