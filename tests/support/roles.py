"""A step whose arguments a client seals, and values that are carried in files."""

from pathlib import Path
from typing import Any

import jax

import tempo_jax as tempo
from tests.support.serving import sealed_for
from tests.support.steps import MOMENTUM_BATCH
from tests.support.steps import momentum_state as initial_state

X, Y = MOMENTUM_BATCH


def sealed_step(client: tempo.Enclave) -> list[Any]:
    """The arguments of `train_step`, sealed."""
    return sealed_for(client, state=initial_state(), x=X, y=Y)


def carry(path: Path, tree: Any) -> Any:
    """Saves sealed values and loads them as another process would."""
    tempo.save_sealed(path, tree)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        tree,
        is_leaf=lambda x: isinstance(x, tempo.SealedArray),
    )
    return tempo.load_sealed(path, shapes)


def scaled(x, y):
    return tempo.reveal(x * 2 + y)
