"""What tests of enclaves share."""

from collections.abc import Iterator

import pytest

import tempo_jax as tempo
from tempo_jax import CheckpointKey
from tests.support.serving import Roles, serving


@pytest.fixture(scope="module")
def roles(tmp_path_factory) -> Iterator[Roles]:
    """A client and a host; in this process for speed."""
    with serving(tmp_path_factory.mktemp("roles")) as both:
        yield both


@pytest.fixture
def keyed(enclave) -> tempo.Enclave:
    """The enclave with a fresh key."""
    enclave.use_checkpoint_key(CheckpointKey.generate())
    return enclave
