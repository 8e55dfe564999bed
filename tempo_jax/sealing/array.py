"""Sealed values: what the host holds of a secret array.

Untrusted, and therefore free of secrets: ciphertext, an opaque handle, or a blinded array.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from jax.core import Tracer

from tempo_jax.errors import SealedValueError, UnsupportedError
from tempo_jax.jaxprs import opaque
from tempo_jax.sealing import orbax
from tempo_jax.sealing.handles import NO_HANDLE, Handles, Lying

ENCRYPTED, RESIDENT, BLINDED = "encrypted", "resident", "blinded"
PUBLISHED = "published"
# Forms that the host holds whole; the others are named by handles.
HELD_WHOLE = frozenset({ENCRYPTED, PUBLISHED})


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

    handles: Handles

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

    Inside a user's `jit`, `scan`, `while_loop` or `cond` a carried state keeps the children and
    the static part that it entered with, since JAX compares both. There `form` and `weak_type` are
    declarations. Outside they are the truth, which the handle tells: a value declared ciphertext
    that has a handle is what the handle names, and its ciphertext is an old value.

    Attributes:
      shape: of the secret array.
      dtype: of the secret array.
      session: the session it belongs to.
    """

    __slots__ = ("_children", "_form", "_text", "_weak_type", "dtype", "session", "shape")

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
        self._form = form
        self.shape = shape
        self.dtype = dtype
        self._weak_type = weak_type
        self.session = session
        self._text: str | None = None
        handle, owner = self.handle, owners.get(session)
        if (
            owner is not None
            and isinstance(handle, jax.Array)
            and not isinstance(handle, Tracer)
            and (form not in HELD_WHOLE or owner.handles.any_loose)
        ):
            owner.adopt(handle)

    @property
    def handle(self) -> Any:
        """The opaque name of a resident value or of a blinded one's keys; none of ciphertext."""
        return self._children[-1]

    def _name(self) -> str | None:
        """The handle's text; None while traced, and of what names no single value."""
        handle = self.handle
        if self._text is None and isinstance(handle, (np.ndarray, jax.Array)):
            if not isinstance(handle, Tracer):
                name = opaque.name_of(opaque.words_of(handle))
                self._text = None if name is None else name.hex()
        return self._text

    def _lying(self) -> Lying | None:
        owner = owners.get(self.session)
        if owner is None or not owner.handles.any_loose:
            return None
        name = self._name()
        return None if name is None else owner.handles.lying(name)

    @property
    def form(self) -> str:
        """Where the value is.

        "encrypted" (AES-256-GCM, made by the client), "resident" (inside the enclave, named by a
        handle), "blinded" (on the devices, under keys that a handle names), or "published" (no
        secret: the client stands for it, and `Enclave.open` reads it anywhere).
        """
        lying = self._lying()
        if lying is not None:
            return lying.form
        if self._form in HELD_WHOLE and self._name() not in (None, NO_HANDLE.hex()):
            return RESIDENT
        return self._form

    @property
    def weak_type(self) -> bool:
        """Whether the secret array's dtype gives way to others'."""
        lying = self._lying()
        return self._weak_type if lying is None else lying.weak_type

    @property
    def content(self) -> Any:
        """The ciphertext with its tag, uint8[nbytes + 76] up to 1 GiB, or the blinded array."""
        lying = self._lying()
        kept = None if lying is None else lying.content
        return self._children[0] if kept is None else kept

    @property
    def has_room(self) -> bool:
        """Whether its children hold blinded content, or would."""
        return self._form == BLINDED

    def declared_alike(self, content: Any, handle: Any) -> SealedArray:
        """A value of this shape and dtype with this one's types, whatever it is.

        Args:
          content: blinded, where it is; None of a value inside the enclave.
          handle: names it.
        """
        children = (handle,)
        if self._form != RESIDENT:
            room = self.has_room and content is not None
            children = (content if room else self._children[0], handle)
        return self.tree_unflatten(self.tree_flatten()[1], children)

    def declares(self, form: str, weak_type: bool) -> bool:
        """Whether that is what its types say."""
        return (form, weak_type) == (self._form, self._weak_type)

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
        orbax.guard()
        declared = self._form, self.shape, self.dtype, self._weak_type, self.session
        return self._children, declared

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


def leaf_type(leaf: Any, where: str, named: Callable[[], str]) -> jax.ShapeDtypeStruct:
    """Shape, dtype and weak type of a leaf that can be sealed, or is.

    Args:
      leaf: what a pytree holds.
      where: what the user called, for the error.
      named: gives the leaf's name and the like, for the error.

    Raises:
      UnsupportedError: it is no array or number, has a dtype that JAX does not compute with, or
        is spread over processes.
      SealedValueError: it is the opaque name inside a sealed value.
    """
    refuse_opaque(leaf, where)
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise UnsupportedError(
                f"{where}: {named()} is an array spread over the devices of several processes, of "
                "which this one has only its own part. Give the whole array, as process 0 has it "
                "(`jax.experimental.multihost_utils.process_allgather(x, tiled=True)` brings it "
                "together): the enclave deals out the parts"
            )
    if not (is_sealed(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)):
        try:
            aval = jax.typeof(leaf)
        except TypeError as error:
            raise UnsupportedError(f"{where}: {named()} {_refused(leaf)}") from error
        leaf = jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
    if leaf.dtype in _REFUSED_DTYPES:
        raise UnsupportedError(
            f"{where}: {named()} is {leaf.dtype}, which XLA does not compile on processors; cast it"
        )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=leaf.weak_type)


# JAX has these dtypes by name alone: XLA's compiler for processors fails on them (0.10 to 0.12).
_REFUSED_DTYPES = (np.dtype(ml_dtypes.float6_e2m3fn), np.dtype(ml_dtypes.float6_e3m2fn))


def _refused(leaf: Any) -> str:
    """What is wrong with a leaf that JAX takes for no array."""
    dtype = getattr(leaf, "dtype", None)
    if not isinstance(dtype, np.dtype):
        return (
            f"of type {type(leaf).__name__} is neither an array nor a number. Keep such objects "
            "out, for example as static fields, in a closure or in `shield(static_argnames=)`"
        )
    if not dtype.isnative:
        native = dtype.newbyteorder("=")
        return (
            f"has the foreign byte order of {dtype.str}, which JAX does not take. Convert it with "
            f"`.astype({native.name!r})`"
        )
    return f"has the dtype {dtype}, which JAX does not take. Convert it with `.astype`"


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
