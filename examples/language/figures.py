"""What a training of a language model measures and tells: lines, result, words and picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from training import curves
from training.task import Epoch, Task


class Metrics(NamedTuple):
    """Figures at an evaluation: losses in nats per byte.

    The training tokens per second are those of all seeds of the program together.
    """

    step: int  # how many are done
    learning_rate: float  # mean since the evaluation before
    train_loss: float  # mean since the evaluation before
    valid_loss: float
    tokens_per_second: float


class Result(NamedTuple):
    """The lowest validation loss, and when it was."""

    valid_loss: float
    best_step: int


def task(schedule: optax.Schedule) -> Task:
    """The task of a training on text.

    Args:
      schedule: the learning rate of the kernels in blocks, for the lines.
    """
    return Task(
        unit="step",
        item="tok",
        rate="tokens_per_second",
        metrics=Metrics,
        line=partial(_line, schedule),
        rank=lambda scores: -scores["loss"],
        result=lambda scores, step: Result(scores["loss"], step),
        so_far=lambda loss, counts: f"loss {loss:.3f}",
        epoch=_words,
        end=_end_words,
        seeds=_seeds_words,
    )


def _line(schedule: optax.Schedule, epoch: Epoch) -> Metrics:
    rates = np.asarray(jax.vmap(schedule)(np.arange(epoch.first_step, epoch.number)))
    return Metrics(
        step=epoch.number,
        # Rounded to what float32 holds: 0.001 and not 0.0010000000474974513.
        learning_rate=float(f"{rates.mean():.6g}"),
        train_loss=epoch.loss_sum / epoch.items,
        valid_loss=epoch.scores["loss"],
        tokens_per_second=epoch.items_per_second,
    )


def _words(m: Metrics) -> str:
    return (
        f"train loss {m.train_loss:.4f}, validation loss {m.valid_loss:.4f}, "
        f"{m.tokens_per_second:.0f} tokens/s"
    )


def _end_words(result: Result) -> str:
    bits = result.valid_loss / math.log(2)
    return (
        f"Validation loss {result.valid_loss:.4f} ({bits:.3f} bits per byte) at step "
        f"{result.best_step}, the lowest"
    )


def _seeds_words(results: Sequence[dict[str, Any]]) -> str:
    losses = [result["valid_loss"] for result in results]
    return (
        f"Validation loss {np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f} "
        f"(standard deviation) of {len(losses)} seeds."
    )


def draw_curves(
    path: Path,
    history: Sequence[Metrics],
    result: Result | None,
    *,
    title: str,
    schedule: optax.Schedule,
) -> None:
    """Draw losses and learning rate over the steps, whole or not at all.

    Args:
      path: of the PNG file.
      history: at least one line.
      result: is marked; None in a run that is not finished.
      title: of the picture.
      schedule: the learning rate by step.
    """
    losses = curves.Panel(
        "cross-entropy (nats per byte)",
        [m.train_loss for m in history],
        [m.valid_loss for m in history],
    )
    star = None
    if result:
        label = f"lowest: {result.valid_loss:.4f} (step {result.best_step})"
        star = curves.Star(result.best_step, result.valid_loss, label)
    steps = [m.step for m in history]
    edges = np.linspace(0, steps[-1], min(200, steps[-1]) + 1).round().astype(int)
    curves.draw(
        path,
        steps,
        [losses],
        star,
        title=title,
        unit="step",
        rates=[float(np.asarray(schedule(step))) for step in edges[:-1]],
        edges=[float(edge) for edge in edges],
        milestones=[],
        log_rates=False,
    )
