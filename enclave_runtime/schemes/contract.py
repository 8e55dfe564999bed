"""What a blinding scheme is: a group acting on axes, a lifetime for its keys, and their arithmetic.

A value is blinded by one group element for each of its axes. The client's planner reads a
scheme's description (which equations commute with it, how long keys may live, what it costs, which
products it wants); the enclave calls its arithmetic. One class holds both, so that they cannot
disagree, and nothing else knows one scheme from another.

To add a scheme, write its class in a module of its own, mark it with `register`, and add the line
that imports it to `enclave_runtime.schemes.registry`.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

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
    ADDITIVE = "additive shares"  # no key on any axis; the elements are what is hidden

    @property
    def orthogonal(self) -> bool:
        """Whether key and inverse-transpose key are the same, so that there is one polarity."""
        return self not in (Group.SCALED_PERMUTATION, Group.INVERTIBLE)

    @property
    def elementwise(self) -> bool:
        """Whether elementwise functions commute, up to their behaviour under signs."""
        return self is Group.SIGNED_PERMUTATION


class UnblindingError(Exception):
    """What the devices returned cannot be what they were asked for; the text goes to the peer."""


@dataclasses.dataclass(frozen=True)
class SchemeCost:
    """What a scheme costs the enclave.

    Attributes:
      overhead: seconds to blind or unblind a tensor however small.
      blinding: nanoseconds for each of its elements.
      drawing: nanoseconds to draw one entry of an axis's key.
    """

    overhead: float
    blinding: float
    drawing: float


@dataclasses.dataclass(frozen=True)
class Scheme(abc.ABC):
    """A blinding scheme.

    Laws, for keys drawn for the classes of a product's axes, and up to rounding:
      ``unblind(blind(x)) == x`` and ``unblind(product(blind(x), blind(w))) == product(x, w)``.

    Attributes:
      name: the scheme's module, and its name in programs.
      group: what its keys form.
      reference: what it costs on two cores of a current server, where nothing was measured.
      keys_per_product: whether every product, forward and backward together, has keys of its
        own at every step; otherwise values are blinded once for all their uses, and the keys
        of device-resident weights are kept. Such a scheme gets products as those of matrices or
        batches of matrices, each operand blinded for one product and its gradients alone, and
        their gradient G for each of its products.
      least_rows: of a product under keys of its own, below which it stays inside.
      least_side: of its columns and of what it sums over, likewise.
      first_layer_share: of the arithmetic, below which the first layer stays inside, likewise.
      host_learns: one sentence for `explain`.
    """

    name: ClassVar[str]
    group: ClassVar[Group]
    reference: ClassVar[SchemeCost]
    keys_per_product: ClassVar[bool] = False
    least_rows: ClassVar[int] = 1
    least_side: ClassVar[int] = 1
    first_layer_share: ClassVar[float] = 0.0
    host_learns: ClassVar[str]

    @property
    def key_budget(self) -> int | None:
        """Steps for which the key of a device-resident weight is kept; None means for good."""
        return None

    @property
    def parameters(self) -> dict[str, Any]:
        """What distinguishes it from other schemes of its class, as JSON fields."""
        return dataclasses.asdict(self)

    @property
    def rounding(self) -> str:
        """What `explain` says of the results' rounding, where it is not plain JAX's."""
        return ""

    @property
    def covers_activations(self) -> bool:
        """Whether products of two activations may go out, under keys per product."""
        return True

    def decoys(self, rows: int) -> int:
        """How many decoys are appended to so many rows, under keys per product."""
        return 0

    def arithmetic(self, rows: int, inner: int, columns: int, results: int, gradients: int) -> int:
        """Floating-point operations of blinding a product, beside the cost of each element.

        Under keys per product, for ``Y = X W`` and its gradients.

        Args:
          rows: of X, without decoys.
          inner: what Y sums over.
          columns: of W.
          results: how many of Y and dX come back.
          gradients: whether dW does, 0 or 1.
        """
        return 0

    # How the devices compute, where that is not on blinded values of the plain ones' type

    @property
    def products_alone(self) -> bool:
        """Whether the devices do nothing but products of operands that were sent for them.

        Then nothing else commutes, no result is an operand, and nothing stays on the devices.
        """
        return self.keys_per_product

    @property
    def device_pools(self) -> int:
        """Into how many parts a blinded value falls, along a first axis; each for other devices."""
        return 1

    @property
    def device_work(self) -> float:
        """Operations of a device for each one of the plain product."""
        return 1.0

    def refuses_devices(self, axes: Mapping[str, int] | None) -> str | None:
        """Why it cannot run on such devices, in a sentence; None where it can.

        Args:
          axes: the size of each axis of the mesh; None without a mesh.
        """
        if axes is None or len(axes) == 1:
            return None
        return f"mesh has the axes {tuple(axes)}, expected exactly one"

    def representation(self, array: ArrayType, *, product: bool) -> ArrayType:
        """As what the devices have a value.

        Args:
          array: its type when it is blinded, decoys included.
          product: whether they computed it, or were sent it.
        """
        return array

    def narrowing(self, dtype: str) -> float:
        """How far off, relative, a product is because its operands cross in fewer bits; else 0.

        Args:
          dtype: of the operands.
        """
        return 0.0

    def refuses(self, lhs: ArrayType, rhs: ArrayType, out: ArrayType, terms: int) -> str | None:
        """Why the devices cannot compute a product, whatever it costs; None where they can.

        Args:
          lhs: its left operand.
          rhs: its right one.
          out: its result.
          terms: of each of the result's sums.
        """
        return None

    def device_product(
        self, product: Callable[..., jax.Array], lhs: jax.Array, rhs: jax.Array
    ) -> jax.Array:
        """What the devices compute of a product, of operands and to a result as `representation`s.

        Args:
          product: the plain product of two arrays of the blinded types' shapes, in the formats it
            has; of int8 arrays, between -125 and 125, exact in int32.
          lhs: left operand.
          rhs: right one.
        """
        return product(lhs, rhs)

    def fields(self, dtype: str) -> tuple[int, ...]:
        """The primes modulo which it computes values of a format; empty if it rounds."""
        return ()

    @property
    def exact(self) -> bool:
        """Whether it computes modulo primes, so that checks of products are exact."""
        return bool(self.fields("float32"))

    @property
    def describes_products(self) -> bool:
        """Whether the enclave is told which products come back, for `refuses` and `inside`."""
        return False

    def inside(self, operands: tuple[Any, Any]) -> tuple[Any, Any] | None:
        """The plain operands of a product that the enclave has to compute itself, else None.

        Args:
          operands: what `blind` returned for them.
        """
        return None

    def cheapest_operands(self, first: Any, second: Any) -> tuple[Any, Any] | None:
        """Operands of a product that is unblinded with no `arithmetic`, to be timed.

        Args:
          first: what `blind` returned for its first operand.
          second: and for its second.
        """
        return None if first is None else (first, second)

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

        Raises:
          UnblindingError: it is no such value; the devices computed something else.
        """

    def let_go(self, secret: Any) -> Any:
        """What is left of an operand's secret when all products with it have come back."""
        return secret

    @classmethod
    @abc.abstractmethod
    def load(cls) -> None:
        """Compiles or loads the kernels that do not depend on shapes, which may take a second."""

    @abc.abstractmethod
    def warm_up(self, array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]) -> None:
        """Compiles what `blind` and `unblind` need for such values."""


SCHEMES: dict[str, type[Scheme]] = {}

_SchemeClass = TypeVar("_SchemeClass", bound=type[Scheme])


def register(scheme: _SchemeClass) -> _SchemeClass:
    """Makes a scheme known by its name, to planner and enclave; for use as a decorator.

    Raises:
      ValueError: another scheme has the name.
    """
    if scheme.name in SCHEMES:
        raise ValueError(f"there is a scheme of the name {scheme.name!r} already")
    SCHEMES[scheme.name] = scheme
    return scheme


def keyed_axes(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """Each keyed axis of a layout, its class, and its parity."""
    for axis, (number, parity) in enumerate(zip(layout.classes, layout.parities, strict=True)):
        if number is not None:
            yield axis, number, parity
