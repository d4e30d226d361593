"""runs.jsonl: a JSON line for each thing that is finished; only ever added to."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from training.files import read_bytes

T = TypeVar("T")
N = TypeVar("N", bound=NamedTuple)


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
    if not os.path.exists(path):
        return [], []
    results, broken = [], []
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            results.append(parse(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError, SyntaxError, RecursionError):
            broken.append(number)
    return results, broken


def checked(parsed: N) -> N:
    """A named tuple as it is; fails where a field is not of the type that it is annotated with."""
    check(parsed._asdict(), get_type_hints(type(parsed)))
    return parsed


def check(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Fails unless there is a value of each of these types; numbers are from 0 and finite."""
    for name, kind in kinds.items():
        if not _fits(values[name], kind):
            raise ValueError(f"no {name}")


def _fits(value: Any, kind: Any) -> bool:
    of = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_fits(value, one) for one in of)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(own, of[1]) for own in value.values())
    if get_origin(kind) in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(own, of[0]) for own in value)
    if kind is Spread:
        if not isinstance(value, dict | Spread):
            return False
        q1, median, q3 = value if isinstance(value, Spread) else Spread(**value)
        return all(_fits(one, float) for one in (q1, median, q3)) and q1 <= median <= q3
    if kind in (int, float):
        numbers = int if kind is int else int | float
        is_number = isinstance(value, numbers) and not isinstance(value, bool)
        return is_number and 0 <= value <= sys.float_info.max
    return kind is Any or isinstance(value, kind)


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
