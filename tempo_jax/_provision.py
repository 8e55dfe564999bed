"""Gives a plan's trusted part to the enclave, or finds what the client gave.

A client encrypts the segments' code and the program's description to the enclave. A host makes
the same plan from the same function and asks for it by the hash of its description, which
covers the code of every segment; so it runs what the client agreed to and nothing else. Called by
`_runtime` and `_shield`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from enclave_runtime.program import Program
from tempo_jax._enclave import Enclave
from tempo_jax._plan import Plan, export_segments
from tempo_jax.errors import UnprovisionedError


def provisioned(plan: Plan, enclave: Enclave) -> tuple[Program, int]:
    """The program with its segments named, and its number in the enclave.

    Raises:
      UnprovisionedError: on the host, where the client has to do this first.
    """
    if enclave.is_client:
        program = _named(plan, [enclave.compile(blob) for blob in export_segments(plan.cut)])
        return program, enclave.provision(program, plan.flat.consts)
    blobs = export_segments(plan.cut)
    program = _named(plan, [hashlib.sha256(blob).hexdigest() for blob in blobs])
    try:
        return program, enclave.find(program)
    except UnprovisionedError as error:
        raise UnprovisionedError(
            f"the client provisioned no program of digest {program.digest}. Have it call "
            "`.provision(...)` on the same function, with the same options to `shield`, arguments "
            "of the same structure, shapes and dtypes, the same `jax_enable_x64`, and the same "
            "versions of JAX and tempo_jax"
        ) from error


def _named(plan: Plan, names: Sequence[str]) -> Program:
    segments = tuple(
        dataclasses.replace(segment, executable=name)
        for segment, name in zip(plan.program.segments, names, strict=True)
    )
    return dataclasses.replace(plan.program, segments=segments)
