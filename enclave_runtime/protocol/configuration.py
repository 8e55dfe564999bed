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


class Listen(NamedTuple):
    """Where the host's processes on other machines reach the enclave.

    Attributes:
      address: numeric; 0.0.0.0 or :: for all networks.
      port: its number, 0 for any free one.
    """

    address: str
    port: int


class Launched(NamedTuple):
    """A parent holds the other end of the pipe; client and host are one process.

    Attributes:
      secret: the session's.
      listen: a second port, that answers what a host may ask; None for none.
    """

    secret: bytes
    listen: Listen | None = None

    def encode(self) -> str:
        """The configuration as the line that `read_configuration` takes."""
        if self.listen is None:
            return self.secret.hex()
        return json.dumps({"launch": {"secret": self.secret.hex(), "listen": self.listen}})

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
      listen: a second port of the host, under the same key; None for none.
    """

    address: str
    client_port: int
    host_port: int
    host_key: bytes
    listen: Listen | None = None

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
    if isinstance(fields, dict) and fields.keys() == {"launch"}:
        return _launched(fields["launch"])
    if not isinstance(fields, dict) or fields.keys() != {"serve"}:
        raise ConfigurationError("a configuration has the one field `serve`, or `launch`")
    return _serving(fields["serve"])


def _launched(fields: Any) -> Launched:
    if not isinstance(fields, dict) or fields.keys() != set(Launched._fields):
        raise ConfigurationError(f"launching needs exactly {', '.join(Launched._fields)}")
    if not _SECRET.fullmatch(_text(fields["secret"])):
        raise ConfigurationError(f"secret is not {SECRET_BYTES} bytes in hexadecimal")
    return Launched(bytes.fromhex(fields["secret"]), _listen(fields["listen"]))


def _listen(field: Any) -> Listen | None:
    if field is None:
        return None
    if not isinstance(field, list) or len(field) != 2:
        raise ConfigurationError("listen is not an address and a port")
    return Listen(_address(field[0], "listen"), _port(field[1], "listen"))


def _port(field: Any, name: str) -> int:
    if type(field) is not int or not 0 <= field < 1 << 16:
        raise ConfigurationError(f"{name} is not the number of a port")
    return field


def _address(field: Any, name: str) -> str:
    try:
        return str(ipaddress.ip_address(_text(field)))
    except ValueError as error:
        raise ConfigurationError(f"{name} is not a numeric IP address") from error


def _serving(fields: Any) -> Serving:
    if not isinstance(fields, dict) or fields.keys() != set(Serving._fields):
        raise ConfigurationError(f"serving needs exactly {', '.join(Serving._fields)}")
    if not _SECRET.fullmatch(_text(fields["host_key"])):
        raise ConfigurationError(f"host_key is not {SECRET_BYTES} bytes in hexadecimal")
    return Serving(
        _address(fields["address"], "address"),
        _port(fields["client_port"], "client_port"),
        _port(fields["host_port"], "host_port"),
        bytes.fromhex(fields["host_key"]),
        _listen(fields["listen"]),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigurationError("a field is not text")
    return value
