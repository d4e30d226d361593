"""The files of a run: arguments.json, *.jsonl, summary.json and tensorboard/.

A line of figures is of an epoch, and its first field says of which: `{"epoch": 3, ...}`, or
`{"step": 600, ...}` where an epoch is no more than so many steps.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.environment import device_name, versions
from training.files import replace_file

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

Line = dict[str, Any]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    _replace(path, json.dumps(content, indent=2) + "\n")


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    """Write an epoch's figures as a line of JSON each, whole or not at all."""
    _replace(path, "".join(map(_line, lines)))


def append_line(path: Path, line: Line) -> None:
    """Add one epoch as one line of JSON, in one write, so that no reader sees half a line."""
    with path.open("ab", buffering=0) as file:
        file.write(_line(line).encode())


def read_lines(path: Path, unit: str, numbers: Sequence[int]) -> list[Line]:
    """The lines of these epochs; one with the number alone where the file has no whole line.

    Args:
      path: of the file, which need not exist.
      unit: the name of the first field.
      numbers: its values.
    """
    found = {}
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # torn, damaged
            line = json.loads(text)
            _line(line)  # raises for NaN, which is no JSON
            found[line[unit]] = line
    return [found.get(number, {unit: number}) for number in numbers]


def open_events(directory: Path) -> SummaryWriter:
    """Begin TensorBoard's event file in place of what is there.

    It is written in the background, and whole once it is closed.
    """
    from tensorboardX import SummaryWriter

    shutil.rmtree(directory, ignore_errors=True)
    return SummaryWriter(str(directory), flush_secs=5)


def add_events(writer: SummaryWriter, line: Line) -> None:
    """Add an epoch's scalars."""
    (_, number), *figures = line.items()
    for name, value in figures:
        if value is not None:
            # Of train/loss and valid/loss, TensorBoard makes a page for train and one for valid.
            tag = name.replace("train_", "train/").replace("valid_", "valid/")
            writer.add_scalar(tag, value, number)


def write_summary(
    path: Path,
    arguments: dict[str, Any],
    result: dict[str, Any],
    rate: str,
    rates: Sequence[float],
    *,
    seconds: float,
    compile_seconds: float,
    seeds_at_once: int,
    git_revision: str | None,
) -> None:
    """Write the result of a run with what is needed to repeat it, whole or not at all.

    Args:
      path: of the JSON file.
      arguments: what the run was asked for.
      result: what it has come to.
      rate: the name of the items per second, such as `images_per_second`.
      rates: these of each epoch; those of all but the first are averaged.
      seconds: of training and validation.
      compile_seconds: of compilation, which comes on top; of the last part of a resumed run, and 0
        where an earlier seed's programs served.
      seeds_at_once: how many seeds shared the program, and hence the times.
      git_revision: from `find_git_revision`, before the run.
    """
    later = rates[1:]
    summary = {
        **result,
        # Every epoch has as many items, so this is all items over all seconds.
        rate: len(later) / sum(1 / r for r in later) if later else None,
        "compile_seconds": compile_seconds,
        "seconds": seconds,
        "seeds_at_once": seeds_at_once,
        "arguments": arguments,
        "versions": versions(),
        "device": device_name(),
        "git_revision": git_revision,
    }
    write_json(path, summary)


def _line(content: Line) -> str:
    return json.dumps(content, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
