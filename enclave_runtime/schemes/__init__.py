"""Blinding schemes: one module each, found by name.

A scheme draws one key for each key class and applies it along axes. To add one, write a
module here with the `Scheme` functions and name it in `SCHEMES`; the planner's view of it
(key lifetimes, cost, what commutes with it) is a class in `tempo_jax.schemes`.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np

from enclave_runtime.keys import KeyStream
from enclave_runtime.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes import signed_permutation


class Scheme(Protocol):
    """What a scheme's module provides.

    Laws, for keys drawn for the classes of a product's axes:
      ``unblind(blind(x, layout, keys), layout, keys) == x`` and
      ``unblind(product(blind(x), blind(w))) == product(x, w)``.
    """

    def draw(self, key_class: KeyClass, stream: KeyStream) -> Any:
        """Draws the key of one class from a cryptographic stream."""
        ...

    def blind(
        self, plain: jax.Array | np.ndarray, layout: Layout, keys: dict[int, Any]
    ) -> jax.Array:
        """Blinds a value; `keys` maps each class of the layout to its key."""
        ...

    def unblind(self, blinded: np.ndarray, layout: Layout, keys: dict[int, Any]) -> jax.Array:
        """Inverse of `blind`; reads each element of shared memory once."""
        ...

    def warm_up(self, array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]) -> None:
        """Compiles what `blind` and `unblind` need for such values."""
        ...


SCHEMES: dict[str, Scheme] = {"signed_permutation": signed_permutation}
