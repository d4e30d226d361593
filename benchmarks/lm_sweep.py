"""Sweep the learning rates of optimizers on small language models of two widths.

Does the best learning rate stay where it is when the width doubles, and which optimizer has the
lowest loss at its best? Every optimizer gets the same number of learning rates, around the one of
its recipe; the best of each is trained with more seeds. Runs that are there already are skipped:
after an interruption the same command goes on.
"""

# Each run is one call of the trainer in a process of its own.

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until `main` handles it, Ctrl-C ends the command at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import itertools
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from common import run_lines
from common.benchmark_command import RUNS, Refused, make_directory, outcome, report, tell, warn_of
from common.trainer_calls import call, ending, locked, noted_signals
from language import recipes
from sweep import lm_report, lm_runs
from sweep.lm_runs import Key, Run
from training.command import a_path, make_parser, number, one_of, positive, several
from training.ending import leave
from training.files import CHECKPOINTS, FAILED
from training.options import seed_count
from training.signals import Stopped, StopSignals

NAME = "lm_sweep.py"
EXAMPLES = """\
examples:
  python benchmarks/lm_sweep.py --architectures qwen3 --optimizers adamw,muon_h
  python benchmarks/lm_sweep.py --widths 32 --points 3 --steps 60 --seeds 1
  python benchmarks/lm_sweep.py --report --output runs/lm_sweep
"""
TRAINER = Path(__file__).resolve().parents[1] / "examples" / "train_lm.py"
OPTIMIZERS = ("adamw", "muon", "adam_srt", "adam_h", "muon_h")
FACTOR = 2.0  # between neighbouring learning rates
MAX_POINTS = 99
HEADS = 4  # the trainer's


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    It is 0 (all runs are there), 1 (some failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    args = _parse(argv)
    return outcome(NAME, args.output, partial(_report if args.report else _sweep, args))


def rates(optimizer: str, points: int) -> list[float]:
    """The learning rates of an optimizer, the recipe's in the middle."""
    middle = recipes.RECIPES[optimizer].learning_rate
    exponents = (i - (points - 1) // 2 for i in range(points))
    return [float(f"{middle * FACTOR**exponent:.3g}") for exponent in exponents]


def _sweep(args: argparse.Namespace, signals: StopSignals) -> int:
    output: Path = args.output
    make_directory(output)
    _load(args, warn=True)
    with noted_signals() as received:
        first = _grid(args)
        failures = _train(args, first, received)
        best = [] if failures or received else _best(args)
        failures += _train(args, best, received)
    runs = _load(args)
    where = _write(output, runs) if runs else "no table yet"
    for failure in failures:
        tell(NAME, f"failed: {failure}")
    wanted = [*first, *best]
    print(f"{sum(key in runs for key in wanted)} of {len(wanted)} runs are there; {where}")
    if received:
        raise Stopped(received[0], at_once=False)
    return 1 if failures else 0


def _grid(args: argparse.Namespace) -> list[Key]:
    """The first seed of all settings, each architecture and width whole before the next."""
    return [
        Key(architecture, width, optimizer, rate, 0)
        for architecture, width, optimizer in itertools.product(
            args.architectures, args.widths, args.optimizers
        )
        for rate in rates(optimizer, args.points)
    ]


def _best(args: argparse.Namespace) -> list[Key]:
    """The other seeds of each optimizer's best learning rate."""
    runs, grid, wanted = _load(args), _grid(args), []
    for key in lm_runs.best(run for run in runs.values() if run.key.seed == 0):
        if key in grid:
            wanted += [key._replace(seed=seed) for seed in range(1, args.seeds)]
    return wanted


def _train(args: argparse.Namespace, wanted: Sequence[Key], received: list[int]) -> list[str]:
    """Trains what is missing; says what failed."""
    failures = []
    runs = _load(args)
    missing = [key for key in wanted if key not in runs]
    for place, key in enumerate(missing, 1):
        home = args.output / "cells" / str(key)
        with locked(home, received) as lock:
            if received:
                break
            if key in _load(args):  # another command works on the same output
                continue
            print(f"run {place}/{len(missing)}: {key}", flush=True)
            code = call(_command(args, key, home / "run"), lock, received)
            # A loss that is no number is a result as well: that learning rate is too large. Any
            # other failure, such as of a full disk, is none.
            if code == 0 or (code == 1 and (home / "run" / FAILED).exists()):
                run_lines.append(args.output / RUNS, lm_runs.line(key, home / "run"))
                shutil.rmtree(home / "run" / CHECKPOINTS, ignore_errors=True)
        if not received and key not in _load(args):
            failures.append(f"{key}: {ending(code)}")
    return failures


def _command(args: argparse.Namespace, key: Key, output: Path) -> list[str]:
    options = {
        "architecture": key.architecture,
        "width": key.width,
        "optimizer": key.optimizer,
        "learning_rate": key.learning_rate,
        "seed": key.seed,
        "depth": args.depth,
        "context": args.context,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "eval_every": args.eval_every,
        "output": output,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, str(TRAINER), *arguments, "--resume"]


def _load(args: argparse.Namespace, *, warn: bool = False) -> dict[Key, Run]:
    """Reads the runs, and refuses those of another protocol than that of the command."""
    runs, broken = lm_runs.load(args.output / RUNS)
    if warn:
        warn_of(broken, NAME, args.output, "run")
    wanted = {} if args.report else vars(args)
    for run in runs.values():
        wanted = run.protocol | {name: wanted[name] for name in run.protocol if name in wanted}
        for name in lm_runs.PROTOCOL:
            if run.protocol[name] != wanted[name]:
                raise Refused(
                    f"{args.output / RUNS} holds a run with another protocol: {name} "
                    f"{run.protocol[name]} and not {wanted[name]}"
                )
    return runs


def _report(args: argparse.Namespace, signals: StopSignals) -> int:
    runs = _load(args, warn=True)
    print(f"{len(runs)} runs; {_write(args.output, runs)}")
    return 0


def _write(output: Path, runs: dict[Key, Run]) -> str:
    return report(output, list(runs.values()), "run", lm_report.write_report)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the options; what every run of the trainer would refuse is refused at once."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.steps % args.eval_every:
        parser.error(f"--eval_every {args.eval_every} does not divide --steps {args.steps}")
    for width in args.widths:
        if width % (2 * HEADS):
            parser.error(f"--widths: {width} is no even multiple of the {HEADS} heads")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(NAME, "[options]", __doc__, EXAMPLES)
    add = parser.add_argument
    for what, known, default in (
        ("architectures", tuple(recipes.ARCHITECTURES), ("qwen3", "gemma3")),
        ("optimizers", recipes.OPTIMIZERS, OPTIMIZERS),
    ):
        add(
            f"--{what}",
            type=partial(several, partial(one_of, known)),
            default=default,
            metavar="NAMES",
            help=f"of {','.join(known)} (default: {','.join(default)})",
        )
    add(
        "--widths",
        type=partial(several, positive),
        default=(64, 128),
        metavar="NUMBERS",
        help="features between blocks (default: 64,128)",
    )
    points = f"learning rates of each optimizer, each {FACTOR:g} times the one before"
    for name, kind, default, what in (
        ("points", _points, 5, points),
        ("seeds", seed_count, 3, "of each optimizer's best learning rate; of the others, one"),
        ("depth", positive, 2, "blocks"),
        ("context", positive, 128, "bytes that a window predicts"),
        ("batch_size", positive, 8, "windows in a step"),
        ("steps", positive, 300, "of training"),
        ("eval_every", positive, 100, "steps between evaluations; divides --steps"),
    ):
        add(
            f"--{name}",
            type=kind,
            default=default,
            metavar="N",
            help=f"{what} (default: %(default)s)",
        )
    add(
        "--output",
        type=a_path,
        default=Path("runs/lm_sweep"),
        metavar="DIR",
        help=f"directory for {RUNS}, table.md, table.png and cells (default: %(default)s)",
    )
    add(
        "--report",
        action="store_true",
        help=f"train nothing: make table.md and table.png again from {RUNS} of --output, "
        "whatever the other options say",
    )
    return parser


def _points(text: str) -> int:
    """How many there may be before the learning rates are infinite or 0."""
    wanted = f"an integer from 1 to {MAX_POINTS}"
    return number(text, int, lambda value: 1 <= value <= MAX_POINTS, wanted)


if __name__ == "__main__":
    leave(main())
