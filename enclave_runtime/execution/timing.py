"""Measures what the enclave's own work costs on this machine.

The client's planner asks once per machine and decides from it which products are worth
sending out. Keys are drawn for the purpose and forgotten; nothing measured depends on data.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes import SCHEMES
from enclave_runtime.schemes.contract import Scheme, SchemeCost

_REPEATS = 5
_SMALL, _LARGE = (256, 64), (2048, 1024)  # shapes from which overhead and slope follow
_ENTRIES = 4096  # of a key
_SIDE = 1024  # of the matrix product
_IMAGES = (32, 28, 28, 64)  # of the convolution, with a window of 3×3 and 64 channels out


def measure() -> dict[str, Any]:
    """Measures every constant.

    Returns:
      `dot_flops` and `convolution_flops` per second in float32, `nanoseconds_per_byte` of a
      copy, and in `schemes` for each scheme by name the fields of a `SchemeCost`: `overhead` of a
      tensor of no size, `blinding` for one element more, the mean of both ways, and `drawing`.
    """
    side = jnp.ones((_SIDE, _SIDE), jnp.float32)
    images = jnp.ones(_IMAGES, jnp.float32)
    window = jnp.ones((3, 3, _IMAGES[-1], _IMAGES[-1]), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    convolve = jax.jit(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    block = np.ones(1 << 22, np.uint8)
    copied = np.empty_like(block)
    return {
        "dot_flops": 2 * _SIDE**3 / _seconds(lambda: multiply(side, side)),
        "convolution_flops": 2
        * images.size
        * 9
        * _IMAGES[-1]
        / _seconds(lambda: convolve(images, window)),
        "nanoseconds_per_byte": 1e9 * _seconds(lambda: np.copyto(copied, block)) / block.size,
        "schemes": {name: dataclasses.asdict(_cost(scheme())) for name, scheme in SCHEMES.items()},
    }


class _Keys:
    """Streams for keys that protect nothing."""

    def __init__(self) -> None:
        self._schedule = KeySchedule()
        self._uses = itertools.count()

    def stream(self) -> Any:
        return self._schedule.stream("calibration", next(self._uses))


def _seconds(work: Callable[[], Any]) -> float:
    """The median time of a piece of work."""
    jax.block_until_ready(work())
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _cost(scheme: Scheme) -> SchemeCost:
    keys = _Keys()
    overhead, slope = _crossing(scheme)
    drawing = _seconds(lambda: scheme.draw(KeyClass(_ENTRIES), keys.stream())) / _ENTRIES
    return SchemeCost(overhead, 1e9 * slope, 1e9 * drawing)


def _crossing(scheme: Scheme) -> tuple[float, float]:
    """Seconds to blind or unblind a float32 tensor: for no element, and for each element."""
    small, large = (_both_ways(scheme, shape) for shape in (_SMALL, _LARGE))
    sizes = [float(np.prod(shape)) for shape in (_SMALL, _LARGE)]
    slope = max(large - small, 0.0) / (sizes[1] - sizes[0])
    return max(small - slope * sizes[0], 0.0), slope


def _both_ways(scheme: Scheme, shape: tuple[int, int]) -> float:
    """The mean time of blinding a tensor and of unblinding a product's result of its size."""
    rows, width = shape
    keys = _Keys()
    # What goes out may have decoy rows, of which the result is rid again.
    decoys = scheme.decoys(rows)
    classes = KeyClass(rows, decoys=decoys), KeyClass(width), KeyClass(width)
    elements = {i: scheme.draw(c, keys.stream()) for i, c in enumerate(classes)}
    x, w = jnp.ones(shape, jnp.float32), jnp.ones((width, width), jnp.float32)
    sent = ArrayType((rows + decoys, width), "float32")

    def memory(array: ArrayType, *, product: bool = False) -> np.ndarray:
        held = scheme.representation(array, product=product)
        return np.zeros(held.shape, held.dtype)

    out, small = memory(sent), memory(ArrayType(w.shape, "float32"))
    returned = memory(sent, product=True)
    secrets: list[Any] = []

    def blind() -> None:
        secrets.append(scheme.blind(x, Layout((0, 1), (1, 1)), elements, out, keys.stream))

    blinding = _seconds(blind)
    weight = scheme.blind(w, Layout((1, 2), (0, 1)), elements, small, keys.stream)
    operands = scheme.cheapest_operands(secrets[-1], weight)
    result = Layout((0, 2), (1, 1))
    unblinding = _seconds(lambda: scheme.unblind(returned, result, elements, operands))
    return (blinding + unblinding) / 2
