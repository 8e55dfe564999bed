"""Faults that strike a host, which is a process that this one starts: kills, cuts of its memory."""

import contextlib
import os
import pathlib
import signal
import sys
import tempfile

import numpy as np

from benchmarks.faults import child
from benchmarks.faults.child import tell, tell_saved
from benchmarks.faults.fuse import Fuse, Moment, moments
from benchmarks.faults.tally import Tally
from benchmarks.faults.training import END, STRUCK, Run, reference, reference_run, saved_steps
from benchmarks.machine import Json
from tempo_jax.errors import EnclaveDiedError, SealedValueError, SharedMemoryError

KILLED, TRUNCATED = "host killed (-9)", "shared memory truncated"


def _truncate_shared_memory() -> None:
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(entry.path).startswith("/dev/shm/tempo_jax-"):
                os.ftruncate(int(entry.name), 0)


def run_host(folder: pathlib.Path, scheme: str, fault: str, moment: Moment | None) -> None:
    """The host's process: resumes, says how it ended, and meets the next fault."""
    fuse = Fuse()
    os.fsync = fuse.watch(os.fsync)
    os.replace = fuse.watch(os.replace)
    if (folder / "reference.npz").exists():
        run = Run(folder, scheme, fuse, tell_saved)
        tell(resumed=run.count)
        run.train(END)
        tell(error=run.error(reference(folder)))
    else:
        run = reference_run(folder, scheme, fuse, tell_saved)
    tell(calls={part: len(durations) for part, durations in fuse.durations.items()})
    if moment is None:
        run.enclave.close()
        return
    run.go_back()
    run.train(STRUCK - 1)
    actions = {
        KILLED: lambda: os.kill(os.getpid(), signal.SIGKILL),
        TRUNCATED: _truncate_shared_memory,
    }
    fuse.arm(moment, actions[fault])
    try:
        run.train(END)
        run.enclave.statistics()
    except (EnclaveDiedError, SharedMemoryError, SealedValueError) as error:
        tell(refused=type(error).__name__)
        # At once: what is mapped of the truncated memory must not be touched any more.
        sys.stdout.flush()
        os._exit(0)
    tell(unnoticed=True)
    run.enclave.close()


def _start_host(
    folder: pathlib.Path, scheme: str, fault: str, moment: Moment | None
) -> tuple[int, Json, str]:
    when = [] if moment is None else [moment.part, str(moment.call), str(moment.phase)]
    return child.run(child.benchmark_command("--host", str(folder), scheme, fault, *when))


def strike(kind: str, scheme: str, counts: dict[str, int], tally: Tally) -> None:
    """Kills the host, or has it truncate the shared memory, at moments as for the enclave."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        status, told, errors = _start_host(folder, scheme, kind, None)
        if status:
            raise RuntimeError(f"the uninterrupted run failed: {errors[-2000:]}")
        fuse = Fuse()
        fuse.durations = {part: [0.0] * calls for part, calls in told["calls"].items()}
        chosen = [m for part, count in counts.items() for m in moments(fuse, part, count)]
        before: tuple[Moment, int, list[str]] | None = None
        for moment in [*chosen, None]:
            status, told, errors = _start_host(folder, scheme, kind, moment)
            if before is not None:
                struck, saved, problems = before
                if told.get("resumed") != saved:
                    problems.append(f"resumed after step {told.get('resumed')}, not {saved}")
                tally.count(struck, problems, told.get("error", np.inf))
            if moment is None:
                return
            problems = []
            ends = {KILLED: {-signal.SIGKILL}, TRUNCATED: {0, -signal.SIGBUS}}[kind]
            if status not in ends or "unnoticed" in told:
                problems.append(f"ended with {status} after {told}: {errors[-500:]}")
            saved = saved_steps(folder)
            if saved < told["saved"] or saved < STRUCK - 1:
                problems.append("lost a checkpoint")
            before = (moment, saved, problems)
