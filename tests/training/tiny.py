"""A network and a data set that train in a moment."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

from images import data, figures, models, programs
from images.data import DataSet, Split
from training import loop


class Tiny(nnx.Module):
    """A network that compiles in a moment: convolution, BatchNorm, linear layer."""

    def __init__(self, num_classes, *, dtype=None, rngs):
        kind = {"dtype": dtype, "rngs": rngs}
        self.conv = nnx.Conv(3, 4, (4, 4), strides=4, padding=0, use_bias=False, **kind)
        self.bn = nnx.BatchNorm(4, momentum=0.9, **kind)
        self.linear = nnx.Linear(4, num_classes, **kind)

    def __call__(self, x, *, train):
        x = nnx.relu(self.bn(self.conv(x), use_running_average=not train))
        return self.linear(x.mean(axis=(1, 2)))


def make_split(images: int, seed: int) -> Split:
    """Images whose brightness depends on their class, of four."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(images) % 4).astype(np.int32)
    noise = rng.integers(0, 100, (images, 32, 32, 3))
    return Split((noise + 50 * labels[:, None, None, None]).clip(0, 255).astype(np.uint8), labels)


def write_images(root: Path) -> Path:
    """A data set as users have them: 4 classes of 12 images to train on and 4 to test on."""
    for part, count in (("train", 48), ("test", 16)):
        split = make_split(count, 0)
        for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            directory = root / part / "abcd"[label]
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(directory / f"{i}.png")
    return root


def make_data(*, pad: int = 0, flip: bool = False) -> DataSet:
    """Of 23 training images, one is for validation."""
    splits = make_split(23, 0), make_split(70, 2)
    return DataSet("tiny", tuple("abcd"), *splits, (0.5,) * 3, (0.25,) * 3, pad, flip)


def close(a: Any, b: Any, tolerance: float) -> None:
    """Compare two trees, relative to each leaf's largest element."""

    def of_leaf(x, y):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1.0, np.abs(y).max()))

    jax.tree.map(of_leaf, a, b)


def make_tiny(seed: int) -> Tiny:
    return Tiny(4, rngs=nnx.Rngs(seed))


def start(tx, images, *, seeds=(0,), make_model=make_tiny, **_) -> tuple:
    """What `fit` takes, but for the trainer."""
    mesh = programs.make_mesh(jax.devices()[:1])
    return programs.start_run(make_model, tx, seeds, len(images.train.labels), mesh)[1:]


def prepare(
    tx: optax.GradientTransformation,
    images: DataSet,
    *,
    batch_size: int,
    make_model: Callable[[int], nnx.Module] = make_tiny,
    seeds: tuple[int, ...] = (0,),
    driver: str | None = None,
    devices: int = 1,
) -> tuple[loop.Trainer, programs.Seeds, loop.Run]:
    """What `fit` takes."""
    mesh = programs.make_mesh(jax.devices()[:devices])
    total = len(images.train.labels)
    graphdef, of_seeds, run = programs.start_run(make_model, tx, seeds, total, mesh)
    trainer = programs.compile_trainer(
        graphdef, tx, images, of_seeds, run.state, batch_size=batch_size, mesh=mesh, driver=driver
    )
    return trainer, of_seeds, run


def fit(trainer, seeds, run, *, epochs, schedule, **options) -> loop.Run:
    """Train on images with this learning rate in the lines."""
    return loop.fit(trainer, seeds, run, figures.task(schedule), epochs=epochs, **options)


def end_results(trainer: loop.Trainer, run: loop.Run) -> list[figures.Result | None]:
    return loop.results(trainer, run, figures.task(optax.constant_schedule(0.1)))


def use_tiny(patch: pytest.MonkeyPatch, images: DataSet | None = None) -> None:
    """Commands train the tiny network instead of ResNet-20, on one device."""
    make_mesh = programs.make_mesh
    patch.setitem(models.MODELS, "resnet20", Tiny)
    patch.setattr(programs, "make_mesh", lambda devices: make_mesh(devices[:1]))
    if images:
        patch.setattr(data, "load", lambda *_, **__: images)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Takes the place of the slow picture of a run."""
    patch.setattr(figures, "draw_curves", lambda path, *_, **__: path.write_bytes(b"picture"))


def compile_once(patch: pytest.MonkeyPatch) -> None:
    """Commands with the same network, optimizer and images share their programs, which are pure.

    Only an optimizer's state tells it from others here: tests that share programs must agree in its
    learning rate and decay, and so in the number of epochs.
    """
    compile_trainer, compiled = programs.compile_trainer, {}

    def shared(graphdef, tx, images, seeds, state, **options):
        leaves, tree = jax.tree.flatten((seeds, state))
        shapes = tuple((x.shape, x.dtype, x.sharding) for x in leaves)
        pixels = images.train.images.tobytes(), images.test.images.tobytes()
        key = graphdef, tree, shapes, pixels, images[4:], *options.items()
        if key not in compiled:
            compiled[key] = compile_trainer(graphdef, tx, images, seeds, state, **options)
        return compiled[key]

    patch.setattr(programs, "compile_trainer", shared)
