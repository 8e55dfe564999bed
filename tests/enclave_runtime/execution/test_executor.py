"""The pool that compiles: a run waits for what its program needs, and for nothing else."""

import threading

import pytest

from enclave_runtime.execution.executor import Executor
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes import SignedPermutation


def fail() -> None:
    raise ArithmeticError("planted")


def test_each_use_is_prepared_once():
    executor, calls = Executor(), []
    kernels = [executor.prepare("use", lambda: calls.append(1)) for _ in range(3)]
    executor.wait([], kernels)
    assert len(calls) == 1 and len(set(kernels)) == 1


def test_a_kernel_that_fails_fails_its_own_program_alone():
    executor = Executor()
    broken, sound = executor.prepare("broken", fail), executor.prepare("sound", lambda: None)
    executor.wait([], (sound,))
    with pytest.raises(ArithmeticError, match="planted"):
        executor.wait([], (sound, broken))
    executor.wait([], (sound,))


def test_another_program_may_come_while_a_run_waits():
    executor, waits = Executor(), threading.Event()
    slow = executor.prepare("slow", waits.wait)
    waiter = threading.Thread(target=executor.wait, args=([], (slow, slow)))
    waiter.start()
    for number in range(100):
        executor.prepare(number, lambda: None)
    waits.set()
    waiter.join(30)
    assert not waiter.is_alive()


def test_values_in_the_clear_need_no_kernel():
    executor, array = Executor(), ArrayType((2, 3), "float32")
    classes = (KeyClass(2), KeyClass(3))
    assert executor.warm_up(SignedPermutation(), array, Layout.clear(2), classes) == []
    keyed = executor.warm_up(SignedPermutation(), array, Layout((0, 1), (1, 1)), classes)
    again = executor.warm_up(SignedPermutation(), array, Layout((0, 1), (1, 1)), classes)
    executor.wait([], keyed)
    assert len(keyed) == 1 and keyed == again
