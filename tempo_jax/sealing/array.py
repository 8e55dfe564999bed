"""Sealed values: what the host holds of a secret array.

Untrusted, and therefore free of secrets: ciphertext, an opaque handle, or a blinded array.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, Protocol

import jax
import numpy as np
from jax.core import Tracer

from tempo_jax.errors import SealedValueError
from tempo_jax.jaxprs import opaque

ENCRYPTED, RESIDENT, BLINDED = "encrypted", "resident", "blinded"


NO_HANDLE = bytes(16)  # beside ciphertext, which the enclave does not know yet


def handle_text(handle: Any) -> str:
    """A handle, opaque or as its words, in the protocol's hexadecimal form.

    Raises:
      SealedValueError: something was done to it outside a shielded function.
    """
    name = opaque.name_of(opaque.words_of(handle))
    if name is None:
        raise SealedValueError(
            "a sealed value was replaced or computed outside a shielded function, where it is an "
            "opaque name and not its numbers (as by `jnp.zeros_like`). Compute with it inside a "
            "function under `tempo.shield`, seal new values with `enclave.seal`, and copy with "
            "`enclave.copy`"
        )
    return name.hex()


def handle_words(text: str) -> np.ndarray:
    """Inverse of `handle_text`, in words with a check value, uint32[6]."""
    return opaque.named_words(bytes.fromhex(text))


def handle_array(text: str) -> Any:
    """Inverse of `handle_text`: an opaque array."""
    return opaque.opaque(handle_words(text))


def no_handle() -> Any:
    """What stands in a handle's place beside ciphertext."""
    return handle_array(NO_HANDLE.hex())


class HandleOwner(Protocol):
    """The enclave client that counts the owners of handles."""

    def adopt(self, handle: Any) -> None:
        """Keeps a handle alive as long as the array that holds it."""


# Enclave clients by session, so that handles that come out of a user's own jit are counted.
owners: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


class NoValueError(SealedValueError, AttributeError, TypeError):
    """Somebody looked at a sealed value; of these types, so that `hasattr` and JAX understand."""


@jax.tree_util.register_pytree_node_class
class SealedArray:
    """A secret array as the host holds it; never shows its value.

    It is a pytree node, so it may sit anywhere in a Flax `TrainState`, a dict of variables
    or an `nnx.State`. Open it with `Enclave.open`.

    Attributes:
      shape: of the secret array.
      dtype: of the secret array.
      form: "encrypted" (AES-256-GCM, made by the client), "resident" (inside the enclave,
        named by a handle), or "blinded" (on the devices, under keys that a handle names).
      session: the session it belongs to.
    """

    __slots__ = ("_children", "dtype", "form", "session", "shape", "weak_type")

    def __init__(
        self,
        children: tuple[Any, ...],
        form: str,
        shape: tuple[int, ...],
        dtype: Any,
        weak_type: bool,
        session: str,
    ):
        self._children = children
        self.form = form
        self.shape = shape
        self.dtype = dtype
        self.weak_type = weak_type
        self.session = session
        handle = self.handle
        if (
            form != ENCRYPTED
            and isinstance(handle, (np.ndarray, jax.Array))
            and not isinstance(handle, Tracer)
        ):
            owner = owners.get(session)
            if owner is not None:
                owner.adopt(handle)

    @property
    def handle(self) -> Any:
        """The opaque name of a resident value or of a blinded one's keys; none of ciphertext."""
        return self._children[-1]

    @property
    def content(self) -> Any:
        """The ciphertext, uint8[nbytes + 28], or the blinded array."""
        return self._children[0]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __repr__(self) -> str:
        shape = ",".join(map(str, self.shape))
        return f"SealedArray({self.dtype.name}[{shape}], {self.form})"

    @property
    def nbytes(self) -> int:
        """Size of the secret array in bytes."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a sealed scalar")
        return self.shape[0]

    def __format__(self, specification: str) -> str:
        return self._no_value() if specification else repr(self)

    def _no_value(self, *_: Any, **__: Any) -> Any:
        raise NoValueError(
            f"{self!r} is secret and has no value on the host. Compute with it inside a shielded "
            "function, which shows the host what it passes through `tempo.reveal`, or decrypt it "
            "for the client with `enclave.open`."
        )

    __array__ = __jax_array__ = __bool__ = __complex__ = __float__ = __int__ = __index__ = _no_value
    __getitem__ = __iter__ = __contains__ = __round__ = __abs__ = __neg__ = __pos__ = _no_value
    __invert__ = __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __sub__ = _no_value
    __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = _no_value
    __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = __pow__ = __rpow__ = _no_value
    __matmul__ = __rmatmul__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = _no_value
    __rxor__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _no_value
    __eq__ = __ne__ = _no_value
    __hash__ = object.__hash__
    __array_ufunc__ = _no_value

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and (hasattr(jax.Array, name) or hasattr(np.ndarray, name)):
            self._no_value()
        raise AttributeError(f"a SealedArray has no attribute {name!r}")

    def __reduce__(self) -> Any:
        raise SealedValueError(
            f"{self!r} belongs to a running session and is not saved or pickled. Save a state with "
            "`enclave.checkpoint`, hand it over with `tempo.save_sealed`, copy it with "
            "`enclave.copy`."
        )

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Children and static part, for `jax.tree_util`."""
        return self._children, (self.form, self.shape, self.dtype, self.weak_type, self.session)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[Any, ...]) -> SealedArray:
        """Inverse of `tree_flatten`."""
        return cls(tuple(children), *static)


def is_sealed(x: Any) -> bool:
    """Whether `x` is a `SealedArray`."""
    return isinstance(x, SealedArray)


def refuse_opaque(leaf: Any, where: str) -> None:
    """Refuses what a tree function found inside a sealed value.

    Raises:
      SealedValueError: it is the name of a sealed value and not an array of its own.
    """
    if opaque.is_opaque(leaf):
        raise SealedValueError(
            f"{where}: a leaf is the opaque name inside a sealed value. Tree functions take sealed "
            "values apart unless told `is_leaf=tempo.is_sealed`; pass the whole `SealedArray`."
        )


def shapes(tree: Any) -> Any:
    """Shapes and dtypes of a pytree that holds sealed values, for counting and for `like=`.

    A tree function that does not stop at sealed values (`is_leaf=tempo.is_sealed`) sees their
    opaque insides and not their sizes; this tree has none.

    Args:
      tree: any pytree of arrays, numbers and sealed values.

    Returns:
      The same pytree with a `jax.ShapeDtypeStruct` in place of every leaf.

    Example:
      >>> sum(x.size for x in jax.tree.leaves(shapes({"kernel": np.ones((3, 4))})))
      12
    """

    def shape(x: Any) -> Any:
        aval = x if is_sealed(x) or isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=bool(aval.weak_type))

    return jax.tree.map(shape, tree, is_leaf=is_sealed)
