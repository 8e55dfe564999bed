"""What the enclave is told at its start, in one line on its standard input.

The line comes from whoever starts the process, under SGX therefore from the host, and is read as
hostile: bounded, and either a secret or one JSON object of exactly known fields. Neither weakens
what a client verifies: the evidence names the mode, and in serving mode the secret of the
session comes from the client alone.
"""

from __future__ import annotations

import ipaddress
import json
import re
from typing import Any, BinaryIO, NamedTuple

from enclave_runtime.crypto.encryption import SECRET_BYTES, refuse_pickling

MAX_LINE = 4096  # bytes
_SECRET = re.compile(rf"[0-9a-f]{{{2 * SECRET_BYTES}}}")


class ConfigurationError(Exception):
    """A first line that is neither a secret nor a serving configuration."""


class Launched(NamedTuple):
    """A parent holds the other end of the pipe; client and host are one process.

    Attributes:
      secret: the session's.
    """

    secret: bytes

    def __repr__(self) -> str:
        return "Launched(<secret>)"

    __reduce__ = refuse_pickling


class Serving(NamedTuple):
    """Two ports: TLS for the client, loopback for the host.

    Attributes:
      address: the client port's numeric address.
      client_port: its number, 0 for any free one.
      host_port: the number of the host's port on 127.0.0.1, 0 for any free one.
      host_key: keeps other users of the machine off the host port; the host knows it, so it
        protects nothing from the host.
    """

    address: str
    client_port: int
    host_port: int
    host_key: bytes

    def encode(self) -> str:
        """The configuration as the line that `read_configuration` takes."""
        return json.dumps({"serve": {**self._asdict(), "host_key": self.host_key.hex()}})

    def __repr__(self) -> str:
        return f"Serving({self.address}, {self.client_port}, {self.host_port})"

    __reduce__ = refuse_pickling


def read_configuration(pipe: BinaryIO) -> Launched | Serving:
    """Reads the first line.

    Raises:
      ConfigurationError: it does not follow either form.
    """
    line = pipe.readline(MAX_LINE + 1)
    if len(line) > MAX_LINE:
        raise ConfigurationError(f"the first line is longer than {MAX_LINE} bytes")
    try:
        text = line.decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise ConfigurationError("the first line is not ASCII") from error
    if _SECRET.fullmatch(text):
        return Launched(bytes.fromhex(text))
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        # Not shown and not chained: it may be a secret with a slip in it.
        raise ConfigurationError(
            "the first line is neither a secret nor a configuration in JSON"
        ) from None
    if not isinstance(fields, dict) or fields.keys() != {"serve"}:
        raise ConfigurationError("a configuration has the one field `serve`")
    return _serving(fields["serve"])


def _serving(fields: Any) -> Serving:
    if not isinstance(fields, dict) or fields.keys() != set(Serving._fields):
        raise ConfigurationError(f"serving needs exactly {', '.join(Serving._fields)}")
    for name in ("client_port", "host_port"):
        if type(fields[name]) is not int or not 0 <= fields[name] < 1 << 16:
            raise ConfigurationError(f"{name} is not the number of a port")
    try:
        address = str(ipaddress.ip_address(_text(fields["address"])))
    except ValueError as error:
        raise ConfigurationError("address is not a numeric IP address") from error
    if not _SECRET.fullmatch(_text(fields["host_key"])):
        raise ConfigurationError(f"host_key is not {SECRET_BYTES} bytes in hexadecimal")
    return Serving(
        address, fields["client_port"], fields["host_port"], bytes.fromhex(fields["host_key"])
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigurationError("a field is not text")
    return value
