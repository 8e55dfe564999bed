"""Who a client is to the enclaves it owns: one secret, which outlives the client's process.

Trusted: it runs on the client's machine alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from enclave_runtime.crypto.encryption import SECRET_BYTES, derive_key
from tempo_jax.errors import ChannelError

_FORMAT = "tempo_jax/client identity/1"
_MAX_FILE = 4096  # bytes


class ClientIdentity:
    """The secret by which a client comes back to the enclaves that it owns.

    Each enclave gets a secret of its own, derived from this one and the enclave's TLS key, so that
    none can pass as the client to another. Whoever has the identity can open everything that was
    sealed with it.

    Example:
      >>> import tempo_jax as tempo
      >>> tempo.ClientIdentity.generate()
      ClientIdentity(<secret>)
    """

    def __init__(self, secret: bytes):
        """Takes a secret of 32 random bytes; see `generate` and `load`.

        Raises:
          ChannelError: it has another length.
        """
        if len(secret) != SECRET_BYTES:
            raise ChannelError(
                f"a client's identity has {len(secret)} bytes, expected {SECRET_BYTES}"
            )
        self._secret = secret

    def __repr__(self) -> str:
        return "ClientIdentity(<secret>)"

    def __reduce__(self) -> Any:
        raise ChannelError("a client's identity is secret and cannot be pickled; use `save`")

    @classmethod
    def generate(cls) -> ClientIdentity:
        """A new identity, from the operating system's randomness."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the identity to a new file that only this user can read.

        The file holds the secret itself: keep it on the client's machine, and safe.

        Raises:
          FileExistsError: there is one already; it may be the only key to what is sealed.
        """
        content = json.dumps({"format": _FORMAT, "secret": self._secret.hex()})
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(path, flags, 0o600), "w") as file:
            file.write(content + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClientIdentity:
        """Reads an identity that `save` wrote.

        Raises:
          ChannelError: the file is not such a file, or others can read it.
          OSError: there is none.
        """
        with open(path, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ChannelError(
                    f"{Path(path)} holds a client's identity and other users may read or change "
                    "it: run `chmod 600` on it, and consider the identity known to them"
                )
            content = file.read(_MAX_FILE)
        try:
            fields = json.loads(content)
            if fields["format"] == _FORMAT:
                return cls(bytes.fromhex(fields["secret"]))
        except (ValueError, KeyError, TypeError):
            pass
        # Not chained: the parser's error would show what it could not read.
        raise ChannelError(f"{Path(path)} is not a client's identity ({_FORMAT})")

    def session_secret(self, session: str, public_key: bytes) -> bytes:
        """The secret of one session, known to this client and that session's enclave.

        Args:
          session: its public name, as the peer gives it; anyone may say one.
          public_key: of the TLS channel, DER. The handshake proved that the peer holds it, so a
            peer that says another enclave's session gets a secret of its own all the same.
        """
        fingerprint = hashlib.sha256(public_key).hexdigest()
        return derive_key(self._secret, f"client identity/{session}/{fingerprint}")
