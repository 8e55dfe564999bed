"""One enclave for all processes of `jax.distributed`, each of which runs the same program.

As everywhere in JAX with several processes, all of them make the same calls in the same order. The
first process (`jax.process_index() == 0`) leads: it launches or attaches to the enclave, its values
are those that are sealed, and it begins the runs and frees what nobody holds. The others hold
stand-ins, join each run by its number and bring and get their devices' parts on lines of their own
(`Kind.JOIN`, `Kind.SEGMENT`). The enclave commits a run when every process asks for that, so a run
counts for all of them or for none.

Every process gives the enclave a sign of life each second and hears how long the others gave none
(`Kind.BEAT`). One that died, was stopped or is cut off is so noticed by all others, whatever they
wait for, and ends the run. JAX's own runtime cannot go on without a process; training goes on in
new processes, as many as are left, from the last checkpoint.

What the processes say to each other goes through the store of `jax.distributed`: where the enclave
listens, what its work costs, and for each call the run's number with the digest of its program, by
which a process notices that it calls something else. The key of the host's port is among it. It
keeps other users of the machine off the port and protects nothing from the host, and a host can
read everything in that store anyway. Untrusted; holds no key of the session.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import logging
import math
import os
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import jax

from enclave_runtime.protocol.wire import Kind
from tempo_jax.errors import EnclaveError, EnclaveTimeoutError, TempoError
from tempo_jax.jaxprs import cluster
from tempo_jax.transport.loopback import HERE, Loopback

WORKER_SECONDS = 30.0  # that a worker of a run may come later than the first
PATIENCE_SECONDS = 7.0  # without a sign of life, after which a process is lost
_BEAT_SECONDS = 1.0  # between signs of life
LOOK_SECONDS = 0.5  # between looks for Ctrl-C while another process is waited for
# Follows the sentence that says who does what.
_TOGETHER = (
    "All processes make the same calls in the same order. A state of which each has a part "
    "(`shard_weights=True`) they open, copy and save together: leave out the "
    "`if jax.process_index() == 0:` around that call, which gives the first process what it gives"
)

_groups = itertools.count()


class Processes:
    """The processes that share an enclave.

    Attributes:
      index: this one's number.
      count: how many there are.
      failure: why they cannot go on together, if so.
      broken: whether that is a process that does nothing more, for which JAX would wait.
    """

    def __init__(self, patience: float = PATIENCE_SECONDS) -> None:
        """Forms the group; every process does so, the same number of times."""
        self._failed = threading.Event()
        self.failure: TempoError | None = None
        self.broken = False
        self._at, self._since = (0, 0), time.monotonic()
        self._patience = patience
        self._heard = time.monotonic()  # when the enclave last answered
        self._silence = 0.0  # of the process that gave no sign of life for longest, in seconds
        self._lines: Loopback | None = None
        self._ended = threading.Event()
        self.index = jax.process_index()
        self.count = jax.process_count()
        self._folder = f"tempo_jax/{next(_groups)}"
        self._calls = itertools.count()
        self._call = ""  # where this call is told of
        self._written: list[str] = []

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.index == 0

    def __repr__(self) -> str:
        return f"process {self.index} of {self.count}"

    # Signs of life

    def watch(self, lines: Loopback, group: str) -> None:
        """Gives signs of life, and looks for those of the others, until `leave`."""
        self._lines, self._group, self._heard = lines, group, time.monotonic()
        threading.Thread(target=_beat, args=(weakref.ref(self),), daemon=True).start()
        atexit.register(_leave_at_exit, weakref.ref(self))

    def leave(self) -> None:
        """Says that this process goes, so that nobody waits for it.

        The first process, with which a launched enclave and JAX's coordinator end, lets the others
        notice and go first.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        patience = _BEAT_SECONDS * 3 + (self._patience if self.broken else 0)
        end = time.monotonic() + patience
        with contextlib.suppress(TempoError):
            found = self._exchange(leaves=1)
            while self.leads and time.monotonic() < end and not self._are_alone(found):
                time.sleep(LOOK_SECONDS)
                found = self._exchange(leaves=1)

    def _are_alone(self, found: dict[str, Any]) -> bool:
        present = {int(p) for p, seconds in found["silent"].items() if seconds < self._patience}
        return present <= {*found["left"]}

    def end_alone(self) -> NoReturn:
        """Ends this process with status 1, where JAX's own exit would wait minutes for the lost."""
        self.leave()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)

    def check(self) -> None:
        """Refuses to go on without a process that is lost.

        Raises:
          TempoError: one is.
        """
        if self.failure is not None:
            raise self.failure

    def explain(self, error: BaseException) -> BaseException:
        """What is behind an error: a process that is lost, should that turn out in time."""
        if isinstance(error, (EnclaveError, jax.errors.JaxRuntimeError)):
            # A collective breaks at once where a process is gone, and a run ends for all when the
            # first of them fails, be it for that reason.
            began = time.monotonic()
            while not self._failed.wait(LOOK_SECONDS) and self._may_find(error, began):
                pass
        return self.failure or error

    def _may_find(self, error: BaseException, began: float) -> bool:
        """Whether a process may yet turn out to be lost, an error after it was raised."""
        waited = time.monotonic() - began
        if waited > self._patience + 2 * _BEAT_SECONDS:
            return False
        told = isinstance(error, EnclaveError)  # by the enclave, that a run ended
        return not told or waited < 3 * _BEAT_SECONDS or self._silence > 2 * _BEAT_SECONDS

    def came_to(self, run: int, segment: int) -> None:
        """Notes how far this process is: the segment that all its workers have come to."""
        self._at, self._since = (run, segment + 1), time.monotonic()

    def _exchange(self, leaves: int = 0) -> dict[str, Any]:
        assert self._lines is not None
        fields = {"group": self._group, "process": self.index, "leaves": leaves}
        run, segment = self._at
        fields |= {"run": run, "segment": segment}
        # As long as the others wait for this one: since it last heard anything.
        left = self._heard + self._patience - time.monotonic()
        found = self._lines.request(Kind.BEAT, fields, seconds=max(left, _BEAT_SECONDS))
        self._heard = time.monotonic()
        return found

    def _look(self) -> None:
        """Gives a sign of life, and finds out who gives none."""
        try:
            found = self._exchange()
        except TempoError as error:
            # Cut off, or the enclave stands still: JAX would wait for its coordinator, beside it.
            away = self._lines is not None and self._lines.host != HERE
            self.broken = self.broken or away or isinstance(error, EnclaveTimeoutError)
            self._fail(error)
            return
        left = [p for p in found["left"] if p != self.index]
        seconds = {int(p): s for p, s in found["silent"].items() if int(p) not in left}
        self._silence = max(seconds.values(), default=0.0)
        lost = {p: s for p, s in seconds.items() if s > self._patience}
        # Only while a run goes on: all of them are in it, or it has not begun.
        behind = [int(p) for p, at in found["at"].items() if self._is_ahead_of(at)]
        if lost:
            self.broken = True
            named = ", ".join(f"process {p} ({s:.0f} s)" for p, s in sorted(lost.items()))
            why = f"no sign of life of {named}: it died, was stopped, or is cut off"
        elif behind and time.monotonic() - self._since > WORKER_SECONDS:
            self.broken = True
            why = (
                f"process {', '.join(map(str, behind))} did not come to segment {self._at[1] - 1} "
                f"within {WORKER_SECONDS:g} s of this one: its device is stuck, or much slower"
            )
        # Who leaves may do so because of one that is silent, and has not yet been for long.
        elif left and self._silence < 3 * _BEAT_SECONDS:
            why = f"process {', '.join(map(str, left))} has ended, and its own output says why"
        else:
            return
        self._fail(
            EnclaveError(
                f"{why}. Start again with the processes that are left, and restore your last "
                "checkpoint"
            )
        )

    def _is_ahead_of(self, at: Sequence[int]) -> bool:
        run, segment = self._at
        return run == at[0] and at[1] < segment

    def _fail(self, failure: TempoError) -> None:
        self.failure = self.failure or failure
        self._failed.set()

    def tell(self, what: str, fields: dict[str, Any]) -> None:
        """Tells the others something once; the first process does."""
        self._write(f"{self._folder}/{what}", fields)

    def hear(self, what: str) -> dict[str, Any]:
        """What the first process told of it, when it does.

        Raises:
          EnclaveError: it failed, or is gone.
        """
        return self._read(f"{self._folder}/{what}")

    # Calls

    def tell_call(self, fields: dict[str, Any]) -> None:
        """Tells the others of this call; the first process does, once for each."""
        self._write(self._next_call(), fields)
        self._written.append(self._call)

    def hear_call(self) -> dict[str, Any]:
        """What the first process told of this call.

        Raises:
          EnclaveError: it failed, or is gone.
        """
        return self._read(self._next_call())

    def _next_call(self) -> str:
        self._call = f"{self._folder}/call/{next(self._calls)}"
        return self._call

    def call_all(self, what: str, digest: str, leaves: Sequence[int] = ()) -> None:
        """Has all processes come to the same place, for what they can only do together.

        The first process calls this and the others `come`. Should it fail, the first one tells
        them of one more call, which is that it failed.

        Args:
          what: they are to do.
          digest: of what is the same for all.
          leaves: that it is about, for those who do not know.

        Raises:
          EnclaveError: one does something else, or does not come.
        """
        self.tell_call({"what": what, "digest": digest, "leaves": [*leaves]})
        call = self._call
        for process in range(1, self.count):
            answer = self._text(f"{call}/{process}", WORKER_SECONDS)
            if answer is None:
                does = f"did not come to {what} within {WORKER_SECONDS:g} s"
            else:
                does = json.loads(answer)["elsewhere"]
            if does:
                raise EnclaveError(f"process {process} {does}. {_TOGETHER}")
        self.tell_call({})

    def come(self, told: dict[str, Any], what: str, digest: str) -> None:
        """Says that this process has come where the first one wants all; see `call_all`.

        Args:
          told: what was heard of this call.
          what: this process does.
          digest: likewise.

        Raises:
          EnclaveError: that is something else, or another process is elsewhere.
        """
        wanted = told.get("what", "a shielded function")
        same = "run" not in told and (wanted, told["digest"]) == (what, digest)
        if same:
            self._write(f"{self._call}/{self.index}", {"elsewhere": ""})
            self.hear_call()
            return
        other = " with other arguments" if what == wanted else ""
        if "run" not in told:
            self._write(f"{self._call}/{self.index}", {"elsewhere": f"calls {what}{other}"})
            with contextlib.suppress(EnclaveError):
                self.hear_call()
        raise EnclaveError(
            f"{self!r} calls {what}{other}, and process 0 calls {wanted}. {_TOGETHER}"
        )

    def forget_calls(self) -> None:
        """Clears away what was told of calls, since everyone has heard it."""
        for key in self._written:
            cluster.forget(key)
        self._written.clear()

    def _write(self, key: str, fields: dict[str, Any]) -> None:
        try:
            cluster.write(key, json.dumps(fields))
        except cluster.NoAnswerError as error:
            raise self._alone(error) from error

    def _read(self, key: str) -> dict[str, Any]:
        text = self._text(key)
        assert text is not None, "without a limit it is waited for"
        told = json.loads(text)
        if "failed" in told:
            raise EnclaveError(f"process 0, which leads, failed: {told['failed']}")
        return told

    def _text(self, key: str, seconds: float = math.inf) -> str | None:
        end = time.monotonic() + seconds
        text = None
        while text is None and time.monotonic() < end:
            self.check()
            try:
                text = cluster.read(key, LOOK_SECONDS)
            except cluster.NoAnswerError as error:
                raise self._alone(error) from error
        return text

    def _alone(self, error: Exception) -> EnclaveError:
        return EnclaveError(
            f"{self!r}: the coordinator of jax.distributed, in process 0, does not answer "
            f"({error}). Start all processes again, and restore your last checkpoint."
        )


def new_group() -> str:
    """A name for processes that belong together, which none had before."""
    return secrets.token_hex(8)


def _beat(group: weakref.ref[Processes]) -> None:
    while True:
        processes = group()
        if processes is None or processes._ended.is_set():
            return
        processes._look()
        ended = processes._ended
        del processes
        if ended.wait(_BEAT_SECONDS):
            return


def _leave_at_exit(group: weakref.ref[Processes]) -> None:
    processes = group()
    if processes is None:
        return
    if processes.broken:
        processes.end_alone()
    processes.leave()
