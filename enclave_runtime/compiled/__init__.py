"""Machine code: `kernel` calls it, `definitions` is what Numba compiles it from.

The enclave imports the definitions, and Numba with them, only when it calls a kernel that nobody
compiled ahead of time. `enclave_runtime.gramine` does that for a staged tree.
"""
