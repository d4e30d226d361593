"""Files that are whole or not there at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a temporary file beside `path`, and put it there when it is whole.

    Both are on the disk when it returns: after a power failure, the file is the old or the new one.
    """
    # Named by the process: another one may write to the same place.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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


def read_if_whole(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is none, or none that is whole."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content else None
