"""Compiles provisioned StableHLO and runs it on the enclave's processors.

Programs arrive as `jax.export` artifacts. Each is compiled once, by its hash, on a pool
of threads (XLA releases the interpreter's lock), while later ones are still arriving.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.export

from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes import Scheme

Compilation = concurrent.futures.Future[object]


class Executor:
    """Compiled segments and the pool that compiles them."""

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1, "compile")
        self._compiled: dict[str, concurrent.futures.Future[Callable[..., Sequence[jax.Array]]]]
        self._compiled = {}
        self._warm: dict[Hashable, Compilation] = {}

    def compile(self, blob: bytes) -> str:
        """Starts compiling a serialized program and returns its name, SHA-256 in hex."""
        name = hashlib.sha256(blob).hexdigest()
        if name not in self._compiled:
            self._compiled[name] = self._pool.submit(_compile, blob)
        return name

    def has(self, name: str) -> bool:
        """Whether a program of this name was given."""
        return name in self._compiled

    def warm_up(
        self, scheme: Scheme, array: ArrayType, layout: Layout, classes: tuple[KeyClass, ...]
    ) -> list[Compilation]:
        """Starts compiling the scheme's kernels for such values."""
        if not layout.keyed:
            return []
        keyed = tuple(None if c is None else classes[c].batch for c in layout.classes)
        use = (scheme, array, keyed, layout.parities)
        return [self.prepare(use, functools.partial(scheme.warm_up, array, layout, classes))]

    def prepare(self, use: Hashable, function: Callable[[], object]) -> Compilation:
        """Starts compiling something else, once for each use."""
        if use not in self._warm:
            self._warm[use] = self._pool.submit(function)
        return self._warm[use]

    def wait(self, names: Sequence[str], kernels: Sequence[Compilation]) -> None:
        """Returns when these programs and kernels are compiled.

        Raises:
          Exception: what the compilation of one of them raised.
        """
        for name in names:
            self._compiled[name].result()
        for kernel in kernels:
            kernel.result()

    def run(self, name: str, inputs: Sequence[jax.Array]) -> Sequence[jax.Array]:
        """Runs a compiled program."""
        return self._compiled[name].result()(*inputs)


def _compile(blob: bytes) -> Callable[..., Sequence[jax.Array]]:
    exported = jax.export.deserialize(bytearray(blob))
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in exported.in_avals]
    # Unread inputs stay arguments, so that every segment is called with what it declares.
    return jax.jit(exported.call, keep_unused=True).lower(*arguments).compile()
