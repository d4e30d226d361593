"""The table's cells: what one call of the trainer trains, its directory, its lock, what it leaves.

A cell's directory is --output/cells/SETTING/OPTIMIZER/seeds-FIRST-LAST; beside it lies the lock of
its setting and optimizer.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

from common import run_lines
from common.benchmark_command import RUNS
from common.trainer_calls import take
from table import table_runs
from table.table_runs import Key
from training.files import CHECKPOINTS, METRICS, SUMMARY, read_if_whole


class Cell(NamedTuple):
    """What one call of the trainer trains."""

    setting: str
    optimizer: str
    seeds: range

    def keys(self) -> set[Key]:
        """The runs, as `table_runs` names them."""
        return {(self.setting, self.optimizer, seed) for seed in self.seeds}

    def __str__(self) -> str:
        first, last = self.seeds[0], self.seeds[-1]
        seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
        return f"{self.setting} with {self.optimizer}, {seeds}"


def stretches(settings: Sequence[str], optimizers: Sequence[str], missing: set[Key]) -> list[Cell]:
    """The missing runs in the order of the names, in the longest stretches of seeds."""
    cells: list[Cell] = []
    for setting, optimizer in itertools.product(settings, optimizers):
        for seed in sorted(key[2] for key in missing if key[:2] == (setting, optimizer)):
            before = cells[-1] if cells else None
            goes_on = before and before == (setting, optimizer, range(before.seeds.start, seed))
            first = cells.pop().seeds.start if goes_on else seed
            cells.append(Cell(setting, optimizer, range(first, seed + 1)))
    return cells


def directory(output: Path, cell: Cell) -> Path:
    """Where the trainer writes."""
    seeds = f"seeds-{cell.seeds[0]}-{cell.seeds[-1]}"
    return output / "cells" / cell.setting / cell.optimizer / seeds


def close(output: Path, cell: Cell) -> None:
    """Adds a cell's finished runs to runs.jsonl and removes its checkpoints; needs the lock.

    Where no run is finished everything stays, to be resumed. Otherwise another stretch of seeds is
    missing from now on, and this directory is not resumed any more.
    """
    home = directory(output, cell)
    recorded = table_runs.load(output / RUNS)[0].keys() & cell.keys()
    lines = ""
    for key in sorted(cell.keys() - recorded):
        run = home if len(cell.seeds) == 1 else home / f"seed-{key[2]}"
        summary = read_if_whole(run / SUMMARY)
        if summary:
            try:
                curve = [json.loads(line) for line in (run / METRICS).open("rb")]
            except (ValueError, OSError):
                print(
                    f"warning: {run / 'metrics.jsonl'} is damaged or missing: remove {run} to have "
                    "it trained again",
                    file=sys.stderr,
                )
                continue
            lines += json.dumps({"setting": cell.setting, **summary, "curve": curve}) + "\n"
    if lines:
        run_lines.append(output / RUNS, lines.encode())
    if lines or recorded:
        for checkpoints in (*home.glob(CHECKPOINTS), *home.glob(f"seed-*/{CHECKPOINTS}")):
            shutil.rmtree(checkpoints, ignore_errors=True)


def tidy_up(output: Path, recorded: Set[Key], cells: Sequence[Cell]) -> None:
    """Ends what a kill left of cells that will not be resumed, and records what they finished.

    Args:
      output: the directory of the table.
      recorded: what runs.jsonl holds.
      cells: what will be trained.
    """
    for home in output.glob("cells/*/*/*/seeds-*-*"):
        dataset, model, optimizer, seeds = home.relative_to(output / "cells").parts
        stretch = re.fullmatch(r"seeds-(\d+)-(\d+)", seeds)
        if stretch is None:  # somebody has renamed it
            continue
        first, last = stretch.groups()
        cell = Cell(f"{dataset}/{model}", optimizer, range(int(first), int(last) + 1))
        in_the_way = cell not in cells and any(other[:2] == cell[:2] for other in cells)
        if in_the_way or cell.keys() & recorded:
            lock = os.open(home.parent / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            if take(lock):  # else a process is at work there
                close(output, cell)
            os.close(lock)
