"""A shielded step of momentum, and its state."""

from typing import Any

import pytest

from tests.support.steps import MOMENTUM_BATCH, shield_all
from tests.support.steps import momentum_state as initial_state
from tests.support.steps import momentum_step as train_step


@pytest.fixture(scope="module")
def train(enclave) -> Any:
    """The shielded step."""
    return shield_all(train_step, enclave=enclave)


@pytest.fixture
def state(enclave, train) -> Any:
    """The state after one step."""
    state, _ = train(enclave.seal(initial_state()), *MOMENTUM_BATCH)
    return state
