"""Small networks for images after the published descriptions, in Flax NNX; see `atlas_blocks`.

All take images as float [n, SIDE, SIDE, 3] and give logits [n, CLASSES].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from architectures.atlas_blocks import HEADS, WIDTH, PreNormBlock, project, stacked, through, unit

CLASSES = 10
SIDE = 16


class ViT(nnx.Module):
    """A vision transformer on patches of 4x4 pixels, with a class token."""

    def __init__(self, rngs: nnx.Rngs):
        self.patches = nnx.Conv(3, WIDTH, (4, 4), strides=4, rngs=rngs)
        self.token = nnx.Param(jax.random.normal(rngs.params(), (WIDTH,)))
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (SIDE**2 // 16 + 1, WIDTH)))
        self.blocks = stacked(lambda rngs: PreNormBlock(False, rngs), rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.patches(images).reshape(len(images), -1, WIDTH)
        token = jnp.broadcast_to(self.token[...], (len(images), 1, WIDTH))
        x = jnp.concatenate([token, x], 1) + self.positions[...]
        return self.head(self.norm(through(self.blocks, x)[:, 0]))


# Swin v2.


class WindowBlock(nnx.Module):
    """Cosine attention in windows of 4x4 and two layers, each with LayerNorm behind it."""

    WINDOW, HIDDEN = 4, 32

    def __init__(self, shift: int, rngs: nnx.Rngs):
        self.shift = shift
        heads = (HEADS, WIDTH // HEADS)
        self.query, self.value = (nnx.LinearGeneral(WIDTH, heads, rngs=rngs) for _ in range(2))
        self.key = project(WIDTH, heads, rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.log_scale = nnx.Param(jnp.full(HEADS, jnp.log(10.0)))
        self.position_up = nnx.Linear(2, self.HIDDEN, rngs=rngs)
        self.position_down = project(self.HIDDEN, HEADS, rngs)
        self.behind_attention = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up, self.down = (
            nnx.Linear(*sizes, rngs=rngs) for sizes in ((WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
        )
        self.behind_feed_forward = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.roll(x, (-self.shift, -self.shift), (1, 2))
        y = jnp.roll(self.attend(y), (self.shift, self.shift), (1, 2))
        x = x + self.behind_attention(y)
        return x + self.behind_feed_forward(self.down(nnx.gelu(self.up(x))))

    def attend(self, x: jax.Array) -> jax.Array:
        """Attention in each window; images [n, height, width, features]."""
        n, height, width, _ = x.shape
        form = n, height // self.WINDOW, self.WINDOW, width // self.WINDOW, self.WINDOW, -1

        def windows(x: jax.Array) -> jax.Array:
            return x.reshape(form).swapaxes(2, 3).reshape(-1, self.WINDOW**2, *x.shape[3:])

        query, key, value = map(windows, (self.query(x), self.key(x), self.value(x)))
        logits = jnp.einsum("wphd,wqhd->whpq", unit(query), unit(key))
        logits = logits * jnp.exp(self.log_scale[...])[:, None, None] + self.position_bias()
        if self.shift:  # what the roll brought together does not see each other
            row, column = ((jnp.arange(s) >= s - self.shift) for s in (height, width))
            region = jnp.broadcast_to(2 * row[:, None] + column, (n, height, width))[..., None]
            region = windows(region)[..., 0]
            logits = jnp.where((region[:, :, None] == region[:, None])[:, None], logits, -jnp.inf)
        mixed = jnp.einsum("whpq,wqhd->wphd", nnx.softmax(logits), value)
        form = n, height // self.WINDOW, width // self.WINDOW, self.WINDOW, self.WINDOW, -1
        return self.out(mixed.reshape(form).swapaxes(2, 3).reshape(x.shape))

    def position_bias(self) -> jax.Array:
        """A bias [heads, position, position], of two layers over the logarithms of distances."""
        places = jnp.stack(jnp.divmod(jnp.arange(self.WINDOW**2), self.WINDOW), -1)
        apart = (places[:, None] - places).astype(jnp.float32)
        bias = self.position_down(
            nnx.relu(self.position_up(jnp.sign(apart) * jnp.log1p(abs(apart))))
        )
        return 16 * nnx.sigmoid(bias).transpose(2, 0, 1)


class SwinV2(nnx.Module):
    """One stage of Swin v2 on patches of 2x2 pixels, with shifted windows in its second block."""

    def __init__(self, rngs: nnx.Rngs):
        self.patches = nnx.Conv(3, WIDTH, (2, 2), strides=2, rngs=rngs)
        self.patch_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.blocks = nnx.List([WindowBlock(shift, rngs) for shift in (0, 2)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.patch_norm(self.patches(images))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean((1, 2)))


# ConvNeXt.


class ConvNeXtBlock(nnx.Module):
    """A 7x7 convolution of each channel, LayerNorm, and two layers with GELU and a small gain."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(WIDTH, WIDTH, (7, 7), feature_group_count=WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.gain = nnx.Param(jnp.full(WIDTH, 1e-6))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.gain[...] * self.down(nnx.gelu(self.up(self.norm(self.conv(x)))))


