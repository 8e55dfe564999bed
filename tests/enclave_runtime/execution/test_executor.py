"""The pool that compiles: a run waits for what its program needs, and for nothing else.

What nobody holds any more is freed.
"""

import gc
import threading

import jax
import jax.numpy as jnp
import pytest

from enclave_runtime.execution import executor as executor_module
from enclave_runtime.execution.executor import Executor
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout
from enclave_runtime.schemes import SignedPermutation


def fail() -> None:
    raise ArithmeticError("planted")


def test_each_use_is_prepared_once():
    executor, calls = Executor(), []
    kernels = [executor.prepare("use", lambda: calls.append(1)) for _ in range(3)]
    executor.hold([], kernels).wait()
    assert len(calls) == 1 and len(set(kernels)) == 1


def test_a_kernel_that_fails_fails_its_own_program_alone():
    executor = Executor()
    broken, sound = executor.prepare("broken", fail), executor.prepare("sound", lambda: None)
    executor.hold([], (sound,)).wait()
    with pytest.raises(ArithmeticError, match="planted"):
        executor.hold([], (sound, broken)).wait()
    executor.hold([], (sound,)).wait()


def test_another_program_may_come_while_a_run_waits():
    executor, waits = Executor(), threading.Event()
    slow = executor.prepare("slow", waits.wait)
    waiter = threading.Thread(target=executor.hold([], (slow, slow)).wait)
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
    executor.hold([], keyed).wait()
    assert len(keyed) == 1 and keyed == again


def blob(number: int) -> bytes:
    """A program that is like no other of another number."""
    exported = jax.export.export(jax.jit(lambda x: [x + number]))
    return bytes(exported(jax.ShapeDtypeStruct((2,), jnp.float32)).serialize())


def has(executor: Executor, name: str) -> bool:
    gc.collect()
    return executor.has(name)


def test_a_program_lives_as_long_as_its_last_holder():
    executor = Executor()
    name = executor.compile(blob(1))
    assert has(executor, name)  # given, and not held yet
    first = executor.hold([name], ())
    second = executor.hold([name, name], ())
    second.wait()
    del first
    assert has(executor, name)
    assert second.run(name, [jnp.ones(2, jnp.float32)])[0].tolist() == [2, 2]
    del second
    assert not has(executor, name)
    with pytest.raises(KeyError):
        executor.hold([name], ())


def test_two_that_give_the_same_do_not_lose_it_to_each_other():
    executor, code = Executor(), blob(2)
    name = executor.compile(code)
    assert executor.compile(code) == name  # somebody else, about to hold it
    first = executor.hold([name], ())
    first.wait()
    del first  # comes and goes before the other one holds it
    assert has(executor, name)
    second = executor.hold([name], ())
    del second
    assert not has(executor, name)


def test_what_is_given_and_never_held_is_bounded(monkeypatch):
    monkeypatch.setattr(executor_module, "MAX_GIVEN", 2)
    executor = Executor()
    names = [executor.compile(blob(number)) for number in (3, 4, 5)]
    executor.hold(names[1:], ()).wait()
    executor._pool.shutdown()  # whose work holds what it has not done
    assert not has(executor, names[0])
