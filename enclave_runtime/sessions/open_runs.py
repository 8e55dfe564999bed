"""The runs of a session that are open, by number, and by the names that the host gave them.

A host that gave up waiting for a run to begin has not heard its number. By a name it can end that
run all the same, also one that begins only then. Trusts nothing that the host says.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator

from enclave_runtime.sessions.attempts import Attempts
from enclave_runtime.sessions.run import Run, RunError

_MAX_GIVEN_UP = 4096  # names that are remembered


class OpenRuns:
    """Admits runs, finds and ends them."""

    def __init__(self, attempts: Attempts) -> None:
        self._attempts = attempts
        self._runs: dict[int, Run] = {}
        self._names: dict[int, str] = {}
        self._given_up: collections.deque[str] = collections.deque(maxlen=_MAX_GIVEN_UP)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, number: int) -> Run:
        """The run of a number.

        Raises:
          RunError: there is none.
        """
        run = self._runs.get(number)
        if run is None:
            raise RunError("no such run: it was committed, failed or was aborted")
        return run

    def admit(self, number: int, run: Run, name: str | None = None) -> None:
        """Opens a run; see `Attempts.begin_run`.

        Raises:
          RunError: the run of this name was aborted.
        """
        with self._lock:
            if name in self._given_up:
                raise RunError("the host aborted the run before it began")
            if run.program.verify:
                self._attempts.begin_run()
            self._runs[number] = run
            if name is not None:
                self._names[number] = name

    def end(self, number: int, run: Run) -> None:
        """Forgets a run. A wrong product counts once, whichever request ends its run first."""
        with self._lock:
            known = self._runs.pop(number, None) is not None
            self._names.pop(number, None)
            lied, run.lied = run.lied, False
            if lied:
                self._attempts.count()
            if known and run.program.verify:
                self._attempts.end_run()

    def abort(self, number: int | None, name: str | None) -> None:
        """Ends the run of a number or a name, at once or when it begins."""
        with self._lock:
            if number is None and name is not None:
                number = next((n for n, of in self._names.items() if of == name), None)
                if number is None:
                    self._given_up.append(name)
            run = None if number is None else self._runs.get(number)
        # A check that is going on counts first; only then is the run's place free.
        if number is not None and run is not None:
            if run.fail(RunError("the host aborted the run")):
                self.end(number, run)

    @contextlib.contextmanager
    def failing(self, number: int) -> Iterator[Run]:
        """Gives a run, and ends it if what is inside fails.

        Raises:
          RunError: there is none of this number.
        """
        run = self[number]
        try:
            yield run
        except BaseException as error:
            if run.fail(error):
                self.end(number, run)
            raise
