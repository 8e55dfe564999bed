"""An enclave that serves a client and a host, as a child of this process.

The host's side: it starts the enclave and holds the other end of its pipe, so that the enclave ends
with it, and writes the file by which the host's programs find the host port.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from enclave_runtime.crypto.encryption import SECRET_BYTES
from enclave_runtime.protocol.configuration import Listen, Serving
from tempo_jax.transport.child import EnclaveProcess
from tempo_jax.transport.host_key import default_path, write_host_key
from tempo_jax.transport.launch import Command


class ServingProcess(NamedTuple):
    """A serving enclave.

    Attributes:
      child: the process.
      client: address of the client port.
      host: address of the host port.
      host_key: the file with the host port's key.
      session: public name of the session.
      listens: address of the host port for other machines; None without one.
    """

    child: EnclaveProcess
    client: str
    host: str
    host_key: Path
    session: str
    listens: str | None = None


@contextlib.contextmanager
def served(
    address: str = "127.0.0.1",
    client_port: int = 0,
    host_port: int = 0,
    host_key: Path | None = None,
    command: Command | None = None,
    listen: Listen | None = None,
) -> Iterator[ServingProcess]:
    """Serves an enclave as long as the context lasts.

    Args:
      address: numeric address on which the client port listens.
      client_port: its number; 0 takes any free one.
      host_port: the host port's number on 127.0.0.1; 0 takes any free one.
      host_key: where to write the host port's key; by default where `Enclave.attach` looks.
      command: what to start; by default an ordinary process.
      listen: where the host's processes on other machines reach the enclave; by default nowhere.

    Raises:
      EnclaveDiedError: the enclave ended before it was up; its log says why.
      EnclaveTimeoutError: it was not up in time.
    """
    key = secrets.token_bytes(SECRET_BYTES)
    line = Serving(address, client_port, host_port, key, listen).encode()
    child = EnclaveProcess(line, 3 if listen is None else 4, command)
    try:
        outside, inside, *others, session = child.greeting
        listens = _shown(listen.address, others[0]) if listen is not None else None
        path = default_path(int(inside)) if host_key is None else host_key
        write_host_key(path, key)
        shown = _shown(address, outside)
        try:
            yield ServingProcess(child, shown, f"127.0.0.1:{inside}", path, session, listens)
        finally:
            path.unlink(missing_ok=True)
    finally:
        child.stop()


def _shown(address: str, port: str) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
