"""Training: from a seed's first step to its results, with all figures on the way.

The arrays and the compiled programs are those of `programs`; what is here keeps count.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from images.data import validation_split
from images.programs import Batch, Network, Seeds, Trainer, TrainState, split_model


class Metrics(NamedTuple):
    """Figures of one epoch: losses in nats, accuracies in 0..1.

    The training images per second are those of all seeds of the program together.
    """

    epoch: int  # from 1
    learning_rate: float  # of the epoch's first step
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float
    images_per_second: float


class Progress(NamedTuple):
    """Where a run stands, apart from its arrays; the lists have one entry per seed."""

    epoch: int  # the one under way, from 1
    step: int  # how many of its steps are done
    loss_sum: list[float]  # over the images of these steps
    correct: list[int]
    geometry: list[list[float]]  # as `Trainer.figures`: sums of means; minima; maxima
    epoch_seconds: float  # that these steps took
    seconds: float  # of training and validation since the run began, without compilation
    history: list[list[Metrics]]
    best_epoch: list[int]  # 0 if none
    best_accuracy: list[float]
    best_loss: list[float]
    epoch_geometry: list[dict[str, float]]  # of the epoch before; empty without `figures`
    failed: list[str | None]  # why a seed cannot go on: a loss that is NaN or infinite


class Run(NamedTuple):
    """A run at a moment: with its `Seeds`, all that it takes to go on."""

    state: TrainState
    best: Network  # of the epoch with the best validation accuracy
    progress: Progress


class Result(NamedTuple):
    """Figures on the test images of the network of the epoch with the best validation accuracy."""

    test_accuracy: float
    test_loss: float
    best_epoch: int


def start_run(
    make_model: Callable[[int], nnx.Module],
    tx: optax.GradientTransformation,
    seeds: Sequence[int],
    images: int,
    mesh: Mesh,
) -> tuple[nnx.GraphDef, Seeds, Run]:
    """Begin a run of several seeds.

    Args:
      make_model: gives the model with the initial weights of a seed.
      tx: the optimizer.
      seeds: of validation split, initial weights, order and augmentation; at least one.
      images: number of training images of the data set, those for validation included.
      mesh: from `make_mesh`.
    """
    split = [split_model(make_model(seed), tx) for seed in seeds]
    # The model's init starts from the seed's own key.
    keys = [jax.random.key_data(jax.random.split(jax.random.key(seed))[1]) for seed in seeds]
    places = [validation_split(images, seed) for seed in seeds]
    # Through NumPy, because only that can be put on the devices of other processes.
    state, key, train, valid = jax.device_put(
        jax.tree.map(
            lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]),
            *[(s, k, *p) for (_, s), k, p in zip(split, keys, places, strict=True)],
        ),
        NamedSharding(mesh, PartitionSpec()),
    )
    of_seeds = Seeds(jax.random.wrap_key_data(key), train, valid)
    n = len(seeds)
    progress = Progress(
        epoch=1,
        step=0,
        loss_sum=[0.0] * n,
        correct=[0] * n,
        geometry=[[] for _ in seeds],
        epoch_seconds=0.0,
        seconds=0.0,
        history=[[] for _ in seeds],
        best_epoch=[0] * n,
        best_accuracy=[-1.0] * n,
        best_loss=[0.0] * n,
        epoch_geometry=[{} for _ in seeds],
        failed=[None] * n,
    )
    best = jax.tree.map(jnp.copy, Network(state.params, state.batch_stats))
    return split[0][0], of_seeds, Run(state, best, progress)


def fit(
    trainer: Trainer,
    seeds: Seeds,
    run: Run,
    *,
    epochs: int,
    schedule: optax.Schedule,
    on_batch: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[Run], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Run:
    """Train from where `run` stands to the end, or until `stop` says so.

    It uses every image once in an epoch, and donates the buffers of `run`. Of the epochs with the
    best validation accuracy it keeps the network of that with the lowest validation loss: on a
    small validation set many epochs share the best accuracy. A seed whose training or validation
    loss is NaN or infinite is marked as failed; the training ends when all seeds are.

    Args:
      trainer: from `compile_trainer`.
      seeds: from `start_run`.
      run: from `start_run`, or a later one with the same seeds.
      epochs: at least 1.
      schedule: the learning rate that the optimizer uses, for the metrics.
      on_batch: called at each epoch's start and after each call of a program, with the figures so
        far.
      on_epoch: called after each epoch, with the run as it then stands.
      stop: asked before each call of a program; the run that is returned can be continued.
    """
    state, best, progress = run
    while progress.epoch <= epochs and not all(progress.failed):
        order, key = trainer.shuffle(seeds, progress.epoch)
        if on_batch:
            on_batch(progress)
        while progress.step < trainer.steps:
            if stop and stop():
                return Run(state, best, progress)
            began = time.perf_counter()
            state, batches = trainer.train(state, order, key, progress.step)
            progress = _after_batches(progress, jax.device_get(batches), trainer, began)
            if all(progress.failed):
                return Run(state, best, progress)
            if on_batch:
                on_batch(progress)

        began = time.perf_counter()
        network = Network(state.params, state.batch_stats)
        losses, accuracies = trainer.validate(network, seeds)
        progress, better = _after_epoch(progress, losses, accuracies, trainer, schedule)
        if any(better):
            best = trainer.choose(np.array(better), network, best)
        progress = progress._replace(seconds=progress.seconds + time.perf_counter() - began)
        if on_epoch:
            on_epoch(Run(state, best, progress))
    return Run(state, best, progress)


def _after_batches(progress: Progress, batches: Batch, trainer: Trainer, began: float) -> Progress:
    """Add the figures of one call, of each seed or of each step and seed."""
    losses, corrects = np.atleast_2d(batches.loss, batches.correct)
    size = min(trainer.batch_size, trainer.images - progress.step * trainer.batch_size)
    failed = list(progress.failed)
    for seed in np.flatnonzero(~np.isfinite(losses).all(axis=0)):
        step = int(np.argmin(np.isfinite(losses[:, seed])))
        failed[seed] = failed[seed] or (
            f"the training loss is {losses[step, seed]} at step {progress.step + step + 1} "
            f"of epoch {progress.epoch}"
        )
    measured = np.asarray(batches.geometry).reshape(*losses.shape, len(trainer.figures))
    seconds = time.perf_counter() - began
    loss_sums = size * losses.sum(axis=0, dtype=np.float64)
    return progress._replace(
        step=progress.step + len(losses),
        loss_sum=(progress.loss_sum + loss_sums).tolist(),
        correct=(progress.correct + corrects.sum(axis=0)).tolist(),
        geometry=_add_geometry(progress, measured, trainer.figures),
        epoch_seconds=progress.epoch_seconds + seconds,
        seconds=progress.seconds + seconds,
        failed=failed,
    )


def _add_geometry(
    progress: Progress, measured: np.ndarray, names: Sequence[str]
) -> list[list[float]]:
    """Add the figures [steps, seeds, names] of one call."""
    steps = measured.astype(np.float64)
    if progress.step:
        steps = np.concatenate([np.asarray(progress.geometry)[None], steps])
    kind = np.array([name.rpartition("/")[2] for name in names])
    least, most = steps.min(axis=0), steps.max(axis=0)
    sums = steps.sum(axis=0)
    return np.where(kind == "mean", sums, np.where(kind == "min", least, most)).tolist()


def _epoch_geometry(progress: Progress, trainer: Trainer) -> list[dict[str, float]]:
    """The means over an epoch's steps, the smallest minima and the largest maxima."""
    parts = [trainer.steps if name.endswith("/mean") else 1 for name in trainer.figures]
    return [
        {name: value / n for name, value, n in zip(trainer.figures, values, parts, strict=True)}
        for values in progress.geometry
    ]


