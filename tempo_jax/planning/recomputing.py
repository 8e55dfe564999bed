"""Decides which values a segment computes again instead of having them kept for it.

A minimum cut between what is there anyway and what is needed weighs bytes kept against elements
recomputed, as rematerialization does for the memory of training (Chen et al., arXiv 1604.06174).
Untrusted and pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence

import numpy as np
from jax.extend.core import primitives as prims

from tempo_jax.jaxprs.products import variables
from tempo_jax.jaxprs.types import JaxprEqn, Var, nbytes

# Cheap enough, and fused by XLA, that computing them again can beat keeping their result.
LIGHT = {
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
LIGHT |= {p for p in [getattr(prims, "one_minus_square_p", None)] if p is not None}
# Transcendental functions: worth computing again only instead of keeping more than a few bytes.
HEAVY = {
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


def recomputed(
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
