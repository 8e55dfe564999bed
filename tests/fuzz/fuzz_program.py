"""Fuzzes the provisioning message: the description of a program, as JSON."""

from __future__ import annotations

import contextlib
import json

from enclave_runtime import fields as checked_fields
from enclave_runtime import products, program, schemes
from enclave_runtime.program import Program, ProgramError
from tests.fuzz import harness


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
    again = json.loads(json.dumps(decoded.encode()))
    assert Program.decode(again) == decoded


if __name__ == "__main__":
    harness.fuzz(one_input, (checked_fields, products, program, schemes), harness.mutate_json)
