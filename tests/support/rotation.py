"""A scheme in one file: every axis rotated by a secret number of places.

It stands for a scheme that somebody adds. Nothing in the library knows it, and
``python -m tests.support.rotation`` is an enclave that does.
"""

import dataclasses
import runpy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.environment import ENCLAVE_MODULE
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes.contract import Group, Scheme, SchemeCost, keyed_axes, register


@dataclasses.dataclass(frozen=True)
class Rotation(Scheme):
    """``X̂[i, j] = X[(i + a) mod m, (j + b) mod n]``: no protection, but equivariant and exact.

    Attributes:
      least: places by which an axis is rotated at least.
    """

    least: int = 0
    name: ClassVar[str] = "rotation"
    group: ClassVar[Group] = Group.SIGNED_PERMUTATION  # permutations are some of these
    reference: ClassVar[SchemeCost] = SchemeCost(overhead=1e-5, blinding=0.5, drawing=1.0)
    host_learns: ClassVar[str] = "every matrix up to a rotation of its rows and columns"

    def draw(self, key_class: KeyClass, stream: KeyStream) -> int:
        """A uniform number of places."""
        return self.least + int(stream.uniform(1)[0] * (key_class.size - self.least))

    def blind(
        self,
        plain: jax.Array | np.ndarray,
        layout: Layout,
        keys: Mapping[int, int],
        out: np.ndarray,
        stream: Callable[[], KeyStream],
    ) -> None:
        """Rotates each axis that carries a key."""
        for axis, number, _ in keyed_axes(layout):
            plain = np.roll(np.asarray(plain), -keys[number], axis)
        np.copyto(out, np.asarray(plain))

    def unblind(
        self,
        blinded: np.ndarray,
        layout: Layout,
        keys: Mapping[int, int],
        operands: tuple[Any, Any] | None,
    ) -> jax.Array:
        """Rotates back."""
        for axis, number, _ in keyed_axes(layout):
            blinded = np.roll(blinded, keys[number], axis)
        return jnp.asarray(blinded)

    @classmethod
    def load(cls) -> None:
        """Has no kernels."""

    def warm_up(self, array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]) -> None:
        """Nothing to compile."""


if __name__ == "__main__":
    register(Rotation)
    runpy.run_module(ENCLAVE_MODULE, run_name="__main__")
