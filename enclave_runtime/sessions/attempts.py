"""How often a host may try its luck against the checks of one session.

Each run that verifies, and each leaf that is held to its checksum, may bring one wrong value back.
What is going on counts as if it would, so that many at the same time are no more tries than as many
in turn. Trusts nothing; it counts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from enclave_runtime.protocol.requests import RequestError
from enclave_runtime.verifying.checksum import NotComparableError
from enclave_runtime.verifying.integrity import MAX_WRONG_PRODUCTS, WrongProductError


class Attempts:
    """Counts what came back wrong, and what still may.

    Attributes:
      wrong: values that came back wrong, in the whole session.
    """

    def __init__(self) -> None:
        self.wrong = 0
        self._runs = 0  # open ones that verify
        self._comparing = 0  # leaves that are being held to their checksums
        self._lock = threading.Lock()

    def refuse_after_lies(self) -> None:
        """Lets nothing begin that verifies once too much was wrong.

        Raises:
          WrongProductError: it was.
        """
        if self.wrong >= MAX_WRONG_PRODUCTS:
            raise WrongProductError(
                f"{self.wrong} wrong products came back in this session: it runs nothing that "
                "verifies any more. Find out which device lies, and launch a new enclave"
            )

    def begin_run(self) -> None:
        """Admits a run that verifies.

        Raises:
          WrongProductError: the host tried its luck too often.
          RequestError: too much that may still fail is going on.
        """
        with self._lock:
            self._refuse_beyond()
            self._runs += 1

    def end_run(self) -> None:
        """An admitted run has ended; what it brought back is counted by `count`, before."""
        with self._lock:
            self._runs -= 1

    def count(self) -> None:
        """Counts a wrong value."""
        with self._lock:
            self.wrong += 1

    @contextlib.contextmanager
    def comparison(self) -> Iterator[None]:
        """Admits one comparison of a leaf like a run, and counts it if it fails.

        Raises:
          WrongProductError: the host tried its luck too often.
          RequestError: too much that may still fail is going on.
        """
        with self._lock:
            self._refuse_beyond()
            self._comparing += 1
        wrong = True
        try:
            yield
            wrong = False
        except NotComparableError:
            wrong = False
            raise
        finally:
            with self._lock:
                self._comparing -= 1
                self.wrong += wrong

    def _refuse_beyond(self) -> None:
        """Bounds what came back wrong and what is going on together; under the lock."""
        self.refuse_after_lies()
        if self.wrong + self._runs + self._comparing >= MAX_WRONG_PRODUCTS:
            leaves = f", {self._comparing} leaves are being compared" if self._comparing else ""
            raise RequestError(
                f"{self._runs} runs that verify are open and {self.wrong} wrong products came "
                f"back{leaves}, together at most {MAX_WRONG_PRODUCTS}: commit or abort a run first"
            )
