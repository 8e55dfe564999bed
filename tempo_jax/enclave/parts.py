"""Leaves of which each process has a part: brought together where the whole is wanted.

With ``shard_weights=True`` on a mesh that spans processes none of them has a whole leaf. The first,
which asks the enclave, needs one to open, copy or save it, and to have it blinded again under other
keys. So all gather it, leaf by leaf, and the first takes it to its memory. Before that they meet
(`Processes.call_all`): in a collective each would wait for one that does something else. Untrusted:
blinded values only.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from enclave_runtime.protocol.wire import Kind
from tempo_jax.enclave.processes import LOOK_SECONDS, Processes
from tempo_jax.jaxprs.trace import local_settings, without_mesh
from tempo_jax.sealing.array import SealedArray, is_sealed


class Shared(Protocol):
    """What is needed of the enclave's client."""

    @property
    def processes(self) -> Processes | None:
        """Those that share the enclave."""
        ...

    @property
    def connection(self) -> Any:
        """The line to the enclave."""
        ...

    def check_owned(self, sealed: SealedArray) -> SealedArray:
        """Refuses values of other sessions and values already donated."""
        ...


def in_parts(content: Any) -> bool:
    """Whether this process has only a part of an array."""
    if not isinstance(content, jax.Array) or isinstance(content, Tracer):
        return False
    return not (content.is_fully_addressable or content.is_fully_replicated)


@contextlib.contextmanager
def wholes(
    enclave: Shared, what: str, leaves: Sequence[Any]
) -> Iterator[Callable[[SealedArray], np.ndarray]]:
    """Brings together the leaves of which each process has a part, if there are any.

    Then all processes have to call this, with the same leaves.

    Args:
      enclave: that they share.
      what: the user called.
      leaves: sealed ones and others.

    Yields:
      What gives the whole content of a sealed leaf. The first process asks it for those in parts in
      their order; the others need not ask.

    Raises:
      SealedValueError: a leaf was donated or belongs to another enclave.
      EnclaveError: a process does not call this now, or is lost.
    """
    sealed = [enclave.check_owned(x) for x in leaves if is_sealed(x)]
    apart = [x.content for x in sealed if in_parts(x.content)]
    processes = enclave.processes
    if processes is None or not apart:
        yield lambda x: np.asarray(x.content)
        return
    types = [(x.shape, x.dtype.name) for x in apart]
    digest = hashlib.sha256(repr(types).encode()).hexdigest()
    if processes.leads:
        try:
            processes.call_all(what, digest)
        except BaseException as error:
            processes.tell_call({"failed": str(error)})
            raise
    else:
        told = processes.hear_call()
        if "run" in told:
            enclave.connection.request(Kind.ABORT, {"run": told["run"]})
        processes.come(told, what, digest)
    with gathering(processes, apart) as gathered:
        yield lambda x: next(gathered) if in_parts(x.content) else np.asarray(x.content)


@contextlib.contextmanager
def gathering(processes: Processes, contents: Sequence[Any]) -> Iterator[Iterator[np.ndarray]]:
    """Gathers arrays, each when it is asked for, and at the end those that nobody asked for.

    All processes do so with the same arrays, when they have met. The first one gets them.
    """
    left = map(functools.partial(_gathered, processes), contents)
    try:
        yield left
    finally:
        for _ in left:  # the others gather them all
            pass


def _gathered(processes: Processes, content: Any) -> np.ndarray:
    """A whole array, on the first process; on the others nothing.

    On a thread, since inside XLA the main one could not hear Ctrl-C, or of a lost process.
    """
    if not in_parts(content):
        return np.asarray(content)
    future: concurrent.futures.Future[jax.Array] = concurrent.futures.Future()
    settings = local_settings()

    def work() -> None:
        try:
            with settings(), without_mesh():
                whole = _replicated(content.sharding.mesh)(content)
                future.set_result(jax.block_until_ready(whole))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="tempo_jax gathering", daemon=True).start()
    while not future.done():
        processes.check()
        concurrent.futures.wait([future], LOOK_SECONDS)
    try:
        whole = future.result()
        return np.asarray(whole) if processes.leads else np.zeros(0, whole.dtype)
    except jax.errors.JaxRuntimeError as error:
        raise processes.explain(error) from error


@functools.lru_cache(maxsize=16)
def _replicated(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
