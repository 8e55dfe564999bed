"""Launches an enclave as a child process and joins it; see `transport.loopback` for the lines.

Untrusted, but for the session's secret, which this process draws and hands to the child through a
pipe.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import threading
import weakref
from pathlib import Path
from typing import IO

from enclave_runtime.crypto.encryption import SECRET_BYTES, session_keys
from enclave_runtime.protocol.configuration import Launched, Listen
from tempo_jax.errors import EnclaveDiedError, EnclaveTimeoutError
from tempo_jax.transport import launch
from tempo_jax.transport.launch import Command
from tempo_jax.transport.loopback import Loopback
from tempo_jax.transport.ownership import Owned

START_SECONDS = 120.0
STOP_SECONDS = 5.0


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    """Ends the process: closing its pipe asks, and after a while it is killed.

    A forked child of the process `owner`, which started it, drops its copy and ends nothing.
    """
    if os.getpid() != owner:
        return
    with contextlib.suppress(OSError):
        if process.stdin:
            process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


class EnclaveProcess(Owned):
    """A child that runs the enclave; it ends when this object is dropped.

    Attributes:
      process: the child.
      greeting: the words with which it said where it listens.
    """

    def __init__(self, first_line: str, words: int, command: Command | None = None):
        """Starts the child.

        Args:
          first_line: what it is told; see `enclave_runtime.protocol.configuration`.
          words: how many its greeting has.
          command: what to start; by default an ordinary process.

        Raises:
          EnclaveDiedError: it ended before it was up.
          EnclaveTimeoutError: it was not up within `START_SECONDS`.
        """
        command = command or launch.command()
        self.process = subprocess.Popen(
            command.arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=command.environment,
            cwd=command.directory,
            # Ctrl-C in a terminal reaches a whole process group, and Gramine ends at SIGINT
            # whatever runs in it ignores. What Ctrl-C means is this process's to decide, and
            # should it end, the pipe closes and the enclave with it.
            start_new_session=True,
        )
        super().__init__()
        self._finalizer = weakref.finalize(self, _stop, self.process, os.getpid())
        assert self.process.stdin and self.process.stdout
        # A child that ended already breaks the pipe; its missing greeting tells below.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(first_line.encode() + b"\n")
            self.process.stdin.flush()
        self.greeting = [word.decode() for word in self._hear(self.process.stdout).split()]
        if len(self.greeting) != words:
            raise self.died()

    def _hear(self, output: IO[bytes]) -> bytes:
        """What the child says when it is up, or nothing if it ends first."""
        late = threading.Event()

        def end() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(START_SECONDS, end)
        timer.daemon = True
        timer.start()
        try:
            line = output.readline()
        finally:
            timer.cancel()
        if late.is_set():
            raise EnclaveTimeoutError(
                f"the enclave (process {self.process.pid}) did not come up within "
                f"{START_SECONDS:g} s and was ended: this machine is overloaded or short of memory"
                ", or something keeps the enclave from starting. Its log, on standard error, may "
                "say more; launch it again once the machine has processors and memory to spare."
            )
        return line

    def leave_to_parent(self) -> None:
        """Closes a forked child's copies of the pipes, by which the enclave knows its parent."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()

    def died(self) -> EnclaveDiedError:
        """What a broken connection to the child means."""
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return EnclaveDiedError(
                f"the connection to the enclave (process {self.process.pid}) broke"
            )
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return EnclaveDiedError(
            f"the enclave (process {self.process.pid}) {how}. What it held is lost: launch a new "
            "one and restore your last checkpoint."
        )

    def stop(self) -> None:
        """Ends the child."""
        self._finalizer()


class Connection(Loopback):
    """A launched enclave process and the means to ask it things.

    Attributes:
      session: the session's public name.
      keys: the session's keys; in development client and host share a process.
      process: the child.
      kind: of enclave.
    """

    def __init__(self, command: Command | None = None, listen: Listen | None = None) -> None:
        command = command or launch.command()
        self.kind = command.kind
        secret = secrets.token_bytes(SECRET_BYTES)
        self.keys = session_keys(secret)
        words = 2 if listen is None else 3
        self._child = EnclaveProcess(Launched(secret, listen).encode(), words, command)
        self.process = self._child.process
        port, *_, self.session = self._child.greeting
        super().__init__(int(port))

    def __repr__(self) -> str:
        return f"process {self.process.pid}"

    def peak_resident_bytes(self) -> int | None:
        """The most of the child's memory that was resident, where only this side can tell.

        Gramine tells what it runs how much was mapped, with address space that is merely reserved;
        without SGX this machine's kernel counts what was touched. None for other kinds: a plain
        process knows it itself, and an SGX enclave's pages are counted as no process's.
        """
        if self.kind != "gramine-direct":
            return None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        peak = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
        return None if peak is None else int(peak[1]) * 1024

    def _connection_key(self) -> bytes:
        assert self.keys is not None
        return self.keys.connection

    def _died(self) -> EnclaveDiedError:
        return self._child.died()

    def close(self) -> None:
        """Ends the enclave; a forked child leaves its parent's as it is."""
        super().close()
        self._child.stop()
