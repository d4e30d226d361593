"""What the commands share in reading their arguments; imports nothing slow."""

import argparse
import math
from collections.abc import Callable
from typing import Any


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
