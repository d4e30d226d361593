"""How a command that trains ends: its exit code and its last words."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from training.command import Refused, prepare_process
from training.signals import Stopped, StopSignals, stop_signals

Train = Callable[[argparse.Namespace, StopSignals], int]


def outcome(prog: str, args: argparse.Namespace, train: Train) -> int:
    """Train, in this process or together with others.

    Returns its exit code: 0, 1 (a run failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).

    Args:
      prog: the command's name.
      args: with the options of `training.options`.
      train: gives the exit code, or raises what this function makes one of.
    """
    code, alone = _outcome(prog, args, train)
    if alone and args.coordinator:
        # At its end, Python would wait for the other processes, which wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _outcome(prog: str, args: argparse.Namespace, train: Train) -> tuple[int, bool]:
    """The exit code, and whether it is this process's alone if there are several."""

    prepare_process()

    def end(code: int, message: str) -> int:
        print(f"{prog}: {message}", file=sys.stderr)
        return code

    try:
        with stop_signals() as signals:
            return _run(args, signals, train), False
    except Refused as error:
        return end(2, f"error: {error}"), True
    except ModuleNotFoundError as error:
        return end(2, f"error: {error}; install it with: pip install -e '.[examples]'"), True
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, True
    except OSError as error:
        return end(1, f"error: {error}"), True
    except Stopped as stopped:
        how = "interrupted" if stopped.signum == signal.SIGINT else "terminated"
        return end(128 + stopped.signum, f"{how}; {_how_to_go_on(args.output)}"), stopped.at_once


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
