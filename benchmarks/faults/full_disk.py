"""The disk is full: a checkpoint finds too little room, and the one before stays as it was."""

import contextlib
import errno
import pathlib
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.faults import child
from benchmarks.faults.child import tell, tell_saved
from benchmarks.faults.tally import Tally
from benchmarks.faults.training import BASE, Run
from tempo_jax.sealing import ledger

FULL = "disk full at checkpoint"
PAGE = 4096  # bytes of a tmpfs block


def run_host(folder: pathlib.Path, limit: int | None) -> None:
    """The host's process on a small disk: takes a step, cannot save it, and resumes.

    Args:
      folder: holds a checkpoint; on a file system with too little room for a second one.
      limit: instead of that, the most bytes that a file may have.
    """
    before = (folder / "state").read_bytes()
    run = Run(folder, "mixing", on_saved=tell_saved)
    started = run.count
    try:
        with _limited_files(limit):
            run.train(started + 1)
    except OSError as error:
        tell(refused=errno.errorcode[error.errno or 0])
    tell(kept=(folder / "state").read_bytes() == before)
    tell(rest=sorted(p.name for p in folder.iterdir()))
    run.enclave.close()
    run = Run(folder, "mixing")
    tell(resumed=run.count - started)
    run.enclave.close()


@contextlib.contextmanager
def _limited_files(limit: int | None) -> Iterator[None]:
    """The most bytes that a file written now may have (`RLIMIT_FSIZE`)."""
    if limit is None:
        yield
        return
    write = ledger.write

    def limited(path: Any, data: bytes) -> None:
        # Only around the write: shared memory consists of files, too.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            write(path, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)

    ledger.write = limited
    try:
        yield
    finally:
        ledger.write = write


def may_mount() -> bool:
    """Whether this user may mount a small file system in a name space of its own."""
    command = ["unshare", "-r", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/tmp"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


def fill(count: int, tally: Tally, mount: bool) -> None:
    """Lets a checkpoint find too little room, by various amounts."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "full"
        folder.mkdir()
        run = Run(folder, "mixing")
        run.train(BASE)
        run.enclave.close()
        used = sum(-(-p.stat().st_size // PAGE) for p in folder.iterdir())
        needed = -(-(folder / "state").stat().st_size // PAGE)
        shutil.copytree(folder, pathlib.Path(name) / "copy")
        for room in np.linspace(0, needed - 1, count).round().astype(int):
            options = ["--disk", str(folder)]
            if mount:
                size = (used + int(room)) * PAGE
                script = (
                    f'mount -t tmpfs -o size={size} tmpfs "$1" && cp "$2"/* "$1" && '
                    'shift 2 && exec "$@"'
                )
                command = ["unshare", "-r", "-m", "sh", "-ec", script, "sh", str(folder)]
                command += [str(pathlib.Path(name) / "copy"), *child.benchmark_command(*options)]
            else:
                command = child.benchmark_command(*options, str(int(room) * PAGE))
            status, told, errors = child.run(command)
            expected = {
                "refused": "ENOSPC" if mount else "EFBIG",
                "kept": True,
                "rest": ["key", "ledger.json", "state"],
                "resumed": 0,
            }
            fits = status == 0 and {k: told.get(k) for k in expected} == expected
            problems = [] if fits else [f"{status}, {told}: {errors[-500:]}"]
            tally.count(f"room for {room} of {needed} pages", problems)
