"""ResNet-18, ResNet-20 and VGG-16 for 32x32 images, in Flax NNX.

All three take images as float [n, 32, 32, 3] and give logits [n, num_classes]. Every convolution
has no bias and is followed by BatchNorm, so each of its filters lives on a sphere; the paths of
these kernels, and no others, contain `conv` (`blocks/0/conv1/kernel`). BatchNorm's scales and
biases and the linear layer are not radially invariant.

`dtype` is that of activations, convolutions and logits, by default the parameters' own. Parameters
and BatchNorm's statistics, and the sums that make these, stay in float32 with any.

Kernels start uniform in +-1/sqrt(fan_in), as in the implementation whose recipes are used here: the
radius at the start sets the effective learning rate, and Flax's default is 1.7 times larger.

BatchNorm's running variance is Flax's, the *biased* one, where PyTorch keeps the unbiased one: at
batch 128 they differ by 0.01 % where a channel has 8x8 positions, by 0.2 % where it has 2x2. The
logits of tests/goldens in evaluation mode are those at running mean 0 and variance 1.
"""

from collections.abc import Callable

import jax
from flax import nnx
from jax.typing import DTypeLike as Dtype

# Variance 1/(3 fan_in), which is what a uniform distribution in +-1/sqrt(fan_in) has.
_kernel_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _conv(
    inputs: int, outputs: int, size: int, stride: int, dtype: Dtype | None, rngs: nnx.Rngs
) -> nnx.Conv:
    # Explicit padding: with stride 2, "SAME" would pad (0, 1) and not (1, 1) as the original does.
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=_kernel_init,
        dtype=dtype,
        rngs=rngs,
    )


def _batch_norm(channels: int, dtype: Dtype | None, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)


def _linear(inputs: int, outputs: int, dtype: Dtype | None, rngs: nnx.Rngs) -> nnx.Linear:
    limit = inputs**-0.5

    def bias_init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return nnx.Linear(
        inputs, outputs, kernel_init=_kernel_init, bias_init=bias_init, dtype=dtype, rngs=rngs
    )


def _relu(x: jax.Array) -> jax.Array:
    # The next convolution's gradient reads this transposed. Without the barrier XLA does not read
    # it on a CPU but computes it anew there, out of order, from as far back as the last block.
    return jax.lax.optimization_barrier(nnx.relu(x))


class Block(nnx.Module):
    """Two 3x3 convolutions and a shortcut, with a 1x1 convolution where the shape changes."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, dtype: Dtype | None, rngs: nnx.Rngs
    ):
        self.conv1 = _conv(inputs, outputs, 3, stride, dtype, rngs)
        self.bn1 = _batch_norm(outputs, dtype, rngs)
        self.conv2 = _conv(outputs, outputs, 3, 1, dtype, rngs)
        self.bn2 = _batch_norm(outputs, dtype, rngs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut_conv = _conv(inputs, outputs, 1, stride, dtype, rngs)
            self.shortcut_bn = _batch_norm(outputs, dtype, rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = _relu(self.bn1(self.conv1(x), use_running_average=not train))
        y = self.bn2(self.conv2(y), use_running_average=not train)
        if self.projects:
            x = self.shortcut_bn(self.shortcut_conv(x), use_running_average=not train)
        return _relu(x + y)


class ResNet(nnx.Module):
    """A 3x3 stem, stages of blocks that halve and widen the image, a mean, a linear layer."""

    def __init__(
        self,
        widths: tuple[int, ...],
        blocks_per_stage: int,
        num_classes: int,
        *,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.conv1 = _conv(3, widths[0], 3, 1, dtype, rngs)
        self.bn1 = _batch_norm(widths[0], dtype, rngs)
        blocks, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            for i in range(blocks_per_stage):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Block(inputs, width, stride, dtype=dtype, rngs=rngs))
                inputs = width
        self.blocks = nnx.List(blocks)
        self.linear = _linear(widths[-1], num_classes, dtype, rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits float [n, num_classes] of images float [n, height, width, 3].

        With `train`, BatchNorm uses the batch's statistics and updates the running ones in place.
        """
        x = _relu(self.bn1(self.conv1(x), use_running_average=not train))
        for block in self.blocks:
            x = block(x, train=train)
        return self.linear(x.mean(axis=(1, 2)))


class ConvNorm(nnx.Module):
    """A 3x3 convolution, BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Dtype | None, rngs: nnx.Rngs):
        self.conv = _conv(inputs, outputs, 3, 1, dtype, rngs)
        self.bn = _batch_norm(outputs, dtype, rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return _relu(self.bn(self.conv(x), use_running_average=not train))


class VGG(nnx.Module):
    """Stages of `ConvNorm`, each ended by a 2x2 max-pool, and one linear layer."""

    def __init__(
        self,
        stages: tuple[tuple[int, ...], ...],
        num_classes: int,
        *,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        inputs = 3
        layers, pooled_after = [], []
        for widths in stages:
            for width in widths:
                layers.append(ConvNorm(inputs, width, dtype=dtype, rngs=rngs))
                inputs = width
            pooled_after.append(len(layers) - 1)
        self.layers = nnx.List(layers)
        self.pooled_after = tuple(pooled_after)
        self.linear = _linear(inputs, num_classes, dtype, rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits float [n, num_classes] of images float [n, 32, 32, 3].

        With `train`, BatchNorm uses the batch's statistics and updates the running ones in place.
        """
        for i, layer in enumerate(self.layers):
            x = layer(x, train=train)
            if i in self.pooled_after:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.linear(x.reshape(x.shape[0], -1))


def resnet20(num_classes: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs) -> ResNet:
    """The 0.27 M parameter CIFAR network: 3 stages of 3 blocks, 16, 32 and 64 channels."""
    return ResNet((16, 32, 64), 3, num_classes, dtype=dtype, rngs=rngs)


def resnet18(num_classes: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs) -> ResNet:
    """The 11 M parameter network in its CIFAR form: 4 stages of 2 blocks, 64 to 512 channels."""
    return ResNet((64, 128, 256, 512), 2, num_classes, dtype=dtype, rngs=rngs)


def vgg16(num_classes: int, *, dtype: Dtype | None = None, rngs: nnx.Rngs) -> VGG:
    """The 15 M parameter network: 13 convolutions in 5 stages, 64 to 512 channels."""
    stages = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
    return VGG(stages, num_classes, dtype=dtype, rngs=rngs)


MODELS: dict[str, Callable[..., nnx.Module]] = {
    "resnet18": resnet18,
    "resnet20": resnet20,
    "vgg16": vgg16,
}
