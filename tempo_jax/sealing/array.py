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

ENCRYPTED, RESIDENT, BLINDED = "encrypted", "resident", "blinded"


def handle_text(handle: Any) -> str:
    """A handle, uint32[4], in the protocol's hexadecimal form."""
    return np.asarray(handle).tobytes().hex()


def handle_array(text: str) -> np.ndarray:
    """Inverse of `handle_text`."""
    return np.frombuffer(bytes.fromhex(text), np.uint32).copy()


class HandleOwner(Protocol):
    """The enclave client that counts the owners of handles."""

    def adopt(self, handle: Any) -> None:
        """Keeps a handle alive as long as the array that holds it."""


# Enclave clients by session, so that handles that come out of a user's own jit are counted.
owners: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


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
        if form != ENCRYPTED and isinstance(self.handle, (np.ndarray, jax.Array)):
            owner = owners.get(session)
            if owner is not None and not isinstance(self.handle, Tracer):
                owner.adopt(self.handle)

    @property
    def handle(self) -> Any:
        """uint32[4], the opaque name of a resident value or of a blinded one's keys."""
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

    def _no_value(self, *_: Any, **__: Any) -> Any:
        raise SealedValueError(
            f"{self!r} is secret and has no value on the host. Compute with it inside a shielded "
            "function, or get its plaintext with `enclave.open`."
        )

    __array__ = __bool__ = __float__ = __int__ = __index__ = _no_value

    def __reduce__(self) -> Any:
        raise SealedValueError(
            f"{self!r} belongs to a running session and cannot be pickled; open it first."
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
