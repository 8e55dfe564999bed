"""Faults that strike the enclave while this process lives: kills, and resets of connections."""

import contextlib
import os
import pathlib
import selectors
import signal
import socket
import struct
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.faults.fuse import Moment, moments
from benchmarks.faults.tally import Tally
from benchmarks.faults.training import END, STRUCK, Run, reference, reference_run, saved_steps
from tempo_jax.errors import EnclaveDiedError, TempoError

KILLED, RESET = "enclave killed (-9)", "TCP reset"


class Proxy:
    """A relay on loopback in front of the enclave that can reset every connection."""

    def __init__(self, port: int):
        """Listens, and forwards to `port`."""
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._target))
                for end in (here, there):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._pairs.append((here, there))
                threading.Thread(target=self._relay, args=(here, there), daemon=True).start()

    def _relay(self, here: socket.socket, there: socket.socket) -> None:
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError, ValueError):
            selector.register(here, selectors.EVENT_READ, there)
            selector.register(there, selectors.EVENT_READ, here)
            while True:
                for key, _ in selector.select(0.5):
                    source: Any = key.fileobj
                    data = source.recv(1 << 16)
                    if not data:
                        here.shutdown(socket.SHUT_RDWR)
                        there.shutdown(socket.SHUT_RDWR)
                        return
                    key.data.sendall(data)

    def reset(self) -> None:
        """Ends every connection with a RST on both sides."""
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.close()
        self._pairs.clear()

    def close(self) -> None:
        """Ends the relay."""
        self._listener.close()
        self.reset()


def _put_proxy_before(run: Run) -> Proxy:
    connection = run.enclave.connection
    proxy = Proxy(connection.port)
    connection.port = proxy.port
    with connection._lock:
        idle, connection._idle = connection._idle, []
    for open_one in idle:
        open_one.close()
    run.enclave.statistics()  # connects, so that there is something to reset
    return proxy


def strike(kind: str, scheme: str, counts: dict[str, int], tally: Tally) -> None:
    """Kills the enclave, or resets its connections, at moments spread over step and checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        run = reference_run(folder, scheme)
        expected = reference(folder)
        for part, count in counts.items():
            for moment in moments(run.fuse, part, count):
                run = _strike_once(run, kind, scheme, folder, expected, moment, tally)
        run.enclave.close()


def _strike_once(
    run: Run,
    kind: str,
    scheme: str,
    folder: pathlib.Path,
    expected: Sequence[np.ndarray],
    moment: Moment,
    tally: Tally,
) -> Run:
    process = run.enclave.connection.process
    run.go_back()
    run.train(STRUCK - 1)
    proxy = None
    if kind == RESET:
        proxy = _put_proxy_before(run)
        run.fuse.arm(moment, proxy.reset)
    else:
        run.fuse.arm(moment, lambda: os.kill(process.pid, signal.SIGKILL))
    problems = []
    try:
        run.train(END)
        # The last reply was already here; the next request meets the fault.
        run.enclave.statistics()
        problems.append("went unnoticed")
    except EnclaveDiedError:
        pass
    except TempoError as error:
        problems.append(f"was taken for {type(error).__name__}")
    if not run.fuse.burnt:
        problems.append("did not strike")
    saved = saved_steps(folder)
    if saved < STRUCK - 1:
        problems.append("lost a checkpoint")
    with contextlib.suppress(TempoError):
        run.enclave.close()
    if proxy is not None:
        proxy.close()
    durations = run.fuse.durations
    run = Run(folder, scheme)
    if run.count != saved:
        problems.append(f"resumed after step {run.count}, not {saved}")
    run.train(END)
    run.fuse.durations = durations
    tally.count(moment, problems, run.error(expected))
    return run
