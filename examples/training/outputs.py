"""The output directory of a command: looked at, claimed, and shared out among the seeds."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.command import Refused
from training.display import say
from training.files import (
    ARGUMENTS,
    CHECKPOINTS,
    GEOMETRY,
    METRICS,
    SUMMARY,
    read_if_whole,
    read_object,
    why_not_writable,
)
from training.processes import leads
from training.records import write_json


class OutputError(Refused):
    """The output directory cannot be used; the message says why."""


def is_done(output: Path | None, arguments: dict[str, Any], *, resume: bool) -> bool:
    """Look whether a directory can be used, and whether what is asked for is finished in it.

    Args:
      output: the directory; None if nothing is to be written.
      arguments: that decide the outcome; those of an earlier run there must be the same.
      resume: whether to go on with it.

    Raises:
      OutputError: it cannot.
    """
    if output is None:
        return False
    if leads():
        _check(output, arguments, resume=resume)
    done = all(map(is_finished, run_directories(output, arguments).values()))
    if done:
        say(f"{output} is finished.")
    return done


def _check(output: Path, arguments: dict[str, Any], *, resume: bool) -> None:
    """Look whether a directory can be written, and is free or holds the same run to go on with.

    Touches nothing.
    """
    if reason := why_not_writable(output):
        raise OutputError(f"cannot write to {output}: {reason}")
    if not os.path.lexists(output / ARGUMENTS):
        names = (METRICS, SUMMARY, CHECKPOINTS)
        if any(map(os.path.lexists, [*map(output.joinpath, names), *output.glob("seed-*")])):
            raise OutputError(f"{output} holds files of a run that did not begin there")
        return
    found = read_object(output / ARGUMENTS)
    if not resume:
        raise OutputError(
            f"{output} already holds a run: go on with it (--resume), name another --output, "
            "or move it away"
        )
    check_same(output, found, arguments)
    for name in (METRICS, SUMMARY, GEOMETRY, CHECKPOINTS):
        path, wanted = output / name, "directory" if name == CHECKPOINTS else "file"
        if os.path.exists(path) and not (
            path.is_dir() if wanted == "directory" else path.is_file()
        ):
            raise OutputError(f"{path} is no {wanted}: move it away")


def check_same(place: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a place that holds a run with other arguments.

    Raises:
      OutputError: it does.
    """
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        differences = (f"{n} {found.get(n)} and not {wanted.get(n)}" for n in names)
        raise OutputError(f"{place} holds a run with {', '.join(differences)}")


@contextmanager
def claimed(output: Path | None, arguments: dict[str, Any]) -> Generator[None, None, None]:
    """Make the directory, write the arguments, and hold the lock on it within the context.

    Raises:
      OutputError: another process is at work there, or the directory cannot be made.
    """
    if output is None or not leads():
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"another process is at work in {output}") from error
    except OSError as error:
        raise OutputError(f"cannot create {output}: {error.strerror}") from error
    with lock:
        write_json(output / ARGUMENTS, arguments)
        yield


def run_directories(output: Path | None, arguments: dict[str, Any]) -> dict[int, Path | None]:
    """Where each seed's files are: in `output`, or one level below if there are several seeds."""
    first, count = arguments["seed"], arguments["seeds"]
    if output is None or count == 1:
        return dict.fromkeys(range(first, first + count), output)
    return {seed: output / f"seed-{seed}" for seed in range(first, first + count)}


def is_finished(directory: Path | None) -> bool:
    """Whether a run has come to its end here; not with a damaged summary, which is made again."""
    return directory is not None and read_if_whole(directory / SUMMARY) is not None
