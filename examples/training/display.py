"""What a run prints: its lines, and the bar below them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from training.processes import leads
from training.task import Metrics, Task, number

if TYPE_CHECKING:
    from training.loop import Progress


def say(text: str, *, file: IO[str] | None = None) -> None:
    """Print a line above the progress bar, in the leading process."""
    if leads():
        tqdm.write(text, file=file or sys.stdout)
        sys.stdout.flush()


def seed_name(arguments: dict[str, Any], seeds: Sequence[int]) -> str:
    """What a line about a seed starts with, where there are others."""
    return f"seed {seeds[0]}: " if len(seeds) == 1 < arguments["seeds"] else ""


def epoch_line(latest: Sequence[Metrics], task: Task, last: int) -> str:
    """An epoch in words, the mean of several seeds; `last` is the number of the last one."""
    mean = task.metrics(*np.mean(latest, axis=0).tolist())
    seeds = f" (means of {len(latest)} seeds)" if len(latest) > 1 else ""
    return f"{task.unit} {mean[0]:.0f}/{last}: {task.epoch(mean)}{seeds}"


@contextmanager
def progress_bar(
    name: str, task: Task, *, epochs: int, steps: int, items: int, batch_size: int, seeds: int
) -> Generator[Callable[[Progress], None], None, None]:
    """A bar over the items of an epoch; gives the function that shows where a run stands.

    Args:
      name: of the run, or "".
      task: names and words.
      epochs: of the run.
      steps: of an epoch.
      items: of an epoch.
      batch_size: items of a step; the last one may have fewer.
      seeds: how many are trained at once.
    """
    hidden = None if leads() else True  # None: hidden where stderr is not a terminal
    last = number(task.unit, epochs, steps)
    with tqdm(total=items, desc="compiling", unit=task.item, leave=False, disable=hidden) as bar:

        def show(progress: Progress) -> None:
            seen = min(items, progress.step * batch_size)
            if seen <= bar.n:
                bar.reset()
            now = number(task.unit, progress.epoch, steps)
            bar.set_description(f"{name}{task.unit} {now}/{last}", refresh=False)
            if seen:
                alive = [i for i in range(seeds) if not progress.failed[i]] or range(seeds)
                all_seen = len(alive) * seen
                loss = sum(progress.loss_sum[i] for i in alive) / all_seen
                counts = {
                    n: sum(of[i] for i in alive) / all_seen for n, of in progress.counts.items()
                }
                bar.set_postfix_str(task.so_far(loss, counts), refresh=False)
            bar.update(seen - bar.n)

        yield show
