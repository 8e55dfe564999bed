"""A launched enclave's process: its group, its end with its host, and a start that never ends."""

import os
import signal
import subprocess
import sys

import pytest

import tempo_jax as tempo
from tempo_jax.errors import EnclaveError, EnclaveTimeoutError
from tempo_jax.transport import child
from tempo_jax.transport.launch import Command
from tests.support.processes import ROOT, is_running, wait_until


def test_a_launched_enclave_has_a_process_group_of_its_own(enclave):
    process = enclave.connection.process.pid
    assert os.getpgid(process) == os.getsid(process) == process
    assert os.getpgid(process) != os.getpgid(0)


HOST = """
import signal, sys
import tempo_jax as tempo

interrupts = []
signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
enclave = tempo.Enclave.launch()
print(enclave.connection.process.pid, flush=True)
sys.stdin.readline()
print(len(interrupts), enclave.statistics()["process"], flush=True)
sys.stdin.readline()
"""


def start_host(text: str) -> subprocess.Popen[str]:
    """A host as a terminal starts it, with a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", text],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def test_ctrl_c_reaches_the_host_alone_and_the_enclave_still_ends_with_it():
    with start_host(HOST) as host:
        assert host.stdin and host.stdout
        process = int(host.stdout.readline())
        os.killpg(host.pid, signal.SIGINT)
        # Python runs the handler once the read goes on.
        host.stdin.write("\n")
        host.stdin.flush()
        assert host.stdout.readline().split() == ["1", str(process)]
        host.kill()
        assert wait_until(lambda: not is_running(process))


DIES = """
import os, signal, subprocess, threading
import tempo_jax as tempo
from tempo_jax.transport import child

class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        print(self.pid, flush=True)
        BEFORE

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

child.subprocess.Popen = Popen
child.threading.Timer = die
tempo.Enclave.launch()
"""


@pytest.mark.parametrize("told", [False, True])
def test_a_host_that_dies_during_the_start_leaves_no_enclave(told):
    with start_host(DIES.replace("BEFORE", "" if told else "die()")) as host:
        assert host.stdout
        process = int(host.stdout.readline())
        assert host.wait() == -signal.SIGKILL
        assert wait_until(lambda: not is_running(process))


def test_a_start_that_times_out_says_so(monkeypatch):
    monkeypatch.setattr(child, "START_SECONDS", 0.5)
    sleeps = Command(("sleep", "60"), dict(os.environ))
    text = r"\(process \d+\) did not come up within 0\.5 s and was ended: .* launch it again once"
    with pytest.raises(EnclaveTimeoutError, match=text) as raised:
        child.EnclaveProcess("told", 2, sleeps)
    assert "checkpoint" not in str(raised.value)  # there is none yet
    process = int(str(raised.value).split("process ")[1].split(")")[0])
    assert wait_until(lambda: not is_running(process))
    assert isinstance(raised.value, EnclaveError)


def test_a_start_in_time_is_not_ended_later(monkeypatch):
    monkeypatch.setattr(child, "START_SECONDS", 60.0)
    with tempo.Enclave.launch() as enclave:
        timers = [t for t in child.threading.enumerate() if isinstance(t, child.threading.Timer)]
        assert all(timer.finished.is_set() for timer in timers)
        assert enclave.statistics()["runs"] == 0
