"""Small functions that are compared with themselves under `jit`.

Each has a product or two around what it is about, so that values cross before and after it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import tempo_jax as tempo
from tests.support.steps import assert_close, shield_all, uniform

X = uniform(1, 8, 12)
W = uniform(2, 12, 8)
V = uniform(3, 8, 12)
S = X @ X.T + 8 * jnp.eye(8)
KEY = jax.random.key(7)
LEGACY_KEY = jax.random.PRNGKey(7)
qr: Any = jax.scipy.linalg.qr  # declared with every number of results
Case = tuple[Callable[..., Any], tuple[Any, ...]]


class Cases(dict[str, Case]):
    """Functions by their names, with arguments."""

    def add(self, *arguments: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Adds the decorated function on these arguments."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self[function.__name__] = (function, arguments)
            return function

        return add

    def check(self, enclave: tempo.Enclave, name: str) -> None:
        """Asserts that a function, shielded, is what it is under `jit`."""
        function, arguments = self[name]
        expected = jax.jit(function)(*arguments)
        shielded = shield_all(function, enclave=enclave, donate=False)
        assert_close(enclave.open(shielded(*arguments)), expected)
