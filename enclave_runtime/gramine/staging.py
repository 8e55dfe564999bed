"""Copies what the enclave needs, and nothing else, into a tree of its own.

The tree is a relocatable Python: ``bin/python3``, ``lib/`` with the shared libraries that are not
glibc's (Gramine brings its own), ``lib/python3.N/`` with the standard library, and ``packages/``.
Modules are compiled beforehand and staged without their source: half as many files to trust, and
nothing to compile or to compare at start-up. So are the kernels (`ahead_of_time`), where binutils'
`ld` is there: Numba and its LLVM, a quarter of all bytes, are then no part of the tree. Elsewhere
they are, and compile the kernels in the enclave's own memory: without a source file to stamp, Numba
caches no machine code.

What goes in: every file that `closure` saw loaded, and with each module its siblings in the same
directory, because what a package imports late is nearly always a neighbour; small packages go in
whole. Left out are tests, GUI parts and packages that the enclave only could use. Shared objects
go in if they were loaded, and Python's own extension modules.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import py_compile
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from enclave_runtime.compiled import kernel
from enclave_runtime.crypto.encryption import SECRET_BYTES
from enclave_runtime.environment import ENCLAVE_ENVIRONMENT, ENCLAVE_MODULE
from enclave_runtime.gramine import ahead_of_time

# What the enclave imports besides Python itself, or kernels are compiled with; each has to be
# installed.
PACKAGES = (
    ENCLAVE_MODULE,
    "_cffi_backend",
    "cryptography",
    "flatbuffers",
    "jax",
    "jaxlib",
    "llvmlite",
    "ml_dtypes",
    "numba",
    "numpy",
    "opt_einsum",
    "scipy",
    "typing_extensions",
)

# What only compiles kernels.
COMPILER = ("llvmlite", "numba")

# Taken whole: small, and they import their own parts on use, some only in rare cases.
WHOLE_PACKAGES = ("cryptography", "flatbuffers", "ml_dtypes", "opt_einsum")

# Options of the interpreter: no `site`, no user's packages, nothing from the current directory,
# no bytecode written, UTF-8 whatever the locale.
PYTHON_OPTIONS = ("-S", "-s", "-P", "-B", "-X", "utf8")

INTERPRETER = "bin/python3"
LIBRARIES = "lib"
PACKAGE_FOLDER = "packages"

# Bytes from which on a shared object's symbols are worth taking off: nothing loads them, and every
# byte is hashed at start-up. Small ones stay as they are, since `strip` breaks files of wheels
# whose paths were patched in (those below `numpy.libs`, for example).
STRIPPED_BYTES = 64 << 20

# Siblings that no enclave wants: tests, GUI, tools for developers. Loaded modules go in anyway.
_UNWANTED = re.compile(
    r"test_.*|.*_test|tests?|testing|conftest|_?tkinter|turtle|turtledemo|idlelib|lib2to3|ensurepip"
    r"|venv|pydoc|pydoc_data|distutils|setup|antigravity|this|pdb|cProfile|profile|pstats|trace"
    r"|webbrowser|doctest|smtpd|imaplib|nntplib|poplib|ftplib|telnetlib|cgi|cgitb"
    r"|_test.*|_xx.*|xx.*|_ctypes_test|_curses.*|_sqlite3|_g?dbm|_crypt|readline|nis|ossaudiodev"
)
# Of glibc, which Gramine replaces by its own.
_GLIBC = re.compile(
    r"(ld-linux.*|lib(c|m|mvec|dl|rt|pthread|util|resolv|anl|nsl|BrokenLocale|thread_db|nss_.*))"
    r"\.so(\.\d+)?"
)


class StagingError(Exception):
    """A tree that cannot be made here; the text says what is missing."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the running interpreter and its packages lie.

    Attributes:
      interpreter: the executable itself, not a virtual environment's link to it.
      stdlib: the folder of the standard library.
      roots: folders that hold `PACKAGES`, in the order in which they are searched.
    """

    interpreter: Path
    stdlib: Path
    roots: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Staged:
    """What a tree holds.

    Attributes:
      modules: compiled modules.
      objects: shared objects and the interpreter.
      size: of all files, in bytes.
      stripped: whether symbols that nothing loads were taken off shared objects.
      ahead: whether the kernels were compiled ahead of time, and their compiler left out.
    """

    modules: int
    objects: int
    size: int
    stripped: bool
    ahead: bool

    @property
    def files(self) -> int:
        """How many files there are."""
        return self.modules + self.objects


def find_source() -> Source:
    """Looks at the running interpreter.

    Raises:
      StagingError: a package is not installed.
    """
    roots: dict[Path, None] = {}
    missing = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            missing.append(package)
            continue
        origin = Path(spec.origin).resolve()
        roots[origin.parent.parent if spec.submodule_search_locations else origin.parent] = None
    if missing:
        raise StagingError(
            f"cannot find {', '.join(missing)}: install tempo-jax with its dependencies into the "
            f"Python that builds ({sys.executable}), or name another one with --python"
        )
    stdlib = Path(sysconfig.get_paths()["stdlib"]).resolve()
    return Source(Path(sys.executable).resolve(), stdlib, tuple(roots))


def enclave_environment(tree: Path | str) -> dict[str, str]:
    """The variables that the interpreter of a tree is started with.

    Args:
      tree: where the enclave sees the tree.
    """
    return {
        **ENCLAVE_ENVIRONMENT,
        "HOME": "/tmp",
        "JAX_PLATFORMS": "cpu",
        "PYTHONHOME": str(tree),
        "PYTHONPATH": f"{tree}/{PACKAGE_FOLDER}",
    }


def stage(tree: Path, source: Source | None = None, *, strip: bool = True) -> Staged:
    """Makes the tree.

    Args:
      tree: a folder that does not exist yet.
      source: what to copy; by default what the running interpreter has.
      strip: take symbols off large shared objects where binutils' `strip` is there.

    Raises:
      StagingError: something is missing, or what was staged does not start.
    """
    source = source or find_source()
    tool = shutil.which("strip") if strip else None
    with tempfile.TemporaryDirectory() as folder:
        kernels = compile_kernels(source, Path(folder) / kernel.LIBRARY.name)
        found = _trace(source, kernels)
        modules = {path for path in _with_siblings(source, map(Path, found["files"]))}
        loaded = [Path(path) for path in found["objects"] if path != str(kernels)]
        objects = _objects(source, loaded)
        if kernels is not None:
            place = _place(source, kernel.LIBRARY.resolve())
            assert place is not None  # the enclave's own package is among the roots
            objects[place] = kernels
        tree.mkdir(parents=True)
        for path in sorted(modules):
            _compile(source, tree, path)
        for target, path in sorted(objects.items()):
            _copy(path, tree / target, tool)
    _copy(source.interpreter, tree / INTERPRETER, None, mode=0o755)
    probe(tree)
    sizes = [path.stat().st_size for path in files_of(tree)]
    return Staged(len(modules), len(objects) + 1, sum(sizes), tool is not None, kernels is not None)


def files_of(tree: Path) -> list[Path]:
    """Every file below a folder, sorted by its path."""
    return sorted(path for path in tree.rglob("*") if not path.is_dir())


def command(tree: Path | str, *arguments: str) -> list[str]:
    """What runs the tree's interpreter, with the enclave's options."""
    return [f"{tree}/{INTERPRETER}", *PYTHON_OPTIONS, *arguments]


def host_environment(tree: Path) -> dict[str, str]:
    """The enclave's variables for running the tree as an ordinary process of this machine."""
    # Gramine finds the libraries through a variable too; see the manifest template.
    return {**enclave_environment(tree), "LD_LIBRARY_PATH": str(tree / LIBRARIES)}


