"""Train JAX models on hardware you do not trust.

`shield` rewrites a training step so that its matrix products and convolutions run on untrusted
devices over blinded operands and everything else in an enclave; `cheap_update` lets an
optimizer update blinded weights where they lie.
"""

from tempo_jax import errors, schemes, testing
from tempo_jax._attestation import AttestationPolicy
from tempo_jax._enclave import Enclave
from tempo_jax._markers import cheap_update, reveal
from tempo_jax._sealed import SealedArray
from tempo_jax._shield import Shielded, shield
from tempo_jax._tcb import Collateral

__version__ = "0.1.0"

__all__ = [
    "AttestationPolicy",
    "Collateral",
    "Enclave",
    "SealedArray",
    "Shielded",
    "cheap_update",
    "errors",
    "reveal",
    "schemes",
    "shield",
    "testing",
]
