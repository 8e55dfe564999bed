"""What a mesh splits over its workers: key classes, and what lies on the devices.

Sharding a class says everything about the products that use it: on a free or batch axis each worker
computes its own part, on a contracted axis the parts are summed (`psum`).

With ``shard_weights=True`` each worker keeps a part of what lies on the devices, as in fully
sharded data parallelism: a leaf is split along one axis, what meets it in its update is split
alike, so that the update runs on parts; its gradient is added up and shared out in one collective,
and the whole is gathered where a product takes it. Untrusted and pure.

References:
  Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models,
  https://arxiv.org/abs/1910.02054
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend.core import primitives as prims

from enclave_runtime.protocol.memory import sharded_axis
from enclave_runtime.protocol.program import KeyClass, Layout
from tempo_jax.jaxprs.primitives import cheap_p, optimization_barrier_p
from tempo_jax.jaxprs.types import JaxprEqn, Var

# Of these each element of the result follows from the elements at its place. One that is missing
# is computed whole by every worker.
_ELEMENTWISE = frozenset(
    {
        *(cheap_p, optimization_barrier_p, prims.neg_p, prims.copy_p, prims.reduce_precision_p),
        *(prims.add_p, prims.sub_p, prims.add_jaxvals_p, prims.mul_p, prims.div_p),
        *(prims.abs_p, prims.sign_p, prims.square_p, prims.sqrt_p, prims.rsqrt_p, prims.cbrt_p),
        *(prims.integer_pow_p, prims.pow_p, prims.exp_p, prims.log_p, prims.tanh_p),
        *(prims.max_p, prims.min_p, prims.clamp_p, prims.is_finite_p, prims.select_n_p),
        *(prims.eq_p, prims.ne_p, prims.lt_p, prims.le_p, prims.gt_p, prims.ge_p),
        *(prims.and_p, prims.or_p, prims.not_p, prims.convert_element_type_p),
    }
)


def choose_sharded(
    classes: Sequence[KeyClass],
    values: Iterable[tuple[Layout, int]],
    fixed: Iterable[Layout],
    workers: int,
) -> frozenset[int]:
    """Chooses classes to split, greedily by the bytes they divide.

    Args:
      classes: all key classes.
      values: layout and bytes of every value on the host.
      fixed: layouts of device-resident leaves, which every worker holds whole.
      workers: devices in the mesh.

    Returns:
      Numbers of classes whose size, decoys included, `workers` divides, no two of them on one
      value.
    """
    if workers == 1:
        return frozenset()
    kept = {c for layout in fixed for c in layout.classes}
    divided: dict[int, int] = {}
    together: dict[int, set[int]] = {}
    for layout, size in values:
        present = [c for c in layout.classes if c is not None]
        for c in present:
            divided[c] = divided.get(c, 0) + size
            together.setdefault(c, set()).update(present)
            if present.count(c) > 1:
                kept.add(c)
    chosen: set[int] = set()
    for c in sorted(divided, key=lambda c: (-divided[c], c)):
        size = classes[c].size + classes[c].decoys
        if c not in kept and size % workers == 0 and not together[c] & chosen:
            chosen.add(c)
    return frozenset(chosen)


def local_shape(
    shape: Sequence[int], layout: Layout, sharded: frozenset[int], workers: int, pools: int = 1
) -> tuple[int, ...]:
    """The shape of one worker's part."""
    axis = sharded_axis(layout, sharded, pools)
    return tuple(n // workers if i == axis else n for i, n in enumerate(shape))


def is_elementwise(eqn: JaxprEqn) -> bool:
    """Whether an equation may run on parts; its operands are scalars or of the result's shape."""
    shape = eqn.outvars[0].aval.shape
    fit = all(v.aval.shape in ((), shape) for v in eqn.invars)
    return eqn.primitive in _ELEMENTWISE and len(eqn.outvars) == 1 and fit and bool(shape)


def split_axis(shape: Sequence[int], workers: int) -> int | None:
    """The longest axis that the workers divide, the first of equals; None if there is none."""
    fitting = [a for a, n in enumerate(shape) if n and n % workers == 0]
    return max(fitting, key=lambda a: (shape[a], -a), default=None)


def split_values(
    leaves: Iterable[Var],
    host: Sequence[JaxprEqn],
    shape: Callable[[Any], Sequence[int]],
    workers: int,
) -> dict[Var, int]:
    """The axes along which workers keep parts of what the host holds.

    Args:
      leaves: what lies on the devices before or after a step.
      host: the host's equations, in order.
      shape: of a value as the host has it; () for what is not to be split.
      workers: devices in the mesh.

    Returns:
      An axis for each leaf that the workers divide, and for what its update makes of it. What is
      made whole all the same (by a product that is not contracted, say) is cut where it is needed.
    """
    axes: dict[Var, int] = {}

    def give(v: Any, axis: int) -> bool:
        found = shape(v)
        if not isinstance(v, Var) or v in axes or len(found) <= axis or found[axis] % workers:
            return False
        axes[v] = axis
        return True

    for leaf in leaves:
        axis = split_axis(shape(leaf), workers)
        if axis is not None:
            give(leaf, axis)
    growing = bool(axes)
    while growing:
        growing = False
        for eqn in host:
            out = eqn.outvars[0]
            if is_elementwise(eqn):
                alike = [v for v in (out, *eqn.invars) if v.aval.shape == out.aval.shape]
                known = [axes[v] for v in alike if isinstance(v, Var) and v in axes]
                if known:
                    growing |= any([give(v, known[0]) for v in alike])
            elif eqn.primitive is prims.transpose_p:
                (source,), order = eqn.invars, eqn.params["permutation"]
                if out in axes:
                    growing |= give(source, order[axes[out]])
                elif source in axes:
                    growing |= give(out, order.index(axes[source]))
    return axes
