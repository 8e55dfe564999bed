"""What a client keeps of its checkpoints: the key, and a memory of the newest one."""

from tempo_jax.sealing.ledger import CheckpointKey, CheckpointLedger, open_checkpoint, write

__all__ = ["CheckpointKey", "CheckpointLedger", "open_checkpoint", "write"]
