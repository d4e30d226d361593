"""What the commands share in reading their arguments; imports nothing slow."""

import argparse
import difflib
import errno
import math
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any


class Refused(Exception):
    """What is asked for cannot be done; the message says why."""


class _Parser(argparse.ArgumentParser):
    """Tells of an unknown option which one may be meant."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = {
                text.lstrip("-") for action in self._actions for text in action.option_strings
            }
            first = next((text for text in unknown if text.startswith("--")), "")
            meant = did_you_mean(first.lstrip("-").partition("=")[0], options, "--")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return found


def make_parser(prog: str, usage: str, description: str | None, epilog: str) -> Any:
    """A parser that keeps the lines of its texts and takes no abbreviations."""
    return _Parser(
        prog=prog,
        usage=f"%(prog)s {usage}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def prepare_process() -> None:
    """Keep what a user's environment may hold from ending a command.

    What a terminal cannot show is printed as an escape, and pictures are drawn without a screen,
    whatever MPLBACKEND says.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    os.environ["MPLBACKEND"] = "agg"


def a_path(text: str) -> Path:
    """A path that can be; an empty one is that of a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    for part in (text, *Path(text).parts):  # of what is not there yet, the first part would be all
        try:
            os.lstat(part)
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                raise argparse.ArgumentTypeError(f"{text!r}: {error.strerror}") from error
    return Path(text)


def several(kind: Callable[[str], Any], text: str) -> tuple[Any, ...]:
    """Values separated by commas, each read by `kind` and named once."""
    values = tuple(map(kind, text.split(",")))
    for value in values:
        if values.count(value) > 1:
            raise argparse.ArgumentTypeError(f"{value} is named twice")
    return values


def one_of(known: Iterable[str], text: str) -> str:
    """A known name."""
    if text not in (names := tuple(known)):
        choice = f"(choose from {', '.join(names)})"
        raise argparse.ArgumentTypeError(f"unknown {text!r} {choice}{did_you_mean(text, names)}")
    return text


def choice(known: Iterable[str]) -> dict[str, Any]:
    """What `add_argument` takes for one of these names."""
    return {"type": partial(one_of, known), "metavar": f"{{{','.join(known)}}}"}


def data_set(known: Iterable[str], text: str) -> str:
    """A known name, or folder:PATH."""
    kind, _, path = text.partition(":")
    if kind == "folder" and path:
        a_path(path)
    elif text not in (names := tuple(known)):
        choice = f"(choose from {', '.join(names)}, folder:PATH)"
        meant = did_you_mean(text, names)
        raise argparse.ArgumentTypeError(f"unknown data set {text!r} {choice}{meant}")
    return text


def did_you_mean(text: str, known: Iterable[str], before: str = "") -> str:
    """The end of a message about an unknown name: the known one that resembles it."""
    alike = difflib.get_close_matches(text.lower(), sorted(known), n=1)
    return f"; did you mean {before}{alike[0]}?" if alike else ""


def positive(text: str) -> int:
    """An integer from 1."""
    return number(text, int, lambda value: value >= 1, "an integer from 1")


def number(text: str, kind: type, allowed: Callable[[float], bool], wanted: str) -> Any:
    """A number of this kind that is allowed; otherwise the error says what is wanted."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value
