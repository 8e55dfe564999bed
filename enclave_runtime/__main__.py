"""Entry point: ``python -m enclave_runtime``. See `enclave_runtime.serving.server`."""

import signal

import jax

from enclave_runtime.serving.dumps import forbid_dumps
from enclave_runtime.serving.server import serve

if __name__ == "__main__":
    forbid_dumps()
    # Ctrl-C in a terminal reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jax.config.update("jax_platforms", "cpu")
    # Programs fix every dtype; this only keeps 64-bit ones from being truncated.
    jax.config.update("jax_enable_x64", True)
    serve()
