"""Stand-ins for a staged tree and for Gramine's tools."""

import stat
from pathlib import Path
from typing import Any

import enclave_runtime
from enclave_runtime.gramine.staging import Staged

ROOT = Path(enclave_runtime.__file__).parent.parent


def make_tree(tree: Path, *_: Any, **__: Any) -> Staged:
    """A tree of three small files, where staging the real one takes half a minute."""
    for name in ("bin/python3", "lib/libz.so.1", "packages/enclave_runtime/__init__.pyc"):
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return Staged(modules=1, objects=2, size=100, stripped=False, ahead=False)


def script(folder: Path, name: str, body: str) -> None:
    """A tool, as a shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
