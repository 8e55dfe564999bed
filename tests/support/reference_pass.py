"""Passes in NumPy: what `enclave_runtime.schemes.kernels.passes` computes, operation by operation.

Each element goes through the same roundings in the same order as in the kernels, so that the two
agree bit for bit.
"""

import numpy as np

from enclave_runtime.schemes.kernels.passes import Pass


def reference(plan: Pass) -> np.ndarray:
    """What the target of a pass takes, dtype[outer, kept, inner]."""
    copies, gathers, size = plan.order.shape
    source = plan.source.reshape(plan.outer, plan.rows, plan.inner)
    extra = plan.extra.reshape(plan.outer, size - plan.rows, plan.inner)
    results = []
    for index, tile in enumerate(np.concatenate([source, extra], axis=1)):
        copy = index * copies // plan.outer
        for stage in range(gathers):
            tile = tile[plan.order[copy, stage]] * plan.scale[copy, stage, :, None]
            if stage < gathers - 1:
                tile = _transformed(plan, tile)
        results.append(tile[: plan.kept])
    return np.stack(results)


def _transformed(plan: Pass, gathered: np.ndarray) -> np.ndarray:
    """H of one gathered tile; see `Blocks`."""
    blocks, size = plan.blocks, len(gathered)
    count, tail = divmod(size, blocks.size)
    mixed = np.full_like(gathered, np.nan)
    for number in range(count):
        at = number * blocks.size if number < count - 1 else blocks.last
        mixed[at : at + blocks.size] = _butterflies(gathered[at : at + blocks.size])
    if tail:
        bare = slice(blocks.bare, blocks.bare + tail)
        mixed[bare] = gathered[bare]
        overlapping = slice(blocks.overlapping, blocks.overlapping + blocks.size)
        mixed[overlapping] = _butterflies(mixed[overlapping] * plan.level[:, None])
    return mixed


def _butterflies(x: np.ndarray) -> np.ndarray:
    """The Hadamard transform of 2**k rows, not normalised."""
    distance = 1
    while distance < len(x):
        pairs = x.reshape(-1, 2, distance, x.shape[1])
        first, second = pairs[:, 0], pairs[:, 1]
        x = np.stack([first + second, first - second], axis=1).reshape(x.shape)
        distance *= 2
    return x
