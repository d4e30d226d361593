"""A run's files by name; files that are whole or not there at all, and what is said of others."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.command import Refused

ARGUMENTS, METRICS, SUMMARY = "arguments.json", "metrics.jsonl", "summary.json"
GEOMETRY = "geometry.jsonl"
FAILED = "failed.json"  # of a run whose loss became infinite or no number, and why
CHECKPOINTS = "checkpoints"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a temporary file beside `path`, and put it there when it is whole.

    Both are on the disk when it returns: after a power failure, the file is the old or the new one.
    """
    # Named by the process: another one may write to the same place.
    temporary = path.with_name(f"{path.name[:50]}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def why_not_writable(directory: Path) -> str | None:
    """Why nothing can be written in a directory, which need not be there yet; None if it can."""
    existing = next(p for p in (directory, *directory.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        return f"{existing} is not a directory"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"no permission to write in {existing}"
    return None


def read_bytes(path: Path) -> bytes:
    """What a file holds; refuses one that cannot be read."""
    try:
        # A pipe would wait, and a device has no end.
        if os.path.exists(path) and not (path.is_file() or path.is_dir()):
            raise Refused(f"cannot read {path}: it is no file")
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that is a file; refuses another one as `read_bytes` and `parse_object` do."""
    return parse_object(path, read_bytes(path))


def parse_object(path: Path, text: bytes, first_line: int = 1) -> dict[str, Any]:
    """The JSON object of a part of a file, which begins at this line.

    Raises:
      Refused: it holds no JSON object.
    """
    try:
        value = json.loads(text.decode("utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise Refused(f"{path}, line {line}: damaged, not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits; too many brackets
        raise Refused(f"{path}, line {first_line}: damaged, too large to be read") from error
    if not isinstance(value, dict):
        raise Refused(f"{path}, line {first_line}: damaged, not a JSON object")
    return value


def read_if_whole(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is none, or none that is whole."""
    if not os.path.exists(path):
        return None
    text = read_bytes(path)
    try:
        return parse_object(path, text) or None
    except Refused:
        return None
