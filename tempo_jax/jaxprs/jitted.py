"""Functions that are jitted already: which of their arguments belong to the program.

Untrusted and pure. Serves JAX 0.10 to 0.12.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


def static_arguments(function: Callable[..., Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Numbers and names of what `jax.jit` was told is static; none for other functions.

    Looks through bound methods and partial applications. A negative number counts from a call's
    last positional argument.
    """
    bound, inner = _bound(function)
    if inner is not None:
        numbers, names = static_arguments(inner)
        return tuple(n if n < 0 else n - bound for n in numbers if n < 0 or n >= bound), names
    info = getattr(function, "_jit_info", None)  # JAX 0.10-0.12: what `jit` keeps of its options.
    return (info.static_argnums, info.static_argnames) if info is not None else ((), ())


def is_filtered(function: Callable[..., Any]) -> bool:
    """Whether this is what `equinox.filter_jit` returns, for which every array is an argument.

    All else in its arguments and results is static.
    """
    _, inner = _bound(function)
    if inner is not None:
        return is_filtered(inner)
    # Equinox 0.13: the class has no public name.
    kind = type(function)
    return (kind.__module__, kind.__name__) == ("equinox._jit", "_JitWrapper")


def _bound(function: Callable[..., Any]) -> tuple[int, Callable[..., Any] | None]:
    """How many arguments a method or a partial application has bound, and of what."""
    if isinstance(function, types.MethodType):
        return 1, function.__func__
    # `functools.partial`, and that of Equinox, which is no subclass of it.
    inner, given = getattr(function, "func", None), getattr(function, "args", None)
    return (len(given), inner) if callable(inner) and isinstance(given, tuple) else (0, None)
