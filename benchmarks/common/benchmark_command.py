"""What the benchmark commands share: how they end, and what they tell of what --output holds."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training import ending
from training.command import Refused
from training.files import why_not_writable
from training.signals import StopSignals

RUNS = "runs.jsonl"


def tell(name: str, message: str) -> None:
    """Write a message of the command with this name to stderr."""
    print(f"{name}: {message}", file=sys.stderr, flush=True)


def outcome(
    name: str, output: Path, command: Callable[[StopSignals], int], lines: str = RUNS
) -> int:
    """Run a command that keeps what it has in the file `lines` of `output`.

    Returns:
      Its exit code; 1 for an error of the system, 2 for a refusal, 130 after Ctrl-C, 143 after
      SIGTERM.
    """
    kept = f"what {output / lines} holds is kept"
    goes_on = f"{kept}, and the same command goes on from there"
    return ending.outcome(name, command, stopped=lambda: goes_on, failed=kept)


def prepare_jax(*, torch: bool) -> None:
    """Set up JAX for measuring, before it starts; `torch` for PyTorch beside it."""
    if torch:
        # Otherwise JAX takes most of the GPU's memory at its start, and leaves PyTorch little.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    # Seconds of compiling shall not be those of reading a cache.
    jax.config.update("jax_enable_compilation_cache", False)


@contextmanager
def needs_torch() -> Generator[None, None, None]:
    """Refuses --torch where the imports and calls inside find no PyTorch that works."""
    try:
        yield
    except ImportError as error:
        raise Refused(f"--torch needs PyTorch ({error}); pip install torch") from error
    except RuntimeError as error:
        raise Refused(f"--torch: {error}") from error


def make_directory(output: Path) -> None:
    """Make the directory for the results, or refuse one that cannot be made or written."""
    if reason := why_not_writable(output):
        raise Refused(f"cannot write to {output}: {reason}")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"cannot create {output}: {error.strerror}") from error


def warn_of(broken: Iterable[int], name: str, output: Path, what: str, lines: str = RUNS) -> None:
    """Tell the numbers of the lines of a file that hold nothing of what they should."""
    for number in broken:
        tell(name, f"warning: line {number} of {output / lines} is no whole {what} and is ignored")


def report(
    output: Path,
    recorded: Collection[Any],
    what: str,
    write: Callable[[Path, Any], None],
    lines: str = RUNS,
) -> str:
    """Make table.md and table.png from what is recorded, and say where; refuse to of nothing."""
    if not recorded:
        raise Refused(f"there are no {what}s in {output / lines}")
    write(output, recorded)
    return f"the table is in {output / 'table.md'} and table.png"
