"""What the trainer runs, and PyTorch beside it, as programs to be timed.

Images are random, except for the time to an accuracy. All is measured on the first device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

import spherical_optax as so
from common import timing
from images import data, figures, models, programs, recipes
from throughput.flops import forward_flops
from throughput.throughput_report import WATCHED
from training import loop
from training.task import Task

CLASSES = 10
EPOCH_IMAGES = 50_000  # CIFAR's: 47,500 to train on and 2,500 for validation
EPOCH_ROUNDS = 3
PAUSE = 0.3  # seconds in which PyTorch's idle threads stop spinning


class Cell(NamedTuple):
    """A setting in which programs are compared."""

    model: str
    precision: str
    batch_size: int
    seeds: int  # trained at once


def synthetic(images: int, test_images: int = 64) -> data.DataSet:
    """Random images with random labels, augmented as CIFAR's; `images` includes validation."""
    rng = np.random.default_rng(0)

    def split(count: int) -> data.Split:
        pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return data.Split(pixels, rng.integers(0, CLASSES, count, dtype=np.int32))

    classes = tuple(map(str, range(CLASSES)))
    mean, std = (0.5,) * 3, (0.25,) * 3
    return data.DataSet("random", classes, split(images), split(test_images), mean, std, 4, True)


def with_validation(images: int) -> int:
    """How many images a data set has of which this many are for training."""
    return images + max(1, (images - 1) // 19)


class _Job(NamedTuple):
    """What `loop.fit` takes."""

    trainer: loop.Trainer
    seeds: programs.Seeds
    run: loop.Run
    task: Task


def make_optimizer(
    cell: Cell, optimizer: str, images: data.DataSet, epochs: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """An optimizer by the published recipe, and its learning rate.

    Args:
      cell: the setting.
      optimizer: of `recipes.OPTIMIZERS`, plain or with `WATCHED` after it.
      images: the data set.
      epochs: of the training, which decide when the learning rate falls.
    """
    count = len(data.validation_split(len(images.train.labels), 0)[0])
    name = optimizer.removesuffix(WATCHED)
    recipe, _ = recipes.recipe(images.name, cell.model, name)
    milestones = recipes.milestones(epochs, programs.steps_per_epoch(count, cell.batch_size))
    schedule = recipes.step_schedule(recipe.learning_rate, milestones)
    tx = recipes.make_optimizer(name, recipe, schedule)
    if name != optimizer:
        tx = so.with_geometry(tx, channel_axes=recipes.spheres())
    return tx, schedule


def _prepare(cell: Cell, optimizer: str, images: data.DataSet, epochs: int) -> _Job:
    """Compiles a training by the published recipe, with the seeds from 0 on."""
    tx, schedule = make_optimizer(cell, optimizer, images, epochs)
    total = len(images.train.labels)

    def make_model(seed: int) -> nnx.Module:
        make = models.MODELS[cell.model]
        return make(len(images.classes), dtype=cell.precision, rngs=nnx.Rngs(seed))

    mesh = programs.make_mesh(jax.devices()[:1])
    graphdef, seeds, run = programs.start_run(make_model, tx, range(cell.seeds), total, mesh)
    trainer = programs.compile_trainer(
        graphdef, tx, images, seeds, run.state, batch_size=cell.batch_size, mesh=mesh
    )
    return _Job(trainer, seeds, run, figures.task(schedule))


Program = Callable[[], object]
Figures = dict[str, Any]


def measure_steps(
    cell: Cell,
    optimizers: Sequence[str],
    torch_device: str | None,
    *,
    rounds: int,
    peak: Callable[[], float],
    on_round: Callable[[], object],
) -> dict[str, Figures]:
    """Time the trainer's steps with each optimizer, and PyTorch's with Adam, in turn.

    Args:
      cell: the setting.
      optimizers: of `recipes.OPTIMIZERS`, each plain or with `WATCHED` after it.
      torch_device: "cpu" or "cuda", to time PyTorch on it too.
      rounds: timings of each program.
      peak: gives the operations per second that the device can do in this precision.
      on_round: called after each round.

    Returns:
      Figures by program, or {"error": why there are none}.
    """
    # On a CPU the trainer calls a program for each step; elsewhere one call does an epoch's.
    steps = 1 if jax.default_backend() == "cpu" else 20
    images = synthetic(with_validation(steps * cell.batch_size))
    before = _peak_bytes()
    makers = {name: partial(_trainer_steps, cell, name, images) for name in optimizers}
    if torch_device:
        makers |= {
            "torch_eager": partial(_torch_steps, cell, images, steps, torch_device, False),
            "torch_compiled": partial(_torch_steps, cell, images, steps, torch_device, True),
        }
    ready: dict[str, Program] = {}
    compile_seconds: dict[str, float] = {}
    figures: dict[str, Figures] = {}
    for name, make in makers.items():
        try:
            ready[name], compile_seconds[name] = make()
        except RuntimeError as error:  # too little memory, or torch.compile does not work here
            figures[name] = _failure(error)
    try:
        pause = PAUSE if torch_device == "cpu" else 0.0
        seconds = timing.interleave(ready, rounds, pause=pause, on_round=on_round)
    except RuntimeError as error:
        return figures | {name: _failure(error) for name in ready}

    after = _peak_bytes()
    flops, most = 3 * forward_flops(models.MODELS[cell.model]), peak()
    for name, of_program in seconds.items():
        each = np.array(of_program) / steps
        rates = timing.spread((cell.seeds * cell.batch_size / each).tolist())
        adam = np.array(seconds["adam"]) / steps if "adam" in seconds else None
        figures[name] = {
            "steps_per_call": steps,
            "images_per_second": rates._asdict(),
            "step_seconds": timing.spread(each.tolist())._asdict(),
            "ratio_to_adam": None
            if adam is None
            else timing.spread((each / adam).tolist())._asdict(),
            "flops_per_image": flops,
            "matrix_peak": most,
            "peak_share": flops * rates.median / most,
            "compile_seconds": compile_seconds[name],
            "peak_bytes": after if after > before else None,
        }
    return figures


def _failure(error: RuntimeError) -> Figures:
    return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def _peak_bytes() -> int:
    """The most memory that the device had in use in this process, if it tells, or 0."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def _trainer_steps(cell: Cell, optimizer: str, images: data.DataSet) -> tuple[Program, float]:
    """A call of the trainer's program, run once, and the seconds of compiling."""
    job = _prepare(cell, optimizer, images, recipes.EPOCHS)
    order = job.trainer.shuffle(job.seeds, 1)
    state = job.run.state

    def train() -> None:
        nonlocal state
        state, batches = job.trainer.train(state, order, 0)
        jax.block_until_ready((state, batches))

    train()
    return train, job.trainer.compile_seconds


def _torch_steps(
    cell: Cell, images: data.DataSet, steps: int, device: str, compiled: bool
) -> tuple[Program, float]:
    """As many steps in PyTorch, run twice, and the seconds of the first call, which compiles."""
    # Imported here: only --torch needs PyTorch.
    from throughput import torch_networks

    count = steps * cell.batch_size
    train = torch_networks.make_training(
        cell.model,
        images.train.images[:count],
        images.train.labels[:count],
        num_classes=CLASSES,
        batch_size=cell.batch_size,
        precision=cell.precision,
        recipe=recipes.recipe(images.name, cell.model, "adam")[0],
        device=device,
        compiled=compiled,
    )
    began = time.perf_counter()
    train()
    seconds = time.perf_counter() - began
    train()
    return train, seconds


def measure_epochs(
    cell: Cell, optimizers: Sequence[str], *, on_round: Callable[[], object]
) -> dict[str, Figures]:
    """Time whole epochs of the trainer, training and validation, the optimizers in turn.

    Returns:
      Figures by optimizer, or {"error": why there are none}.
    """
    images = synthetic(EPOCH_IMAGES)
    try:
        jobs = {name: _prepare(cell, name, images, recipes.EPOCHS) for name in optimizers}
        epochs = {name: _epoch(job) for name, job in jobs.items()}
        for epoch in epochs.values():
            epoch()
        seconds = timing.interleave(epochs, EPOCH_ROUNDS, on_round=on_round)
    except RuntimeError as error:
        return dict.fromkeys(optimizers, _failure(error))
    return {
        name: {
            "epoch_seconds": timing.spread(of_program)._asdict(),
            "projected_minutes": recipes.EPOCHS * timing.spread(of_program).median / 60,
            "compile_seconds": jobs[name].trainer.compile_seconds,
        }
        for name, of_program in seconds.items()
    }


def _epoch(job: _Job) -> Program:
    """A call is the next epoch."""
    run = job.run

    def train() -> None:
        nonlocal run
        run = _next_epoch(job, run)

    return train


def _next_epoch(job: _Job, run: loop.Run) -> loop.Run:
    return loop.fit(job.trainer, job.seeds, run, job.task, epochs=run.progress.epoch)


def measure_accuracy(
    cell: Cell,
    optimizer: str,
    images: data.DataSet,
    *,
    accuracy: float,
    epochs: int,
    on_round: Callable[[], object],
) -> dict[str, Figures]:
    """Train seed 0 until its validation accuracy reaches this, and see when that is.

    Args:
      cell: the setting, with one seed.
      optimizer: of `recipes.OPTIMIZERS`, with the published recipe of so many epochs.
      images: the data set.
      accuracy: 0 to 1.
      epochs: the most that are trained.
      on_round: called after each epoch.

    Returns:
      For the optimizer, the epoch (None if it is not reached) with the seconds of training and
      validation so far, or {"error": why there are none}.
    """
    try:
        job = _prepare(cell, optimizer, images, epochs)
        run, reached = job.run, False
        while run.progress.epoch <= epochs and not reached:
            run = _next_epoch(job, run)
            if run.progress.failed[0]:
                return {optimizer: {"error": run.progress.failed[0]}}
            reached = run.progress.history[0][-1].valid_accuracy >= accuracy
            on_round()
    except RuntimeError as error:
        return {optimizer: _failure(error)}
    history = run.progress.history[0]
    figures = {
        "epoch": len(history) if reached else None,
        "seconds": run.progress.seconds,
        "best_accuracy": max(metrics.valid_accuracy for metrics in history),
        "compile_seconds": job.trainer.compile_seconds,
    }
    return {optimizer: figures}
