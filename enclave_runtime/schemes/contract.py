"""What a blinding scheme is: a group acting on axes, a lifetime for its keys, and their arithmetic.

A value is blinded by one group element for each of its axes. The client's planner reads a
scheme's description (which equations commute with it, how long keys may live); the enclave
calls its arithmetic. One class holds both, so that they cannot disagree.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout


class Group(enum.Enum):
    """What the keys of an axis form, and so which equations commute with the blinding."""

    SIGNED_PERMUTATION = "signed permutations"
    SCALED_PERMUTATION = "permutations with positive scales"
    ORTHOGONAL = "orthogonal matrices"
    INVERTIBLE = "invertible matrices"

    @property
    def orthogonal(self) -> bool:
        """Whether key and inverse-transpose key are the same, so that there is one polarity."""
        return self in (Group.SIGNED_PERMUTATION, Group.ORTHOGONAL)

    @property
    def elementwise(self) -> bool:
        """Whether elementwise functions commute, up to their behaviour under signs."""
        return self is Group.SIGNED_PERMUTATION


@dataclasses.dataclass(frozen=True)
class Scheme(abc.ABC):
    """A blinding scheme.

    Laws, for keys drawn for the classes of a product's axes, and up to rounding:
      ``unblind(blind(x)) == x`` and ``unblind(product(blind(x), blind(w))) == product(x, w)``.

    Attributes:
      name: the scheme's module, and its name in programs.
      group: what its keys form.
      keys_per_product: whether every product, forward and backward together, has keys of its
        own at every step; otherwise values are blinded once for all their uses, and the keys
        of device-resident weights are kept.
      host_learns: one sentence for `explain`.
    """

    name: ClassVar[str]
    group: ClassVar[Group]
    keys_per_product: ClassVar[bool] = False
    host_learns: ClassVar[str]

    @property
    def key_budget(self) -> int | None:
        """Steps for which the key of a device-resident weight is kept; None means for good."""
        return None

    @property
    def parameters(self) -> dict[str, Any]:
        """What distinguishes it from other schemes of its class, as JSON fields."""
        return dataclasses.asdict(self)

    @abc.abstractmethod
    def draw(self, key_class: KeyClass, stream: KeyStream) -> Any:
        """Draws the key of one class from a cryptographic stream."""

    @abc.abstractmethod
    def blind(
        self,
        plain: jax.Array | np.ndarray,
        layout: Layout,
        keys: Mapping[int, Any],
        out: np.ndarray,
        stream: Callable[[], KeyStream],
    ) -> Any:
        """Blinds a value.

        Args:
          plain: the value.
          layout: how it is blinded.
          keys: each class's key.
          out: shared memory, to which nothing but the blinded value is written.
          stream: opens the stream of this one value, for what is drawn for it alone.

        Returns:
          What `unblind` needs to know of this value when it was a product's operand.
        """

    @abc.abstractmethod
    def unblind(
        self,
        blinded: np.ndarray,
        layout: Layout,
        keys: Mapping[int, Any],
        operands: tuple[Any, Any] | None,
    ) -> jax.Array:
        """Inverse of `blind`.

        Args:
          blinded: the value, in private memory that nobody changes any more.
          layout: how it is blinded.
          keys: each class's key.
          operands: if the value is the product of two blinded values, what `blind` returned
            for them.
        """

    def let_go(self, secret: Any) -> Any:
        """What later products need of an operand's `blind` once it was the first operand of one.

        Called when no product is left whose second operand has no decoys.
        """
        return secret

    @abc.abstractmethod
    def warm_up(self, array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]) -> None:
        """Compiles what `blind` and `unblind` need for such values."""


def keyed_axes(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """Each keyed axis of a layout, its class, and its parity."""
    for axis, (number, parity) in enumerate(zip(layout.classes, layout.parities, strict=True)):
        if number is not None:
            yield axis, number, parity
