"""Finds which files the enclave loads, by doing what it does and looking at what was loaded.

A script: `staging` runs it in an interpreter started as in the enclave (without `site`), with
what it may import on its standard input, and reads from its standard output the Python files and
shared objects that were loaded. A package that is neither Python's own nor on the list
cannot be imported, as it could not in the staged tree: optional dependencies stay out.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import pkgutil
import socket
import ssl
import sys
import threading
import types
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any


class Only(importlib.abc.MetaPathFinder):
    """Finds modules as Python does, except in top-level packages that are not named."""

    def __init__(self, packages: Sequence[str]):
        """Lets `packages` and Python's own modules be found."""
        self._allowed = {*packages, *sys.stdlib_module_names}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """What Python would find, or None."""
        top = fullname.partition(".")[0]
        # The standard library's record of how Python was built has the platform in its name.
        if top in self._allowed or top.startswith("_sysconfigdata_"):
            return importlib.machinery.PathFinder.find_spec(fullname, path, target)
        return None


def exercise(kernels: str | None) -> None:
    """Imports all of the enclave and takes every path that may import something late.

    Args:
      kernels: the library of kernels that were compiled ahead of time; None has Numba compile them.
    """
    import jax

    from enclave_runtime.compiled import kernel

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    left_out = ["enclave_runtime.gramine"]
    if kernels is not None:
        left_out.append("enclave_runtime.compiled.definitions")
        kernel.LIBRARY = Path(kernels)
    _import_all("enclave_runtime", left_out)
    import jax.export
    import jax.numpy as jnp

    from enclave_runtime.execution import timing
    from enclave_runtime.execution.executor import Executor

    # Keys, kernels and both directions of every scheme.
    timing.measure()

    def program(x: jax.Array) -> Any:
        key = jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32))
        noise = jax.random.normal(key, x.shape, x.dtype)
        singular = jnp.linalg.svd(x, compute_uv=False)
        return jnp.sort(x + noise), singular, jnp.fft.fft(x[0]).real, jax.nn.gelu(x)

    exported = jax.export.export(jax.jit(program))(jax.ShapeDtypeStruct((4, 4), jnp.float32))
    executor = Executor()
    name = executor.compile(bytes(exported.serialize()))
    executor.hold([name], ()).run(name, [jnp.ones((4, 4), jnp.float32)])
    _shake_hands()
    "localhost".encode("idna")  # the codec that looks up hosts


def _shake_hands() -> None:
    """A client connects: a certificate with evidence is made and sent."""
    from enclave_runtime.protocol import handshake
    from enclave_runtime.protocol.wire import NONCE_BYTES
    from enclave_runtime.serving.tls import ServerIdentity

    outside, inside = socket.socketpair()
    server = ServerIdentity().context()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE

    def accept() -> None:
        with server.wrap_socket(inside, server_side=True) as connection:
            connection.recv(1)

    thread = threading.Thread(target=accept)
    thread.start()
    name = handshake.server_name(bytes(NONCE_BYTES))
    with client.wrap_socket(outside, server_hostname=name) as connection:
        connection.sendall(b"x")
    thread.join()


def _import_all(package: str, left_out: Collection[str]) -> None:
    """Imports a package's modules, without those that only build the enclave."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        name = f"{package}.{module.name}"
        # The entry point is imported too: under this name it does not serve.
        if name in left_out:
            continue
        if module.ispkg:
            _import_all(name, left_out)
        else:
            importlib.import_module(name)


def loaded() -> dict[str, list[str]]:
    """The Python files and the shared objects that this process has loaded."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[-1].rstrip("\n") for line in maps if "/" in line}
    objects = {path for path in mapped if ".so" in os.path.basename(path)}
    own = os.path.abspath(__file__)
    return {
        "files": sorted(f for f in files if f and f.endswith(".py") and f != own),
        "objects": sorted(objects),
    }


if __name__ == "__main__":
    request = json.load(sys.stdin)
    sys.path.extend(request["roots"])
    finders = sys.meta_path
    finders[finders.index(importlib.machinery.PathFinder)] = Only(request["packages"])
    exercise(request["kernels"])
    json.dump(loaded(), sys.stdout)
