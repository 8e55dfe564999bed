"""The variables with which an enclave of any kind starts, and what they do to its allocator."""

import os
import re
import subprocess
import sys

import pytest

from enclave_runtime.gramine import manifest, staging
from tempo_jax.transport import launch

# Threads that live at the same time and allocate, each of which glibc would give an arena.
ARENAS = """
import ctypes, sys, threading
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
ready = threading.Barrier(5)
def work():
    libc.malloc(ctypes.c_size_t(100_000))
    ready.wait()
    ready.wait()
for _ in range(4):
    threading.Thread(target=work).start()
ready.wait()
stream = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, stream)
libc.fclose(stream)
ready.wait()
"""


def arenas(environment: dict[str, str]) -> int:
    """How many arenas glibc's allocator has in a process with several threads."""
    run = subprocess.run(
        [sys.executable, "-c", ARENAS],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return len(re.findall("<heap nr=", run.stdout))


@pytest.mark.parametrize(
    "variables",
    [
        launch.command().environment,
        manifest.environment(),
        staging.host_environment(staging.Path()),
    ],
    ids=["process", "gramine", "staged"],
)
def test_every_kind_of_enclave_has_one_arena(variables):
    assert variables["MALLOC_ARENA_MAX"] == "1"
    allocator = {name: value for name, value in variables.items() if name.startswith("MALLOC_")}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    assert arenas({**plain, **allocator}) == 1
    assert arenas(plain) > 1  # as it would be without
