"""Small language models after the published descriptions of today's architectures, in Flax NNX.

Written for `atlas.py`, from the papers that `atlas_lines.ARCHITECTURES` names: they keep where the
norms, activations and biases are, which is what decides on spheres, and leave out what does not
touch that (dropout, stochastic depth, long contexts, auxiliary losses). Queries, keys and values
are kernels of their own in all of them, with an axis for heads. What repeats lies under `blocks`,
and is stacked along a leading axis where all blocks are the same. Networks for images are in
`atlas_images`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from language.models import Attention, Decoder, Size, rotate
from language.recipes import ARCHITECTURES, Architecture

VOCABULARY, POSITIONS = 64, 24
WIDTH, DEPTH, HEADS = 64, 2, 4
# Small embeddings make a first block without a norm before it so small that the epsilon of the norm
# behind it counts, and spoils the invariance of its values: OLMo 2's, at a usual 0.02.
LARGE = nnx.initializers.normal(1.0)


def stacked(make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """DEPTH modules of one form, their parameters stacked along a leading axis."""

    @nnx.split_rngs(splits=DEPTH)
    @nnx.vmap
    def several(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return several(rngs)


def through(blocks: nnx.Module, x: jax.Array) -> jax.Array:
    """What stacked blocks make of `x`, one after another."""

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def step(x: jax.Array, block: nnx.Module) -> jax.Array:
        return block(x)

    return step(x, blocks)


class LanguageModel(nnx.Module):
    """Embedded tokens, stacked blocks, a norm and a head; learnt positions if asked for."""

    def __init__(self, make, norm, rngs: nnx.Rngs, *, positions: int = 0):
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, embedding_init=LARGE, rngs=rngs)
        self.positions = nnx.Embed(positions, WIDTH, rngs=rngs) if positions else None
        self.blocks = stacked(make, rngs)
        self.norm = norm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(jnp.arange(tokens.shape[1]))
        return self.head(self.norm(through(self.blocks, x)))


# GPT-2, whose block is also that of ViT.


class PreNormBlock(nnx.Module):
    """LayerNorm before attention and before two layers with GELU; biases everywhere."""

    def __init__(self, causal: bool, rngs: nnx.Rngs):
        self.causal = causal
        self.before_attention = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.before_feed_forward = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x[..., 0]) if self.causal else None
        x = x + self.attention(self.before_attention(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.before_feed_forward(x))))


def gpt2(rngs: nnx.Rngs) -> nnx.Module:
    """GPT-2; its head is a kernel of its own here, and not the embedding."""
    return LanguageModel(
        lambda rngs: PreNormBlock(True, rngs), nnx.LayerNorm, rngs, positions=POSITIONS
    )


# nGPT.


def unit(x: jax.Array) -> jax.Array:
    """Vectors along the last axis at length 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def project(inputs: int, outputs: int | tuple[int, ...], rngs: nnx.Rngs) -> nnx.LinearGeneral:
    return nnx.LinearGeneral(inputs, outputs, use_bias=False, rngs=rngs)


