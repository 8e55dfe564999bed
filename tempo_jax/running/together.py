"""Calls into Python of which one worker's answer serves the whole mesh.

Inside a program on several devices, a call that JAX places on one device is copied to the others
by a collective of the compiler's choosing, and one that raises leaves the other devices in their
next collective, for which XLA's CPU client ends the process. Here the first worker calls, all
workers meet, and each then takes the answer, or raises what the call raised. Untrusted.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from tempo_jax.errors import EnclaveError
from tempo_jax.jaxprs.callbacks import Function, call

_KEPT = 16  # answers that a program which has failed elsewhere may leave untaken


@dataclasses.dataclass
class _Answer:
    values: Sequence[np.ndarray]
    error: BaseException | None
    waiting: set[int]  # workers that have not taken it


class Together:
    """Calls on behalf of all workers of a mesh with one axis."""

    def __init__(self, mesh: Mesh):
        """For programs on this mesh."""
        self._mesh = mesh
        self._tickets = itertools.count(1)
        self._answers: collections.OrderedDict[int, _Answer] = collections.OrderedDict()
        self._lock = threading.Lock()

    def call(
        self, function: Function, results: Sequence[jax.ShapeDtypeStruct], *arguments: Any
    ) -> list[jax.Array]:
        """Calls `function` once for all workers; see `tempo_jax.jaxprs.callbacks.call`.

        Args:
          function: may raise; every worker then does.
          results: shapes and dtypes of what it returns, which all workers get whole.
          *arguments: arrays that every worker has whole.
        """
        (axis,) = self._mesh.axis_names

        def lead(worker: np.ndarray, *given: np.ndarray) -> list[np.ndarray]:
            return [np.asarray(0 if worker else self._ask(function, given), np.uint32)]

        def follow(ticket: np.ndarray, worker: np.ndarray) -> Sequence[np.ndarray]:
            return self._take(int(ticket), int(worker))

        def on_worker(*arguments: Any) -> list[jax.Array]:
            worker = lax.axis_index(axis)
            (ticket,) = call(lead, [jax.ShapeDtypeStruct((), jnp.uint32)], worker, *arguments)
            return call(follow, results, lax.psum(ticket, axis), worker)

        whole = PartitionSpec()
        return jax.shard_map(
            on_worker, mesh=self._mesh, in_specs=whole, out_specs=whole, check_vma=False
        )(*arguments)

    def _ask(self, function: Function, given: Sequence[np.ndarray]) -> int:
        everyone = set(range(self._mesh.size))
        try:
            # What is returned may lie in memory that the next call uses.
            answer = _Answer([np.array(x) for x in function(*given)], None, everyone)
        except BaseException as error:
            answer = _Answer([], error, everyone)
        with self._lock:
            ticket = next(self._tickets)
            self._answers[ticket] = answer
            if len(self._answers) > _KEPT:
                self._answers.popitem(last=False)
        return ticket

    def _take(self, ticket: int, worker: int) -> Sequence[np.ndarray]:
        with self._lock:
            answer = self._answers.get(ticket)
            if answer is None:
                raise EnclaveError("JAX repeated one of its callbacks too late")
            answer.waiting.discard(worker)
            if not answer.waiting:
                del self._answers[ticket]
        if answer.error is not None:
            raise answer.error
        return answer.values
