"""The enclave's log: its standard error, where neither a stranger nor the host can fill a disk.

Each place in the code that logs has a budget of its own, so that whoever exhausts one hides nothing
that is said elsewhere.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings

BURST = 100  # records of one place that are written at once
SECONDS = 60.0  # until one more is
MAX_CHARACTERS = 4000  # of a record; of a longer one its beginning and its end


class RateLimit(logging.Filter):
    """Lets `BURST` records of each place through, then one in `SECONDS`."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        # By place: what is left of its budget, when that was, and how many records were left out.
        self._places: dict[tuple[str, int], tuple[float, float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written; the first one after others were not says so."""
        place, now = (record.pathname, record.lineno), time.monotonic()
        with self._lock:
            left, last, omitted = self._places.get(place, (float(BURST), now, 0))
            left = min(left + (now - last) / SECONDS, float(BURST))
            written = left >= 1
            self._places[place] = (left - written, now, 0 if written else omitted + 1)
        if written and omitted:
            record.msg = f"{record.msg} (and {omitted} like it before, left out)"
        return written


class ShortFormatter(logging.Formatter):
    """Cuts long records: what is in them may come from a peer."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text, of `MAX_CHARACTERS` and a mark at most."""
        text = super().format(record)
        if len(text) <= MAX_CHARACTERS:
            return text
        half = MAX_CHARACTERS // 2
        return f"{text[:half]} […] {text[-half:]}"


def _discard(*_: object, **__: object) -> None:
    """Shows no warning."""


def configure() -> None:
    """Has this process log to its standard error, and show no warning of a library.

    NumPy and JAX warn when a value overflows or is invalid, so a warning in the log would tell the
    host something of the data.
    """
    # NumPy's own switch, `seterr`, holds for one thread alone.
    warnings.simplefilter("ignore")
    # Whoever sets another filter later is not shown either.
    warnings.showwarning = _discard
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ShortFormatter("enclave: %(message)s"))
    handler.addFilter(RateLimit())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
