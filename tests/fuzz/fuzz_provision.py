"""Fuzzes the request that provisions a program: where description and constants begin and end.

A client that is authentic may still be wrong. An input is a JSON document: the request's `fields`,
the `program`, its `rules` (without them some that fit) and the types of the `constants` that come
with it (what is no type comes as it is). Everything is encrypted here, since altered bytes rarely
get past a tag, and the fuzzer's `program_bytes` counts from where the description ends.
"""

from __future__ import annotations

import functools
import json
import secrets
from typing import Any

import numpy as np

from enclave_runtime.crypto.encryption import (
    DecryptionError,
    encrypt_array,
    encrypt_bytes,
    session_keys,
)
from enclave_runtime.protocol import tags, updates
from enclave_runtime.protocol.memory import Arena, ArenaError
from enclave_runtime.protocol.program import ArrayType, ProgramError
from enclave_runtime.protocol.requests import RequestError
from enclave_runtime.protocol.tags import ArgumentRule, Rules
from enclave_runtime.protocol.wire import Frame, Kind
from enclave_runtime.sessions import session
from enclave_runtime.sessions.session import Session
from enclave_runtime.verifying import follower
from tests.fuzz import harness
from tests.fuzz.fuzz_program import IdleExecutor

IDENTITY = "00" * 16
KEYS = session_keys(bytes(32))
ARENA = "arena"
PLACE = 256  # bytes for each constant in shared memory
ARENA_BYTES = 8 * PLACE
# What the server answers as refused or malformed.
_REFUSALS = (
    *(ArenaError, DecryptionError, ProgramError, RequestError),
    *(KeyError, TypeError, ValueError, AttributeError),
)


@functools.cache
def _arena() -> Arena:
    arena = Arena(f"tempo_jax-{secrets.token_hex(16)}", ARENA_BYTES, create=True)
    arena.unlink()
    return arena


def _constant(described: Any) -> bytes:
    """Ciphertext of zeros of this type, or the text of what is no small type."""
    try:
        array = ArrayType.decode(described)
    except ProgramError:
        return json.dumps(described).encode()
    if array.nbytes > PLACE:
        return b""
    zeros = np.zeros(array.shape, np.dtype(array.dtype))
    return encrypt_array(KEYS.to_enclave, zeros, IDENTITY).tobytes()


def _open_rules(program: Any) -> dict[str, Any]:
    """Rules that refuse nothing, for what may be no program."""
    outputs = program.get("outputs") if isinstance(program, dict) else None
    return Rules("f", ("",) * (len(outputs) if isinstance(outputs, list) else 0)).encode()


def one_input(data: bytes) -> None:
    """Provisions; what is accepted is kept, and nothing else."""
    try:
        document = json.loads(data)
        fields, program = dict(document["fields"]), document["program"]
        rules = document["rules"] if "rules" in document else _open_rules(program)
        constants = [_constant(c) for c in document["constants"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return
    plain = json.dumps({"program": program, "rules": rules}).encode()
    attachment = encrypt_bytes(KEYS.to_enclave, plain, f"provision|{IDENTITY}".encode())
    if type(fields.get("program_bytes")) is int:
        fields["program_bytes"] += len(attachment)
        attachment += b"".join(constants)
    for number, content in enumerate(constants[: ARENA_BYTES // PLACE]):
        own = np.frombuffer(content[:PLACE], np.uint8)
        np.copyto(_arena().view(ArrayType(own.shape, "uint8"), number * PLACE), own)
    asked = Session(KEYS, IDENTITY)
    asked._executor = IdleExecutor()
    asked._arenas[ARENA] = _arena()
    try:
        reply, _ = asked.handle(Frame(Kind.PROVISION, 1, fields, attachment))
    except _REFUSALS:
        assert not asked._programs
        return
    assert reply["program"] == 0 and len(asked._programs) == 1


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Changes what lies around the program, mostly; the program has a fuzzer of its own."""
    try:
        document = json.loads(data)
        program = document.pop("program")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return harness.mutate_json(data, max_size, seed)
    if seed % 4 == 0 or not document:
        return harness.mutate_json(data, max_size, seed)
    around = harness.mutate_json(json.dumps(document).encode(), max_size, seed)
    kept = json.dumps(program, separators=(",", ":")).encode()
    return (around[:-1] + b',"program":' + kept + b"}")[:max_size]


def made_seeds(program: bytes) -> dict[str, bytes]:
    """The corpus's seeds by file name, for a description; made anew when the format changes."""
    described = json.loads(program)
    constants = [port["array"] for port in described["constants"]]
    places = [number * PLACE for number in range(len(constants))]
    count = len(described["inputs"])
    argument = ArgumentRule("x", tuple(range(count)), (("x", "f.x"),) * count, 2, carried=True)
    held = Rules("f", ("f.x",) * len(described["outputs"]), (argument,), retries=3)
    forms = {
        "behind": ({"program_bytes": 0}, _open_rules(described)),
        "shared": ({"arena": ARENA, "offsets": places}, held.encode()),
    }
    return {
        name: json.dumps(
            {"fields": fields, "constants": constants, "rules": rules, "program": described}
        ).encode()
        for name, (fields, rules) in forms.items()
    }


if __name__ == "__main__":
    harness.fuzz(one_input, (session, follower, tags, updates), mutate)
