"""Blinding schemes: one module each, found by name.

To add one, write a module here with a `Scheme` class and name the class in `SCHEMES`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from enclave_runtime.protocol.program import ProgramError
from enclave_runtime.schemes.contract import Group, Scheme
from enclave_runtime.schemes.mixing import Mixing
from enclave_runtime.schemes.orthogonal import Orthogonal
from enclave_runtime.schemes.signed_permutation import SignedPermutation
from enclave_runtime.schemes.tempo import Tempo

SCHEMES: dict[str, type[Scheme]] = {
    s.name: s for s in (Mixing, Orthogonal, SignedPermutation, Tempo)
}

__all__ = ["SCHEMES", "Group", "Mixing", "Orthogonal", "Scheme", "SignedPermutation", "Tempo"]


def make_scheme(name: str, parameters: dict[str, Any]) -> Scheme:
    """The scheme of that name; inverse of `Scheme.name` and `Scheme.parameters`.

    Raises:
      ProgramError: there is no such scheme, or it does not take these parameters.
    """
    known = SCHEMES.get(name)
    if known is None:
        raise ProgramError(f"the scheme is not one of {', '.join(sorted(SCHEMES))}")
    fields = {f.name for f in dataclasses.fields(known)}
    if set(parameters) != fields:
        raise ProgramError(f"the scheme {name} takes the parameters {', '.join(sorted(fields))}")
    try:
        return known(**parameters)
    except (TypeError, ValueError) as error:
        raise ProgramError(f"the scheme {name} was given parameters out of range") from error
