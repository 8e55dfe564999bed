"""An enclave that serves, with its client and its host in the test's own process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tempo_jax as tempo
from tempo_jax.cli.serve import ServingProcess, served

INSECURE = tempo.AttestationPolicy(insecure_accept_no_sgx=True)
IDENTITY = tempo.ClientIdentity(bytes(range(32)))


class Roles(NamedTuple):
    """Both sides of one serving enclave; they share nothing but files."""

    ports: ServingProcess
    client: tempo.Enclave
    host: tempo.Enclave


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Roles]:
    """Serves an enclave and joins it from both sides."""
    with (
        served(host_key=folder / "host.key") as ports,
        tempo.Enclave.connect(ports.client, policy=INSECURE, identity=IDENTITY) as client,
        tempo.Enclave.attach(ports.host, host_key=ports.host_key) as host,
    ):
        yield Roles(ports, client, host)


def sealed_for(client: tempo.Enclave, **arguments: Any) -> list[Any]:
    """Arguments of a function, each sealed under its name."""
    return [client.seal(value, tag=name) for name, value in arguments.items()]
