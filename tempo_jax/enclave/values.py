"""Sealing and opening single values, on the client's side; which values are an enclave's.

What is sealed has the shape and dtype of its plain value in the clear and its content encrypted to
one session. Runs where the keys are; the methods of `Enclave` say what users may expect.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from enclave_runtime.crypto import encryption
from enclave_runtime.protocol.memory import Arena, input_bytes
from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.protocol.tags import (
    NOWHERE,
    ORIGIN_BYTES,
    Seal,
    place_of,
    publish_array,
    published_array,
    read_published,
    seal_array,
    unseal_array,
)
from enclave_runtime.protocol.wire import Kind
from tempo_jax.enclave.parts import wholes
from tempo_jax.enclave.processes import Processes
from tempo_jax.errors import SealedValueError, UnsupportedError
from tempo_jax.jaxprs import types
from tempo_jax.jaxprs.types import array_type
from tempo_jax.sealing.array import (
    BLINDED,
    ENCRYPTED,
    PUBLISHED,
    SealedArray,
    handle_text,
    is_sealed,
    leaf_type,
    no_handle,
)
from tempo_jax.transport.channel import Channel


class Keyed(Protocol):
    """What is needed of the enclave's client."""

    @property
    def connection(self) -> Any:
        """The line to the enclave."""
        ...

    @property
    def session(self) -> str:
        """The session's public name."""
        ...

    @property
    def follows(self) -> bool:
        """Whether another process's values count."""
        ...

    def keys(self, what: str) -> encryption.SessionKeys:
        """The session's keys, for `what`."""
        ...

    @property
    def processes(self) -> Processes | None:
        """Those that share the enclave."""
        ...

    def check_owned(self, sealed: SealedArray) -> SealedArray:
        """Refuses values of other sessions and values already donated."""
        ...

    def arena(self, size: int) -> AbstractContextManager[tuple[str, Arena]]:
        """Shared memory for some requests."""
        ...


def seal(enclave: Keyed, tree: Any, tag: str | None) -> Any:
    """See `Enclave.seal`."""

    def leaf_sealed(path: Any, leaf: Any, seal: Seal) -> SealedArray:
        if is_sealed(leaf):
            return check_owned(leaf, enclave.session)
        return _sealed(enclave, path, leaf, seal)

    return _tagged(tree, tag, leaf_sealed)


def publish(enclave: Keyed, tree: Any, tag: str) -> Any:
    """See `Enclave.publish`."""

    def published(path: Any, leaf: Any, seal: Seal) -> SealedArray:
        if enclave.follows:
            return stand_in(enclave, _plain_leaf(path, leaf, "enclave.publish")[0], PUBLISHED)
        keys = enclave.keys("`enclave.publish`")
        aval, plain = _plain_leaf(path, leaf, "enclave.publish")
        content = publish_array(keys.to_enclave, plain, enclave.session, seal)
        return _held_whole(enclave, PUBLISHED, content, aval)

    return _tagged(tree, tag, published)


def copy(enclave: Keyed, tree: Any) -> Any:
    """See `Enclave.copy`."""
    seal = Seal(NOWHERE, secrets.token_bytes(ORIGIN_BYTES))

    def copied(x: SealedArray) -> SealedArray:
        if enclave.follows:
            return stand_in(enclave, check_owned(x, enclave.session))
        return _sealed(enclave, (), _open_leaf(enclave, x, whole), seal)

    with wholes(enclave, "`enclave.copy`", jax.tree.leaves(tree, is_leaf=is_sealed)) as whole:
        return jax.tree.map(lambda x: copied(x) if is_sealed(x) else x, tree, is_leaf=is_sealed)


def _tagged(tree: Any, tag: str | None, make: Callable[[Any, Any, Seal], Any]) -> Any:
    """The leaves of a pytree, made with tags that share an origin."""
    origin = secrets.token_bytes(ORIGIN_BYTES)

    def made(path: Any, leaf: Any) -> Any:
        text = None if tag is None else f"{tag}{jax.tree_util.keystr(path)}"
        return make(path, leaf, Seal(NOWHERE if text is None else place_of(text), origin))

    return jax.tree_util.tree_map_with_path(made, tree, is_leaf=is_sealed)


def _sealed(enclave: Keyed, path: Any, leaf: Any, seal: Seal) -> SealedArray:
    if enclave.follows:
        return stand_in(enclave, _plain_leaf(path, leaf, "enclave.seal")[0])
    keys = enclave.keys("`enclave.seal`")
    aval, plain = _plain_leaf(path, leaf, "enclave.seal")
    content = seal_array(keys.to_enclave, plain, enclave.session, seal)
    return _held_whole(enclave, ENCRYPTED, content, aval)


def stand_in(enclave: Keyed, aval: Any, form: str = ENCRYPTED) -> SealedArray:
    """What stands for a value of the first process."""
    return _held_whole(enclave, form, np.zeros(0, np.uint8), aval)


