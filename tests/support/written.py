"""Checkpoints that are written in memory."""

import ml_dtypes
import numpy as np

from enclave_runtime.protocol.checkpoint import (
    CheckpointWriter,
    Leaf,
    Recipient,
    sealed_bytes,
)
from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.protocol.tags import TagRecord

SECRET, OTHER_SECRET = bytes(range(32)), bytes(range(1, 33))
ORDER_ID = "00" * 16
ALTERED = "failed its authentication"
VALUES = {
    "matrix": np.arange(6, dtype=np.float64).reshape(2, 3),
    "narrow": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.int8),
    "scalar": np.array(7, np.uint32),
}


def leaf(name: str, value: np.ndarray) -> Leaf:
    return Leaf(name, ArrayType(value.shape, value.dtype.name), value.dtype.name, False)


def written(
    values: dict[str, np.ndarray] = VALUES, number: int = 1, secret: bytes = SECRET
) -> bytes:
    """A whole checkpoint."""
    leaves = [leaf(name, value) for name, value in values.items()]
    writer = CheckpointWriter(secret, Recipient.CLIENT, number, leaves)
    parts = [writer.head]
    for value in values.values():
        out = np.empty(sealed_bytes(ArrayType(value.shape, value.dtype.name)), np.uint8)
        writer.seal(value, TagRecord(b"p" * 32, b"o" * 16, 7), out)
        parts.append(out.tobytes())
    return b"".join(parts)
