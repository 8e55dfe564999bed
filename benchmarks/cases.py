"""The training steps that the benchmarks measure: the examples' own, on random data.

Only the sizes are chosen here. The data is random because no cost here depends on its values.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import linen, nnx

from examples import common, models, resnet, transformer, vit

IMAGE_SHAPE = (32, 32, 3)
NUM_CLASSES = 10
VOCABULARY = 256
SEQUENCE_LENGTH = 128
BATCHES = 4  # distinct batches, to be used in turn

Step = Callable[[Any, common.Batch], tuple[Any, common.Metrics]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step to measure.

    Attributes:
      title: names it in the table and in the plot.
      batch_size: examples in a step.
      checked_batch_size: examples in a step of the comparison in float64.
      goal: step time over plain's to stay below, on 2 cores, with `SignedPermutation`; infinite
        where nobody set one.
      build: returns the plain step and its first state.
      draw_batch: returns a random batch of the given size.
    """

    title: str
    batch_size: int
    checked_batch_size: int
    goal: float
    build: Callable[[], tuple[Step, Any]]
    draw_batch: Callable[[np.random.Generator, int], common.Batch]

    def batches(self, size: int) -> list[common.Batch]:
        """Returns `BATCHES` batches, the same in every process."""
        rng = np.random.default_rng(0)
        return [self.draw_batch(rng, size) for _ in range(BATCHES)]


def _build_resnet(name: str) -> tuple[Step, Any]:
    model = models.resnet(name, NUM_CLASSES)
    schedule = optax.constant_schedule(0.1)
    return resnet.train_step, resnet.create_state(model, IMAGE_SHAPE, schedule, seed=0)


def _build_transformer(blocks: int = 4, width: int = 256, heads: int = 4) -> tuple[Step, Any]:
    # Dropout costs both sides the same, so leaving it out makes the ratio stricter.
    model = models.Transformer(
        VOCABULARY,
        blocks=blocks,
        width=width,
        heads=heads,
        sequence_length=SEQUENCE_LENGTH,
        dropout_rate=0.0,
    )
    state = transformer.create_state(model, optax.constant_schedule(1e-3), seed=0)
    return transformer.train_step, state


def _build_vit(blocks: int = 6, width: int = 384, heads: int = 6) -> tuple[Step, Any]:
    model = models.VisionTransformer(
        IMAGE_SHAPE, NUM_CLASSES, blocks=blocks, width=width, heads=heads, patch=4, rngs=nnx.Rngs(0)
    )
    if jax.config.read("jax_enable_x64"):
        for block in model.blocks:
            block.attention.attention_fn = _attention_in_float64
    graphdef, state = vit.create_state(model, optax.constant_schedule(1e-3))
    return vit.make_train_step(graphdef), state


def _attention_in_float64(
    query: jax.Array, key: jax.Array, value: jax.Array, **_: Any
) -> jax.Array:
    """Stands in for nnx's attention, whose softmax is float32 whatever it is given."""
    return linen.dot_product_attention(query, key, value)


def _draw_images(rng: np.random.Generator, size: int) -> common.Batch:
    return {
        "image": rng.standard_normal((size, *IMAGE_SHAPE), np.float32),
        "label": rng.integers(NUM_CLASSES, size=size, dtype=np.int32),
    }


def _draw_text(rng: np.random.Generator, size: int) -> common.Batch:
    tokens = rng.integers(VOCABULARY, size=(size, SEQUENCE_LENGTH + 1), dtype=np.int32)
    return {"token": tokens[:, :-1], "label": tokens[:, 1:]}


CASES = {
    "resnet20": Case("ResNet-20", 128, 16, 1.3, lambda: _build_resnet("resnet20"), _draw_images),
    "resnet18": Case("ResNet-18", 64, 4, 1.25, lambda: _build_resnet("resnet18"), _draw_images),
    "transformer": Case("transformer", 8, 2, 1.8, _build_transformer, _draw_text),
    "vit": Case("ViT-S-like", 32, 4, 1.5, _build_vit, _draw_images),
}

# What an accelerator is for; the batches of the transformers hold 4,096 patches and 8,192 tokens.
_vit_b = functools.partial(_build_vit, blocks=12, width=768, heads=12)
_wide = functools.partial(_build_transformer, blocks=12, width=1024, heads=16)
LARGE = {
    "resnet50": Case("ResNet-50", 64, 2, math.inf, lambda: _build_resnet("resnet50"), _draw_images),
    "vit-b": Case("ViT-B-like", 64, 2, math.inf, _vit_b, _draw_images),
    "transformer-1024": Case("transformer, d 1024", 64, 1, math.inf, _wide, _draw_text),
}

# The same kinds of models, of a size for which seconds on a CPU do.
_vit_small = functools.partial(_build_vit, blocks=1, width=128, heads=2)
_narrow = functools.partial(_build_transformer, blocks=1, width=128, heads=2)
SMALL = {
    "resnet50": Case("ResNet-20", 8, 2, math.inf, lambda: _build_resnet("resnet20"), _draw_images),
    "vit-b": Case("ViT of one block", 8, 2, math.inf, _vit_small, _draw_images),
    "transformer-1024": Case("transformer of one block", 4, 1, math.inf, _narrow, _draw_text),
}
