"""Variables and options with which the enclave's interpreter is started, wherever it runs.

Shared: `tempo_jax.transport.launch` starts the development process with them, and the Gramine
manifest fixes them. Holds no secret.
"""

from __future__ import annotations

ENCLAVE_MODULE = "enclave_runtime"

# glibc returns large blocks to the system at once and then pays a page fault for every page of
# the next result; keeping them made elementwise segments several times faster (mallopt(3)).
ALLOCATOR_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    # Requests run in threads. An arena of a thread's own holds 64 MB at most, so that larger blocks
    # are mapped anew each time, with the page faults that the lines above avoid; the one arena that
    # is left, the heap's, has no such limit.
    "MALLOC_ARENA_MAX": "1",
}
ENCLAVE_ENVIRONMENT = {
    **ALLOCATOR_ENVIRONMENT,
    # The enclave shares NumPy's products out itself; two pools of threads would wait for each
    # other.
    "OPENBLAS_NUM_THREADS": "1",
    # What JAX compiles inside is the client's program, which no file outside may hold.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
