"""Run-time checks as Equinox' `error_if` makes them, for where Equinox is not installed."""

from typing import Any

import jax
import pytest
from jax import lax


def like_equinox(x: Any, failed: jax.Array, message: str = "") -> Any:
    """What `equinox.error_if` traces to."""

    def raises(_: Any) -> Any:
        raise RuntimeError(f"{message}\n\n\n----\nand what Equinox says about `jit`")

    raises.__module__ = "equinox._errors"
    return lax.cond(failed, lambda: jax.pure_callback(raises, x, failed), lambda: x)


def equinox(x: Any, failed: jax.Array, message: str = "too large") -> Any:
    """`equinox.error_if` itself."""
    package = pytest.importorskip("equinox", reason="equinox is not installed")
    return package.error_if(x, failed, message)
