"""What a plan expects of the enclave's time, against the time that its runs take.

Plans are made from rates that were measured once. Where runs take far more or less, the rates are
doubted and the user is told, once for a plan. Where the devices are the enclave's own processors,
they may take half of these from it. Untrusted in that a wrong rate makes a slow plan, never an
insecure one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from tempo_jax.planning.calibration import DISAGREES

FIRST = 2  # runs that do not count: they compile, and touch their memory for the first time
RUNS = 5  # that count
# In a shorter run the enclave is mostly busy with what no plan counts: requests and small calls.
SHORTEST = 0.01

_log = logging.getLogger("tempo_jax")


class Expectation:
    """Compares the least busy time of some runs with a plan's estimate.

    The least, since other work on the machine only adds to it.
    """

    def __init__(
        self,
        name: str,
        seconds: Callable[[], float | None],
        doubt: Callable[[], str],
        *,
        shared: bool = False,
    ):
        """Expects runs to come.

        Args:
          name: the shielded function's.
          seconds: gives those that the enclave should be busy in a run, or None if nobody knows.
          doubt: has the rates measured anew, and says what becomes of them.
          shared: whether devices work on the enclave's processors, at the same time.
        """
        self._name = name
        self._seconds = seconds
        self._doubt = doubt
        self._most = DISAGREES * (2 if shared else 1)
        self._lock = threading.Lock()
        self._taken: list[float] = []

    def ran(self, busy: float) -> None:
        """Hears how many seconds a run kept the enclave busy."""
        with self._lock:
            if len(self._taken) == FIRST + RUNS:
                return
            self._taken.append(busy)
            if len(self._taken) < FIRST + RUNS:
                return
        least, expected = min(self._taken[FIRST:]), self._seconds()
        if expected is None or expected < SHORTEST:
            return
        if expected / DISAGREES <= least <= expected * self._most:
            return
        _log.warning(
            "`%s` keeps the enclave busy for %.3g s in a run (the least of %d), where its plan "
            "expected %.3g s from this machine's rates. %s",
            self._name,
            least,
            RUNS,
            expected,
            self._doubt(),
        )
