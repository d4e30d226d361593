"""Train the paper's table, seven optimizers on seven settings, and show it beside the paper's.

Runs that are there already are skipped: after an interruption the same command goes on.
"""

# Each cell (a setting, an optimizer and a stretch of seeds) is one call of the trainer in a process
# of its own. JAX is never started here, so that no cell can take the others down with it and the
# device is free between them.

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence, Set
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import paper_table
import table_runs
from cifar import recipes
from cifar.command import make_parser, one_of, positive, several
from table_runs import Key, Protocol, Run

EXAMPLES = """\
examples:
  python benchmarks/reproduce_table.py --settings cifar10/resnet20 --output runs/resnet20
  python benchmarks/reproduce_table.py --dataset digits --settings cifar10/resnet20 --seeds 2 \\
    --epochs 4
  python benchmarks/reproduce_table.py --report --output runs/resnet20
"""
TRAINER = Path(__file__).resolve().parents[1] / "examples" / "train_cifar.py"
RUNS = "runs.jsonl"
EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
PATIENCE = 60  # seconds in which the trainer should end by itself after Ctrl-C


class _Refused(Exception):
    """The command cannot go on as asked; the message says why."""


class Cell(NamedTuple):
    """What one call of the trainer trains."""

    setting: str
    optimizer: str
    seeds: range

    def keys(self) -> set[Key]:
        """The runs, as `table_runs` names them."""
        return {(self.setting, self.optimizer, seed) for seed in self.seeds}

    def __str__(self) -> str:
        first, last = self.seeds[0], self.seeds[-1]
        seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
        return f"{self.setting} with {self.optimizer}, {seeds}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    It is 0 (all runs are there), 1 (some failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    args = _parser().parse_args(argv)
    try:
        if args.report:
            return _report(args.output)
        with _noted_signals() as received:
            return _run(args, received)
    except _Refused as error:
        return _end(2, f"error: {error}")
    except ModuleNotFoundError as error:
        return _end(2, f"error: {error}; install it with: pip install -e '.[examples]'")
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:  # in --report; the training notes it
        return _end(130, "interrupted")
    except OSError as error:
        return _end(1, f"error: {error}; what {args.output / RUNS} holds is kept")


def _end(code: int, message: str) -> int:
    print(f"reproduce_table.py: {message}", file=sys.stderr)
    return code