class ConvNeXt(nnx.Module):
    """One stage of ConvNeXt on patches of 2x2 pixels."""

    def __init__(self, rngs: nnx.Rngs):
        self.patches = nnx.Conv(3, WIDTH, (2, 2), strides=2, rngs=rngs)
        self.patch_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.blocks = stacked(ConvNeXtBlock, rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = through(self.blocks, self.patch_norm(self.patches(images)))
        return self.head(self.norm(x.mean((1, 2))))


# ResNet.

Norm = Callable[..., nnx.Module]  # of a number of channels, and rngs


class BottleneckBlock(nnx.Module):
    """A 3x3 convolution between two of 1x1, each with a norm, and a shortcut with a norm."""

    def __init__(self, inputs: int, hidden: int, stride: int, norm: Norm, rngs: nnx.Rngs):
        def conv(inputs: int, outputs: int, size: int = 1, strides: int = 1) -> nnx.Conv:
            form = {"kernel_size": (size, size), "strides": strides, "use_bias": False}
            return nnx.Conv(inputs, outputs, **form, rngs=rngs)

        outputs = 4 * hidden
        self.conv1, self.norm1 = conv(inputs, hidden), norm(hidden, rngs=rngs)
        self.conv2 = conv(hidden, hidden, 3, stride)
        self.norm2 = norm(hidden, rngs=rngs)
        self.conv3, self.norm3 = conv(hidden, outputs), norm(outputs, rngs=rngs)
        self.shortcut = conv(inputs, outputs, strides=stride) if inputs != outputs else None
        self.shortcut_norm = norm(outputs, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return nnx.relu(x + self.norm3(self.conv3(y)))


class ResNet(nnx.Module):
    """A stem and two stages of one block each, with a norm behind each convolution."""

    def __init__(self, norm: Norm, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 32, (3, 3), use_bias=False, rngs=rngs)
        self.stem_norm = norm(32, rngs=rngs)
        forms = ((32, 16, 1), (64, 32, 2))
        self.blocks = nnx.List([BottleneckBlock(*form, norm, rngs) for form in forms])
        self.head = nnx.Linear(128, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


BATCH_NORM = partial(nnx.BatchNorm, use_running_average=False)
GROUP_NORM = partial(nnx.GroupNorm, num_groups=4)

NETWORKS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    "vit": ViT,
    "swin2": SwinV2,
    "convnext": ConvNeXt,
    "resnet_bn": partial(ResNet, BATCH_NORM),
    "resnet_gn": partial(ResNet, GROUP_NORM),
}


def batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images of noise, and random labels."""
    of_images, of_labels = jax.random.split(key)
    images = jax.random.normal(of_images, (8, SIDE, SIDE, 3))
    return images, jax.random.randint(of_labels, (8,), 0, CLASSES)
