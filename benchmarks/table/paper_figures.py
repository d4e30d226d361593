"""The test accuracies of Roburin et al. 2022, and those of our runs to compare with them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from table.table_runs import Key, Run

PAPER_SOURCE = (
    "Roburin et al. 2022, *Spherical Perspective on Learning with Normalization Layers* "
    "([arXiv 2006.13382](https://arxiv.org/abs/2006.13382))"
)
OPTIMIZERS = ("sgd", "adam", "adamw", "adamg", "sgdmrt", "adams", "adamsrt")
NOT_COMPARABLE = "adamg"
WHY_NOT_COMPARABLE = (
    "adamg is not comparable: the published code inverts its `channel_wise` switch (its spherical "
    "branch runs exactly for the parameters that are not flagged) and never puts the initial point "
    "on the sphere. The paper's figures probably come from that code, so they are of another "
    "algorithm than the one described, which is the one trained here."
)
# What the paper claims, as differences between two optimizers in one setting.
PAIRS = (("adamsrt", "adam"), ("adams", "adam"), ("sgdmrt", "sgd"))
# Test accuracies in %, a column per optimizer in the order of OPTIMIZERS.
_MEANS = {
    "cifar10/resnet20": (92.39, 90.98, 90.19, 91.64, 92.25, 91.15, 91.81),
    "cifar10/resnet18": (95.1, 93.77, 93.61, 94.67, 94.93, 93.95, 94.92),
    "cifar10/vgg16": (93.56, 92.83, 92.53, 93.41, 93.68, 92.92, 93.75),
    "cifar100/resnet18": (77.08, 71.3, 67.39, 73.76, 77.09, 74.44, 75.28),
    "cifar100/vgg16": (73.77, 68.43, 71.37, 70.17, 73.32, 68.73, 71.45),
    "svhn/resnet18": (95.96, 95.32, 95.38, 95.73, 96.17, 95.75, 95.84),
    "svhn/vgg16": (95.95, 95.57, 95.6, 95.7, 95.95, 95.66, 95.82),
}
_DEVIATIONS = {
    "cifar10/resnet20": (0.12, 0.06, 0.24, 0.17, 0.12, 0.11, 0.2),
    "cifar10/resnet18": (0.04, 0.2, 0.12, 0.12, 0.23, 0.23, 0.05),
    "cifar10/vgg16": (0.05, 0.17, 0.25, 0.17, 0.3, 0.11, 0.06),
    "cifar100/resnet18": (0.18, 0.36, 0.27, 0.34, 0.15, 0.22, 0.35),
    "cifar100/vgg16": (0.1, 0.16, 0.22, 0.2, 0.29, 0.27, 0.13),
    "svhn/resnet18": (0.15, 0.23, 0.15, 0.05, 0.12, 0.09, 0.07),
    "svhn/vgg16": (0.09, 0.2, 0.08, 0.25, 0.12, 0.09, 0.05),
}
SETTINGS = tuple(_MEANS)


class Accuracy(NamedTuple):
    """A test accuracy in %, or a difference of two in points, over runs.

    The deviation is None for a single run.
    """

    mean: float
    deviation: float | None


PAPER: dict[str, dict[str, Accuracy]] = {
    setting: dict(zip(OPTIMIZERS, map(Accuracy, means, _DEVIATIONS[setting]), strict=True))
    for setting, means in _MEANS.items()
}


def runs_of(runs: Mapping[Key, Run], setting: str, optimizer: str) -> list[Run]:
    """A cell's runs, in the order of seeds."""
    return [run for key, run in sorted(runs.items()) if key[:2] == (setting, optimizer)]


def shared_seeds(runs: Mapping[Key, Run], setting: str, pair: tuple[str, str]) -> list[int]:
    """The seeds that both optimizers have been trained with, sorted."""
    first, second = ({key[2] for key in runs if key[:2] == (setting, name)} for name in pair)
    return sorted(first & second)


def summarise(runs: Mapping[Key, Run], setting: str, optimizer: str) -> Accuracy | None:
    """Mean and sample deviation of the test accuracy over seeds; None where there is no run."""
    return _accuracy([100 * run.test_accuracy for run in runs_of(runs, setting, optimizer)])


def compare(runs: Mapping[Key, Run], setting: str, pair: tuple[str, str]) -> Accuracy | None:
    """The first optimizer less the second: mean and sample deviation over the seeds of both.

    None where no seed has been trained with both.
    """
    return _accuracy(
        [
            100 * (runs[setting, pair[0], seed].test_accuracy)
            - 100 * (runs[setting, pair[1], seed].test_accuracy)
            for seed in shared_seeds(runs, setting, pair)
        ]
    )


def paper_difference(setting: str, pair: tuple[str, str]) -> Accuracy:
    """The same of the paper, whose seeds are not told apart: deviations add as squares."""
    (mean, deviation), (other, others) = (PAPER[setting][optimizer] for optimizer in pair)
    assert deviation is not None and others is not None
    return Accuracy(mean - other, math.hypot(deviation, others))


def _accuracy(values: Sequence[float]) -> Accuracy | None:
    if not values:
        return None
    return Accuracy(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def mark(optimizer: str, ours: Accuracy, paper: Accuracy) -> str:
    """▲ or ▼ where ours is more than two deviations of the difference above or below the paper.

    Empty otherwise, for a single run, and for the optimizer that is not comparable.
    """
    if optimizer == NOT_COMPARABLE or ours.deviation is None or paper.deviation is None:
        return ""
    difference = ours.mean - paper.mean
    if abs(difference) <= 2 * math.hypot(ours.deviation, paper.deviation):
        return ""
    return "▲" if difference > 0 else "▼"
