"""A serving enclave, and a line to each of its ports."""

from collections.abc import Iterator

import pytest

from tempo_jax.cli.serve import ServingProcess, served
from tempo_jax.transport.channel import Channel, parse_address
from tempo_jax.transport.host_key import read_host_key
from tempo_jax.transport.loopback import Attachment
from tests.support.serving import IDENTITY, INSECURE


@pytest.fixture(scope="module")
def enclave_ports(tmp_path_factory) -> Iterator[ServingProcess]:
    """A serving enclave that `IDENTITY` owns."""
    with served(host_key=tmp_path_factory.mktemp("host") / "key") as running:
        Channel(running.client, INSECURE, IDENTITY).close()
        yield running


@pytest.fixture
def client(enclave_ports: ServingProcess) -> Iterator[Channel]:
    """The owner's connection."""
    connection = Channel(enclave_ports.client, INSECURE, IDENTITY)
    yield connection
    connection.close()


@pytest.fixture
def host(enclave_ports: ServingProcess) -> Iterator[Attachment]:
    """A host's lines."""
    _, port = parse_address(enclave_ports.host)
    lines = Attachment(port, read_host_key(port, enclave_ports.host_key))
    yield lines
    lines.close()
