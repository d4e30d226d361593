"""Checkpoints of a run, written by Orbax in the background; the newest sound one is read back.

A checkpoint is a directory named after its step, which appears only once it is complete:

* `arrays/`: the arrays, which `orbax.checkpoint.StandardCheckpointer().restore(PATH)` reads as
  nested dicts and lists, without code from here
* `shapes/metadata` and `progress/metadata`: JSON of the arrays' names, types and shapes, and of
  what the caller adds
* `checksums.json`: the SHA-256 of each of these files, because Orbax takes a changed byte for
  another number, and its threads print hundreds of tracebacks about a file that is cut off
"""

import functools
import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from training import ending

PyTree = Any
CHECKSUMS = "checksums.json"


def open_checkpoints(directory: Path) -> ocp.CheckpointManager:
    """Opens a directory of checkpoints; makes it, and removes what an interrupted save left in it.

    Every process of a run calls this and the other functions here, on a file system they share.

    Raises:
      OSError: the directory cannot be made.
    """
    _quieten()
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(2),
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(
            post_finalization_callback=lambda: _add_checksums(directory),
            # Where a background thread cannot make them, the program hangs at its end.
            create_directories_asynchronously=False,
        ),
    )
    return ocp.CheckpointManager(directory, options=options)


def save(
    manager: ocp.CheckpointManager, step: int, arrays: PyTree, progress: dict[str, Any]
) -> None:
    """Waits for the save before, and starts one that keeps the newest two checkpoints.

    Does nothing where a checkpoint of this step or a later one exists. When it returns, the arrays
    may be donated and `progress` may be changed.

    Args:
      manager: from `open_checkpoints`.
      step: at least 0.
      arrays: a tree of `jax.Array`s, in each process the same global ones.
      progress: anything that JSON holds; that of the first process is kept.

    Raises:
      OSError: the save before has failed, or this one cannot start.
    """
    items = ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays),
        shapes=ocp.args.JsonSave(_shapes(arrays)),
        progress=ocp.args.JsonSave(json.loads(json.dumps(progress))),  # a copy, for the background
    )
    with _failing_as_os_error(manager):
        manager.save(step, args=items)


def close(manager: ocp.CheckpointManager) -> None:
    """Waits for a save under way. To be called at the end, whether the run failed or not.

    Raises:
      OSError: the last save has failed, and `save` has not raised it.
    """
    with _failing_as_os_error(manager):
        manager.close()


def restore(
    manager: ocp.CheckpointManager, like: PyTree, *, warn: Callable[[str], None]
) -> tuple[PyTree, dict[str, Any]] | None:
    """Reads the newest checkpoint that is sound, and then removes the damaged ones after it.

    Args:
      manager: from `open_checkpoints`.
      like: arrays, or `jax.ShapeDtypeStruct`s with shardings: the structure, shapes, types and
        shardings to return.
      warn: called with one sentence for each damaged checkpoint, in the first process only.

    Returns:
      The arrays and the progress, or None where there is no sound checkpoint.

    Raises:
      ValueError: the checkpoint is sound, but holds other arrays; nothing is removed.
      OSError: a file is there but cannot be read, and nothing is removed; or a save has failed.
    """
    with _failing_as_os_error(manager):
        manager.wait_until_finished()
    steps = sorted(manager.all_steps(), reverse=True)
    newest = -1
    if jax.process_index() == 0:
        for step in steps:
            checkpoint = Path(manager.directory, str(step))
            damaged = _damaged_file(checkpoint)
            if damaged is None:
                newest = step
                break
            warn(f"skipping the checkpoint {checkpoint}, whose {damaged} is damaged or missing")
    newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    result = None if newest < 0 else _read(manager, newest, like)
    for step in steps:
        if step > newest:
            manager.delete(step)
    return result


def _read(manager: ocp.CheckpointManager, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    from_json = ocp.args.JsonRestore()
    saved = manager.restore(step, args=ocp.args.Composite(shapes=from_json, progress=from_json))
    wanted = _shapes(like)
    for name in sorted(wanted.keys() | saved["shapes"].keys()):
        there, here = (shapes.get(name, "missing") for shapes in (saved["shapes"], wanted))
        if there != here:
            raise ValueError(
                f"the checkpoint {manager.directory / str(step)} does not fit this run: "
                f"{name} is {there} there and {here} here"
            )
    arrays = manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(like)))
    return arrays["arrays"], saved["progress"]


def _shapes(arrays: PyTree) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(arrays)
    }


def _add_checksums(directory: Path) -> None:
    """Called by Orbax, in one process, just before it gives a written checkpoint its name."""
    for arrays in directory.glob("*/arrays"):
        checkpoint = arrays.parent
        if not (checkpoint / CHECKSUMS).exists():
            files = [file for file in checkpoint.glob("*/**/*") if file.is_file()]
            checksums = {f.relative_to(checkpoint).as_posix(): _checksum(f) for f in files}
            (checkpoint / CHECKSUMS).write_text(json.dumps(checksums, indent=0))


def _damaged_file(checkpoint: Path) -> str | None:
    name = CHECKSUMS
    try:
        checksums = json.loads((checkpoint / CHECKSUMS).read_bytes())
        if not isinstance(checksums, dict) or not checksums:
            return CHECKSUMS
        for name, checksum in checksums.items():
            if _checksum(checkpoint / name) != checksum:
                return name
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return name
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _failing_as_os_error(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Gives one type and one line to the errors of a save, which have many."""
    try:
        yield
    except Exception as error:
        # TensorStore raises ValueErrors of many lines, with the operating system's code in them.
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            reason = os.strerror(int(code[1]))
        else:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise OSError(f"cannot save a checkpoint in {manager.directory}: {reason}") from error


@functools.cache
def _quieten() -> None:
    """Drops what Orbax's threads print about a failed save, which `save` or `close` raises anyway.

    Orbax logs it, and leaves the other writes to an event loop that is closed: each of them is
    reported when it ends.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(
            lambda record: "orbax" not in record.pathname + record.getMessage()
        )
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    ending.pass_over_closed_loops()
