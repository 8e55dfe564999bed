"""The models of the examples, with the sizes as parameters.

They stand apart from the scripts that train them because the benchmarks measure the same models.
Nothing here knows of `tempo_jax`: a model needs no change to be shielded.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


def _conv(features: int, size: int, strides: int = 1) -> nn.Conv:
    """Returns a square convolution without bias; a batch norm follows it and brings its own."""
    return nn.Conv(
        features,
        (size, size),
        (strides, strides),
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    )


def _batch_norm(train: bool) -> Callable[..., nn.BatchNorm]:
    """Returns the norm's constructor; its running statistics suit short training."""
    # Flax's 0.99 would still hold two thirds of the initial statistics after 40 steps.
    return functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.8)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, as in ResNet-18 and ResNet-20.

    Attributes:
      features: output channels of the block.
      strides: by how much the block shrinks height and width.
    """

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (batch, height, width, channels) to (batch, height/s, width/s, features)."""
        norm = _batch_norm(train)
        y = nn.relu(norm()(_conv(self.features, 3, self.strides)(x)))
        y = norm()(_conv(self.features, 3)(y))
        if x.shape != y.shape:
            x = norm()(_conv(self.features, 1, self.strides)(x))
        return nn.relu(x + y)


class BottleneckBlock(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut, as in ResNet-50.

    Attributes:
      features: channels of the 3×3 convolution; the block puts out four times as many.
      strides: by how much the block shrinks height and width.
    """

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (batch, height, width, channels) to (batch, height/s, width/s, 4·features)."""
        norm = _batch_norm(train)
        y = nn.relu(norm()(_conv(self.features, 1)(x)))
        y = nn.relu(norm()(_conv(self.features, 3, self.strides)(y)))
        y = norm()(_conv(4 * self.features, 1)(y))
        if x.shape != y.shape:
            x = norm()(_conv(4 * self.features, 1, self.strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network with the CIFAR stem: one 3×3 convolution and no pooling before the blocks.

    Attributes:
      block: `BasicBlock` or `BottleneckBlock`.
      stages: blocks in each stage; each stage after the first halves height and width.
      width: features of the first stage; each later stage doubles them.
      num_classes: length of the logits.

    References:
      He et al., Deep Residual Learning for Image Recognition, CVPR 2016,
      https://arxiv.org/abs/1512.03385
    """

    block: type[BasicBlock] | type[BottleneckBlock]
    stages: tuple[int, ...]
    width: int
    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes).

        Args:
          images: float images.
          train: normalize by the batch's own statistics and update the running ones (which are in
            the collection ``batch_stats``), rather than normalize by the running ones.
        """
        x = nn.relu(_batch_norm(train)()(_conv(self.width, 3)(images)))
        for stage, blocks in enumerate(self.stages):
            for index in range(blocks):
                strides = 2 if stage > 0 and index == 0 else 1
                x = self.block(self.width * 2**stage, strides)(x, train)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet20": functools.partial(ResNet, block=BasicBlock, stages=(3, 3, 3), width=16),
    "resnet18": functools.partial(ResNet, block=BasicBlock, stages=(2, 2, 2, 2), width=64),
    "resnet50": functools.partial(ResNet, block=BottleneckBlock, stages=(3, 4, 6, 3), width=64),
}


def resnet(name: str, num_classes: int) -> ResNet:
    """Returns the network called `name`, a key of `RESNETS`."""
    return RESNETS[name](num_classes=num_classes)


class ConvNet(nn.Module):
    """Three convolutions and a dense layer: small enough to fit in seconds.

    Attributes:
      num_classes: length of the logits.
      width: features of the first convolution; each later one doubles them.
    """

    num_classes: int
    width: int = 32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        x = nn.relu(nn.Conv(self.width, (3, 3))(images))
        x = nn.relu(nn.Conv(2 * self.width, (3, 3), (2, 2))(x))
        x = nn.relu(nn.Conv(4 * self.width, (3, 3), (2, 2))(x))
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


class TransformerBlock(nn.Module):
    """Self-attention and a gelu layer four times as wide, each on a normalized residual stream.

    Attributes:
      heads: attention heads; divides the width of the input.
      dropout_rate: share of attention weights, and of each branch's output, that is dropped.
    """

    heads: int
    dropout_rate: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """Maps (batch, length, width) to the same shape; `mask` says what may attend to what."""
        width = x.shape[-1]
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(
            self.heads, dropout_rate=self.dropout_rate, deterministic=not train
        )(y, mask=mask)
        x = x + nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        y = nn.Dense(width)(y)
        return x + nn.Dropout(self.dropout_rate, deterministic=not train)(y)


class Transformer(nn.Module):
    """A causal language model over a small vocabulary.

    Attributes:
      vocabulary: number of distinct tokens, and length of the logits.
      blocks: number of `TransformerBlock`.
      width: length of a token's vector.
      heads: attention heads in each block.
      sequence_length: the longest input; there is one learned position for each place.
      dropout_rate: see `TransformerBlock`; drawn from the random stream ``dropout``.
    """

    vocabulary: int
    blocks: int = 2
    width: int = 128
    heads: int = 4
    sequence_length: int = 64
    dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        """Maps tokens (batch, length) to the logits of what follows (batch, length, vocabulary)."""
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (1, self.sequence_length, self.width)
        )
        x = nn.Embed(self.vocabulary, self.width)(tokens) + positions[:, : tokens.shape[1]]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.blocks):
            x = TransformerBlock(self.heads, self.dropout_rate)(x, mask, train)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


class VisionTransformerBlock(nnx.Module):
    """Self-attention and a gelu layer four times as wide, each on a normalized residual stream."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        """Draws the block's weights; `heads` divides `width`."""
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.hidden_norm = nnx.LayerNorm(width, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, rngs=rngs)
        self.output = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, patches, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.output(nnx.gelu(self.hidden(self.hidden_norm(x))))


class VisionTransformer(nnx.Module):
    """A vision transformer that averages its patches instead of carrying a class token.

    References:
      Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021,
      https://arxiv.org/abs/2010.11929
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        blocks: int = 3,
        width: int = 192,
        heads: int = 3,
        patch: int = 8,
        rngs: nnx.Rngs,
    ):
        """Draws the weights.

        Args:
          image_shape: height, width and channels of the images.
          num_classes: length of the logits.
          blocks: number of `VisionTransformerBlock`.
          width: length of a patch's vector.
          heads: attention heads in each block; divides `width`.
          patch: side of a patch in pixels; divides the images' height and width.
          rngs: source of the initial weights.
        """
        height, columns, channels = image_shape
        if height % patch or columns % patch:
            raise ValueError(f"patch {patch} does not divide images of {height}×{columns} pixels.")
        self.patches = nnx.Conv(
            channels, width, (patch, patch), (patch, patch), padding="VALID", rngs=rngs
        )
        count = (height // patch) * (columns // patch)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, count, width)))
        self.blocks = nnx.List(
            VisionTransformerBlock(width, heads, rngs=rngs) for _ in range(blocks)
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=1))
