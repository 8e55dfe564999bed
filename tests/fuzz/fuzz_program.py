"""Fuzzes the provisioning message: the description of a program, as JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from enclave_runtime import schemes
from enclave_runtime.execution.executor import Compilation, Executables, Executor
from enclave_runtime.protocol import descriptions, program, updates
from enclave_runtime.protocol import fields as checked_fields
from enclave_runtime.protocol.program import Program, ProgramError
from enclave_runtime.verifying import follower, integrity
from tests.fuzz import harness


class IdleExecutor(Executor):
    """Has every program and compiles nothing."""

    def has(self, name: str) -> bool:
        """Whatever its name."""
        return True

    def hold(self, names: Iterable[str], kernels: Sequence[Compilation]) -> Executables:
        """Nothing that could run."""
        return Executables({}, kernels)

    def prepare(self, use: Hashable, function: Callable[[], object]) -> Compilation:
        """A compilation that never ends."""
        return Compilation()


def one_input(data: bytes) -> None:
    """Decodes a program; what is accepted is the same after another round."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return
    try:
        decoded = Program.decode(fields)
    except ProgramError:
        return
    with contextlib.suppress(ProgramError):
        schemes.make_scheme(decoded.scheme, decoded.parameters)
    again: Any = json.loads(json.dumps(decoded.encode()))
    assert Program.decode(again) == decoded
    if decoded.verify:
        with contextlib.suppress(ProgramError):
            follower.check_program(decoded)
            integrity.prepare(decoded, IdleExecutor())


if __name__ == "__main__":
    harness.fuzz(
        one_input,
        (checked_fields, follower, integrity, descriptions, program, schemes, updates),
        harness.mutate_json,
    )
