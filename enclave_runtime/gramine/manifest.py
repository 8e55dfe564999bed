"""Renders the Gramine manifest of a staged tree.

The template in this folder is in Gramine's own format. What the tree decides is filled in here;
`gramine.libos` and `gramine.runtimedir()` belong to the Gramine installation: its own
`gramine-manifest` fills them in where it is installed, and elsewhere `render` does from a path that
the caller names.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from enclave_runtime.environment import ENCLAVE_MODULE
from enclave_runtime.gramine.staging import (
    INTERPRETER,
    LIBRARIES,
    PYTHON_OPTIONS,
    enclave_environment,
    files_of,
)
from enclave_runtime.protocol.limits import CONNECTIONS

TREE = "tree"  # the staged tree's folder beside the manifest
MOUNT = "/enclave"  # where the enclave sees it
APPLICATION = "enclave"  # Gramine's name of what it runs: enclave.manifest, enclave.sig
TEMPLATE = f"{APPLICATION}.manifest.template"
MANIFEST = f"{APPLICATION}.manifest"

# Where Debian's and Ubuntu's packages of Gramine put it.
GRAMINE_FOLDER = "/usr/lib/x86_64-linux-gnu/gramine"

ENCLAVE_SIZE = "8G"
_GRAMINE = re.compile(r"\{\{\s*(gramine\.[a-z.()]+)\s*\}\}")


def max_threads(cpus: int) -> int:
    """How many threads the enclave may need on a machine with so many processors.

    >>> max_threads(2)
    199
    """
    return 16 + 3 + 4 * cpus + 4 + CONNECTIONS


def environment() -> dict[str, str]:
    """Every variable that the enclave sees, with its value."""
    return {**enclave_environment(MOUNT), "LD_LIBRARY_PATH": f"/lib:{MOUNT}/{LIBRARIES}"}


def argv() -> list[str]:
    """The enclave's command line."""
    return [os.path.basename(INTERPRETER), *PYTHON_OPTIONS, "-m", ENCLAVE_MODULE]


def sha256(path: Path) -> str:
    """A file's hash, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_part(
    directory: Path,
    *,
    enclave_size: str = ENCLAVE_SIZE,
    cpus: int | None = None,
    product_id: int = 1,
    svn: int = 1,
) -> str:
    """Fills in all of the template but what belongs to Gramine's installation.

    Args:
      directory: holds the staged tree in `TREE`.
      enclave_size: a power of two, as ``8G``.
      cpus: of the machine that will run the enclave; by default as many as this one's.
      product_id: number of the product for clients that pin the signer.
      svn: its security version.

    Returns:
      A template that `gramine-manifest` and `render` take.
    """
    cpus = cpus or os.cpu_count() or 1
    paths = [path.relative_to(directory) for path in files_of(directory / TREE)]
    entries = [f'  {{ uri = "file:{p}", sha256 = "{sha256(directory / p)}" }},' for p in paths]
    # The folder of Gramine's own libc; its tools hash what is in it.
    entries.append('  "file:{{ gramine.runtimedir() }}/",')
    variables = {
        "mount": MOUNT,
        "tree": TREE,
        "interpreter": INTERPRETER,
        "argv": json.dumps(argv()),
        "environment": "\n".join(
            f"loader.env.{name} = {json.dumps(value)}" for name, value in environment().items()
        ),
        "product_id": str(product_id),
        "svn": str(svn),
        "enclave_size": enclave_size,
        "cpus": str(cpus),
        "connections": str(CONNECTIONS),
        "max_threads": str(max_threads(cpus)),
        "count": str(len(entries)),
        "trusted_files": "\n".join(entries),
    }
    return _filled(Path(__file__).with_name(TEMPLATE).read_text(), variables)


def render(template: str, gramine: Path | str = GRAMINE_FOLDER) -> str:
    """Fills in where Gramine lies, as `gramine-manifest` would where it is not installed.

    Args:
      template: what `own_part` gave.
      gramine: the folder with `libsysdb.so` and `runtime/glibc` on the machine that will sign.
    """
    variables = {
        "gramine.libos": f"{gramine}/libsysdb.so",
        "gramine.runtimedir()": f"{gramine}/runtime/glibc",
    }
    return _GRAMINE.sub(lambda match: variables[match[1]], template)


def _filled(template: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1]
        return match[0] if name.startswith("gramine.") else variables[name]

    return re.sub(r"\{\{\s*([a-z_.()]+)\s*\}\}", value, template)
