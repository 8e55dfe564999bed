"""The rules that a production manifest has to keep; each breach is a sentence.

Pure: a parsed manifest and the staged files in, sentences out. Whoever audits a build can
apply them as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from enclave_runtime.gramine.manifest import MOUNT, TREE, argv, environment, max_threads, sha256
from enclave_runtime.gramine.staging import INTERPRETER, files_of

MAX_ENTRIES = 2000  # below it; start-up time grows faster than the number of entries
MIN_ENCLAVE_SIZE = 8 << 30
# Linux's own default. Python recurses on it, and so do XLA and LLVM while they compile, without
# looking how much is left: what overflows ends the enclave. It is the size of every thread's stack,
# since glibc takes the limit on the main thread's for the others'.
MIN_STACK_SIZE = 8 << 20
# All stacks together may take this part of the enclave, where memory is what is committed at the
# start; the rest is for libraries and values.
STACKS_OF_ENCLAVE = 1 / 2
MAX_THREADS = 4096  # MAX_DBG_THREADS of Gramine 1.9, which starts no enclave that asks for more
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# Gramine's names for settings that weaken, or that only debugging needs.
_WEAK = ("insecure__", "debug__", "experimental__")
# Settings with one right value.
_REQUIRED: dict[str, Any] = {
    "libos.entrypoint": f"{MOUNT}/{INTERPRETER}",
    "loader.argv": argv(),
    "loader.env": environment(),
    "loader.log_level": "error",
    "fs.root": {"type": "tmpfs"},
    "sys.disallow_subprocesses": True,
    "sgx.debug": False,
    "sgx.file_check_policy": "strict",
    "sgx.remote_attestation": "dcap",
}
# Settings that are judged below, or that cannot weaken anything.
_JUDGED = (
    "fs.mounts",
    "loader.entrypoint",
    "sgx.edmm_enable",
    "sgx.enclave_size",
    "sgx.isvprodid",
    "sgx.isvsvn",
    "sgx.max_threads",
    "sgx.trusted_files",
    "sys.stack",
)
# What Gramine's tools write out although nobody set it.
_DEFAULTS: dict[str, Any] = {
    "sgx.cpu_features": {
        "amx": "unspecified",
        "avx": "unspecified",
        "avx512": "unspecified",
        "mpx": "disabled",
        "pkru": "disabled",
    },
    "sgx.enable_stats": False,
    "sgx.use_exinfo": False,
}


def breaches(manifest: Mapping[str, Any], cpus: int = 1) -> list[str]:
    """What of a manifest breaks a rule, whatever files there are.

    Args:
      manifest: as `tomllib` parses it.
      cpus: of the machine that will run the enclave.

    Returns:
      Sentences; none for a sound manifest.
    """
    broken = [*_weak(manifest), *_settings(manifest)]
    if not _has_form(manifest):
        return [*broken, "fs.mounts or sgx.trusted_files is not a list of what Gramine takes"]
    return [*broken, *_mounts(manifest), *_sizes(manifest, cpus)]


def stale_files(manifest: Mapping[str, Any], directory: Path) -> list[str]:
    """How the staged tree differs from what a manifest without breaches trusts.

    Returns:
      Sentences; none if every file is listed with its hash and nothing else is.
    """
    listed = {
        uri.removeprefix("file:"): digest
        for uri, digest in _trusted(manifest)
        if uri.startswith(f"file:{TREE}/")
    }
    found = {str(path.relative_to(directory)) for path in files_of(directory / TREE)}
    out = [f"{name} lies in the tree and is not trusted" for name in sorted(found - listed.keys())]
    out += [f"{name} is trusted and missing" for name in sorted(listed.keys() - found)]
    for name in sorted(found & listed.keys()):
        path = directory / name
        if path.is_symlink():
            out.append(f"{name} is a link; the tree holds files alone")
        elif sha256(path) != listed[name]:
            out.append(f"{name} has changed since it was staged")
    return out


def _get(manifest: Mapping[str, Any], dotted: str) -> Any:
    value: Any = manifest
    for name in dotted.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


def _trusted(manifest: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    entries = _get(manifest, "sgx.trusted_files") or []
    return [(e, None) if isinstance(e, str) else (e["uri"], e.get("sha256")) for e in entries]


def _has_form(manifest: Mapping[str, Any]) -> bool:
    """Whether the lists hold what Gramine takes, so that the other rules can read them."""
    mounts, entries = _get(manifest, "fs.mounts"), _get(manifest, "sgx.trusted_files")
    return (
        isinstance(mounts, list)
        and all(isinstance(mount, Mapping) for mount in mounts)
        and isinstance(entries, list)
        and all(isinstance(e, str) or isinstance(_get(e, "uri"), str) for e in entries)
    )


def _weak(table: Any, path: str = "") -> Iterator[str]:
    if isinstance(table, Mapping):
        for name, value in table.items():
            dotted = f"{path}.{name}" if path else name
            if name.startswith(_WEAK):
                yield f"{dotted} weakens the enclave; leave it out"
            yield from _weak(value, dotted)
    elif isinstance(table, list):
        for value in table:
            yield from _weak(value, path)


def _settings(manifest: Mapping[str, Any]) -> Iterator[str]:
    for table, settings in manifest.items():
        for key, value in settings.items() if isinstance(settings, Mapping) else [("", settings)]:
            name = f"{table}.{key}".rstrip(".")
            known = name in _REQUIRED or name in _JUDGED or value == _DEFAULTS.get(name, ...)
            if not known:
                yield f"{name} is not a setting of this manifest; leave it out"
    for name, value in _REQUIRED.items():
        actual = _get(manifest, name)
        if type(actual) is not type(value) or actual != value:
            yield f"{name} is {actual!r}, expected {value!r}"


def _mounts(manifest: Mapping[str, Any]) -> Iterator[str]:
    mounts = _get(manifest, "fs.mounts") or []
    runtime = next((m.get("uri") for m in mounts if m.get("path") == "/lib"), None)
    expected = [
        {"type": "tmpfs", "path": "/tmp"},
        {"path": "/lib", "uri": runtime},
        {"path": "/lib64", "uri": runtime},
        {"path": MOUNT, "uri": f"file:{TREE}"},
        {"type": "untrusted_shm", "path": "/dev/shm", "uri": "dev:/dev/shm"},
    ]
    if mounts != expected:
        yield (
            "fs.mounts shows something else than /tmp, Gramine's runtime on /lib and /lib64, the "
            f"tree on {MOUNT} and /dev/shm, in this order"
        )
    entry = _get(manifest, "loader.entrypoint")
    loader = entry.get("uri") if isinstance(entry, Mapping) else None
    folder = runtime.removesuffix("/runtime/glibc") if isinstance(runtime, str) else None
    if folder in (None, runtime) or loader != f"{folder}/libsysdb.so":
        yield (
            f"loader.entrypoint is {entry!r}, expected the libsysdb.so of the Gramine whose "
            "runtime/glibc is mounted on /lib"
        )
    for uri, digest in _trusted(manifest):
        if ".." in uri.split("/") or not uri.startswith((f"file:{TREE}/", f"{runtime}/")):
            yield f"{uri} is trusted and belongs to neither the tree nor Gramine's runtime"
        elif uri.startswith(f"file:{TREE}/") and not _is_digest(digest):
            yield f"{uri} is trusted without a hash"


def _is_digest(text: str | None) -> bool:
    return text is not None and re.fullmatch("[0-9a-f]{64}", text) is not None


def _sizes(manifest: Mapping[str, Any], cpus: int) -> Iterator[str]:
    count = len(_trusted(manifest))
    if not 0 < count < MAX_ENTRIES:
        yield f"sgx.trusted_files has {count} entries, expected 1 to {MAX_ENTRIES - 1}"
    text = _get(manifest, "sgx.enclave_size")
    size = _bytes(text)
    if size < MIN_ENCLAVE_SIZE or size & (size - 1):
        yield f"sgx.enclave_size is {text!r}, expected a power of two of at least 8G"
    threads = _get(manifest, "sgx.max_threads")
    if type(threads) is not int or threads < max_threads(cpus):
        yield (
            f"sgx.max_threads is {threads!r}, expected at least {max_threads(cpus)} for "
            f"{cpus} processors"
        )
    elif threads > MAX_THREADS:
        yield f"sgx.max_threads is {threads}, expected at most {MAX_THREADS}, as Gramine takes"
    else:
        yield from _stacks(manifest, threads, size)


def _stacks(manifest: Mapping[str, Any], threads: int, enclave: int) -> Iterator[str]:
    settings = _get(manifest, "sys.stack")
    text = _get(manifest, "sys.stack.size")
    size = _bytes(text)
    if not isinstance(settings, Mapping) or set(settings) != {"size"} or size < MIN_STACK_SIZE:
        yield f"sys.stack is {settings!r}, expected a size of at least 8M and nothing else"
    elif threads * size > enclave * STACKS_OF_ENCLAVE:
        yield (
            f"{threads} threads (sgx.max_threads) with stacks of {text} (sys.stack.size) take more "
            "than half of the enclave; build with a larger --enclave-size or fewer --cpus"
        )


def _bytes(text: Any) -> int:
    """A size as Gramine reads it; 0 for what is none."""
    match = re.fullmatch(r"([0-9]+)([KMG]?)", text if isinstance(text, str) else "")
    return int(match[1]) * _UNITS.get(match[2], 1) if match else 0
