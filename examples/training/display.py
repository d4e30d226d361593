"""What a run prints: its lines, and the bar below them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from images.programs import Seeds
from training import loop
from training.processes import leads


def say(text: str, *, file: IO[str] | None = None) -> None:
    """Print a line above the progress bar, in the leading process."""
    if leads():
        tqdm.write(text, file=file or sys.stdout)
        sys.stdout.flush()


def seed_name(arguments: dict[str, Any], seeds: Sequence[int]) -> str:
    """What a line about a seed starts with, where there are others."""
    return f"seed {seeds[0]}: " if len(seeds) == 1 < arguments["seeds"] else ""


def epoch_line(latest: Sequence[loop.Metrics], epochs: int) -> str:
    """An epoch in words, the mean of several seeds."""
    m = loop.Metrics(*np.mean(latest, axis=0).tolist())
    seeds = f" (means of {len(latest)} seeds)" if len(latest) > 1 else ""
    return (
        f"epoch {m.epoch:.0f}/{epochs}: train {m.train_accuracy:.2%} (loss {m.train_loss:.4f}), "
        f"validation {m.valid_accuracy:.2%} (loss {m.valid_loss:.4f}), "
        f"{m.images_per_second:.0f} images/s{seeds}"
    )


@contextmanager
def progress_bar(
    arguments: dict[str, Any], of_seeds: Seeds, name: str
) -> Generator[Callable[[loop.Progress], None], None, None]:
    """A bar over the images of an epoch; gives the function that shows where a run stands."""
    seeds, images = of_seeds.train.shape
    hidden = None if leads() else True  # None: hidden where stderr is not a terminal
    with tqdm(total=images, desc="compiling", unit="img", leave=False, disable=hidden) as bar:

        def show(progress: loop.Progress) -> None:
            seen = min(images, progress.step * arguments["batch_size"])
            if seen <= bar.n:
                bar.reset()
            bar.set_description(
                f"{name}epoch {progress.epoch}/{arguments['epochs']}", refresh=False
            )
            if seen:
                loss = sum(progress.loss_sum) / (seeds * seen)
                accuracy = sum(progress.correct) / (seeds * seen)
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
            bar.update(seen - bar.n)

        yield show