def _after_epoch(
    progress: Progress,
    losses: list[float],
    accuracies: list[float],
    trainer: Trainer,
    schedule: optax.Schedule,
) -> tuple[Progress, list[bool]]:
    """Add an epoch's line to each seed's history; tells also which seeds became better."""
    epoch, n = progress.epoch, len(losses)
    history, failed = list(progress.history), list(progress.failed)
    best_epoch, best_accuracy = list(progress.best_epoch), list(progress.best_accuracy)
    best_loss, better = list(progress.best_loss), [False] * n
    for i, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True)):
        if failed[i]:
            continue
        if not math.isfinite(loss):
            failed[i] = f"the validation loss is {loss} after epoch {epoch}"
            continue
        better[i] = (accuracy, -loss) > (best_accuracy[i], -best_loss[i])
        if better[i]:
            best_epoch[i], best_accuracy[i], best_loss[i] = epoch, accuracy, loss
        metrics = Metrics(
            epoch=epoch,
            # Rounded to what float32 holds: 0.001 and not 0.0010000000474974513.
            learning_rate=float(f"{schedule((epoch - 1) * trainer.steps):.6g}"),
            train_loss=progress.loss_sum[i] / trainer.images,
            train_accuracy=progress.correct[i] / trainer.images,
            valid_loss=loss,
            valid_accuracy=accuracy,
            images_per_second=n * trainer.images / progress.epoch_seconds,
        )
        history[i] = [*history[i], metrics]
    after = Progress(
        epoch=epoch + 1,
        step=0,
        loss_sum=[0.0] * n,
        correct=[0] * n,
        geometry=[[] for _ in losses],
        epoch_seconds=0.0,
        seconds=progress.seconds,
        history=history,
        best_epoch=best_epoch,
        best_accuracy=best_accuracy,
        best_loss=best_loss,
        epoch_geometry=_epoch_geometry(progress, trainer),
        failed=failed,
    )
    return after, better


def results(trainer: Trainer, run: Run) -> list[Result | None]:
    """Test each seed's best network; None for a seed that failed."""
    losses, accuracies = trainer.test(run.best)
    return [
        None if failed else Result(accuracy, loss, epoch)
        for failed, accuracy, loss, epoch in zip(
            run.progress.failed, accuracies, losses, run.progress.best_epoch, strict=True
        )
    ]
