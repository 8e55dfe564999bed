"""Notices a worker of a mesh that does not come, and ends its run with an error that names it.

A process that is lost is noticed by `enclave.processes`; this ends the runs that it took part in.

The others wait for it inside XLA, where nobody says whom they wait for. XLA's own patience on a CPU
is 40 seconds, after which it ends the process; this comes before. One thread looks at all runs, as
long as there are any. Untrusted.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from tempo_jax.enclave.processes import WORKER_SECONDS
from tempo_jax.errors import EnclaveError

_LOOK_SECONDS = 0.5

_log = logging.getLogger("tempo_jax")


class WatchedRun(Protocol):
    """A run as the watchdog sees it."""

    def late(self, seconds: float) -> tuple[int, list[int]] | None:
        """The segment that some workers have waited at for so long, and who has not come."""

    def lost(self) -> BaseException | None:
        """What befell the processes that take part, if any of them is lost."""

    def abort(self, failure: BaseException) -> None:
        """Ends the run."""


class _Watchdog:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: set[WatchedRun] = set()
        self._awake = False

    def watch(self, run: WatchedRun) -> None:
        with self._lock:
            self._runs.add(run)
            if not self._awake:
                self._awake = True
                threading.Thread(target=self._look, name="tempo_jax watchdog", daemon=True).start()

    def unwatch(self, run: WatchedRun) -> None:
        with self._lock:
            self._runs.discard(run)

    def _look(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            with self._lock:
                runs = list(self._runs)
                if not runs:
                    self._awake = False
                    return
            for run in runs:
                failure = run.lost() or _lateness(run)
                if failure is not None:
                    _log.error("%s", failure)
                    run.abort(failure)


def _lateness(run: WatchedRun) -> EnclaveError | None:
    late = run.late(WORKER_SECONDS)
    if late is None:
        return None
    index, missing = late
    return EnclaveError(
        f"worker {', '.join(map(str, missing))} of the mesh did not come to segment {index} within "
        f"{WORKER_SECONDS:g} s of the first. Its device is stuck, or much slower than the others: "
        "look at it, or leave it out of `mesh=`."
    )


_watchdog = _Watchdog()
watch, unwatch = _watchdog.watch, _watchdog.unwatch
