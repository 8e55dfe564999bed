"""Files of sealed values, by which a client and a host hand them to each other.

Untrusted, and free of secrets as sealed values are: ciphertext, handles, blinded arrays. A handle
means something to the enclave that gave it, as long as that runs; checkpoints are for what has
to outlive an enclave. The reader takes structure, shapes and dtypes from the caller, and from the
file only what fits them: nothing is unpickled, and no length in it decides what is allocated.

    bytes 0-3   magic b"TMPS"
    bytes 4-5   version, now 2
    bytes 6-7   zero
    bytes 8-11  length of the header, at most `MAX_HEADER`
    header      JSON: {"session": …, "leaves": [{"path", "form", "shape", "dtype", "weak_type",
                "handle"}, …]}
    contents    of the leaves that have any, in order, little-endian, to the end of the file

Integers are big-endian. Users call `save_sealed` and `load_sealed`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.protocol.tags import published_bytes, seal_bytes
from tempo_jax.errors import SealedValueError
from tempo_jax.jaxprs.types import array_type
from tempo_jax.sealing.array import (
    BLINDED,
    ENCRYPTED,
    HELD_WHOLE,
    PUBLISHED,
    RESIDENT,
    SealedArray,
    handle_array,
    handle_text,
    is_sealed,
    no_handle,
    owners,
)

HEADER = struct.Struct(">4sHHI")  # 12 bytes
MAGIC = b"TMPS"
VERSION = 2
MAX_HEADER = 1 << 26  # bytes
_SESSION = re.compile("[0-9a-f]{32}")
_HANDLE = re.compile("[0-9a-f]{32}")
_KEYS = {"path", "form", "shape", "dtype", "weak_type", "handle"}


def save_sealed(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a pytree of sealed values to a file, in place of what was there.

    What the values name in the enclave stays there, although they may be dropped here. A later
    call that donates one of them makes the file's copy useless, like any other copy.

    Args:
      path: the file.
      tree: any pytree whose leaves are all sealed, by one session.

    Raises:
      SealedValueError: a leaf is not sealed, or of another session than the others.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_sealed)
    described, contents, sessions = [], [], set()
    for where, leaf in leaves:
        name = jax.tree_util.keystr(where)
        if not is_sealed(leaf):
            raise SealedValueError(
                f"save_sealed: `{name}` is not sealed and would be written in the clear. Seal it "
                "with `enclave.seal`, or leave it out"
            )
        sessions.add(leaf.session)
        described.append(
            {
                "path": name,
                "form": leaf.form,
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "weak_type": bool(leaf.weak_type),
                "handle": "" if leaf.form in HELD_WHOLE else handle_text(leaf.handle),
            }
        )
        if leaf.form != RESIDENT:
            _refuse_part(name, leaf.content)
            contents.append(_little_endian(np.asarray(leaf.content)))
    if len(sessions) != 1:
        raise SealedValueError(
            f"save_sealed: the values belong to {len(sessions)} sessions, expected one"
        )
    header = json.dumps({"session": sessions.pop(), "leaves": described}).encode()
    if len(header) > MAX_HEADER:
        raise SealedValueError(f"save_sealed: {len(leaves)} leaves are too many for one file")
    target = Path(path)
    # Written aside and renamed: whoever reads sees the old file or the new one, whole.
    aside = target.with_name(f"{target.name}.{secrets.token_hex(8)}")
    try:
        with open(aside, "xb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, 0, len(header)) + header)
            for content in contents:
                file.write(content)
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _keep(leaf for _, leaf in leaves)


def load_sealed(path: str | os.PathLike[str], like: Any) -> Any:
    """Reads a pytree of sealed values that `save_sealed` wrote.

    Args:
      path: the file.
      like: a pytree of the same structure whose leaves have the values' shapes and dtypes:
        arrays, sealed values or `jax.ShapeDtypeStruct` (as of `jax.eval_shape`).

    Returns:
      The pytree, its leaves `SealedArray`.

    Raises:
      SealedValueError: the file is malformed or holds something else than `like` says.
    """
    wanted, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_sealed)
    with open(path, "rb") as file:
        session, described = _read_header(file, Path(path))
        if len(described) != len(wanted):
            raise SealedValueError(
                f"load_sealed: {Path(path)} holds {len(described)} values, expected {len(wanted)}"
            )
        leaves = [
            _read_leaf(file, session, fields, jax.tree_util.keystr(where), leaf)
            for fields, (where, leaf) in zip(described, wanted, strict=True)
        ]
        if file.read(1):
            raise SealedValueError(f"load_sealed: more bytes follow the values in {Path(path)}")
    _keep(leaves)
    return jax.tree.unflatten(structure, leaves)


def _refuse_part(name: str, content: Any) -> None:
    if isinstance(content, jax.Array):
        if not (content.is_fully_addressable or content.is_fully_replicated):
            raise SealedValueError(
                f"save_sealed: of `{name}` each process has only a part. Have all of them call "
                "`enclave.copy`, or, without the client's keys, a function that returns it under "
                '`shield(..., placement="enclave")`, and save what the first one gets'
            )


def _keep(leaves: Any) -> None:
    for leaf in leaves:
        owner = owners.get(leaf.session)
        if owner is not None:
            owner.keep(leaf)


def _little_endian(content: np.ndarray) -> bytes:
    return (content if sys.byteorder == "little" else content.byteswap()).tobytes()


def _read_header(file: BinaryIO, path: Path) -> tuple[str, list[Any]]:
    start = file.read(HEADER.size)
    if len(start) != HEADER.size:
        raise SealedValueError(f"load_sealed: {path} is too short for a file of sealed values")
    magic, version, zero, length = HEADER.unpack(start)
    if magic != MAGIC or zero:
        raise SealedValueError(f"load_sealed: {path} is not a file of sealed values")
    if version != VERSION:
        raise SealedValueError(f"load_sealed: {path} has version {version}, expected {VERSION}")
    if length > min(MAX_HEADER, os.fstat(file.fileno()).st_size):
        raise SealedValueError(f"load_sealed: the header of {path} is longer than it may be")
    try:
        fields = json.loads(str(file.read(length), "utf-8"))
        session, leaves = fields["session"], fields["leaves"]
        if not isinstance(leaves, list) or not _SESSION.fullmatch(session):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SealedValueError(f"load_sealed: the header of {path} is malformed") from error
    return session, leaves


def _read_leaf(file: BinaryIO, session: str, fields: Any, name: str, like: Any) -> SealedArray:
    aval = like if is_sealed(like) or isinstance(like, jax.ShapeDtypeStruct) else jax.typeof(like)
    if not isinstance(fields, dict) or fields.keys() != _KEYS:
        raise SealedValueError(f"load_sealed: the description of `{name}` is malformed")
    found = fields["path"], fields["dtype"], fields["shape"]
    expected = name, str(aval.dtype), list(aval.shape)
    if found != expected:
        raise SealedValueError(
            f"load_sealed: expected `{expected[0]}`, {expected[1]}{expected[2]}, and the file "
            "holds another value there: `like` is not what was saved"
        )
    form, handle = fields["form"], fields["handle"]
    named = isinstance(handle, str) and bool(_HANDLE.fullmatch(handle))
    if (
        form not in (ENCRYPTED, PUBLISHED, RESIDENT, BLINDED)
        or type(fields["weak_type"]) is not bool
        or (handle != "" if form in HELD_WHOLE else not named)
    ):
        raise SealedValueError(f"load_sealed: the description of `{name}` is malformed")
    children: tuple[Any, ...] = (no_handle() if form in HELD_WHOLE else handle_array(handle),)
    if form != RESIDENT:
        array = array_type(aval)
        if form in HELD_WHOLE:
            length = published_bytes if form == PUBLISHED else seal_bytes
            array = ArrayType((length(array.nbytes),), "uint8")
        content = file.read(array.nbytes)
        if len(content) != array.nbytes:
            raise SealedValueError(f"load_sealed: the file ends within `{name}`")
        values = np.frombuffer(content, np.dtype(array.dtype)).reshape(array.shape)
        native = values if sys.byteorder == "little" else values.byteswap()
        children = (jnp.asarray(native), *children)
    return SealedArray(children, form, tuple(aval.shape), aval.dtype, fields["weak_type"], session)
