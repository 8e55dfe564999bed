"""Blinding schemes: one module each, found by name; `registry` lists them."""

from __future__ import annotations

import dataclasses
from typing import Any

from enclave_runtime.protocol.program import ProgramError
from enclave_runtime.schemes.checks import check_program as check_program
from enclave_runtime.schemes.contract import register as register
from enclave_runtime.schemes.registry import *  # noqa: F403  # A new scheme is a line there alone.
from enclave_runtime.schemes.registry import SCHEMES, Scheme


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
