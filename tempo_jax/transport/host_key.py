"""The file by which a host's processes find the host port of an enclave.

The key in it keeps other users of the machine off the port. It belongs to the host, who serves the
enclave, and protects nothing from the host.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from enclave_runtime.crypto.encryption import SECRET_BYTES
from tempo_jax.cache import cache_directory
from tempo_jax.errors import ChannelError

_KEY = re.compile(rf"[0-9a-f]{{{2 * SECRET_BYTES}}}\n?")


def default_path(port: int) -> Path:
    """Where the key of a host port is by default: ``~/.cache/tempo_jax/host-PORT.key``."""
    return cache_directory() / f"host-{port}.key"


def write_host_key(path: Path, key: bytes) -> None:
    """Writes a key to a file that only this user can read, in place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: the file never exists with other permissions or half a key.
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(aside, flags, 0o600), "w") as file:
        file.write(key.hex() + "\n")
    os.replace(aside, path)


def read_host_key(port: int, path: str | os.PathLike[str] | None = None) -> bytes:
    """The key of a host port.

    Raises:
      ChannelError: there is no such file, or it holds no key.
    """
    chosen = default_path(port) if path is None else Path(path)
    try:
        with open(chosen, encoding="ascii") as file:
            text = file.read(2 * SECRET_BYTES + 2)
    except (OSError, UnicodeDecodeError) as error:
        raise ChannelError(
            f"no host key at {chosen}: pass `host_key=`, the file that `tempo-jax enclave serve` "
            "names when it starts"
        ) from error
    if not _KEY.fullmatch(text):
        raise ChannelError(f"{chosen} holds no host key")
    return bytes.fromhex(text.strip())
