"""The enclave's first line: a secret or a serving configuration, and nothing else."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclave_runtime.protocol.configuration import (
    MAX_LINE,
    ConfigurationError,
    Launched,
    Listen,
    Serving,
    read_configuration,
)

SERVING = Serving("127.0.0.1", 7441, 0, bytes(range(32)))
FIELDS = json.loads(SERVING.encode())["serve"]


def read(line: bytes) -> Launched | Serving:
    return read_configuration(io.BytesIO(line))


def test_secret_launches():
    secret = bytes(range(32))
    configuration = read(secret.hex().encode() + b"\nmore")
    assert configuration == Launched(secret)
    assert repr(configuration) == "Launched(<secret>)"


LISTENS = st.none() | st.builds(Listen, st.ip_addresses().map(str), st.integers(0, 65535))


@given(secret=st.binary(min_size=32, max_size=32), listen=LISTENS)
def test_launching_may_listen(secret, listen):
    launched = Launched(secret, listen)
    assert read(launched.encode().encode() + b"\n") == launched
    assert secret.hex() not in repr(launched)


@given(
    listen=LISTENS,
    address=st.ip_addresses().map(str),
    ports=st.tuples(st.integers(0, 65535), st.integers(0, 65535)),
    key=st.binary(min_size=32, max_size=32),
)
def test_reading_inverts_encoding(address, ports, key, listen):
    serving = Serving(address, ports[0], ports[1], key, listen)
    assert read(serving.encode().encode() + b"\n") == serving
    assert key.hex() not in repr(serving)


def line(**changes: object) -> bytes:
    fields = {**FIELDS, **changes}
    return json.dumps({"serve": {k: v for k, v in fields.items() if v is not ...}}).encode()


REFUSED = [
    (b"", "neither a secret nor"),
    (b"\n", "neither a secret nor"),
    (b"00" * 31, "neither a secret nor|one field"),
    (b"0" * 63 + b"g", "neither a secret nor"),
    (b"AB" * 32, "neither a secret nor"),
    (b"\xff" * 64, "not ASCII"),
    (b" " * MAX_LINE + b"{}", f"longer than {MAX_LINE} bytes"),
    (b"[" * 4000, "neither a secret nor"),
    (b"[]", "one field `serve`"),
    (b"{}", "one field `serve`"),
    (b'{"serve": 1, "launch": 2}', "one field `serve`"),
    (b'{"serve": []}', "serving needs exactly"),
    (line(extra=1), "serving needs exactly address, client_port"),
    (line(host_key=...), "serving needs exactly"),
    (line(client_port="7441"), "client_port is not the number of a port"),
    (line(client_port=True), "client_port is not the number of a port"),
    (line(client_port=65536), "client_port is not the number of a port"),
    (line(host_port=-1), "host_port is not the number of a port"),
    (line(address="localhost"), "not a numeric IP address"),
    (line(address="127.0.0.1:80"), "not a numeric IP address"),
    (line(address=2130706433), "a field is not text"),
    (line(host_key="00" * 31), "host_key is not 32 bytes"),
    (line(host_key=None), "a field is not text"),
    (line(listen=["0.0.0.0"]), "listen is not an address and a port"),
    (line(listen="0.0.0.0:1"), "listen is not an address and a port"),
    (line(listen=["all", 1]), "listen is not a numeric IP address"),
    (line(listen=["0.0.0.0", 65536]), "listen is not the number of a port"),
    (b'{"launch": 1}', "launching needs exactly secret, listen"),
    (b'{"launch": {"secret": "00", "listen": null}}', "secret is not 32 bytes"),
]


@pytest.mark.parametrize(("content", "text"), REFUSED, ids=lambda x: repr(x)[:40])
def test_anything_else_is_refused(content, text):
    with pytest.raises(ConfigurationError, match=text):
        read(content)


def test_refusal_does_not_show_a_secret_with_a_slip_in_it():
    slip = "ab" * 31 + "ag"
    with pytest.raises(ConfigurationError) as caught:
        read(slip.encode())
    assert slip not in str(caught.value) and caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@given(content=st.binary(max_size=200))
def test_any_line_is_read_or_refused(content):
    try:
        read(content)
    except ConfigurationError:
        return
