"""runs.jsonl: a JSON line for each finished run of the table.

A line is {"setting": "cifar10/resnet20", ..., "curve": [...]}: a run's summary.json between the
setting that it counts for and the lines of its metrics.jsonl.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import run_lines
from images import recipes

Key = tuple[str, str, int]  # setting, optimizer, seed


class Protocol(NamedTuple):
    """What all runs of a table share."""

    epochs: int
    batch_size: int
    precision: str
    stand_in: str | None  # the data set that takes the place of CIFAR-10

    def difference(self, other: Protocol) -> str | None:
        """Names the first difference, this one first; None where there is none."""
        for name, mine, its in zip(self._fields, self, other, strict=True):
            if mine != its:
                name = "dataset" if name == "stand_in" else name
                return f"--{name} {mine or '(none)'}, not {its or '(none)'}"
        return None


class Run(NamedTuple):
    """What the report needs of a line of runs.jsonl."""

    protocol: Protocol
    test_accuracy: float  # 0..1
    seconds: float
    compile_seconds: float
    images_per_second: float | None
    seeds_at_once: int
    device: str
    versions: dict[str, str | None]
    git_revision: str | None


def load(path: Path) -> tuple[dict[Key, Run], list[int]]:
    """The runs of runs.jsonl, and the numbers (from 1) of the lines that hold none.

    Of two lines for one run the first counts.
    """
    found, broken = run_lines.read(path, _parse)
    runs: dict[Key, Run] = {}
    for key, run in found:
        runs.setdefault(key, run)
    return runs, broken


def _parse(entry: dict[str, Any]) -> tuple[Key, Run]:
    arguments, setting = entry["arguments"], entry["setting"]
    optimizer, seed, dataset = arguments["optimizer"], arguments["seed"], arguments["dataset"]
    own, model = setting.split("/")
    if optimizer not in recipes.RECIPES[own, model]:
        raise ValueError("no optimizer of the table")
    stand_in = None if dataset == own else dataset
    epochs, batch_size = arguments["epochs"], arguments["batch_size"]
    protocol = Protocol(epochs, batch_size, arguments["precision"], stand_in)
    rest = {name: entry[name] for name in Run._fields if name != "protocol"}
    run_lines.checked(protocol)
    run = run_lines.checked(Run(protocol, **rest))
    if not isinstance(seed, int) or run.test_accuracy > 1 or not run.seconds:
        raise ValueError("no accuracy of a seed, or no time")
    return (setting, optimizer, seed), run
