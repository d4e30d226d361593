"""The sweep's runs: what tells them apart, and the lines of runs.jsonl that hold them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from common import run_lines
from training.files import ARGUMENTS, METRICS, SUMMARY

PROTOCOL = ("depth", "heads", "context", "batch_size", "steps", "eval_every", "text_sha256")


class Key(NamedTuple):
    """What tells the runs of a sweep apart."""

    architecture: str
    width: int
    optimizer: str
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


class Run(NamedTuple):
    """A finished run."""

    key: Key
    protocol: dict[str, int | str]  # what all runs of a sweep have in common
    losses: list[float]  # of the validation, at each evaluation
    seconds: float
    source: dict[str, dict[str, str | None] | str | None]  # versions, device, revision

    @property
    def loss(self) -> float:
        """The validation loss at the end; infinite where it was no number on the way."""
        return self.losses[-1] if self.losses else math.inf


def line(key: Key, directory: Path) -> bytes:
    """A line of what the trainer left in a directory; without losses where it failed."""
    arguments = json.loads((directory / ARGUMENTS).read_bytes())
    content = {"arguments": {**arguments, "seed": key.seed}, "losses": []}
    if (directory / SUMMARY).exists():
        summary = json.loads((directory / SUMMARY).read_bytes())
        curve = [json.loads(one) for one in (directory / METRICS).open("rb")]
        content["losses"] = [round(float(one["valid_loss"]), 6) for one in curve]
        names = ("seconds", "tokens_per_second", "versions", "device", "git_revision")
        content |= {name: summary[name] for name in names}
    return (json.dumps(content, allow_nan=False) + "\n").encode()


def load(path: Path) -> tuple[dict[Key, Run], list[int]]:
    """The runs of a file, the first of each key, and the numbers of lines that are none."""
    runs, broken = run_lines.read(path, _parse)
    found: dict[Key, Run] = {}
    for run in runs:
        found.setdefault(run.key, run)
    return found, broken


def _parse(content: Any) -> Run:
    arguments = content["arguments"]
    key = run_lines.checked(Key(*(arguments[name] for name in Key._fields)))
    source = {name: content.get(name) for name in ("versions", "device", "git_revision")}
    protocol = {name: arguments[name] for name in PROTOCOL}
    return run_lines.checked(
        Run(key, protocol, content["losses"], content.get("seconds", 0.0), source)
    )


def best(runs: Iterable[Run]) -> list[Key]:
    """For each architecture, width and optimizer, the run with the lowest loss at its end."""
    found: dict[tuple[str, int, str], Run] = {}
    for run in runs:
        other = found.setdefault(run.key[:3], run)
        if run.loss < other.loss:
            found[run.key[:3]] = run
    return [run.key for run in found.values() if run.losses]