def _held_whole(enclave: Keyed, form: str, content: np.ndarray, aval: Any) -> SealedArray:
    children = (jnp.asarray(content), no_handle())
    return SealedArray(children, form, aval.shape, aval.dtype, aval.weak_type, enclave.session)


def _plain_leaf(path: Any, leaf: Any, where: str) -> tuple[Any, np.ndarray]:
    """A leaf's type, and its content as NumPy has it.

    Raises:
      UnsupportedError: it is not an array or a number, or a tracer.
    """
    aval = leaf_type(leaf, where, lambda: f"leaf `{jax.tree_util.keystr(path)}`")
    if isinstance(leaf, Tracer):
        raise UnsupportedError(
            f"{where} was called inside jit: the value is already the host's. Call it "
            "before, outside jit."
        )
    try:
        return aval, np.asarray(types.to_physical(jnp.asarray(leaf)))
    except TypeError as error:  # a sealed value, or a description of an array
        raise UnsupportedError(
            f"{where}: leaf `{jax.tree_util.keystr(path)}` of type {type(leaf).__name__} has no "
            "value here. Give the array itself."
        ) from error


# Opening


def open_leaves(enclave: Keyed, tree: Any) -> Any:
    """See `Enclave.open`."""
    with wholes(enclave, "`enclave.open`", jax.tree.leaves(tree, is_leaf=is_sealed)) as whole:
        if enclave.follows:
            return tree
        return jax.tree.map(
            lambda x: _open_leaf(enclave, x, whole) if is_sealed(x) else x, tree, is_leaf=is_sealed
        )


def _open_leaf(
    enclave: Keyed, sealed: SealedArray, whole: Callable[[SealedArray], np.ndarray]
) -> jax.Array:
    """The plain value of one sealed leaf, of which `whole` gives the content."""
    check_owned(sealed, enclave.session)
    plain = _opened(enclave, sealed, array_type(sealed), whole)
    opened = types.from_physical(jnp.asarray(plain), sealed)
    return types.with_weak_type(opened, sealed.weak_type)


def _opened(
    enclave: Keyed,
    sealed: SealedArray,
    array: ArrayType,
    whole: Callable[[SealedArray], np.ndarray],
) -> np.ndarray:
    connection, session = enclave.connection, enclave.session
    expected = array.shape, np.dtype(array.dtype)
    if sealed.form == PUBLISHED and connection.keys is None:
        return read_published(whole(sealed), *expected)
    keys = enclave.keys("`enclave.open`")
    if sealed.form in (PUBLISHED, ENCRYPTED):
        read = published_array if sealed.form == PUBLISHED else unseal_array
        with _authentic(array):
            return read(keys.to_enclave, whole(sealed), session, *expected)[1]
    if isinstance(connection, Channel):
        blinded = whole(sealed).tobytes() if sealed.form == BLINDED else b""
        reply = connection.exchange(Kind.OPEN, {"handle": handle_text(sealed.handle)}, blinded)
        encrypted = np.frombuffer(reply.attachment, np.uint8)
    else:
        with enclave.arena(input_bytes(array)) as (name, arena):
            if sealed.form == BLINDED:
                np.copyto(arena.view(array, 0), whole(sealed))
            fields = {"handle": handle_text(sealed.handle), "arena": name, "offset": 0}
            connection.request(Kind.OPEN, fields)
            size = encryption.encrypted_bytes(array.nbytes)
            encrypted = arena.view(ArrayType((size,), "uint8"), 0).copy()
    with _authentic(array):
        return encryption.decrypt_array(keys.to_client, encrypted, session, *expected)


@contextlib.contextmanager
def _authentic(array: ArrayType) -> Iterator[None]:
    """Says of which value an authentication failed."""
    try:
        yield
    except encryption.DecryptionError as error:
        raise SealedValueError(
            f"a sealed {array.dtype}{list(array.shape)} failed its authentication: it was "
            "altered, or its shape, dtype or session is not the one it was sealed with"
        ) from error


# Whose a value is


def check_owned(sealed: SealedArray, session: str) -> SealedArray:
    """Refuses values of other sessions and values already donated; see `Enclave.check_owned`."""
    if sealed.session != session:
        raise SealedValueError(
            f"{sealed!r} belongs to another session or enclave; open it there and seal it here"
        )
    children = [c for c in (sealed.content, sealed.handle) if not isinstance(c, Tracer)]
    if any(isinstance(c, jax.Array) and c.is_deleted() for c in children):
        raise SealedValueError(
            f"{sealed!r} was donated to an earlier call, which replaced it by the new state it "
            "returned. Use that one, or pass `donate=False` to `shield`."
        )
    if not isinstance(sealed.handle, Tracer):
        handle_text(sealed.handle)
    if sealed.form == BLINDED:
        blinded, array = sealed.content, array_type(sealed)
        if blinded.ndim != len(array.shape) or np.dtype(blinded.dtype).name != array.dtype:
            raise SealedValueError(
                f"{sealed!r} lies on the devices as {blinded.dtype}{list(blinded.shape)}: its "
                "blinded content was changed outside a shielded function. Compute with it "
                "inside one."
            )
    return sealed
