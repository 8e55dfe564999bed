"""Blinding schemes: what `shield(scheme=...)` takes.

Their arithmetic runs in the enclave, so their home is `enclave_runtime.schemes`.
"""

from enclave_runtime.schemes import Group, Mixing, Orthogonal, Scheme, SignedPermutation, Tempo

__all__ = ["Group", "Mixing", "Orthogonal", "Scheme", "SignedPermutation", "Tempo"]
