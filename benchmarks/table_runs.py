"""runs.jsonl: a JSON line for each finished run of the table.

A line is {"setting": "cifar10/resnet20", ..., "curve": [...]}: a run's summary.json between the
setting that it counts for and the lines of its metrics.jsonl.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from cifar import recipes

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
    """Read runs.jsonl; no file is an empty one.

    Of two lines for one run the first counts.

    Returns:
      The runs, and the numbers (from 1) of the lines that hold none: a killed process may have left
      part of a line.
    """
    runs: dict[Key, Run] = {}
    broken = []
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}, []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            key, run = _parse(line)
        except (ValueError, TypeError, KeyError, AttributeError):
            broken.append(number)
        else:
            runs.setdefault(key, run)
    return runs, broken


def _parse(line: bytes) -> tuple[Key, Run]:
    entry = json.loads(line)
    arguments, setting = entry["arguments"], entry["setting"]
    optimizer, seed, dataset = arguments["optimizer"], arguments["seed"], arguments["dataset"]
    own, model = setting.split("/")
    if optimizer not in recipes.RECIPES[own, model]:
        raise ValueError("no optimizer of the table")
    stand_in = None if dataset == own else dataset
    epochs, batch_size = arguments["epochs"], arguments["batch_size"]
    protocol = Protocol(epochs, batch_size, arguments["precision"], stand_in)
    rest = {name: entry[name] for name in Run._fields if name != "protocol"}
    if not math.isfinite(rest["test_accuracy"]):
        raise ValueError("no accuracy")
    return (setting, optimizer, seed), Run(protocol, **rest)


def append(path: Path, lines: bytes) -> None:
    """Add whole lines in one write, after a newline if a kill left part of a line.

    Raises:
      OSError: not everything could be written; `load` passes over what is not a whole line.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            lines = b"\n" + lines
        if os.write(file, lines) != len(lines):
            raise OSError(f"{path} could not be written to its end")
        os.fsync(file)
    finally:
        os.close(file)
