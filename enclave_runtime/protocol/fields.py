"""Reading untyped fields of a decoded description, with bounds; shared by both sides.

Holds no secret state.
"""

from __future__ import annotations

from typing import Any

MAX_RANK = 32  # of an array


class ProgramError(Exception):
    """A program description that contradicts itself."""


def require(condition: bool, message: str) -> None:
    """Refuses a description unless a condition holds."""
    if not condition:
        raise ProgramError(message)


def natural(value: Any, limit: int, what: str) -> int:
    """A number from 0 to below `limit`."""
    require(type(value) is int and 0 <= value < limit, f"{what} is out of range")
    return value


def items(value: Any, what: str) -> list[Any]:
    """A list."""
    require(isinstance(value, list), f"{what} is not a list")
    return value


def pair(value: Any) -> list[Any]:
    """A list of two."""
    require(isinstance(value, list) and len(value) == 2, "a pair has another length")
    return value
