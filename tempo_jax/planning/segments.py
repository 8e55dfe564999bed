"""Cuts the enclave's part of a placed program into segments.

The segment of a value is the number of visits to the host on the longest path to it, so that one
round trip serves everything that can go out together. A value that a later segment needs is either
kept or computed again: a minimum cut between what is there anyway and what is needed decides,
weighing bytes kept against elements recomputed (as rematerialization does for the memory of
training, Chen et al., arXiv 1604.06174).

A product that nothing sent depends on, as the gradient of a weight that is updated inside, need not
hold up what is sent: it is *late*. The devices compute it while the enclave runs the segment that
could have read it, and what the enclave makes of it is a segment of its own behind that one, which
runs while the devices are at the next products. Untrusted and pure.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import primitives as prims

from tempo_jax.jaxprs.equations import forward_only
from tempo_jax.jaxprs.products import is_product
from tempo_jax.jaxprs.types import Jaxpr, JaxprEqn, Var, nbytes
from tempo_jax.planning.placement import Placement
from tempo_jax.planning.walk import Side

# Cheap enough, and fused by XLA, that computing them again can beat keeping their result.
_LIGHT = {
    prims.abs_p,
    prims.add_p,
    prims.add_jaxvals_p,
    prims.and_p,
    prims.bitcast_convert_type_p,
    prims.broadcast_in_dim_p,
    prims.ceil_p,
    prims.clamp_p,
    prims.concatenate_p,
    prims.convert_element_type_p,
    prims.copy_p,
    prims.div_p,
    prims.eq_p,
    prims.floor_p,
    prims.ge_p,
    prims.gt_p,
    prims.integer_pow_p,
    prims.iota_p,
    prims.is_finite_p,
    prims.le_p,
    prims.lt_p,
    prims.max_p,
    prims.min_p,
    prims.mul_p,
    prims.ne_p,
    prims.neg_p,
    prims.not_p,
    prims.or_p,
    prims.pad_p,
    prims.reduce_precision_p,
    prims.reshape_p,
    prims.rev_p,
    prims.rsqrt_p,
    prims.select_n_p,
    prims.sign_p,
    prims.slice_p,
    prims.sqrt_p,
    prims.square_p,
    prims.squeeze_p,
    prims.stop_gradient_p,
    prims.sub_p,
    prims.transpose_p,
    prims.xor_p,
}
# JAX 0.12: what tanh's derivative became.
_LIGHT |= {p for p in [getattr(prims, "one_minus_square_p", None)] if p is not None}
# Transcendental functions: worth computing again only instead of keeping more than a few bytes.
_HEAVY = {
    prims.cbrt_p,
    prims.cos_p,
    prims.erf_p,
    prims.exp2_p,
    prims.exp_p,
    prims.expm1_p,
    prims.log1p_p,
    prims.log_p,
    prims.logistic_p,
    prims.pow_p,
    prims.sin_p,
    prims.tanh_p,
}
_HEAVY_BYTES = 8  # bytes of keeping that one transcendental element is worth
# Reading a value that is kept anyway, over keeping another of its size: more than half, so that a
# sum over all layers is not added up anew in each of them.
_READING = 2 / 3
_UNIT = 1024  # bytes; capacities are integers of 32 bits
_INFINITE = 1 << 30


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
    """

    eqns: tuple[JaxprEqn, ...]
    uploads: tuple[Var, ...]
    downloads: tuple[Var, ...]
    inputs: tuple[Var, ...]
    outputs: tuple[Var, ...]
    beside: bool = False


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
) -> Cut:
    """Cuts a placed program.

    Args:
      jaxpr: the flat program.
      placement: where each equation runs.
      revealed: outputs that go to the host in the clear.
      sealed_inside: outputs that stay in the enclave.
      may_be_late: whether a product is large enough for a request of its own.
    """
    return _Cutter(jaxpr, placement, revealed, sealed_inside, may_be_late).cut()


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
        for v in _variables(eqn.invars):
            if is_needed or (host and v not in placement.host):
                needed.add(v)
    return frozenset(late)


def _variables(atoms: Sequence[Any]) -> list[Var]:
    return [v for v in atoms if isinstance(v, Var)]


