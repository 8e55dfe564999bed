"""Train JAX models on hardware you do not trust.

`shield` rewrites a training step so that its matrix products and convolutions run on untrusted
devices over blinded operands and everything else in an enclave; `cheap_update` lets an
optimizer update blinded weights where they lie.
"""

from tempo_jax import checkpoints, errors, schemes, testing
from tempo_jax.api.estimate import Machine
from tempo_jax.api.markers import cheap_update, keep_inside, reveal
from tempo_jax.api.shield import shield
from tempo_jax.api.shielded import Shielded
from tempo_jax.attestation.policy import AttestationPolicy
from tempo_jax.attestation.tcb import Collateral
from tempo_jax.enclave.enclave import Enclave
from tempo_jax.running.timeline import profile
from tempo_jax.sealing.array import SealedArray, is_sealed, shapes
from tempo_jax.sealing.file import load_sealed, save_sealed
from tempo_jax.sealing.ledger import CheckpointKey, CheckpointLedger
from tempo_jax.transport.identity import ClientIdentity

__version__ = "0.2.0"

__all__ = [
    "AttestationPolicy",
    "CheckpointKey",
    "CheckpointLedger",
    "ClientIdentity",
    "Collateral",
    "Enclave",
    "Machine",
    "SealedArray",
    "Shielded",
    "cheap_update",
    "checkpoints",
    "errors",
    "is_sealed",
    "keep_inside",
    "load_sealed",
    "profile",
    "reveal",
    "save_sealed",
    "schemes",
    "shapes",
    "shield",
    "testing",
]
