"""What a shielded function held is freed when it goes: programs, threads, memory."""

import gc
import threading
import weakref

import numpy as np
import pytest

import tempo_jax as tempo
from tests.support.fresh import run_fresh

MEGABYTES = 40


def fresh_shields_leave_nothing() -> None:
    with tempo.Enclave.launch() as enclave:
        x = np.ones((8, 8), np.float32)
        before = enclave.statistics()["programs"]
        threads = threading.active_count()
        for number in range(60):
            shielded = tempo.shield(
                lambda x, n=number: tempo.reveal(x @ x + n), enclave=enclave, offload="all"
            )
            np.testing.assert_array_equal(shielded(x), 8 + number)
            gone = weakref.ref(shielded)
            del shielded
            gc.collect()
            assert gone() is None
            if number == 2:
                threads = threading.active_count()
            assert enclave.statistics()["programs"] == before
        assert threading.active_count() <= threads


@pytest.mark.slow
def test_fresh_shields_leave_no_program_and_no_thread():
    run_fresh(fresh_shields_leave_nothing, optimized=False)


def resident_bytes(process: int) -> int:
    """How much memory a process has now."""
    with open(f"/proc/{process}/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmRSS"].split()[0]) * 1024


def closed_over_arrays_leave_no_memory() -> None:
    import os

    import jax.numpy as jnp

    rows = MEGABYTES << 18  # float32 numbers
    with tempo.Enclave.launch() as enclave:
        processes = (os.getpid(), enclave.connection.process.pid)
        memory = []
        for number in range(11):
            table = jnp.full(rows, number, jnp.float32)
            shielded = tempo.shield(lambda x, t=table: tempo.reveal(x + t.sum()), enclave=enclave)
            np.testing.assert_array_equal(shielded(np.zeros(1, np.float32)), number * rows)
            del shielded, table
            gc.collect()
            assert enclave.statistics()["programs"] == 0
            memory.append([resident_bytes(process) for process in processes])
    # The allocator's pools keep what the first ones used; five more kept would be 200 MB.
    for grown in np.subtract(memory[10], memory[5]):
        assert grown < 2 * MEGABYTES << 20, memory


@pytest.mark.slow
def test_closed_over_arrays_leave_no_memory():
    run_fresh(closed_over_arrays_leave_no_memory, optimized=False)


def a_function_in_the_users_jit_lives_on() -> None:
    import jax

    with tempo.Enclave.launch() as enclave:
        # The compiled program is all that holds what was shielded while it was traced.
        step = jax.jit(lambda x: tempo.shield(lambda x: x * 2, enclave=enclave, donate=False)(x))
        sealed = enclave.seal(np.arange(3.0, dtype=np.float32))
        for _ in range(3):
            np.testing.assert_array_equal(enclave.open(step(sealed)), [0, 2, 4])
            gc.collect()
            assert enclave.statistics()["programs"] == 1


@pytest.mark.slow
def test_a_function_in_the_users_jit_lives_as_long_as_that():
    run_fresh(a_function_in_the_users_jit_lives_on, optimized=False)
