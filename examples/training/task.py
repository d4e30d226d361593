"""What a run's life asks an example about: how its figures are counted, judged and told."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Metrics = Any  # a NamedTuple of numbers: a line of metrics.jsonl; the first is the epoch or step
Result = Any  # a NamedTuple of numbers: what summary.json begins with


class Epoch(NamedTuple):
    """One seed's figures of an epoch."""

    number: int  # as lines and messages count, see `Task.unit`
    first_step: int  # of the optimizer's, from 0
    items: int
    loss_sum: float  # over the training items
    counts: dict[str, int]  # of the training items
    scores: dict[str, float]  # of the validation
    items_per_second: float  # of all seeds of the program together


class Task(NamedTuple):
    """How the figures of a training are counted, judged and told.

    An epoch is what ends with a validation, and gives a line of figures: once through the data, or
    so many steps. Lines and messages count epochs where `unit` is "epoch", and the optimizer's
    steps where it is "step".
    """

    unit: str
    item: str  # what the progress bar counts
    rate: str  # the field of a line whose mean is in the summary: items per second
    metrics: type[Metrics]  # of a line
    line: Callable[[Epoch], Metrics]
    rank: Callable[[dict[str, float]], Any]  # of validation scores; the largest is the best
    result: Callable[[dict[str, float], int], Result]  # of the best network's test, and of when
    # In words:
    so_far: Callable[[float, dict[str, float]], str]  # mean loss and counts per item, for the bar
    epoch: Callable[[Metrics], str]  # the mean over the seeds
    end: Callable[[Result], str]
    seeds: Callable[[Sequence[dict[str, Any]]], str]  # several results, each with its fields


def number(unit: str, epoch: int, steps: int) -> int:
    """How lines and messages count an epoch, or several, of so many steps."""
    return epoch * steps if unit == "step" else epoch


def place(unit: str, epoch: int, step: int, steps: int) -> str:
    """In words, the step from 1 of an epoch from 1 that has so many."""
    if unit == "step":
        return f"step {number(unit, epoch - 1, steps) + step}"
    return f"step {step} of {unit} {epoch}"


def where(unit: str, epoch: int, step: int, steps: int) -> str:
    """In words, where a run goes on of whose epoch under way this many steps are done."""
    if unit == "step":
        return f"after step {number(unit, epoch - 1, steps) + step}"
    return f"in {unit} {epoch}" + (f" after {step} of its steps" if step else "")
