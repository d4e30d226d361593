"""Train the paper's table, seven optimizers on seven settings, and show it beside the paper's.

Runs that are there already are skipped: after an interruption the same command goes on.
"""

# Each cell (a setting, an optimizer and a stretch of seeds) is one call of the trainer in a process
# of its own. JAX is never started here, so that no cell can take the others down with it and the
# device is free between them.

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import paper_table
import table_cells
import table_runs
from benchmark_command import RUNS, Refused, make_directory, outcome, report, tell, warn_of
from images import recipes
from table_cells import Cell
from table_runs import Key, Protocol, Run
from training.command import make_parser, one_of, positive, several

NAME = "reproduce_table.py"
EXAMPLES = """\
examples:
  python benchmarks/reproduce_table.py --settings cifar10/resnet20 --output runs/resnet20
  python benchmarks/reproduce_table.py --dataset digits --settings cifar10/resnet20 --seeds 2 \\
    --epochs 4
  python benchmarks/reproduce_table.py --report --output runs/resnet20
"""
TRAINER = Path(__file__).resolve().parents[1] / "examples" / "train_cifar.py"
EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
PATIENCE = 60  # seconds in which the trainer should end by itself after Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    It is 0 (all runs are there), 1 (some failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    args = _parser().parse_args(argv)
    return outcome(NAME, args.output, partial(_report_or_train, args))


def _report_or_train(args: argparse.Namespace) -> int:
    try:
        if args.report:
            return _report(args.output)
        with _noted_signals() as received:
            return _run(args, received)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:  # in --report; the training notes it
        tell(NAME, "interrupted")
        return 130


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
        raise Refused(f"--dataset {args.dataset} stands in for cifar10, not for {others[0]}")
    output: Path = args.output
    make_directory(output)
    wanted = set(itertools.product(settings, args.optimizers, range(args.seeds)))

    recorded = _load(output, protocol, warn=True).keys()
    cells = table_cells.stretches(settings, args.optimizers, wanted - recorded)
    table_cells.tidy_up(output, recorded, cells)
    recorded = _load(output, protocol).keys()
    cells = table_cells.stretches(settings, args.optimizers, wanted - recorded)

    failures = []
    for number, cell in enumerate(cells, 1):
        if received:
            break
        with table_cells.locked(table_cells.directory(output, cell).parent, received) as lock:
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
                table_cells.close(output, cell)
        if not received and cell.keys() - _load(output, protocol).keys():
            failures.append(f"{cell}: {_ending(code)}")

    runs = _load(output, protocol)
    where = _write(output, runs) if runs else "no table yet"
    for failure in failures:
        tell(NAME, f"failed: {failure}")
    print(f"{len(wanted & runs.keys())} of {len(wanted)} runs are there; {where}", flush=True)
    if received:
        tell(NAME, "interrupted; the same command goes on from here")
        return EXIT_CODES[received[0]]
    return 0 if wanted <= runs.keys() else 1


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
        "output": table_cells.directory(args.output, cell),
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


def _load(output: Path, protocol: Protocol | None = None, *, warn: bool = False) -> dict[Key, Run]:
    """Reads the runs, and refuses those of more than one protocol."""
    runs, broken = table_runs.load(output / RUNS)
    if warn:
        warn_of(broken, NAME, output, "run")
    for run in runs.values():
        protocol = protocol or run.protocol
        if difference := run.protocol.difference(protocol):
            raise Refused(f"{output / RUNS} holds a run of another protocol: {difference}")
    return runs


def _report(output: Path) -> int:
    runs = _load(output, warn=True)
    where = _write(output, runs)
    print(f"{len(runs)} runs; {where}")
    return 0


def _write(output: Path, runs: Mapping[Key, Run]) -> str:
    return report(output, runs, "run", paper_table.write_report)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(NAME, "[options]", __doc__, EXAMPLES)
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
