"""Kernels: imported late, and what is passed to those that were compiled ahead of time."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import tempo_jax as tempo
from enclave_runtime.compiled import kernel
from enclave_runtime.compiled.kernel import Kernel, KernelError
from enclave_runtime.protocol.wire import Kind
from tempo_jax.api import shielded as shielded_module
from tempo_jax.schemes import Mixing
from tests.support.boundary import mappings
from tests.support.steps import uniform

COMPILERS = ("numba", "llvmlite", "scipy")


def test_the_enclave_imports_no_compiler_at_its_start():
    code = (
        "import sys, enclave_runtime.__main__ as main\n"
        f"print([name for name in {COMPILERS} if name in sys.modules], main.serve.__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[] serve\n"


def test_a_running_enclave_loads_the_compiler_when_a_scheme_needs_it():
    with tempo.Enclave.launch() as enclave:
        process = enclave.connection.process.pid
        np.testing.assert_array_equal(enclave.open(enclave.seal(np.arange(3))), [0, 1, 2])
        assert not [name for name in COMPILERS if f"/{name}/" in mappings(process)]
        x, w = uniform(1, 130, 64), uniform(2, 64, 66)
        enclave.open(tempo.shield(lambda x, w: x @ w, enclave=enclave, offload="all")(x, w))
        assert "/llvmlite/" in mappings(process)


def test_kernels_are_loaded_while_their_program_is_planned(enclave, monkeypatch):
    """Where everything goes out that can; else when the plan says that something does."""
    sent: list[tuple[str, dict[str, str]]] = []
    real_plan, real = shielded_module.make_plan, enclave.connection.request

    def request(kind: Kind, fields: Any, *rest: Any) -> Any:
        if kind is Kind.PREPARE:
            sent.append(("prepare", fields))
        return real(kind, fields, *rest)

    def plan(request: Any) -> Any:
        sent.append(("plan", {}))
        return real_plan(request)

    monkeypatch.setattr(enclave.connection, "request", request)
    monkeypatch.setattr(shielded_module, "make_plan", plan)
    x, w = uniform(1, 130, 64), uniform(2, 64, 66)
    for offload, expected in (("all", ["prepare", "plan"]), ("auto", ["plan"])):
        sent.clear()
        monkeypatch.setattr(enclave, "_prepared", set())
        for scheme in (Mixing(), Mixing(condition=3.0)):
            function = tempo.shield(
                lambda x, w: x @ w, enclave=enclave, scheme=scheme, offload=offload
            )
            function.explain(x, w)
        # Once for a scheme: its kernels are the same under all parameters.
        assert [name for name, _ in sent] == [*expected, "plan"]


class Library:
    """Stands for a library of one kernel; records the words that it was called with."""

    _name = "the library"

    def __init__(self, name: str, status: int = 0):
        self.words: list[int] = []

        def entry(words: Any) -> int:
            self.words = list(words)
            return status

        setattr(self, name, entry)


def calling(monkeypatch: pytest.MonkeyPatch, library: Library) -> Kernel:
    """A kernel that nothing else sees, and that is called in a library."""
    monkeypatch.setattr(Kernel, "known", [])
    monkeypatch.setattr(kernel, "_library", lambda: library)
    return Kernel("nowhere", "twist")


def test_arguments_are_flattened_to_words(monkeypatch):
    library = Library("twist.f4x2.i.u8x1.i")
    twist = calling(monkeypatch, library)
    matrix, words = np.zeros((3, 5), np.float32), np.zeros(4, np.uint64)
    twist((matrix, (7, words)), np.int64(-2))
    assert library.words == [
        *(0, 0, 15, 4, matrix.ctypes.data, 3, 5, 20, 4),
        7,
        *(0, 0, 4, 8, words.ctypes.data, 4, 8),
        -2,
    ]
    assert repr(twist) == "Kernel(twist)"


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((3, 4), np.float32).T, "C-contiguous and aligned"),
        (np.zeros(8, np.float32)[::2], "C-contiguous and aligned"),
        (np.zeros(9, np.uint8)[1:].view(np.float32), "C-contiguous and aligned"),
        (np.zeros(4, ">f4"), r"twist\.>f4x1 is not among the kernels in the library: build"),
        (np.zeros(4, np.float64), r"twist\.f8x1 is not among the kernels"),
        (np.zeros((4, 1), np.float32), r"twist\.f4x2 is not among the kernels"),
        (4, r"twist\.i is not among the kernels"),
    ],
)
def test_what_a_kernel_was_not_compiled_for_is_refused(monkeypatch, array, words):
    twist = calling(monkeypatch, Library("twist.f4x1"))
    twist(np.zeros(4, np.float32))
    with pytest.raises(KernelError, match=words):
        twist(array)


def test_a_kernel_that_fails_says_so(monkeypatch):
    twist = calling(monkeypatch, Library("twist.f4x1", status=1))
    with pytest.raises(KernelError, match="twist failed"):
        twist(np.zeros(4, np.float32))


def test_a_processor_that_is_too_old_is_named(monkeypatch, tmp_path):
    library, cpuinfo = tmp_path / "kernels.so", tmp_path / "cpuinfo"
    library.touch()
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu bmi1 bmi2 f16c movbe\nbugs\t: avx2 fma\n")
    monkeypatch.setattr(kernel, "_CPUINFO", cpuinfo)
    with pytest.raises(KernelError, match="for x86-64-v3, and this processor lacks avx2, fma: run"):
        kernel._loaded(library)
    monkeypatch.setattr(kernel, "_CPUINFO", tmp_path / "none")
    with pytest.raises(KernelError, match="lacks avx2, bmi1"):
        kernel._loaded(library)


def test_there_is_no_library_beside_the_source():
    assert not kernel.LIBRARY.exists() and kernel._library() is None
