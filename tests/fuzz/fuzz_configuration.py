"""Fuzzes the reader of the enclave's first line, which comes from whoever starts the process."""

from __future__ import annotations

import io

from enclave_runtime.crypto.encryption import SECRET_BYTES
from enclave_runtime.protocol import configuration
from enclave_runtime.protocol.configuration import (
    ConfigurationError,
    Launched,
    Listen,
    Serving,
    read_configuration,
)
from tests.fuzz import harness


def one_input(data: bytes) -> None:
    """Reads a line; a serving configuration that is accepted is the same after another round."""
    try:
        read = read_configuration(io.BytesIO(data))
    except ConfigurationError:
        return
    assert read_configuration(io.BytesIO(read.encode().encode() + b"\n")) == read
    if isinstance(read, Launched):
        assert len(read.secret) == SECRET_BYTES


def made_seeds() -> dict[str, bytes]:
    """The corpus's seeds by file name; made anew when the format changes."""
    key = bytes(range(SECRET_BYTES))
    serving = {
        name: Serving(address, 8443, 0, key).encode().encode() + b"\n"
        for name, address in (("version4", "127.0.0.1"), ("version6", "fe80::1%eth0"))
    }
    elsewhere = Listen("0.0.0.0", 7443)
    return {
        "secret": key.hex().encode() + b"\n",
        "listening": Launched(key, elsewhere).encode().encode() + b"\n",
        "serving_more": Serving("::", 1, 2, key, elsewhere).encode().encode() + b"\n",
        **serving,
    }


if __name__ == "__main__":
    harness.fuzz(one_input, (configuration,), harness.mutate_json)
