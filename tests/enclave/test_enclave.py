"""An enclave's life: it starts, answers its own host alone, and leaves nothing behind."""

import gc
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from enclave_runtime.protocol import evidence
from enclave_runtime.protocol.evidence import Platform
from enclave_runtime.serving import dumps
from tempo_jax.errors import EnclaveDiedError, EnclaveError
from tempo_jax.transport import child
from tests.support.processes import ROOT, host_script, is_running, nothing_left_behind, wait_until


def test_close_ends_the_process():
    with nothing_left_behind():
        with tempo.Enclave.launch() as running:
            process = running.connection.process
            assert repr(running) == f"Enclave(process {process.pid})"
            assert running.statistics()["process"] == process.pid
            sealed = running.seal(jnp.arange(3.0))
            results = [tempo.shield(lambda x: x * 2, enclave=running)(sealed)]
            np.testing.assert_array_equal(running.open(results[0]), [0, 2, 4])
        assert process.poll() is not None and not is_running(process.pid)
    assert repr(running) == "Enclave(closed)"
    refused = (
        running.statistics,
        lambda: running.open(results),
        lambda: running.seal(1.0),
        lambda: running.publish(1.0, tag="rate"),
        lambda: running.checkpoint(results),
    )
    for use in refused:
        with pytest.raises(EnclaveError, match="closed; launch a new one"):
            use()
    running.close()  # a second time does nothing
    results.clear()  # nor does dropping what it held
    gc.collect()


def test_dropped_enclave_ends_its_process():
    running = tempo.Enclave.launch()
    process = running.connection.process.pid
    del running
    gc.collect()
    assert wait_until(lambda: not is_running(process))


def test_process_that_does_not_come_up(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EnclaveDiedError, match="ended with status 1"):
        tempo.Enclave.launch()


def test_killed_enclave_is_an_error_that_says_so():
    with nothing_left_behind():
        running = tempo.Enclave.launch()
        shielded = tempo.shield(lambda x: x * 2, enclave=running)
        kept = shielded(jnp.arange(3.0))
        os.kill(running.connection.process.pid, signal.SIGKILL)
        for use in (running.statistics, lambda: shielded(jnp.ones(3)), lambda: running.open(kept)):
            with pytest.raises(EnclaveDiedError, match=r"\(process \d+\) was killed by signal 9"):
                use()
        running.close()


HOST = """
import jax.numpy as jnp
import tempo_jax as tempo

enclave = tempo.Enclave.launch()
shielded = tempo.shield(
    lambda x: jnp.tanh(x @ x) @ x,
    enclave=enclave,
    scheme=tempo.schemes.SignedPermutation(),
    offload="all",
    donate=False,
)
x = enclave.seal(jnp.ones((4, 4)))
shielded(x)
print(enclave.connection.process.pid, flush=True)
while True:
    shielded(x)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_enclave_ends_with_its_host(how):
    with nothing_left_behind(), host_script(HOST) as (host, printed):
        process = int(printed.readline())
        assert is_running(process)
        os.kill(host, how)
        assert wait_until(lambda: not is_running(process))


STRANGER = """
import socket, sys
from enclave_runtime.protocol import wire
from enclave_runtime.protocol.wire import Frame, Kind

def refused(*frames):
    with socket.create_connection(("127.0.0.1", PORT), timeout=5) as connection:
        challenge = bytes.fromhex(wire.receive(connection).fields["challenge"])
        try:
            for frame in frames:
                connection.sendall(frame if isinstance(frame, bytes) else frame(challenge).encode())
            answer = wire.receive(connection)
        except OSError:
            return True
        return answer

def proof(key, role="host"):
    nonce = bytes(32)
    def make(challenge):
        fields = {"nonce": nonce.hex(), "proof": wire.prove(key, role, challenge, nonce).hex()}
        return Frame(Kind.PROOF, 0, fields)
    return make

def asking(kind, **fields):
    return lambda challenge: Frame(kind, 1, fields)

guess = bytes(range(32))
print(
    refused(asking(Kind.STATISTICS)),
    refused(asking(Kind.FREE)),
    refused(proof(guess)),
    refused(proof(guess), asking(Kind.FREE)),
    refused(proof(b"")),
    refused(asking(Kind.PROOF)),
    refused(asking(Kind.PROOF, nonce="", proof="")),
    refused(asking(Kind.PROOF, nonce=3, proof=None)),
    refused(asking(Kind.PROOF, nonce="x", proof="zz")),
    refused(asking(Kind.PROOF, nonce="00" * 600, proof="")),
    refused(b"GET / HTTP/1.1" + bytes(100)),
    refused(wire.HEADER.pack(b"TMPO", 1, Kind.PROOF, 0, 1 << 30)),
)
"""


def test_process_without_the_session_key_is_refused(enclave):
    sealed = tempo.shield(lambda x: x + 1, enclave=enclave)(jnp.zeros(3))
    script = STRANGER.replace("PORT", str(enclave.connection.port))
    with host_script(script) as (_, printed):
        assert printed.read().split() == ["True"] * 12
    assert is_running(enclave.connection.process.pid)
    np.testing.assert_array_equal(enclave.open(sealed), np.ones(3))


def test_process_without_the_secret_does_not_pass_as_the_enclave(enclave, monkeypatch):
    connection = enclave.connection
    monkeypatch.setattr(child, "STOP_SECONDS", 0.1)  # of waiting whether the process ended
    monkeypatch.setattr(connection, "keys", connection.keys._replace(connection=bytes(32)))
    with connection._lock:
        idle, connection._idle = connection._idle, []
    try:
        match = r"connection to the enclave \(process \d+\) broke"
        with pytest.raises(EnclaveDiedError, match=match):
            enclave.statistics()
    finally:
        connection._idle = idle


# Core dumps


def test_enclave_leaves_no_core_file(enclave):
    limits = Path(f"/proc/{enclave.connection.process.pid}/limits").read_text()
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)


DUMPABLE = """
import ctypes, runpy
from enclave_runtime.serving import dumps, server

def show():
    print(ctypes.CDLL(None).prctl(dumps.PR_GET_DUMPABLE, 0, 0, 0, 0))

show()
server.serve = show
runpy.run_module("enclave_runtime", run_name="__main__")
"""


def test_enclave_is_not_dumpable_when_it_serves():
    # A limit on core files does not bind a handler to which the kernel pipes dumps (core(5)).
    run = subprocess.run(
        [sys.executable, "-c", DUMPABLE], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.split() == ["1", "0"], run.stderr


@pytest.mark.parametrize("platform", get_args(Platform))
def test_kernel_that_would_dump_is_refused(monkeypatch, platform):
    class Refusing:
        @staticmethod
        def prctl(*_: int) -> int:
            return -1

    monkeypatch.setattr(dumps.ctypes, "CDLL", lambda *_, **__: Refusing)
    monkeypatch.setattr(dumps.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(evidence, "detect_platform", lambda: platform)
    if platform == "process":
        with pytest.raises(dumps.DumpError, match="core dumps stay possible"):
            dumps.forbid_dumps()
    else:  # Gramine dumps nothing itself
        dumps.forbid_dumps()
