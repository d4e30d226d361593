"""How a command ends: its exit code and its last words."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

from training.command import Refused, prepare_process
from training.signals import Stopped, StopSignals, stop_signals

Train = Callable[[argparse.Namespace, StopSignals], int]


def leave(code: int) -> NoReturn:
    """End this process with the exit code of `outcome`.

    After a signal that is without Python's teardown, which may crash in what was cut off.
    """
    if code > 128:
        _leave_at_once(code)
    sys.exit(code)


def outcome(
    prog: str,
    command: Callable[[StopSignals], int | None],
    *,
    stopped: Callable[[], str] = str,
    failed: str = "",
) -> int:
    """Run a command; where it fails, tell why on stderr.

    Returns:
      Its exit code, 0 for None; 1 for an error of the system, 2 for a refusal, 130 after Ctrl-C,
      143 after SIGTERM.

    Args:
      prog: the command's name.
      command: is given the signals that ask for its end.
      stopped: what to add after a signal.
      failed: what to add after an error of the system.
    """
    prepare_process()
    pass_over_closed_loops()

    def end(code: int, *parts: str) -> int:
        print(f"{prog}: {'; '.join(filter(None, parts))}", file=sys.stderr, flush=True)
        return code

    try:
        with stop_signals() as signals:
            return command(signals) or 0
    except Refused as error:
        return end(2, f"error: {error}")
    except ModuleNotFoundError as error:
        return end(2, f"error: {error}", "install it with: pip install -e '.[examples]'")
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return end(1, f"error: {error}", failed)
    except KeyboardInterrupt:
        return end(130, "interrupted", stopped())
    except Stopped as end_asked:
        how = "interrupted" if end_asked.signum == signal.SIGINT else "terminated"
        return end(128 + end_asked.signum, how, stopped())


@cache  # once in a process, and until its end
def pass_over_closed_loops() -> None:
    """Reports no write of a failed save that finds its event loop closed; see `checkpoints`."""
    report = sys.unraisablehook

    def report_others(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            report(unraisable)

    sys.unraisablehook = report_others


def training_outcome(prog: str, args: argparse.Namespace, train: Train) -> int:
    """Train, in this process or together with others.

    Returns its exit code: 0, 1 (a run failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).

    Args:
      prog: the command's name.
      args: with the options of `training.options`.
      train: gives the exit code, or raises what `outcome` makes one of.
    """
    together = False  # whether the other processes, if there are any, end as well

    def command(signals: StopSignals) -> int:
        nonlocal together
        try:
            code = _run(args, signals, train)
        except Stopped as stopped:
            together = not stopped.at_once
            raise
        together = True
        return code

    code = outcome(prog, command, stopped=lambda: _how_to_go_on(args.output))
    if args.coordinator and not together:
        _leave_at_once(code)  # Python's teardown would wait for the others, which wait for this one
    return code


def _leave_at_once(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _how_to_go_on(output: Path | None) -> str:
    if output is None:
        return "nothing is kept without --output"
    if not output.exists():
        return "nothing was begun"
    return f"--resume goes on with what is in {output}"


def _run(args: argparse.Namespace, signals: StopSignals, train: Train) -> int:
    if not args.coordinator:
        return train(args, signals)
    # Imported here, so that --help and a refusal do not wait for JAX.
    from training import processes

    processes.join(args.coordinator, args.num_processes, args.process_id)
    with signals.defer():  # to a step that all processes agree on
        return train(args, signals)
