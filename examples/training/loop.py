"""Training: from a run's first step to its last, with all figures on the way.

What is trained is the example's: its compiled programs are a `Trainer`, and its arrays pass through
here unread. What is here keeps count, in epochs as `Task` has them.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from training import geometry
from training.task import Epoch, Metrics, Result, Task, number, place

PyTree = Any  # of arrays
Scores = dict[str, list[float]]  # figures of an evaluation by name, for each seed; one is `loss`


class Batch(NamedTuple):
    """Figures of a step [seeds], or of several [steps, seeds]."""

    loss: jax.Array  # mean over the items, in nats, float32
    counts: dict[str, jax.Array]  # numbers of items by name, int32
    geometry: jax.Array  # float32 [..., figures], as `Trainer.figures` names them


class Trainer(NamedTuple):
    """The compiled programs of a training, and what an epoch of its training is.

    `seeds` is what the seeds of a run differ in from the outset, so that the programs serve for
    other seeds too; `state` is what a step changes, and `network` what an evaluation needs of it.
    """

    items: int
    steps: int
    batch_size: int  # items of a step; the last one may have fewer
    figures: tuple[str, ...]  # what an optimizer that is wrapped in `with_geometry` measures
    compile_seconds: float
    shuffle: Callable[[PyTree, int], PyTree]  # (seeds, epoch) -> order: what its steps share
    train: Callable[[PyTree, PyTree, int], tuple[PyTree, Batch]]  # (state, order, first step)
    network: Callable[[PyTree], PyTree]  # (state)
    validate: Callable[[PyTree, PyTree], Scores]  # (network, seeds)
    test: Callable[[PyTree], Scores]  # (network)
    choose: Callable[[np.ndarray, PyTree, PyTree], PyTree]  # (which seeds, their network, else)


class Progress(NamedTuple):
    """Where a run stands, apart from its arrays; the lists have one entry per seed."""

    epoch: int  # the one under way, from 1
    step: int  # how many of its steps are done
    loss_sum: list[float]  # over the items of these steps
    counts: dict[str, list[int]]
    geometry: list[list[float]]  # as `geometry.add` gives them
    epoch_seconds: float  # that these steps took
    seconds: float  # of training and validation since the run began, without compilation
    history: list[list[Metrics]]
    best_epoch: list[int]  # 0 if none
    best: Scores  # of that epoch
    epoch_geometry: list[dict[str, float]]  # of the epoch before; empty without `figures`
    failed: list[str | None]  # why a seed cannot go on: a loss that is NaN or infinite


class Run(NamedTuple):
    """A run at a moment: with its seeds, all that it takes to go on."""

    state: PyTree
    best: PyTree  # the network of the epoch with the best validation
    progress: Progress


def choose(better: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """For each seed the new arrays where they are better, else the old ones."""

    def of_leaf(new, old):
        return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(of_leaf, new, old)


def first_progress(seeds: int, counts: Sequence[str], scores: Sequence[str]) -> Progress:
    """The progress of a run at its first step.

    Args:
      seeds: how many.
      counts: the names of `Batch.counts`.
      scores: the names of what an evaluation gives.
    """
    return Progress(
        epoch=1,
        step=0,
        loss_sum=[0.0] * seeds,
        counts={name: [0] * seeds for name in counts},
        geometry=[[] for _ in range(seeds)],
        epoch_seconds=0.0,
        seconds=0.0,
        history=[[] for _ in range(seeds)],
        best_epoch=[0] * seeds,
        best={name: [-1.0] * seeds for name in scores},
        epoch_geometry=[{} for _ in range(seeds)],
        failed=[None] * seeds,
    )


def to_json(progress: Progress) -> dict[str, Any]:
    """What a checkpoint keeps; the counts and the best scores are fields of their own there."""
    best = {f"best_{name}": values for name, values in progress.best.items()}
    fields = progress._asdict() | progress.counts | best
    return {name: value for name, value in fields.items() if name not in ("counts", "best")}


def from_json(saved: dict[str, Any], like: Progress, metrics: Callable[..., Metrics]) -> Progress:
    """The progress that a checkpoint has kept.

    Args:
      saved: from `to_json`.
      like: with the same names of counts and scores.
      metrics: makes a line from its fields.
    """
    fields = {name: saved[name] for name in Progress._fields if name in saved} | {
        "counts": {name: saved[name] for name in like.counts},
        "best": {name: saved[f"best_{name}"] for name in like.best},
        "history": [[metrics(*line) for line in lines] for lines in saved["history"]],
    }
    return Progress(**fields)


def fit(
    trainer: Trainer,
    seeds: PyTree,
    run: Run,
    task: Task,
    *,
    epochs: int,
    on_batch: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[Run], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Run:
    """Train from where `run` stands to the end, or until `stop` says so.

    It donates the buffers of `run`. It keeps the network of the epoch whose validation `task.rank`
    puts highest, the first of several. A seed whose training or validation loss is NaN or infinite
    is marked as failed; the training ends when all seeds are.

    Args:
      trainer: the programs.
      seeds: what they take of the seeds.
      run: at its first step, or a later one with the same seeds.
      task: makes the lines and judges them.
      epochs: at least 1.
      on_batch: called at each epoch's start and after each call of a program, with the figures so
        far.
      on_epoch: called after each epoch, with the run as it then stands.
      stop: asked before each call of a program; the run that is returned can be continued.
    """
    state, best, progress = run
    while progress.epoch <= epochs and not all(progress.failed):
        order = trainer.shuffle(seeds, progress.epoch)
        if on_batch:
            on_batch(progress)
        while progress.step < trainer.steps:
            if stop and stop():
                return Run(state, best, progress)
            began = time.perf_counter()
            state, batches = trainer.train(state, order, progress.step)
            progress = _after_batches(progress, jax.device_get(batches), trainer, task, began)
            if all(progress.failed):
                return Run(state, best, progress)
            if on_batch:
                on_batch(progress)

        began = time.perf_counter()
        network = trainer.network(state)
        progress, better = _after_epoch(progress, trainer.validate(network, seeds), trainer, task)
        if any(better):
            best = trainer.choose(np.array(better), network, best)
        progress = progress._replace(seconds=progress.seconds + time.perf_counter() - began)
        if on_epoch:
            on_epoch(Run(state, best, progress))
    return Run(state, best, progress)


def _after_batches(
    progress: Progress, batches: Batch, trainer: Trainer, task: Task, began: float
) -> Progress:
    """Add the figures of one call, of each seed or of each step and seed."""
    losses = np.atleast_2d(batches.loss)
    size = min(trainer.batch_size, trainer.items - progress.step * trainer.batch_size)
    failed = list(progress.failed)
    for seed in np.flatnonzero(~np.isfinite(losses).all(axis=0)):
        step = int(np.argmin(np.isfinite(losses[:, seed])))
        at = place(task.unit, progress.epoch, progress.step + step + 1, trainer.steps)
        failed[seed] = failed[seed] or f"the training loss is {losses[step, seed]} at {at}"
    measured = np.asarray(batches.geometry).reshape(*losses.shape, len(trainer.figures))
    seconds = time.perf_counter() - began
    loss_sums = size * losses.sum(axis=0, dtype=np.float64)
    return progress._replace(
        step=progress.step + len(losses),
        loss_sum=(progress.loss_sum + loss_sums).tolist(),
        counts={
            name: (np.asarray(so_far) + np.atleast_2d(batches.counts[name]).sum(axis=0)).tolist()
            for name, so_far in progress.counts.items()
        },
        geometry=geometry.add(
            progress.geometry if progress.step else None, measured, trainer.figures
        ),
        epoch_seconds=progress.epoch_seconds + seconds,
        seconds=progress.seconds + seconds,
        failed=failed,
    )


def _after_epoch(
    progress: Progress, scores: Scores, trainer: Trainer, task: Task
) -> tuple[Progress, list[bool]]:
    """Add an epoch's line to each seed's history; tells also which seeds became better."""
    n = len(progress.failed)
    ended = number(task.unit, progress.epoch, trainer.steps)
    history, failed = list(progress.history), list(progress.failed)
    best_epoch, better = list(progress.best_epoch), [False] * n
    best = {name: list(values) for name, values in progress.best.items()}
    for i in range(n):
        of_seed = {name: values[i] for name, values in scores.items()}
        if failed[i]:
            continue
        if not math.isfinite(of_seed["loss"]):
            failed[i] = f"the validation loss is {of_seed['loss']} after {task.unit} {ended}"
            continue
        before = {name: values[i] for name, values in best.items()}
        better[i] = not best_epoch[i] or task.rank(of_seed) > task.rank(before)
        if better[i]:
            best_epoch[i] = progress.epoch
            for name, value in of_seed.items():
                best[name][i] = value
        epoch = Epoch(
            number=ended,
            first_step=(progress.epoch - 1) * trainer.steps,
            items=trainer.items,
            loss_sum=progress.loss_sum[i],
            counts={name: values[i] for name, values in progress.counts.items()},
            scores=of_seed,
            items_per_second=n * trainer.items / progress.epoch_seconds,
        )
        history[i] = [*history[i], task.line(epoch)]
    start = first_progress(n, [*progress.counts], [*best])
    after = start._replace(
        epoch=progress.epoch + 1,
        seconds=progress.seconds,
        history=history,
        best_epoch=best_epoch,
        best=best,
        epoch_geometry=geometry.of_epoch(progress.geometry, trainer.figures, trainer.steps),
        failed=failed,
    )
    return after, better


def results(trainer: Trainer, run: Run, task: Task) -> list[Result | None]:
    """Test each seed's best network; None for a seed that failed."""
    scores, progress = trainer.test(run.best), run.progress
    return [
        None
        if failure
        else task.result(
            {name: values[i] for name, values in scores.items()},
            number(task.unit, progress.best_epoch[i], trainer.steps),
        )
        for i, failure in enumerate(progress.failed)
    ]
