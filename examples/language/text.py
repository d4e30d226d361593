"""Text as bytes: which files are read, how they are split, and windows of it.

By default the text is the sources of the Python installation's own standard library, which every
machine has. The split is by files, so that nothing of a validation file is seen in training.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from training.command import Refused

VOCABULARY = 256
VALID_SHARE = 10  # one file of so many is for validation
END = b"\0"  # behind each file
TESTS = {"test", "tests", "idle_test"}
MAX_BYTES = 2**31 - 1  # of a part, whose places are int32


class TextError(Refused):
    """The text cannot be had; the message is one sentence for the user."""


class Text(NamedTuple):
    """The files of each part, one behind the other."""

    train: np.ndarray  # uint8 [bytes]
    valid: np.ndarray
    files: tuple[int, int]  # number of files for training and for validation
    sha256: str  # of both parts


def load(paths: Sequence[Path] = ()) -> Text:
    """Reads the text, in an order that depends on the files' names only.

    Args:
      paths: files, and directories, of which every file is read that is UTF-8 and not hidden; by
        default Python's standard library, of which the modules are read, without their tests.

    Raises:
      TextError: something is missing or cannot be read, or there are fewer than two files.
    """
    files = dict(_standard_library() if not paths else _given(paths))
    if len(files) < 2:
        found = "no file" if not files else "one file"
        raise TextError(
            f"there is {found} of text, and two are needed, as some are for validation only; "
            "cut a long one into parts"
        )
    # By their hash: in alphabetical order neighbours resemble each other.
    by_hash = sorted(files, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    held_out = set(by_hash[: max(1, len(files) // VALID_SHARE)])
    parts = []
    for wanted in (False, True):
        names = [name for name in sorted(files) if (name in held_out) == wanted]
        part = b"".join(files[name] + END for name in names)
        if len(part) > MAX_BYTES:
            raise TextError(f"there are {len(part)} bytes of text, more than {MAX_BYTES}")
        parts.append(part)
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts))
    train, valid = (np.frombuffer(part, np.uint8) for part in parts)
    return Text(train, valid, (len(files) - len(held_out), len(held_out)), digest.hexdigest())


def draw_windows(
    text: jax.Array, key: jax.Array, step: jax.Array, shape: Sequence[int]
) -> jax.Array:
    """Windows of a text at random places, which depend on the key and the step only.

    Args:
      text: uint8 [bytes], at least as long as a window.
      key: of the run.
      step: from 0.
      shape: number of windows, and their length.

    Returns:
      Tokens, int32 of the shape.
    """
    count, length = shape
    key = jax.random.fold_in(key, step)
    starts = jax.random.randint(key, (count, 1), 0, len(text) - length + 1)
    return text[starts + jnp.arange(length)].astype(jnp.int32)


def spread_windows(text: np.ndarray, count: int, length: int) -> np.ndarray:
    """At most `count` windows, spread evenly over a text and apart: uint8 [windows, length]."""
    count = min(count, len(text) // length)
    starts = np.arange(count) * (len(text) // count)
    return np.stack([text[start : start + length] for start in starts])


def _standard_library() -> Iterator[tuple[str, bytes]]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in _walk(root):
        inner = file.relative_to(root)
        if file.suffix == ".py" and not {"site-packages", *TESTS}.intersection(inner.parts):
            content = _read(file)
            if content is not None:
                yield inner.as_posix(), content


def _given(paths: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    for number, path in enumerate(paths):
        # The number tells files of one name in two directories apart.
        if os.path.isdir(path):  # `Path.is_dir` raises for a name that is too long
            for file in _walk(path):
                inner = file.relative_to(path)
                hidden = any(part.startswith(".") for part in inner.parts)
                content = None if hidden else _read(file)
                if content is not None:
                    yield f"{number}/{inner.as_posix()}", content
            continue
        content = _read(path)
        if content is None:
            raise TextError(f"{path} is not text in UTF-8")
        yield f"{number}/{path.name}", content


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise TextError(f"cannot read {error.filename}: {error.strerror}")

    for directory, _, names in os.walk(root, onerror=refuse):
        yield from (Path(directory, name) for name in names)


def _read(path: Path) -> bytes | None:
    """What a file holds; None where that is no text."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait, a device has no end
            return None
        content = path.read_bytes()
    except FileNotFoundError:
        raise TextError(f"there is no file or directory {path}") from None
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if END in content else content
