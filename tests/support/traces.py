"""Traces of attacks: short, simulated, and made once."""

import functools
from typing import Any

from benchmarks.attacks import (
    traces,
)

STEPS = 4


@functools.cache
def history():
    """Plain training of the smallest victim, shared by all tests."""
    return traces.train(traces.VICTIMS["mlp"], 0, STEPS)


@functools.cache
def trace(scheme: str) -> Any:
    """The same training under one of the schemes."""
    return traces.blind_history(history(), traces.VICTIMS["mlp"], scheme, 0)
