"""Lines of another process of the host to the enclave that the first launched or attached to.

Untrusted.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

from enclave_runtime.protocol.wire import WireError
from tempo_jax.errors import ChannelError, EnclaveDiedError, SharedMemoryError, TempoError
from tempo_jax.transport.loopback import ANSWER_SECONDS, HERE, Loopback, gone

_LOOK_SECONDS = 2.0  # that whatever listens on a port here gets to prove that it is the enclave


class Joined(Loopback):
    """Another host process's lines to the enclave that a process launched or attached to.

    Where that is, and whether memory is shared with it, is found out by trying: names of machines
    say neither (containers, namespaces, clones).
    """

    keys = None

    def __init__(
        self, told: Mapping[str, Any], other: str | None = None, *, share_memory: bool = True
    ):
        """Joins the enclave, here or where else it listens.

        Args:
          told: what the process that opened the session said of it; see `Loopback.invitation`.
          other: address of that process's machine, for an enclave that listens on all of its own.
          share_memory: False has everything travel even where memory could be shared.

        Raises:
          ChannelError: it is reached neither here nor there.
        """
        self._key = bytes.fromhex(told["key"])
        self.session = told["session"]
        super().__init__(told["port"])
        if not self._answers(_LOOK_SECONDS):
            self._turn_to(told["listens"], other)
        self.carries = not (share_memory and self._finds_shared())

    def _answers(self, seconds: float) -> bool:
        try:
            connection = self._connect(seconds)
        except (OSError, WireError, TempoError):
            return False
        self._idle.append(connection)
        return True

    def _turn_to(self, listens: Any, other: str | None) -> None:
        if not listens:
            raise ChannelError(
                f"nothing on port {self.port} of this machine is the enclave of the first process, "
                "which is on another machine, and it listens on none but its own: have process 0 "
                'launch it with `Enclave.launch(listen="0.0.0.0:7443")`, or serve it with '
                "`tempo-jax enclave serve --listen 0.0.0.0:7443`"
            )
        self.host, self.port = listens
        if ipaddress.ip_address(self.host).is_unspecified:
            self.host = other or self.host
        if not self._answers(ANSWER_SECONDS):
            raise ChannelError(
                f"the enclave does not answer at {self!r}, where it listens for processes of other "
                "machines: look at the firewall, and that `listen` names an address that this "
                "machine reaches"
            )

    def _finds_shared(self) -> bool:
        """Whether the enclave finds a file that this process makes."""
        try:
            name, _ = self._shared(1)
        except SharedMemoryError:
            return False
        self._unmap(name)
        return True

    def __repr__(self) -> str:
        return f"port {self.port}" + ("" if self.host == HERE else f" of {self.host}")

    def _connection_key(self) -> bytes:
        return self._key

    def _died(self) -> EnclaveDiedError:
        return gone(repr(self), self._why_silent())
