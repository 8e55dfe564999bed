"""Records what reaches the host, for `tempo_jax.testing.host_view`.

Untrusted by definition: it can record only what the host has anyway.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Product:
    """An offloaded equation as the host saw it.

    Attributes:
      step: number of the shielded call within the recording, from 0.
      equation: number of the equation in the shielded function's flat program.
      primitive: `dot_general_p` or `conv_general_dilated_p`.
      params: the equation's parameters.
      operands: the two blinded operands.
      result: the blinded product.
    """

    step: int
    equation: int
    primitive: Any
    params: dict[str, Any]
    operands: tuple[np.ndarray, np.ndarray]
    result: np.ndarray


@dataclasses.dataclass
class HostView:
    """Everything that reached the host during a recording, in order.

    Attributes:
      products: offloaded equations.
      crossings: (step, array) of every tensor that passed between enclave and host.
      revealed: (step, array) of every revealed output.
      leaves: (step, array) of every blinded leaf that lay on the devices.
      steps: number of shielded calls recorded.
      pools: under a scheme with several pools of devices, what reached each of them alone.
    """

    products: list[Product] = dataclasses.field(default_factory=list)
    crossings: list[tuple[int, np.ndarray]] = dataclasses.field(default_factory=list)
    revealed: list[tuple[int, np.ndarray]] = dataclasses.field(default_factory=list)
    leaves: list[tuple[int, np.ndarray]] = dataclasses.field(default_factory=list)
    steps: int = 0
    pools: list[HostView] = dataclasses.field(default_factory=list)

    def arrays(self) -> Iterator[np.ndarray]:
        """Every recorded array."""
        for product in self.products:
            yield from (*product.operands, product.result)
        for _, array in (*self.crossings, *self.revealed, *self.leaves):
            yield array


def add_crossing(view: HostView, array: np.ndarray, pools: int) -> None:
    """Records a tensor that passed.

    Args:
      view: the recording.
      array: the tensor.
      pools: into how many pools' parts it falls along its first axis; 1 if all see it.
    """
    view.crossings.append((view.steps, array))
    for number, pool in enumerate(view.pools):
        part = array if pools == 1 else array[number]
        pool.crossings.append((view.steps, part))


def add_product(view: HostView, product: Product) -> None:
    """Records an offloaded equation, and of shares each pool's part of it."""
    view.products.append(product)
    first, second = product.operands
    for number, pool in enumerate(view.pools):
        own = (first[number], second[number])
        pool.products.append(
            dataclasses.replace(product, operands=own, result=product.result[number])
        )


_active: list[HostView] = []


@contextlib.contextmanager
def host_view() -> Iterator[HostView]:
    """Records every array that reaches the host during shielded calls.

    Covers calls outside `jax.jit`; a shielded call inside one raises while a recording runs.

    Yields:
      The recording, filled as calls are made.
    """
    view = HostView()
    _active.append(view)
    try:
        yield view
    finally:
        _active.remove(view)


def active_views() -> list[HostView]:
    """The recordings that run now."""
    return list(_active)
