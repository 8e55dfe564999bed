"""Blinding schemes: what `shield(scheme=...)` takes.

Their arithmetic runs in the enclave, so their home is `enclave_runtime.schemes`.
"""

from enclave_runtime.schemes.registry import *  # noqa: F403  # A new scheme is a line there alone.