def probe(tree: Path) -> None:
    """Starts the enclave from the tree alone, as an ordinary process without a parent.

    Raises:
      StagingError: it does not come up; the text ends with the reason.
    """
    run = subprocess.run(
        command(tree, "-m", ENCLAVE_MODULE),
        # It reads a secret, is up, finds that the pipe has ended, and ends.
        input=secrets.token_hex(SECRET_BYTES) + "\n",
        env=host_environment(tree),
        cwd="/",
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise StagingError(f"the staged enclave does not start:\n{run.stderr[-2000:]}")


def compile_kernels(source: Source, output: Path) -> Path | None:
    """Compiles the kernels ahead of time; None where there is no linker."""
    linker = shutil.which("ld")
    if linker is None:
        return None
    request = {"output": str(output), "linker": linker}
    _run_script(source, ahead_of_time.__file__, request, ahead_of_time.environment())
    return output


def _trace(source: Source, kernels: Path | None) -> dict[str, list[str]]:
    packages = [name for name in PACKAGES if kernels is None or name not in COMPILER]
    request = {"packages": packages, "kernels": kernels and str(kernels)}
    script = Path(__file__).with_name("closure.py")
    return json.loads(_run_script(source, str(script), request, {}))


def _run_script(
    source: Source, script: str, request: dict[str, Any], variables: dict[str, str]
) -> str:
    """Runs a script of this folder in an interpreter of its own; gives what it prints."""
    environment = {
        name: value
        for name, value in enclave_environment("").items()
        if not name.startswith("PYTHON")
    }
    run = subprocess.run(
        [str(source.interpreter), *PYTHON_OPTIONS, script],
        input=json.dumps({"roots": [str(root) for root in source.roots], **request}),
        env={**environment, **variables},
        cwd="/",
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise StagingError(
            f"the enclave's modules cannot be loaded or compiled:\n{run.stderr[-2000:]}"
        )
    return run.stdout


def _with_siblings(source: Source, files: Iterable[Path]) -> Iterator[Path]:
    folders = set()
    for path in files:
        yield path
        folders.add(path.parent)
    for folder in folders - set(source.roots):
        for path in folder.glob("*.py"):
            if not _UNWANTED.fullmatch(path.stem):
                yield path
    for root in source.roots:
        for package in WHOLE_PACKAGES:
            for path in (root / package).rglob("*.py"):
                parts = path.relative_to(root).with_suffix("").parts
                if not any(_UNWANTED.fullmatch(part) for part in parts):
                    yield path


def _place(source: Source, path: Path) -> Path | None:
    """Where a file goes in the tree; None if it is neither Python's nor a package's."""
    # Packages first: some Pythons keep them below the standard library.
    for root in source.roots:
        if path.is_relative_to(root):
            return Path(PACKAGE_FOLDER) / path.relative_to(root)
    if path.is_relative_to(source.stdlib):
        return Path(LIBRARIES) / source.stdlib.name / path.relative_to(source.stdlib)
    return None


def _compile(source: Source, tree: Path, path: Path) -> None:
    place = _place(source, path)
    if place is None:
        raise StagingError(f"{path} was loaded from outside Python and its packages")
    place = place.with_suffix(".pyc")
    target = tree / place
    target.parent.mkdir(parents=True, exist_ok=True)
    # The path in tracebacks is relative, so that the same source gives the same bytes anywhere.
    py_compile.compile(
        str(path),
        str(target),
        dfile=str(place.with_suffix(".py")),
        doraise=True,
        optimize=0,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    target.chmod(0o644)


def _objects(source: Source, loaded: Sequence[Path]) -> dict[Path, Path]:
    """Where each shared object goes, by its place in the tree."""
    objects = {}
    extensions = [
        path
        for path in source.stdlib.glob("lib-dynload/*.so")
        if not _UNWANTED.fullmatch(path.name.partition(".")[0])
    ]
    for path in [*loaded, *extensions]:
        place = _place(source, path)
        if place is not None:
            objects[place] = path
    for name, path in _needed([source.interpreter, *objects.values()]).items():
        resolved = path.resolve()
        if not _GLIBC.fullmatch(name) and _place(source, path) is None:
            objects[Path(LIBRARIES) / name] = resolved
    known = {path.resolve() for path in objects.values()}
    for path in loaded:
        # Opened at run time, so that nothing names it as needed.
        if path.resolve() not in known and not _GLIBC.fullmatch(path.name):
            objects[Path(LIBRARIES) / path.name] = path
    return objects


def _needed(binaries: Sequence[Path]) -> dict[str, Path]:
    """The libraries that binaries name as needed, with what the loader takes for each name."""
    run = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True)
    # A library of a wheel may count on another one that was loaded with it before.
    missing = set(re.findall(r"^\s*(\S+) => not found", run.stdout, re.MULTILINE))
    missing -= {path.name for path in binaries}
    if missing:
        raise StagingError(f"shared libraries are missing: {', '.join(sorted(missing))}")
    found = re.findall(r"^\s*(\S+) => (/\S+)", run.stdout, re.MULTILINE)
    return {os.path.basename(name): Path(path) for name, path in found}


def _copy(path: Path, target: Path, strip: str | None, mode: int = 0o644) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    target.chmod(mode)
    if strip is not None and target.stat().st_size >= STRIPPED_BYTES:
        # A file that cannot be stripped stays as it is.
        subprocess.run([strip, "--strip-unneeded", str(target)], capture_output=True)
