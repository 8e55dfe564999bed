"""Compiles provisioned StableHLO and runs it on the enclave's processors.

Programs arrive as `jax.export` artifacts. Each is compiled once, by its hash, on a pool
of threads (XLA releases the interpreter's lock), while later ones are still arriving.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import jax
import jax.export

from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes import Scheme

Compilation = concurrent.futures.Future[object]
Compiled = concurrent.futures.Future[Callable[..., Sequence[jax.Array]]]


# Programs that were given and that nobody holds yet; far more than one description names.
MAX_GIVEN = 1 << 14


class Executables:
    """The compiled segments of one program and its kernels, kept for as long as this is."""

    def __init__(self, compiled: Mapping[str, Compiled], kernels: Sequence[Compilation]):
        self._compiled = dict(compiled)
        self._kernels = tuple(kernels)

    def wait(self) -> None:
        """Returns when all are compiled.

        Raises:
          Exception: what the compilation of one of them raised.
        """
        for compilation in (*self._compiled.values(), *self._kernels):
            compilation.result()

    def run(self, name: str, inputs: Sequence[jax.Array]) -> Sequence[jax.Array]:
        """Runs a segment."""
        return self._compiled[name].result()(*inputs)


class Executor:
    """The pool that compiles, and what somebody holds of it.

    What is compiled is shared by all that hold it, and freed with the last of them.
    """

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1, "compile")
        self._compiled: weakref.WeakValueDictionary[str, Compiled] = weakref.WeakValueDictionary()
        self._warm: weakref.WeakValueDictionary[Hashable, Compilation]
        self._warm = weakref.WeakValueDictionary()
        # What was given and not yet claimed by as many holders, the oldest first.
        self._given: dict[str, tuple[int, Compiled]] = {}
        self._loaded: set[type[Scheme]] = set()
        self._lock = threading.Lock()

    def compile(self, blob: bytes) -> str:
        """Starts compiling a serialized program and returns its name, SHA-256 in hex."""
        name = hashlib.sha256(blob).hexdigest()
        with self._lock:
            compiled = self._compiled.get(name)
            if compiled is None:
                compiled = self._compiled[name] = self._pool.submit(_compile, blob)
            times, _ = self._given.pop(name, (0, compiled))
            self._given[name] = (times + 1, compiled)
            if len(self._given) > MAX_GIVEN:
                del self._given[next(iter(self._given))]
        return name

    def hold(self, names: Iterable[str], kernels: Sequence[Compilation]) -> Executables:
        """What keeps programs of these names, and kernels, for whoever holds it.

        Raises:
          KeyError: no program of such a name was given, or it was freed since.
        """
        with self._lock:
            held = {name: self._compiled[name] for name in names}
            for name, compiled in held.items():
                times, _ = self._given.pop(name, (1, compiled))
                if times > 1:
                    self._given[name] = (times - 1, compiled)
        return Executables(held, kernels)

    def has(self, name: str) -> bool:
        """Whether a program of this name was given, and somebody holds it."""
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

    def load(self, scheme: type[Scheme]) -> None:
        """Starts loading a scheme's kernels, once; what fails will fail again where it is used."""
        with self._lock:
            if scheme not in self._loaded:
                self._loaded.add(scheme)
                self._pool.submit(scheme.load)

    def prepare(self, use: Hashable, function: Callable[[], object]) -> Compilation:
        """Starts compiling something else, once for each use while somebody holds it."""
        with self._lock:
            compilation = self._warm.get(use)
            if compilation is None:
                compilation = self._warm[use] = self._pool.submit(function)
        return compilation


def _compile(blob: bytes) -> Callable[..., Sequence[jax.Array]]:
    exported = jax.export.deserialize(bytearray(blob))
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in exported.in_avals]
    # Unread inputs stay arguments, so that every segment is called with what it declares.
    return jax.jit(exported.call, keep_unused=True).lower(*arguments).compile()
