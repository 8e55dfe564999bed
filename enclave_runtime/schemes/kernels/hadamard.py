"""Mixing: dense, well-conditioned maps of axes that cost a few passes over memory.

`mix` and `unmix` check what they are given and apply the map of each axis in one pass, with
the work of a large one spread over threads. Maps and how they are drawn, which stand in
`enclave_runtime.schemes.kernels.axis_map`, are passed on here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.schemes.kernels import lines, passes, tile_programs
from enclave_runtime.schemes.kernels.axis_map import AxisMap as AxisMap
from enclave_runtime.schemes.kernels.axis_map import block_size as block_size
from enclave_runtime.schemes.kernels.axis_map import dense_transform as dense_transform
from enclave_runtime.schemes.kernels.axis_map import draw as draw
from enclave_runtime.schemes.kernels.threads import in_parallel

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def _apply(
    source: np.ndarray,
    axis: int,
    axis_map: AxisMap,
    extra: np.ndarray | None,
    target: np.ndarray,
) -> None:
    """Maps one axis; `target` may be `source` where their shapes agree."""
    if target.size:
        plan = passes.planned(source, axis, axis_map, extra, target)
        in_parallel(functools.partial(passes.run, plan), plan.tasks, plan.elements)


def _transform(
    name: str,
    x: np.ndarray,
    maps: Mapping[int, AxisMap],
    extra: np.ndarray | None,
    keep: int | None,
    out: np.ndarray | None,
) -> np.ndarray:
    x = np.require(x, requirements=["C", "A"])
    rows_axis = x.ndim - 2
    if x.dtype not in DTYPES or x.ndim < 1:
        raise ValueError(f"{name}: expected float32 or float64 of rank 1 or more, got {x.dtype}")
    if (extra is not None or keep is not None) and rows_axis not in maps:
        raise ValueError(f"{name}: extra rows need a map of axis {rows_axis}")
    sizes = list(x.shape)
    if extra is not None:
        extra = np.require(extra, requirements=["C", "A"])
        cut = (*x.shape[:rows_axis], *x.shape[rows_axis + 1 :])
        got = (*extra.shape[:rows_axis], *extra.shape[rows_axis + 1 :])
        if extra.dtype != x.dtype or extra.ndim != x.ndim or cut != got:
            raise ValueError(
                f"{name}: extra rows {extra.dtype}{extra.shape} do not fit {x.dtype}{x.shape}"
            )
        sizes[rows_axis] += extra.shape[rows_axis]
    for axis, axis_map in maps.items():
        if not 0 <= axis < x.ndim or axis_map.size != sizes[axis]:
            raise ValueError(f"{name}: a map of size {axis_map.size} on axis {axis} of {sizes}")
        if axis_map.copies not in (1, sizes[0] if axis else 1):
            raise ValueError(f"{name}: {axis_map.copies} copies on axis {axis} of {sizes}")
    if 0 in maps and any(axis_map.copies != 1 for axis_map in maps.values()):
        # The two would not commute, and a map across the batch would undo its keys' independence.
        raise ValueError(f"{name}: a map of axis 0 beside copies, one for each index of axis 0")
    if keep is not None:
        if not 0 <= keep <= sizes[rows_axis]:
            raise ValueError(f"{name}: cannot keep {keep} of {sizes[rows_axis]} rows")
        sizes[rows_axis] = keep
    shape = tuple(sizes)
    if out is None:
        result = private = passes.aligned_empty(shape, x.dtype)
    elif out.shape == shape and out.dtype == x.dtype and out.flags.carray:
        # The host may see `out`, and must not see an array that lacks some axis's map.
        result, private = out, passes.aligned_empty(shape, x.dtype) if len(maps) > 1 else out
    else:
        raise ValueError(f"{name}: out is not a C-contiguous {x.dtype}{shape}")
    # The axis that grows or shrinks comes first, so that the others can work in place.
    axes = sorted(maps, key=lambda axis: axis != rows_axis)
    for axis in axes:
        target = result if axis == axes[-1] else private
        _apply(x, axis, maps[axis], extra, target)
        x, extra = target, None
    if not axes:
        result[...] = x
    return result


def mix(
    x: np.ndarray,
    maps: Mapping[int, AxisMap],
    *,
    extra: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Applies ``maps[axis]`` along each axis that has one.

    Args:
      x: float32 or float64 of any rank >= 1. With `copies` > 1, axis 0 is the batch, and
        copy i maps ``x[i]``.
      maps: by axis, counted from 0; axes without a map stay as they are.
      extra: rows that are appended along axis ``rank - 2`` first, of x's shape otherwise;
        the axis's map then has the size of both.
      out: C-contiguous, not overlapping x; takes the result. Only finished elements are
        written to it.

    Returns:
      `out`, or a new array: of x's shape, with the extra rows.

    Raises:
      ValueError: shapes, sizes or dtypes do not fit each other.

    >>> a = draw(KeyStream(bytes(32)), 3, condition=4)
    >>> x = np.ones((2, 3))
    >>> bool(np.allclose(mix(x, {1: a}), x @ a.dense().T))
    True
    """
    return _transform("mix", x, maps, extra, None, out)


def unmix(
    y: np.ndarray,
    maps: Mapping[int, AxisMap],
    *,
    keep: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Applies maps as `mix` does, and keeps the first `keep` positions along axis ``rank - 2``.

    Called with the maps' inverses, ``unmix(mix(x, A, extra=r), inverse, keep=len(x)) == x``
    up to rounding.

    >>> a = draw(KeyStream(bytes(32)), 5, condition=4)
    >>> x, decoys = np.ones((3, 2)), np.zeros((2, 2))
    >>> bool(np.allclose(unmix(mix(x, {0: a}, extra=decoys), {0: a.inverse()}, keep=3), x))
    True
    """
    return _transform("unmix", y, maps, None, keep, out)


@functools.cache
def warm_up() -> None:
    """Compiles every kernel, or loads it from Numba's cache: seconds, or a fraction of one."""
    axis_map = draw(KeyStream(bytes(32)), 1, condition=1).inverse()
    for dtype in DTYPES:
        mix(np.zeros((1, 2), dtype), {0: axis_map})
        mix(np.zeros((2, 1), dtype), {1: axis_map})
        program = tile_programs.TileProgram(np.dtype(dtype), 1, 1)
        program.unit(0, 1)
        program.run()
    lines.warm_up()
    KeyStream(bytes(32)).normal(1)
