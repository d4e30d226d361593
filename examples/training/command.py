"""What the commands share in reading their arguments; imports nothing slow."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Refused(Exception):
    """What is asked for cannot be done; the message says why."""


def make_parser(prog: str, usage: str, description: str | None, epilog: str) -> Any:
    """A parser that keeps the lines of its texts and takes no abbreviations."""
    return argparse.ArgumentParser(
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


def directory(text: str) -> Path:
    """A path that is not empty, as that of a variable that is not set would be."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def several(kind: Callable[[str], Any], text: str) -> tuple[Any, ...]:
    """Values separated by commas, each read by `kind` and named once."""
    values = tuple(map(kind, text.split(",")))
    for value in values:
        if values.count(value) > 1:
            raise argparse.ArgumentTypeError(f"{value} is named twice")
    return values


def one_of(known: Sequence[str], text: str) -> str:
    """A known name."""
    if text not in known:
        raise argparse.ArgumentTypeError(f"unknown {text!r} (choose from {', '.join(known)})")
    return text


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
