"""A line to an enclave belongs to the process that made it; a forked child's copy is nobody's.

`os.fork` copies sockets, pipes and finalizers into the child (data loaders fork). Requests of both
would mix on one socket, and what the child drops or ends would be its parent's. So whoever holds
a line knows its process: in any other one it asks for nothing and ends nothing, and the child's
copies of descriptors are closed when it starts, lest they keep the parent's lines open.
"""

from __future__ import annotations

import abc
import os
import weakref

from tempo_jax.errors import ForkedError


class Owned(abc.ABC):
    """What belongs to one process."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        _everything.add(self)

    @property
    def is_owned(self) -> bool:
        """Whether this process is the one that made it."""
        return os.getpid() == self._owner

    def check_process(self) -> None:
        """Refuses every other process.

        Raises:
          ForkedError: this is a forked child.
        """
        if not self.is_owned:
            raise ForkedError(
                f"this enclave belongs to process {self._owner}, and this is process "
                f"{os.getpid()}, forked from it: only the former may use it. Hand the child plain "
                "arrays and keep sealed ones in the parent, or open an enclave of the child's own "
                "(start it with the method 'spawn': JAX does not survive a fork)"
            )

    @abc.abstractmethod
    def leave_to_parent(self) -> None:
        """Closes a forked child's copies of descriptors; nothing reaches the other ends.

        Another thread of the parent may have held any lock when it forked, so this takes none.
        """


_everything: weakref.WeakSet[Owned] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for owned in list(_everything):
        owned.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)
