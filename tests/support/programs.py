"""Programs as they cross to an enclave."""

import dataclasses
import json
from typing import Any

from enclave_runtime.protocol.program import (
    Program,
)

HASH = "0123456789abcdef" * 4


def with_executables(program: Program) -> Program:
    """The same program with a name for each executable."""
    segments = tuple(dataclasses.replace(s, executable=HASH) for s in program.segments)
    return dataclasses.replace(program, segments=segments)


def as_it_crosses(program: Program) -> Any:
    """Parsed JSON, for a test to change."""
    return json.loads(json.dumps(program.encode()))
