"""Image sets by name, held in memory as uint8, and what the jitted step does to a batch of them.

`load` reads a set, `validation_split` chooses its validation images; `augment` and `normalise` are
pure JAX.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from images.recipes import DATASETS
from images.sources import DataError, Split, read_digits, read_folder, read_tfds

Channels = tuple[float, float, float]


class DataSet(NamedTuple):
    """A whole set with the treatment of its images; `train` includes those for validation.

    `mean` and `std` are per channel, of pixels / 255; `pad` (pixels) and `flip` are the
    augmentation of training images.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: Channels
    std: Channels
    pad: int
    flip: bool


class _Published(NamedTuple):
    """A set that TFDS provides, with the treatment that the published recipes give it."""

    builder: str
    mean: Channels
    std: Channels
    pad: int
    flip: bool


_PUBLISHED = {
    "cifar10": _Published(
        "cifar10", (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), pad=4, flip=True
    ),
    "cifar100": _Published(
        "cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), pad=4, flip=True
    ),
    "svhn": _Published("svhn_cropped", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), pad=0, flip=False),
}


def load(name: str, *, data_dir: str | Path) -> DataSet:
    """Reads a data set.

    Args:
      name: one of `recipes.DATASETS`, or folder:PATH, where PATH is a directory, .zip or
        .tar[.gz|.bz2|.xz] with images in train/CLASS/ and test/CLASS/.
      data_dir: where TFDS keeps cifar10, cifar100 and svhn, which are downloaded there once
        (svhn with its 1.2 GiB of extra images, which TFDS fetches too but we do not read).

    Returns:
      The data set, in an order that depends on its content only.

    Raises:
      DataError: the data is missing, damaged, cannot be downloaded, or a package is missing.
    """
    try:
        if name in _PUBLISHED:
            builder, mean, std, pad, flip = _PUBLISHED[name]
            where = _home_expanded(data_dir, "another --data_dir")
            classes, train, test = read_tfds(builder, where)
        elif name == "digits":
            classes, train, test = read_digits()
            (mean, std), pad, flip = _statistics(train.images), 4, False
        elif name.startswith("folder:") and name != "folder:":
            where = _home_expanded(name.removeprefix("folder:"), "the folder without it")
            classes, train, test = read_folder(where)
            (mean, std), pad, flip = _statistics(train.images), 4, True
        else:
            names = ", ".join((*DATASETS, "folder:PATH"))
            raise DataError(f"There is no data set {name!r}; choose from {names}.")
    except ImportError as error:
        raise DataError(
            f"Data set {name} needs the Python package {error.name or error}; "
            "install it with: pip install 'spherical-optax[examples]'"
        ) from error
    if len(classes) < 2:
        raise DataError(
            f"Data set {name} has the class {classes[0]} only; it needs at least 2 to tell apart."
        )
    return DataSet(name, classes, train, test, mean, std, pad, flip)


def _home_expanded(path: str | Path, remedy: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        message = f"There is no home directory for the ~ of {path}; name {remedy}."
        raise DataError(message) from error


def validation_split(total: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sets 5 % of the training images aside for validation, one at least.

    Args:
      total: number of images, at least 2.
      seed: chooses them, at least 0.

    Returns:
      The places of the images to train on, and of those for validation: int32, both ascending.
    """
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng(seed).permutation(total)[: max(1, total // 20)]] = True
    return np.flatnonzero(~chosen).astype(np.int32), np.flatnonzero(chosen).astype(np.int32)


def augment(key: jax.Array, images: jax.Array, *, pad: int, flip: bool) -> jax.Array:
    """Crops every image at random after padding it with black, and mirrors a random half.

    Args:
      key: a PRNG key.
      images: uint8 [n, height, width, channels].
      pad: black pixels on each side, so each image moves by -pad..pad pixels each way.
      flip: whether to mirror left to right with probability 1/2.

    Returns:
      uint8 of the same shape; with `pad=0` and `flip=False` the images themselves.
    """
    crop_key, flip_key = jax.random.split(key)
    if pad:
        offsets = jax.random.randint(crop_key, (len(images), 2), 0, 2 * pad + 1)
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

        def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

        images = jax.vmap(crop)(padded, offsets)
    if flip:
        coins = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(coins, images[:, :, ::-1], images)
    return images


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Returns (images / 255 - mean) / std in float32, for uint8 [..., 3] and 3 values each."""
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def _statistics(images: np.ndarray) -> tuple[Channels, Channels]:
    """Mean and standard deviation of pixels / 255 per channel; 1 stands in for a zero std."""
    total, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for start in range(0, len(images), 1000):  # in parts: the squares need 4 times the memory
        part = images[start : start + 1000]
        total += part.sum(axis=(0, 1, 2), dtype=np.int64)
        squares += np.square(part, dtype=np.uint32).sum(axis=(0, 1, 2), dtype=np.int64)
    count = images[..., 0].size
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    red, green, blue = (mean / 255).tolist()
    std_red, std_green, std_blue = np.where(std > 0, std / 255, 1.0).tolist()
    return (red, green, blue), (std_red, std_green, std_blue)
