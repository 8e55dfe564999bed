"""Which key classes a mesh splits over its workers.

Sharding a class says everything about the products that use it: on a free or batch axis each worker
computes its own part, on a contracted axis the parts are summed (`psum`). Untrusted and pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from enclave_runtime.protocol.memory import sharded_axis
from enclave_runtime.protocol.program import KeyClass, Layout


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
