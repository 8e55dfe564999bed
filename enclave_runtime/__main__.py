"""Entry point: ``python -m enclave_runtime``. See `enclave_runtime.serving.server`."""

import signal

import jax

from enclave_runtime.serving.dumps import forbid_dumps
from enclave_runtime.serving.server import serve

if __name__ == "__main__":
    forbid_dumps()
    # Ctrl-C is the parent's to understand, which starts the enclave in a group of its own; this is
    # for whoever starts it by hand. Gramine ends at the signal all the same.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jax.config.update("jax_platforms", "cpu")
    # Programs fix every dtype; this only keeps 64-bit ones from being truncated.
    jax.config.update("jax_enable_x64", True)
    serve()
