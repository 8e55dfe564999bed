"""Kernels that are compiled ahead of time: the same results as Numba's, from a library alone."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from enclave_runtime.compiled import kernel
from enclave_runtime.compiled.kernel import Kernel
from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.gramine import staging
from enclave_runtime.schemes.kernels import hadamard
from enclave_runtime.schemes.kernels.hadamard import draw, mix, unmix
from enclave_runtime.schemes.kernels.lines import Factors, scaled

KEY = bytes(range(32))
NUMBA = Path("none")  # where no library is

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ld") is None, reason="needs binutils' ld"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The library as staging has it made."""
    output = tmp_path_factory.mktemp("ahead") / "kernels.so"
    assert staging.compile_kernels(staging.find_source(), output) == output
    return output


def results() -> list[np.ndarray]:
    """What all kernels give, on fixed keys."""
    out: list[np.ndarray] = []
    for size in (1, 2, 31, 64, 65, 200):
        for copies in (1, 3):
            axis_map = draw(KeyStream(KEY), size, condition=4, copies=copies, rounds=3)
            for each in (axis_map, axis_map.inverse(), axis_map.transpose()):
                out += [each.order, each.scale]
    for dtype in (np.float32, np.float64):
        stream = KeyStream(KEY)
        out += [stream.normal(count, dtype) for count in (0, 1, 7, 20_001)]
        for rows, width in ((1, 2), (3, 5), (64, 64), (130, 67), (257, 1000)):
            x = stream.normal(rows * width, dtype).reshape(rows, width)
            extra = stream.normal(5 * width, dtype).reshape(5, width)
            maps = {i: draw(stream, n, condition=4) for i, n in ((0, rows + 5), (1, width))}
            mixed = mix(x, maps, extra=extra)
            inverses = {i: axis_map.inverse() for i, axis_map in maps.items()}
            out += [mixed, unmix(mixed, inverses, keep=rows), mix(mixed, {1: maps[1]})]
            factors = Factors(np.ldexp(1.0, [np.arange(rows) % 7]), np.full((1, width), 0.5))
            larger, lengths = scaled(x, factors)
            out += [larger, *lengths]
    return out


def test_results_are_those_of_numba_bit_for_bit(library, monkeypatch):
    monkeypatch.setattr(kernel, "LIBRARY", library)
    ahead = results()
    assert kernel._library() is not None
    monkeypatch.setattr(kernel, "LIBRARY", NUMBA)
    for ours, theirs in zip(ahead, results(), strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


def test_it_needs_nothing_and_shows_the_kernels_alone(library):
    ctypes.CDLL(str(library), mode=getattr(ctypes, "RTLD_NOW", 2))
    run = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True)
    kinds, names = zip(*(line.split()[-2:] for line in run.stdout.splitlines()), strict=True)
    assert set(kinds) == {"T"}  # defined functions, and nothing that another library would give
    hadamard.warm_up()
    assert {name.partition(".")[0] for name in names} == {known.name for known in Kernel.known}


def test_numba_is_not_imported(library):
    code = (
        "import sys, pathlib\n"
        "from enclave_runtime.compiled import kernel\n"
        "from enclave_runtime.schemes.kernels import hadamard\n"
        f"kernel.LIBRARY = pathlib.Path({str(library)!r})\n"
        "hadamard.warm_up()\n"
        "print([name for name in ('numba', 'llvmlite', 'scipy') if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_it_is_the_same_wherever_it_is_made(library, tmp_path):
    again = tmp_path / "elsewhere.so"
    staging.compile_kernels(staging.find_source(), again)
    assert again.read_bytes() == library.read_bytes()


def test_without_a_linker_numba_is_staged(monkeypatch, tmp_path):
    monkeypatch.setattr(staging.shutil, "which", lambda _: None)
    assert staging.compile_kernels(staging.find_source(), tmp_path / "kernels.so") is None
