"""runs.jsonl: a JSON line for each thing that is finished; only ever added to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Spread(NamedTuple):
    """Quartiles of repeated timings, as a line holds them."""

    q1: float
    median: float
    q3: float


def read(path: Path, parse: Callable[[Any], T]) -> tuple[list[T], list[int]]:
    """Read the lines of a file; no file is an empty one.

    Args:
      path: of the file.
      parse: makes a result of a line's JSON value; may fail as a value of another form makes it.

    Returns:
      The results, and the numbers (from 1) of the lines that give none: a killed process may have
      left part of a line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    results, broken = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            results.append(parse(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError):
            broken.append(number)
    return results, broken


def append(path: Path, lines: bytes) -> None:
    """Add whole lines in one write, after a newline if a kill left part of a line.

    Raises:
      OSError: not everything could be written; `read` passes over what is not a whole line.
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