class _Cutter:
    def __init__(
        self,
        jaxpr: Jaxpr,
        placement: Placement,
        revealed: Iterable[Var],
        sealed_inside: Iterable[Var],
        may_be_late: Callable[[Var], bool],
    ):
        # Until `cut` counts segments, they have even numbers, and 2n + 1 is the one behind the n-th
        # that takes what comes late.
        self.late = _late(jaxpr, placement, may_be_late)
        self.made_by: dict[Var, JaxprEqn] = {}  # values made inside
        self.order: dict[int, int] = {}
        self.home: dict[Var, int] = {}  # the segment of a value inside
        self.level: dict[Var, int] = {}  # the first segment that can read a value on the host
        self.sent: dict[Var, None] = dict.fromkeys(revealed)
        self.sealed = dict.fromkeys(sealed_inside)
        self.host: list[HostEquation] = []
        self.anyone: set[Var] = set()
        self.first_reader: dict[Var, int] = {}  # the first segment that may read an upload
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
            ready = [self._ready(v) for v in _variables(eqn.invars)]
            home = max(ready, default=0)
            for v in eqn.outvars:
                self.home[v] = home
                self.made_by[v] = eqn
            for v in _variables(eqn.invars):
                if v in self.level:
                    self.first_reader[v] = min(home, self.first_reader.get(v, home))
        plain = [v for e in self.host if not e.sent for v in e.eqn.invars]
        self.constants = forward_only(known, plain)

    def _ready(self, v: Var) -> int:
        """The first segment that can read `v`."""
        return self.home[v] if v in self.home else self.level[v]

    def _place_on_host(self, eqn: JaxprEqn, number: int, sent: bool) -> None:
        level = 0
        for v in _variables(eqn.invars):
            if v in self.level:
                level = max(level, self.level[v])
            elif sent or v not in self.anyone:
                level = max(level, self.home[v] // 2 * 2 + 2)
                self.sent[v] = None
        self.level[eqn.outvars[0]] = level | (eqn.outvars[0] in self.late)
        self.host.append(HostEquation(eqn, number, sent))

    def cut(self) -> Cut:
        wanted: dict[int, dict[Var, None]] = {0: {}}
        for v in (*self.sent, *self.sealed):
            wanted.setdefault(self._ready(v), {})[v] = None
        materialized = {*self.sent, *self.sealed}
        segments: dict[int, TrustedSegment] = {}
        for index in reversed(range(1 + max(wanted))):
            if index not in wanted:
                continue
            roots = wanted[index]
            frontier = self._frontier(roots, index)
            again = self._recompute(frontier, index, materialized)
            eqns, inputs = self._collect(roots, index, again)
            for v in inputs:
                materialized.add(v)
                if v in self.made_by:
                    wanted.setdefault(self.home[v], {})[v] = None
            segments[index] = TrustedSegment(
                eqns=tuple(eqns),
                uploads=tuple(v for v in (*inputs, *roots) if v in self.level),
                downloads=tuple(v for v in roots if v in self.sent),
                inputs=tuple(inputs),
                outputs=tuple(v for v in roots if v in self.made_by),
            )
        numbers = sorted(segments)
        inorder = [
            dataclasses.replace(
                segments[n], beside=n % 2 == 1 and n - 1 in segments and not segments[n].downloads
            )
            for n in numbers
        ]
        levels = {v: bisect.bisect_left(numbers, n // 2 * 2) for v, n in self.level.items()}
        return Cut(
            _upload_once(inorder), levels, tuple(self.host), tuple(self.constants), self.late
        )

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
                pending.extend(_variables(self.made_by[v].invars))
        return frontier

    def _was_there(self, v: Var, index: int) -> bool:
        """Whether a value was made before this segment, or came from the host for another."""
        if v in self.made_by:
            return self.home[v] < index
        return self.first_reader.get(v, index) < index

    def _recompute(self, frontier: Sequence[Var], index: int, materialized: set[Var]) -> set[Var]:
        """Values of earlier segments to compute again instead of keeping: a minimum cut.

        Each value is an edge whose capacity is what keeping it costs, or reading it where it is
        kept anyway; values that cannot be computed again are tied to the source, the segment's
        needs to the sink. What ends on the sink's side of the cut is computed again.
        """

        def is_tied(v: Var) -> bool:
            eqn = self.made_by.get(v)
            return eqn is None or v in materialized or eqn.primitive not in _LIGHT | _HEAVY

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
            eqn = self.made_by[v]
            if eqn.primitive in _HEAVY:
                size = math.prod(v.aval.shape)
                edges.append((0, number, size * _HEAVY_BYTES // _UNIT + 1))
            pending.extend(u for u in _variables(eqn.invars) if self._was_there(u, index))
        if not nodes:
            return set()
        # A quarter of what importing this library would take, and not every program comes here.
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        for v, number in nodes.items():
            if not is_tied(v):
                for u in set(_variables(self.made_by[v].invars)):
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
                pending.extend(_variables(eqn.invars))
        eqns = [chosen[number] for number in sorted(chosen)]
        made: set[Var] = set()
        for eqn in eqns:
            inputs.update(dict.fromkeys(v for v in _variables(eqn.invars) if v not in made))
            made |= set(eqn.outvars)
        return eqns, list(inputs)


def _upload_once(segments: list[TrustedSegment]) -> tuple[TrustedSegment, ...]:
    """Leaves each upload with the first segment that reads it."""
    seen: set[Var] = set()
    once = []
    for segment in segments:
        uploads = tuple(dict.fromkeys(v for v in segment.uploads if v not in seen))
        seen |= set(uploads)
        once.append(dataclasses.replace(segment, uploads=uploads))
    return tuple(once)
