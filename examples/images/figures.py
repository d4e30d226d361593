"""What a training on images measures and tells: lines, result, words and picture."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from training import curves
from training.task import Epoch, Task


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


class Result(NamedTuple):
    """Figures on the test images of the network of the epoch with the best validation accuracy."""

    test_accuracy: float
    test_loss: float
    best_epoch: int


def task(schedule: optax.Schedule) -> Task:
    """The task of a training on images.

    Of the epochs with the best validation accuracy, that with the lowest validation loss is the
    best: on a small validation set many share the best accuracy.

    Args:
      schedule: the learning rate that the optimizer uses, for the lines.
    """
    return Task(
        unit="epoch",
        item="img",
        rate="images_per_second",
        metrics=Metrics,
        line=partial(_line, schedule),
        rank=lambda scores: (scores["accuracy"], -scores["loss"]),
        result=lambda scores, epoch: Result(scores["accuracy"], scores["loss"], epoch),
        so_far=lambda loss, counts: f"loss {loss:.3f}, accuracy {counts['correct']:.1%}",
        epoch=_epoch_words,
        end=_end_words,
        seeds=_seeds_words,
    )


def _line(schedule: optax.Schedule, epoch: Epoch) -> Metrics:
    return Metrics(
        epoch=epoch.number,
        # Rounded to what float32 holds: 0.001 and not 0.0010000000474974513.
        learning_rate=float(f"{schedule(epoch.first_step):.6g}"),
        train_loss=epoch.loss_sum / epoch.items,
        train_accuracy=epoch.counts["correct"] / epoch.items,
        valid_loss=epoch.scores["loss"],
        valid_accuracy=epoch.scores["accuracy"],
        images_per_second=epoch.items_per_second,
    )


def _epoch_words(m: Metrics) -> str:
    return (
        f"train {m.train_accuracy:.2%} (loss {m.train_loss:.4f}), "
        f"validation {m.valid_accuracy:.2%} (loss {m.valid_loss:.4f}), "
        f"{m.images_per_second:.0f} images/s"
    )


def _end_words(result: Result) -> str:
    return (
        f"Test accuracy {result.test_accuracy:.2%} (loss {result.test_loss:.4f}) with "
        f"epoch {result.best_epoch}, the best in validation"
    )


def _seeds_words(results: Sequence[dict[str, Any]]) -> str:
    accuracies = [result["test_accuracy"] for result in results]
    return (
        f"Test accuracy {np.mean(accuracies):.2%} ± {100 * np.std(accuracies, ddof=1):.2f} "
        f"(standard deviation) of {len(accuracies)} seeds."
    )


def draw_curves(
    path: Path,
    history: Sequence[Metrics],
    result: Result | None,
    *,
    title: str,
    schedule: Callable[[int], Any],
    milestones: Sequence[int],
    steps_per_epoch: int,
) -> None:
    """Draw loss, accuracy and learning rate over the epochs, whole or not at all.

    Args:
      path: of the PNG file.
      history: at least one epoch.
      result: its test accuracy is marked at the best epoch; None in a run that is not finished.
      title: of the picture.
      schedule: the learning rate by optimizer step.
      milestones: the steps at which it is lowered.
      steps_per_epoch: optimizer steps of an epoch.
    """
    losses = curves.Panel(
        "cross-entropy (nats)",
        [m.train_loss for m in history],
        [m.valid_loss for m in history],
        log=True,
    )
    accuracies = curves.Panel(
        "accuracy (%)",
        [100 * m.train_accuracy for m in history],
        [100 * m.valid_accuracy for m in history],
    )
    star = None
    if result:
        accuracy, best = 100 * result.test_accuracy, result.best_epoch
        star = curves.Star(best, accuracy, f"test: {accuracy:.2f} % (epoch {best})")
    epochs = [m.epoch for m in history]
    lowered = sorted(set(milestones))
    last = max(epochs[-1] * steps_per_epoch, lowered[-1])
    curves.draw(
        path,
        epochs,
        [losses, accuracies],
        star,
        title=title,
        unit="epoch",
        rates=[float(schedule(step)) for step in (0, *lowered)],
        edges=[step / steps_per_epoch for step in (0, *lowered, last)],
        milestones=[step / steps_per_epoch for step in lowered],
    )
