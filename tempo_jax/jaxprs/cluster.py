"""Short texts that the processes of `jax.distributed` leave for each other.

The store is that of the runtime's coordinator, which process 0 holds; it comes with
`jax.distributed.initialize`. Untrusted. Serves JAX 0.10 to 0.12.
"""

from __future__ import annotations

from typing import Any

import jax
from jax._src import distributed  # JAX 0.10-0.12: no public interface leads to the store.


class NoAnswerError(Exception):
    """The coordinator does not answer."""


def _client() -> Any:
    client = distributed.global_state.client
    if client is None:
        raise NoAnswerError("jax.distributed is not initialized")
    return client


def coordinator() -> str | None:
    """Address of the machine of process 0, as every process reaches the coordinator there."""
    address = distributed.global_state.coordinator_address
    return address.rpartition(":")[0].strip("[]") if address else None


def write(key: str, text: str) -> None:
    """Leaves a text under a key, in place of an earlier one.

    Raises:
      NoAnswerError: the coordinator does not answer.
    """
    try:
        _client().key_value_set(key, text, allow_overwrite=True)
    except jax.errors.JaxRuntimeError as error:
        raise NoAnswerError(str(error)) from error


def read(key: str, seconds: float) -> str | None:
    """The text under a key; None if there is none within so many seconds.

    Raises:
      NoAnswerError: the coordinator does not answer.
    """
    try:
        return _client().blocking_key_value_get(key, max(1, int(seconds * 1000)))
    except jax.errors.JaxRuntimeError as error:
        if str(error).startswith(("DEADLINE_EXCEEDED", "NOT_FOUND")):
            return None
        raise NoAnswerError(str(error)) from error


def read_all(folder: str) -> dict[str, str]:
    """All texts whose keys begin with ``folder/``, by the rest of the key.

    Raises:
      NoAnswerError: the coordinator does not answer.
    """
    try:
        found = _client().key_value_dir_get(f"{folder}/")
    except jax.errors.JaxRuntimeError as error:
        if str(error).startswith("NOT_FOUND"):
            return {}
        raise NoAnswerError(str(error)) from error
    return {key.rpartition("/")[2]: text for key, text in found}


def forget(key: str) -> None:
    """Removes a key; one that is not there does nothing.

    Raises:
      NoAnswerError: the coordinator does not answer.
    """
    try:
        _client().key_value_delete(key)
    except jax.errors.JaxRuntimeError as error:
        raise NoAnswerError(str(error)) from error
