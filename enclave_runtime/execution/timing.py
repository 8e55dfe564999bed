"""Measures what the enclave's own work costs on this machine.

The client's planner asks once per machine and decides from it which products are worth
sending out. Keys are drawn for the purpose and forgotten; nothing measured depends on data.
Everything is timed in turn, several times over, and the least time counts: other work on the
machine only adds to it, and a burst of it does not last for all the rounds.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Hashable, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes import SCHEMES
from enclave_runtime.schemes.contract import Scheme, SchemeCost

_ROUNDS = 6  # that count
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
    schemes = {name: scheme() for name, scheme in SCHEMES.items()}
    works: dict[Hashable, Callable[[], Any]] = {
        "dot": lambda: multiply(side, side),
        "convolution": lambda: convolve(images, window),
        "copy": lambda: np.copyto(copied, block),
    }
    for name, scheme in schemes.items():
        works |= {(name, what): work for what, work in _scheme_works(scheme).items()}
    seconds = _least_seconds(works)
    return {
        "dot_flops": 2 * _SIDE**3 / seconds["dot"],
        "convolution_flops": 2 * images.size * 9 * _IMAGES[-1] / seconds["convolution"],
        "nanoseconds_per_byte": 1e9 * seconds["copy"] / block.size,
        "schemes": {name: dataclasses.asdict(_cost(name, seconds)) for name in schemes},
    }


class _Keys:
    """Streams for keys that protect nothing."""

    def __init__(self) -> None:
        self._schedule = KeySchedule()
        self._uses = itertools.count()

    def stream(self) -> Any:
        return self._schedule.stream("calibration", next(self._uses))


def _least_seconds(works: Mapping[Hashable, Callable[[], Any]]) -> dict[Hashable, float]:
    """The least time of each piece of work, all of which are done in turn."""
    least = dict.fromkeys(works, float("inf"))
    for number in range(_ROUNDS + 1):
        for name, work in works.items():
            start = time.perf_counter()
            jax.block_until_ready(work())
            if number:  # The first compiles.
                least[name] = min(least[name], time.perf_counter() - start)
    return least


def _cost(name: str, seconds: Mapping[Hashable, float]) -> SchemeCost:
    """A scheme's cost: seconds for a float32 tensor of no element, and for each element."""
    (small, size), (large, most) = (
        ((seconds[name, ("blind", shape)] + seconds[name, ("unblind", shape)]) / 2, prod(shape))
        for shape in (_SMALL, _LARGE)
    )
    slope = max(large - small, 0.0) / (most - size)
    drawing = seconds[name, "draw"] / _ENTRIES
    return SchemeCost(max(small - slope * size, 0.0), 1e9 * slope, 1e9 * drawing)


def _scheme_works(scheme: Scheme) -> dict[Hashable, Callable[[], Any]]:
    """What a scheme does: drawing a key, and blinding and unblinding a small and a large tensor."""
    keys = _Keys()
    works: dict[Hashable, Callable[[], Any]] = {
        "draw": lambda: scheme.draw(KeyClass(_ENTRIES), keys.stream())
    }
    for shape in (_SMALL, _LARGE):
        works["blind", shape], works["unblind", shape] = _both_ways(scheme, shape, keys)
    return works


def _both_ways(
    scheme: Scheme, shape: tuple[int, int], keys: _Keys
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Blinding a tensor, and unblinding a product's result of its size."""
    rows, width = shape
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

    def blind() -> Any:
        return scheme.blind(x, Layout((0, 1), (1, 1)), elements, out, keys.stream)

    first = blind()
    second = scheme.blind(w, Layout((1, 2), (0, 1)), elements, small, keys.stream)
    operands = scheme.cheapest_operands(first, second)

    def unblind() -> Any:
        return scheme.unblind(returned, Layout((0, 2), (1, 1)), elements, operands)

    def blind_alone() -> None:
        blind()

    return blind_alone, unblind
