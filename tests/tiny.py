"""A network and a data set that train in a moment."""

import numpy as np
from flax import nnx

from cifar.data import DataSet, Split


class Tiny(nnx.Module):
    """A network that compiles in a moment: convolution, BatchNorm, linear layer."""

    def __init__(self, num_classes, *, rngs):
        self.conv = nnx.Conv(3, 4, (4, 4), strides=4, padding=0, use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.linear = nnx.Linear(4, num_classes, rngs=rngs)

    def __call__(self, x, *, train):
        x = nnx.relu(self.bn(self.conv(x), use_running_average=not train))
        return self.linear(x.mean(axis=(1, 2)))


def make_split(images: int, seed: int) -> Split:
    """Images whose brightness depends on their class, of four."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(images) % 4).astype(np.int32)
    noise = rng.integers(0, 100, (images, 32, 32, 3))
    return Split((noise + 50 * labels[:, None, None, None]).clip(0, 255).astype(np.uint8), labels)


def make_data(*, pad: int = 0, flip: bool = False) -> DataSet:
    splits = make_split(22, 0), make_split(6, 1), make_split(70, 2)
    return DataSet("tiny", tuple("abcd"), *splits, (0.5,) * 3, (0.25,) * 3, pad, flip)
