"""Kernels: functions of arrays, compiled ahead of time or by Numba when they are first called.

A staged enclave holds their machine code in a shared library beside this module, compiled by
whoever built the tree, measured with it, and called through `ctypes`: neither Numba nor LLVM's
Python package is part of it then. Elsewhere Numba compiles and caches in the way of `njit`.

A kernel takes arrays, integers, and named tuples of these, returns nothing and writes into its
arrays. In the library it is one C function, ``int32 (const int64 words[])``, named after the
kernel and its arguments' types. Words are the fields of the arguments in order: an integer is
one; an array of d axes is 5 + 2 d, two zeros (Numba's owner and Python's), size, bytes of an
element, address, shape and strides in bytes. The result is 0, or the status that Numba's
convention has for a raised exception.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import operator
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LIBRARY = Path(__file__).with_name("kernels.so")
# What the library is compiled for: processors with AVX2, as all that have SGX with DCAP are. Named
# as LLVM and the x86-64 psABI name it, with the features by which Linux's /proc/cpuinfo shows it.
PROCESSOR = "x86-64-v3"
_FEATURES = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_CPUINFO = Path("/proc/cpuinfo")


class KernelError(Exception):
    """A kernel that cannot run here, or that failed."""


class Kernel:
    """A function that is compiled before it runs; calls release the GIL.

    Attributes:
      module: where it is defined, for Numba.
      name: under which.
    """

    # Every kernel there is, in the order of definition: what is compiled ahead of time.
    known: list[Kernel] = []

    def __init__(self, module: str, name: str):
        """Names a function that is decorated with `compiled`; it is not imported yet."""
        self.module, self.name = module, name
        self._entries: dict[tuple[str, ...], Any] = {}
        Kernel.known.append(self)

    def __repr__(self) -> str:
        return f"Kernel({self.name})"

    def __call__(self, *arguments: Any) -> None:
        """Runs it.

        Raises:
          KernelError: it was not compiled for arguments of these types, or it failed.
        """
        library = _library()
        if library is None:
            self.dispatcher(*arguments)
            return
        types: list[str] = []
        words: list[int] = []
        for argument in arguments:
            _flatten(argument, types, words)
        entry = self._entries.get(key := tuple(types))
        if entry is None:
            entry = self._entries[key] = self._find(library, symbol(self.name, types))
        if entry((ctypes.c_int64 * len(words))(*words)):
            raise KernelError(f"{self.name} failed")

    @functools.cached_property
    def dispatcher(self) -> Any:
        """What Numba makes of the function."""
        return getattr(importlib.import_module(self.module), self.name)

    def _find(self, library: ctypes.CDLL, name: str) -> Any:
        try:
            entry = getattr(library, name)
        except AttributeError:
            raise KernelError(
                f"{name} is not among the kernels in {library._name}: build the enclave again"
            ) from None
        entry.restype = ctypes.c_int32
        return entry


def symbol(name: str, types: list[str]) -> str:
    """The library's name for a kernel with arguments of these types."""
    return ".".join([name, *types])


def array_type(dtype: np.dtype, axes: int) -> str:
    """How `symbol` names an array."""
    return f"{dtype.str.removeprefix('<')}x{axes}"


INTEGER = "i"  # how it names an integer


def _flatten(argument: Any, types: list[str], words: list[int]) -> None:
    if isinstance(argument, np.ndarray):
        if not (argument.flags.c_contiguous and argument.flags.aligned):
            raise KernelError("a kernel takes arrays that are C-contiguous and aligned")
        types.append(array_type(argument.dtype, argument.ndim))
        words += (0, 0, argument.size, argument.itemsize, argument.ctypes.data)
        words += argument.shape
        words += argument.strides
    elif isinstance(argument, tuple):
        for part in argument:
            _flatten(part, types, words)
    else:
        types.append(INTEGER)
        words.append(operator.index(argument))


_loading = threading.Lock()


def _library() -> ctypes.CDLL | None:
    """The library that was compiled ahead of time; None where there is none."""
    with _loading:
        return _loaded(LIBRARY)


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL | None:
    if not path.exists():
        return None
    try:
        flags = _CPUINFO.read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        flags = []
    missing = sorted(_FEATURES.difference(flags))
    if missing:
        raise KernelError(
            f"the kernels were compiled for {PROCESSOR}, and this processor lacks "
            f"{', '.join(missing)}: run the enclave on another machine"
        )
    return ctypes.CDLL(str(path))


def compiled(function: Callable[..., Any]) -> Any:
    """Has Numba compile a function, which may call others that are so decorated.

    The machine code is cached next to the source, or in the user's cache directory, and
    compiled again in each process where neither can be written. A cache is code: where
    the host can write to it, it must lie outside of what the enclave reads.
    """
    import numba

    options: dict[str, Any] = {
        "nogil": True,
        # Division as in NumPy: a check for zero would keep loops from being vectorized.
        "error_model": "numpy",
        # Without Numba's runtime, which counts references to arrays: kernels make none, and their
        # machine code then needs nothing but itself.
        "_nrt": False,
    }
    try:
        return numba.njit(**options, cache=True)(function)
    except RuntimeError:  # Numba found no directory that it can write to.
        return numba.njit(**options)(function)