@contextmanager
def _noted_signals() -> Generator[list[int], None, None]:
    """Makes Ctrl-C and SIGTERM do nothing but add themselves to the list that it yields."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    previous = {signum: signal.signal(signum, note) for signum in EXIT_CODES}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _run(args: argparse.Namespace, received: list[int]) -> int:
    protocol = Protocol(args.epochs, args.batch_size, args.precision, args.dataset)
    own = tuple(name for name in paper_table.SETTINGS if name.startswith("cifar10/"))
    settings = args.settings or (own if args.dataset else paper_table.SETTINGS)
    if args.dataset and (others := [name for name in settings if name not in own]):
        raise _Refused(f"--dataset {args.dataset} stands in for cifar10, not for {others[0]}")
    output: Path = args.output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _Refused(f"cannot create {output}: {error.strerror}") from error
    wanted = set(itertools.product(settings, args.optimizers, range(args.seeds)))

    recorded = _load(output, protocol, warn=True).keys()
    _tidy_up(output, recorded, _stretches(settings, args.optimizers, wanted - recorded))
    recorded = _load(output, protocol).keys()
    cells = _stretches(settings, args.optimizers, wanted - recorded)

    failures = []
    for number, cell in enumerate(cells, 1):
        if received:
            break
        with _locked(_directory(output, cell).parent, received) as lock:
            if received:
                break
            if cell.keys() & _load(output, protocol).keys():
                # Another command works on the same output.
                print(f"{cell}: recorded by another command, at least in part", flush=True)
                continue
            print(f"cell {number}/{len(cells)}: {cell}", flush=True)
            code = _train(_command(args, cell), lock, received)
            received += [signum for signum in EXIT_CODES if code in (EXIT_CODES[signum], -signum)]
            # What was interrupted or killed stays as it is: the next start makes the same call.
            if code == 0 or (code == 1 and not received):
                _close(output, cell)
        if not received and cell.keys() - _load(output, protocol).keys():
            failures.append(f"{cell}: {_ending(code)}")

    runs = _load(output, protocol)
    if runs:
        paper_table.write_report(output, runs)
    for failure in failures:
        _end(1, f"failed: {failure}")
    where = f"the table is in {output / 'table.md'} and table.png" if runs else "no table yet"
    print(f"{len(wanted & runs.keys())} of {len(wanted)} runs are there; {where}", flush=True)
    if received:
        code = EXIT_CODES[received[0]]
        return _end(code, "interrupted; the same command goes on from here")
    return 0 if wanted <= runs.keys() else 1


def _stretches(settings: Sequence[str], optimizers: Sequence[str], missing: set[Key]) -> list[Cell]:
    """The missing runs in the order of the names, in the longest stretches of seeds."""
    cells: list[Cell] = []
    for setting, optimizer in itertools.product(settings, optimizers):
        for seed in sorted(key[2] for key in missing if key[:2] == (setting, optimizer)):
            before = cells[-1] if cells else None
            goes_on = before and before == (setting, optimizer, range(before.seeds.start, seed))
            first = cells.pop().seeds.start if goes_on else seed
            cells.append(Cell(setting, optimizer, range(first, seed + 1)))
    return cells


def _directory(output: Path, cell: Cell) -> Path:
    seeds = f"seeds-{cell.seeds[0]}-{cell.seeds[-1]}"
    return output / "cells" / cell.setting / cell.optimizer / seeds


def _command(args: argparse.Namespace, cell: Cell) -> list[str]:
    dataset, model = cell.setting.split("/")
    options = {
        "dataset": args.dataset or dataset,
        "model": model,
        "optimizer": cell.optimizer,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "seed": cell.seeds[0],
        "seeds": len(cell.seeds),
        "output": _directory(args.output, cell),
    }
    if args.data_dir is not None:
        options["data_dir"] = args.data_dir
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, str(TRAINER), *arguments, "--resume"]


def _train(command: Sequence[str], lock: int, received: Sequence[int]) -> int:
    """Runs a trainer to its end and returns its exit code, or minus the signal that killed it.

    A terminal sends Ctrl-C to the trainer as well, which then ends by itself. SIGTERM is handed on;
    it also follows a Ctrl-C that did not reach the trainer.
    """
    trainer = subprocess.Popen(command, pass_fds=[lock])
    waited = 0.0
    while trainer.poll() is None and signal.SIGTERM not in received and waited < PATIENCE:
        with suppress(subprocess.TimeoutExpired):
            trainer.wait(timeout=0.1)
        waited += 0.1 if received else 0
    if trainer.poll() is None:
        trainer.terminate()
    return trainer.wait()


def _ending(code: int) -> str:
    if code < 0:
        return f"killed by signal {-code} ({signal.strsignal(-code)})"
    return f"exit code {code}" if code else "exit code 0 without the results of all seeds"


@contextmanager
def _locked(home: Path, received: Sequence[int]) -> Generator[int, None, None]:
    """Waits for the lock of a setting and optimizer and holds it; a signal ends the waiting.

    The trainer inherits the lock. If it outlives its killed parent, the next command waits for its
    end instead of starting a second one on the same files.
    """
    home.mkdir(parents=True, exist_ok=True)
    lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _take(lock):
            print(f"waiting for another process that works in {home}", flush=True)
            while not received and not _take(lock):
                time.sleep(0.1)
        yield lock
    finally:
        os.close(lock)


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _close(output: Path, cell: Cell) -> None:
    """Adds a cell's finished runs to runs.jsonl and removes its checkpoints; needs the lock.

    Where no run is finished everything stays, to be resumed. Otherwise another stretch of seeds is
    missing from now on, and this directory is not resumed any more.
    """
    directory = _directory(output, cell)
    recorded = table_runs.load(output / RUNS)[0].keys() & cell.keys()
    lines = ""
    for key in sorted(cell.keys() - recorded):
        run = directory if len(cell.seeds) == 1 else directory / f"seed-{key[2]}"
        if (run / "summary.json").exists():
            summary = json.loads((run / "summary.json").read_bytes())
            curve = [json.loads(line) for line in (run / "metrics.jsonl").open("rb")]
            lines += json.dumps({"setting": cell.setting, **summary, "curve": curve}) + "\n"
    if lines:
        table_runs.append(output / RUNS, lines.encode())
    if lines or recorded:
        for checkpoints in _checkpoints(directory):
            shutil.rmtree(checkpoints, ignore_errors=True)


def _tidy_up(output: Path, recorded: Set[Key], cells: Sequence[Cell]) -> None:
    """Ends what a kill left of cells that will not be resumed, and records what they finished."""
    for directory in output.glob("cells/*/*/*/seeds-*-*"):
        dataset, model, optimizer, seeds = directory.relative_to(output / "cells").parts
        _, first, last = seeds.split("-")
        cell = Cell(f"{dataset}/{model}", optimizer, range(int(first), int(last) + 1))
        in_the_way = cell not in cells and any(other[:2] == cell[:2] for other in cells)
        if in_the_way or cell.keys() & recorded:
            lock = os.open(directory.parent / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            if _take(lock):  # else a process is at work there
                _close(output, cell)
            os.close(lock)


def _checkpoints(directory: Path) -> list[Path]:
    return [*directory.glob("checkpoints"), *directory.glob("seed-*/checkpoints")]


def _load(output: Path, protocol: Protocol | None = None, *, warn: bool = False) -> dict[Key, Run]:
    """Reads the runs, and refuses those of more than one protocol."""
    runs, broken = table_runs.load(output / RUNS)
    for number in broken if warn else ():
        _end(0, f"warning: line {number} of {output / RUNS} is no whole run and is ignored")
    for run in runs.values():
        protocol = protocol or run.protocol
        if difference := run.protocol.difference(protocol):
            raise _Refused(f"{output / RUNS} holds a run of another protocol: {difference}")
    return runs


def _report(output: Path) -> int:
    runs = _load(output, warn=True)
    if not runs:
        raise _Refused(f"there are no runs in {output / RUNS}")
    paper_table.write_report(output, runs)
    print(f"{len(runs)} runs; the table is in {output / 'table.md'} and table.png")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("reproduce_table.py", "[options]", __doc__, EXAMPLES)
    add = parser.add_argument
    number = {"type": positive, "metavar": "N"}
    add(
        "--settings",
        type=partial(several, partial(one_of, paper_table.SETTINGS)),
        metavar="NAMES",
        help=f"of {','.join(paper_table.SETTINGS)} (default: all, or all of cifar10 with "
        "--dataset)",
    )
    add(
        "--optimizers",
        type=partial(several, partial(one_of, paper_table.OPTIMIZERS)),
        default=paper_table.OPTIMIZERS,
        metavar="NAMES",
        help=f"of {','.join(paper_table.OPTIMIZERS)} (default: all)",
    )
    add(
        "--seeds",
        **number,
        default=5,
        help="runs of each setting and optimizer, with the seeds from 0 (default: %(default)s)",
    )
    add("--epochs", **number, default=recipes.EPOCHS, help="default: %(default)s, the paper's")
    add("--batch_size", **number, default=recipes.BATCH_SIZE, help="default: %(default)s, as there")
    add(
        "--precision",
        choices=recipes.PRECISIONS,
        default="float32",
        help="of activations and convolutions (default: %(default)s)",
    )
    add(
        "--dataset",
        type=_stand_in,
        metavar="NAME",
        help="digits or folder:PATH, to take the place of cifar10 (default: none; each setting's "
        "own data)",
    )
    add("--data_dir", metavar="DIR", help="where TFDS keeps its data sets (default: the trainer's)")
    add(
        "--output",
        type=Path,
        default=Path("runs/table"),
        metavar="DIR",
        help=f"directory for {RUNS}, table.md, table.png and cells/ (default: %(default)s)",
    )
    add(
        "--report",
        action="store_true",
        help=f"train nothing: make table.md and table.png again from {RUNS} of --output, whatever "
        "the other options say",
    )
    return parser


def _stand_in(text: str) -> str:
    if text == "digits" or text.removeprefix("folder:") not in ("", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither digits nor folder:PATH")


if __name__ == "__main__":
    sys.exit(main())
