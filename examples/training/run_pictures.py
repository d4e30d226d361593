"""What the commands that draw runs share: how they read runs, name them, and write a picture."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from training.command import Refused, a_path, make_parser
from training.files import ARGUMENTS, METRICS, parse_object, read_bytes, read_object, replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTING = ("dataset", "model", "optimizer")
OWN = ("learning_rate", "weight_decay")  # every optimizer's recipe has its own
ASIDE = ("seeds", "seeds_at_once", "geometry")  # these do not change a run

Arguments = dict[str, Any]
Run = TypeVar("Run")


def make_drawing_parser(
    prog: str, description: str | None, epilog: str, picture: str
) -> argparse.ArgumentParser:
    """A parser of directories with runs, and of the picture to write, by default `picture`."""
    parser = make_parser(prog, "[options] DIR...", description, epilog)
    parser.add_argument(
        "directories", type=a_path, nargs="+", metavar="DIR", help="with runs at or below it"
    )
    parser.add_argument(
        "--output",
        type=_png,
        default=picture,
        metavar="FILE",
        help="the picture to write, a .png file (default: %(default)s)",
    )
    return parser


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return a_path(text)


def check_output(path: Path) -> None:
    """Refuse a picture that cannot be written, without touching anything."""
    if path.is_dir():
        raise Refused(f"cannot write {path}: it is a directory")
    if not path.parent.is_dir():
        raise Refused(f"cannot write {path}: {path.parent} is not a directory")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise Refused(f"cannot write {path}: no permission to write in {path.parent}")


def write_picture(path: Path, figure: Figure) -> None:
    """Write a PNG file, whole or not at all."""
    # Imported here, so that --help and a refusal do not wait for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    replace_file(path, FigureCanvasAgg(figure).print_png)


def read_runs(directories: Sequence[Path], read: Callable[[Path], Run | None]) -> list[Run]:
    """Every run at or below the directories, in their order and each once, as `read` gives it.

    One for which it gives None has not finished an epoch, and is left out with a message.

    Raises:
      Refused: for a directory without a run, or no finished epoch at all.
    """
    paths: dict[Path, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise Refused(f"no such directory: {directory}")
        below = sorted(
            Path(place) for place, *names in _walk(directory) if any(METRICS in n for n in names)
        )
        found = [path for path in below if (path / ARGUMENTS).is_file()]
        if not found:
            raise Refused(f"no run (with {ARGUMENTS} and {METRICS}) at or below {directory}")
        paths |= {path.resolve(): path for path in found}
    runs = {path: read(path) for path in paths.values()}
    for path, run in runs.items():
        if run is None:
            print(f"{path} has not finished an epoch: left out.", file=sys.stderr)
    started = [run for run in runs.values() if run is not None]
    if not started:
        raise Refused("no run has finished an epoch")
    return started


def _walk(directory: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """All directories below one, with the names in them; refuses one that cannot be read."""

    def refuse(error: OSError) -> None:
        raise Refused(f"cannot read {error.filename}: {error.strerror}")

    return os.walk(directory, onerror=refuse)


def read_arguments(directory: Path) -> Arguments:
    """What decides the outcome of a run; that of a language model has `SETTING` too."""
    path = directory / ARGUMENTS
    arguments = read_object(path)
    unit = "epochs"
    if "architecture" in arguments:
        unit, names = "steps", {"architecture": "model", "text": "dataset"}
        arguments = {names.get(key, key): value for key, value in arguments.items()}
        arguments.pop("text_sha256", None)
    for key in (*SETTING, unit, "seed", *arguments):
        if not isinstance(arguments.get(key, []), str | int | float | None):
            raise Refused(f"{path}: damaged, {key} is missing or no plain value")
    return {key: value for key, value in arguments.items() if key not in ASIDE}


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that has one for each epoch, or so many steps, from the first on."""
    *lines, last = read_bytes(path).split(b"\n")
    epochs = [parse_object(path, text, line) for line, text in enumerate(lines, 1)]
    with contextlib.suppress(Refused):  # the last line may be torn: of a run under way, or killed
        epochs.append(parse_object(path, last))
    every = epochs[0].get("step") if epochs else None  # of a language model
    unit, every = ("epoch", 1) if not isinstance(every, int) else ("step", every)
    for line, epoch in enumerate(epochs, 1):
        if epoch.get(unit) != every * line:
            raise Refused(f"{path}, line {line}: damaged, it is not of {unit} {every * line}")
    return epochs


def check_number(place: str, values: dict[str, Any], key: str, most: float) -> None:
    """Refuse what is no number from 0 to `most`: 1, or the largest there is."""
    value = values.get(key)
    if not isinstance(value, int | float) or not 0 <= value <= most:  # NaN is in no range
        range_ = "from 0 to 1" if most == 1 else "from 0"
        raise Refused(f"{place}: damaged, {key} is not a finite number {range_}")


def differing(runs: Sequence[Arguments]) -> list[str]:
    """The arguments that are not the same in all runs."""
    keys = dict.fromkeys(key for arguments in runs for key in arguments)
    return [key for key in keys if len({arguments.get(key) for arguments in runs}) > 1]


def name_common(runs: Sequence[Arguments]) -> str:
    """What all the runs have in common."""
    arguments, different = runs[0], differing(runs)
    setting = [str(arguments[key]) for key in ("model", "dataset") if key not in different]
    common = [key for key in arguments if key not in (*SETTING, *different)]
    return ", ".join([*filter(None, [" on ".join(setting)]), *_named(arguments, common)])


def name_run(arguments: Arguments, runs: Sequence[Arguments]) -> str:
    """The optimizer, and what else tells a run from the others.

    Learning rate and weight decay are named only where they differ for the same optimizer in the
    same setting: between optimizers they differ by the recipes.
    """
    alike = [other for other in runs if all(other[k] == arguments[k] for k in SETTING)]
    keys = [key for key in differing(runs) if key not in ("optimizer", *OWN)]
    keys += [key for key in differing(alike) if key in OWN]
    return ", ".join([str(arguments["optimizer"]), *_named(arguments, keys)])


def _named(arguments: Arguments, keys: Sequence[str]) -> list[str]:
    return [f"{key} {arguments.get(key)}" for key in keys]