class NormalisedBlock(nnx.Module):
    """States on the unit sphere, moved towards those of attention and feed-forward layer."""

    def __init__(self, rngs: nnx.Rngs):
        heads, hidden = (HEADS, WIDTH // HEADS), 4 * WIDTH
        self.query, self.key, self.value = (project(WIDTH, heads, rngs) for _ in range(3))
        self.out = project(WIDTH, WIDTH, rngs)
        self.up, self.gate = (project(WIDTH, hidden, rngs) for _ in range(2))
        self.down = project(hidden, WIDTH, rngs)
        self.qk_scale = nnx.Param(jnp.ones(heads))
        self.up_scale, self.gate_scale = (nnx.Param(jnp.ones(hidden)) for _ in range(2))
        self.attention_rate, self.feed_forward_rate = (
            nnx.Param(jnp.full(WIDTH, 0.2)) for _ in range(2)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key = (unit(rotate(to(x))) * self.qk_scale[...] for to in (self.query, self.key))
        mixed = jax.nn.dot_product_attention(
            query, key, self.value(x), scale=(WIDTH // HEADS) ** 0.5, is_causal=True
        )
        x = unit(x + self.attention_rate[...] * (unit(self.out(mixed.reshape(x.shape))) - x))
        gate = nnx.silu(self.gate(x) * self.gate_scale[...] * WIDTH**0.5)
        y = unit(self.down(self.up(x) * self.up_scale[...] * gate))
        return unit(x + self.feed_forward_rate[...] * (y - x))


class NGPT(nnx.Module):
    """nGPT as its loss is: its weights' normalisation after each step is no part of that."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)  # lengths near 1
        self.blocks = stacked(NormalisedBlock, rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)
        self.head_scale = nnx.Param(jnp.full(VOCABULARY, WIDTH**0.5))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(through(self.blocks, self.embedding(tokens))) * self.head_scale[...]


# OLMoE.


class Experts(nnx.Module):
    """Gated layers, of which a router takes the best for each token, weighted by its softmax."""

    NUMBER, CHOSEN, HIDDEN = 8, 2, WIDTH // 2

    def __init__(self, rngs: nnx.Rngs):
        def kernels(inputs: int, outputs: int) -> nnx.Param:
            init = nnx.initializers.lecun_normal(batch_axis=0)
            return nnx.Param(init(rngs.params(), (self.NUMBER, inputs, outputs)))

        self.router = nnx.Linear(WIDTH, self.NUMBER, use_bias=False, rngs=rngs)
        self.gate, self.up = kernels(WIDTH, self.HIDDEN), kernels(WIDTH, self.HIDDEN)
        self.down = kernels(self.HIDDEN, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        weights = nnx.softmax(self.router(x))
        least = jax.lax.top_k(weights, self.CHOSEN)[0][..., -1:]
        weights = jnp.where(weights >= least, weights, 0)
        gate, up = (jnp.einsum("npi,eio->npeo", x, to[...]) for to in (self.gate, self.up))
        return jnp.einsum("npeo,eoi,npe->npi", nnx.silu(gate) * up, self.down[...], weights)


class ExpertsBlock(nnx.Module):
    """RMSNorm before attention and experts; queries and keys are normalised as wholes."""

    def __init__(self, rngs: nnx.Rngs):
        size = Size(VOCABULARY, WIDTH, DEPTH, HEADS)
        style = Architecture("before", "whole", "swiglu")
        self.before_attention = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = Attention(size, style, None, rngs)
        self.before_experts = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.experts = Experts(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.before_attention(x))
        return x + self.experts(self.before_experts(x))


def olmoe(rngs: nnx.Rngs) -> nnx.Module:
    """OLMoE."""
    return LanguageModel(ExpertsBlock, nnx.RMSNorm, rngs)


# Mamba 2.


class Mamba2Block(nnx.Module):
    """RMSNorm, a state space per head between two projections, and a gated RMSNorm in it."""

    STATE, TAPS, INNER = 16, 4, 2 * WIDTH

    def __init__(self, rngs: nnx.Rngs):
        mixed = self.INNER + 2 * self.STATE
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.into = project(WIDTH, self.INNER + mixed + HEADS, rngs)
        self.conv = nnx.Conv(
            mixed, mixed, (self.TAPS,), padding="CAUSAL", feature_group_count=mixed, rngs=rngs
        )
        self.step_bias, self.log_decay = (nnx.Param(jnp.zeros(HEADS)) for _ in range(2))
        self.skip = nnx.Param(jnp.ones(HEADS))
        self.gated_norm = nnx.RMSNorm(self.INNER, rngs=rngs)
        self.out = project(self.INNER, WIDTH, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        ends = [self.INNER, 2 * self.INNER + 2 * self.STATE]
        gate, mixed, steps = jnp.split(self.into(self.norm(x)), ends, -1)
        mixed = nnx.silu(self.conv(mixed))
        values, keys, queries = jnp.split(mixed, [self.INNER, self.INNER + self.STATE], -1)
        values = values.reshape(*x.shape[:2], HEADS, -1)
        steps = nnx.softplus(steps + self.step_bias[...])

        # The state at p is the sum over q <= p of exp(-sum of decays in between) steps keys values.
        total = jnp.cumsum(-steps * jnp.exp(self.log_decay[...]), axis=1)
        between = total[:, :, None] - total[:, None]
        causal = jnp.tri(x.shape[1], dtype=bool)[:, :, None]
        decay = jnp.exp(jnp.where(causal, between, -jnp.inf))
        y = jnp.einsum("nps,nqs,npqh,nqh,nqhd->nphd", queries, keys, decay, steps, values)
        y = (y + self.skip[...][:, None] * values).reshape(*x.shape[:2], -1)
        return x + self.out(self.gated_norm(y * nnx.silu(gate)))


def mamba2(rngs: nnx.Rngs) -> nnx.Module:
    """Mamba 2."""
    return LanguageModel(Mamba2Block, nnx.RMSNorm, rngs)


def decoder(name: str, rngs: nnx.Rngs) -> nnx.Module:
    """Llama, Qwen3, Gemma 3 or OLMo 2, as the example trains them, but for larger embeddings."""
    model = Decoder(Size(VOCABULARY, WIDTH, DEPTH, HEADS), ARCHITECTURES[name], rngs=rngs)
    embedding = model.embedding.embedding
    embedding[...] = embedding[...] / jnp.std(embedding[...])
    return model


NETWORKS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    **{name: partial(decoder, name) for name in ARCHITECTURES},
    "gpt2": gpt2,
    "ngpt": NGPT,
    "olmoe": olmoe,
    "mamba2": mamba2,
}


def batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Random tokens, and labels that have nothing to do with them."""
    tokens, labels = jax.random.randint(key, (2, 4, POSITIONS), 0, VOCABULARY)
    return tokens, labels
