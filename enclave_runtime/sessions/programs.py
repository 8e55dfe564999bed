"""The programs that the client provisioned, by the numbers under which the host runs them.

Each holds its constants and its compiled segments, and so memory. The client says when it needs one
no more; beyond `MAX_PROGRAMS` the one that was not used for the longest goes.
"""

from __future__ import annotations

import itertools
import logging
import threading
from typing import NamedTuple

import jax

from enclave_runtime.execution.executor import Executables
from enclave_runtime.protocol.program import Program
from enclave_runtime.protocol.requests import RequestError
from enclave_runtime.protocol.tags import Rules
from enclave_runtime.schemes import Scheme

MAX_PROGRAMS = 256

_log = logging.getLogger("enclave_runtime")


class UnknownProgramError(RequestError):
    """The host asks for a program that the client did not provision."""


class Provisioned(NamedTuple):
    """A program with its digest and constants, its owner's rules, and what its runs execute."""

    program: Program
    rules: Rules
    digest: str
    scheme: Scheme
    constants: dict[int, jax.Array]
    executables: Executables

    def __repr__(self) -> str:
        return "Provisioned(<secret>)"


class Programs:
    """Programs by number; a number names no other one later."""

    def __init__(self) -> None:
        self._kept: dict[int, Provisioned] = {}  # the least recently used first
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, provisioned: Provisioned) -> int:
        """Keeps a program and returns its number.

        Rules that refuse something hold at once and in place of earlier ones, which a host that
        remembered their number might like better.
        """
        with self._lock:
            earlier = [
                n
                for n, kept in self._kept.items()
                if kept.digest == provisioned.digest and kept.rules.arguments
            ]
            number = earlier[0] if earlier else next(self._numbers)
            self._kept.pop(number, None)
            self._kept[number] = provisioned
            if len(self._kept) > MAX_PROGRAMS:
                oldest = next(iter(self._kept))
                del self._kept[oldest]
                _log.warning(
                    "freed program %d, unused for the longest: %d are kept", oldest, MAX_PROGRAMS
                )
        return number

    def use(self, number: int) -> Provisioned:
        """The program of a number, which counts as used now.

        Raises:
          UnknownProgramError: there is none, or it was freed.
        """
        with self._lock:
            if number not in self._kept:
                raise UnknownProgramError(
                    "no such program was provisioned, or it was freed: the enclave keeps the "
                    f"{MAX_PROGRAMS} that were used last"
                )
            provisioned = self._kept[number] = self._kept.pop(number)
        return provisioned

    def find(self, digest: str) -> int:
        """The number of the program of a digest; of equal ones the latest.

        Raises:
          UnknownProgramError: there is none.
        """
        with self._lock:
            equal = [n for n, kept in self._kept.items() if kept.digest == digest]
        if not equal:
            raise UnknownProgramError("the client provisioned no such program")
        return max(equal)

    def release(self, number: int) -> None:
        """Frees a program; one that is gone already does nothing."""
        with self._lock:
            self._kept.pop(number, None)
