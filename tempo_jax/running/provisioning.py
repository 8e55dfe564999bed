"""Gives a plan's trusted part to the enclave, or finds what the client gave.

A client encrypts the segments' code and the program's description to the enclave. A host makes the
same plan from the same function and asks for it by the hash of its description, which covers the
code of every segment; so it runs what the client agreed to and nothing else. Of a host's processes
only the first asks: the others join its runs, and compare the hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from enclave_runtime.protocol.memory import input_bytes
from enclave_runtime.protocol.program import ArrayType, Program
from enclave_runtime.protocol.tags import Rules
from enclave_runtime.protocol.wire import Kind
from tempo_jax.enclave.enclave import Enclave
from tempo_jax.errors import UnprovisionedError
from tempo_jax.jaxprs import types
from tempo_jax.planning.export import export_segments
from tempo_jax.planning.plan import Plan


class ProvisionedPlan(NamedTuple):
    """A program that the enclave has.

    Attributes:
      program: with its segments named.
      number: of the program in the enclave.
      export_seconds: that exporting the segments took.
      compile_seconds: that the enclave took to compile them; 0 on the host, whose client had it
        do so before.
    """

    program: Program
    number: int
    export_seconds: float
    compile_seconds: float


def provisioned(plan: Plan, enclave: Enclave, rules: Rules) -> ProvisionedPlan:
    """Gives the enclave a plan's program, or finds it there.

    Args:
      plan: its plan.
      enclave: what gets it, or has it.
      rules: the client's, of what the program's inputs take; the host's say nothing.

    Raises:
      UnprovisionedError: on the host, where the client has to do this first.
    """
    start, compiling = time.perf_counter(), 0.0
    if enclave.is_client:
        given: dict[bytes, str] = {}
        names = []
        for blob in export_segments(plan.cut):
            if blob not in given:
                before = time.perf_counter()
                given[blob] = _compile(enclave, blob)
                compiling += time.perf_counter() - before
            names.append(given[blob])
        exporting = time.perf_counter() - start - compiling
        program = _named(plan, names)
        number = _provision(enclave, program, rules, plan.flat.consts)
        return ProvisionedPlan(program, number, exporting, compiling)
    blobs = export_segments(plan.cut)
    program = _named(plan, [hashlib.sha256(blob).hexdigest() for blob in blobs])
    exporting = time.perf_counter() - start
    if enclave.follows:  # it begins no run, and joins those of this digest
        return ProvisionedPlan(program, 0, exporting, compiling)
    try:
        return ProvisionedPlan(program, _find(enclave, program), exporting, compiling)
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


def _compile(enclave: Enclave, blob: bytes) -> str:
    """Gives a segment's code, which the enclave starts to compile; returns its name."""
    reply = enclave.connection.request(Kind.COMPILE, {}, enclave.encrypt(blob, "compile"))
    return reply["executable"]


def _provision(enclave: Enclave, program: Program, rules: Rules, constants: Sequence[Any]) -> int:
    """Gives a program, its rules and its closed-over arrays; returns its number."""
    described = {"program": program.encode(), "rules": rules.encode()}
    content = enclave.encrypt(json.dumps(described).encode(), "provision")
    plain = (np.asarray(types.to_physical(value)) for value in constants)
    if not enclave.is_host:
        behind = [enclave.encrypt_array(value).tobytes() for value in plain]
        fields = {"program_bytes": len(content)}
        attachment = b"".join((content, *behind))
        return enclave.connection.request(Kind.PROVISION, fields, attachment)["program"]
    sizes = [input_bytes(port.array) for port in program.constants]
    with enclave.arena(sum(sizes)) as (name, arena):
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        for port, offset, value in zip(program.constants, offsets, plain, strict=True):
            assert (value.shape, value.dtype.name) == (port.array.shape, port.array.dtype)
            encrypted = enclave.encrypt_array(value)
            np.copyto(arena.view(ArrayType(encrypted.shape, "uint8"), offset), encrypted)
        fields = {"arena": name, "offsets": offsets}
        return enclave.connection.request(Kind.PROVISION, fields, content)["program"]


def _find(enclave: Enclave, program: Program) -> int:
    """The number of a program that the client provisioned.

    Raises:
      UnprovisionedError: it provisioned none of this description.
    """
    return enclave.connection.request(Kind.FIND, {"digest": program.digest})["program"]
