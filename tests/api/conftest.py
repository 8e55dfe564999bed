"""What tests of `shield` share: a classifier's step, its state, and a second enclave."""

from typing import Any

import pytest

from tests.support.classifier import BATCHES, initial_state, train_step
from tests.support.steps import (
    shield_all,
)


@pytest.fixture(scope="module")
def train(enclave) -> Any:
    """The shielded step; tests share it, so that it is compiled once."""
    return shield_all(train_step, enclave=enclave)


@pytest.fixture
def state(enclave, train) -> Any:
    """The state after one step: its leaves lie where they will stay."""
    state, _ = train(enclave.seal(initial_state()), *BATCHES[0])
    return state
