"""Decoders after Llama 3, Qwen3, Gemma 3 and OLMo 2, in Flax NNX.

A decoder takes tokens as integers [n, positions] and gives logits [n, positions, vocabulary]: an
embedding, blocks of attention and feed-forward layers, a last norm, and a head of its own. There
are no biases; positions are rotary. The blocks are stacked along a leading axis and run in one
`nnx.scan`, so that the kernel of all queries has the shape (depth, width, heads, head size).

`dtype` is that of activations, by default the parameters' own. Parameters stay in float32 with any,
and so do the norms' sums.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike as Dtype

from language.recipes import Architecture

ROTARY_BASE = 10_000.0
ACTIVATIONS = {
    "swiglu": nnx.silu,
    "geglu": nnx.gelu,
    "squared_relu": lambda x: jnp.square(nnx.relu(x)),  # not gated
}


class Size(NamedTuple):
    """Of a decoder."""

    vocabulary: int
    width: int  # even multiple of heads
    depth: int  # number of blocks
    heads: int


class Attention(nnx.Module):
    """Causal attention with rotary positions."""

    def __init__(self, size: Size, style: Architecture, dtype: Dtype | None, rngs: nnx.Rngs):
        heads, head_size = size.heads, size.width // size.heads

        def projection() -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                size.width, (heads, head_size), use_bias=False, dtype=dtype, rngs=rngs
            )

        self.query, self.key, self.value = projection(), projection(), projection()
        self.out = _linear(size.width, size.width, dtype, rngs, variance=0.5 / size.depth)
        self.normalised = style.qk_norm != "none"
        if self.normalised:
            axes = (-2, -1) if style.qk_norm == "whole" else (-1,)
            features = size.width if style.qk_norm == "whole" else head_size

            def norm() -> nnx.RMSNorm:
                return nnx.RMSNorm(
                    features, reduction_axes=axes, feature_axes=axes, dtype=dtype, rngs=rngs
                )

            self.query_norm, self.key_norm = norm(), norm()

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.normalised:
            query, key = self.query_norm(query), self.key_norm(key)
        mixed = jax.nn.dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        return self.out(mixed.reshape(x.shape))


class FeedForward(nnx.Module):
    """Two layers, or with a gated activation two and a gate."""

    def __init__(self, size: Size, style: Architecture, dtype: Dtype | None, rngs: nnx.Rngs):
        self.activation = style.activation
        hidden = 4 * size.width
        if self.activation != "squared_relu":
            hidden = 8 * size.width // 3  # for as many weights with a gate
            self.gate = _linear(size.width, hidden, dtype, rngs)
        self.up = _linear(size.width, hidden, dtype, rngs)
        self.down = _linear(hidden, size.width, dtype, rngs, variance=0.5 / size.depth)

    def __call__(self, x: jax.Array) -> jax.Array:
        activate = ACTIVATIONS[self.activation]
        if self.activation == "squared_relu":
            return self.down(activate(self.up(x)))
        return self.down(activate(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and feed-forward layer, each added to what goes in, with norms before or behind."""

    def __init__(self, size: Size, style: Architecture, dtype: Dtype | None, rngs: nnx.Rngs):
        self.norms = style.norms
        self.attention = Attention(size, style, dtype, rngs)
        self.feed_forward = FeedForward(size, style, dtype, rngs)

        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(size.width, dtype=dtype, rngs=rngs)

        if self.norms != "behind":
            self.before_attention, self.before_feed_forward = norm(), norm()
        if self.norms != "before":
            self.behind_attention, self.behind_feed_forward = norm(), norm()

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.norms == "behind" else self.before_attention(x)
        y = self.attention(y)
        x = x + (y if self.norms == "before" else self.behind_attention(y))
        y = x if self.norms == "behind" else self.before_feed_forward(x)
        y = self.feed_forward(y)
        return x + (y if self.norms == "before" else self.behind_feed_forward(y))


class Decoder(nnx.Module):
    """A language model.

    Args:
      size: of the network.
      style: of its blocks, one of `recipes.ARCHITECTURES`.
      unroll: whether the blocks are compiled one by one and not as a loop.
      dtype: of activations.
      rngs: for the initial parameters.
    """

    def __init__(
        self,
        size: Size,
        style: Architecture,
        *,
        unroll: bool = False,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.unroll = unroll
        self.embedding = nnx.Embed(
            size.vocabulary,
            size.width,
            embedding_init=nnx.initializers.normal(1.0),
            dtype=dtype,
            rngs=rngs,
        )

        @nnx.split_rngs(splits=size.depth)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(size, style, dtype, rngs)

        self.blocks = stacked(rngs)
        self.norm = nnx.RMSNorm(size.width, dtype=dtype, rngs=rngs)
        self.head = _linear(size.width, size.vocabulary, dtype, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, unroll=self.unroll or 1)
        def through(x: jax.Array, block: Block) -> jax.Array:
            return block(x)

        return self.head(self.norm(through(self.embedding(tokens), self.blocks)))


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions: turns pairs of features by angles that grow with the position.

    Args:
      x: [n, positions, heads, head size]; feature i of the first half and of the second are a pair,
        which turns by the position times ROTARY_BASE^(-2 i / head size).
    """
    positions, half = x.shape[1], x.shape[-1] // 2
    rates = ROTARY_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(positions, dtype=jnp.float32)[:, None, None] * rates
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _linear(
    inputs: int, outputs: int, dtype: Dtype | None, rngs: nnx.Rngs, *, variance: float = 1.0
) -> nnx.Linear:
    """A linear layer without bias; its weights start with this variance over their inputs."""
    init = nnx.initializers.variance_scaling(variance, "fan_in", "truncated_normal")
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs)
