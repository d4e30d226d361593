"""Train the paper's table, seven optimizers on seven settings, and show it beside the paper's.

Runs that are there already are skipped: after an interruption the same command goes on.
"""

# Each cell (a setting, an optimizer and a stretch of seeds) is one call of the trainer.

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until `main` handles it, Ctrl-C ends the command at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from common.benchmark_command import RUNS, Refused, make_directory, outcome, report, tell, warn_of
from common.trainer_calls import call, ending, locked, noted_signals
from images import recipes
from table import paper_figures, table_cells, table_report, table_runs
from table.table_cells import Cell
from table.table_runs import Key, Protocol, Run
from training.command import a_path, choice, data_set, make_parser, one_of, positive, several
from training.ending import leave
from training.options import seed_count
from training.signals import Stopped, StopSignals

NAME = "reproduce_table.py"
EXAMPLES = """\
examples:
  python benchmarks/reproduce_table.py --settings cifar10/resnet20 --output runs/resnet20
  python benchmarks/reproduce_table.py --dataset digits --settings cifar10/resnet20 --seeds 2 \\
    --epochs 4
  python benchmarks/reproduce_table.py --report --output runs/resnet20
"""
TRAINER = Path(__file__).resolve().parents[1] / "examples" / "train_cifar.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    It is 0 (all runs are there), 1 (some failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    args = _parser().parse_args(argv)
    return outcome(NAME, args.output, partial(_report_or_train, args))


def _report_or_train(args: argparse.Namespace, signals: StopSignals) -> int:
    if args.report:
        return _report(args.output)
    with noted_signals() as received:
        return _run(args, received)


def _run(args: argparse.Namespace, received: list[int]) -> int:
    protocol = Protocol(args.epochs, args.batch_size, args.precision, args.dataset)
    own = tuple(name for name in paper_figures.SETTINGS if name.startswith("cifar10/"))
    settings = args.settings or (own if args.dataset else paper_figures.SETTINGS)
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
        with locked(table_cells.directory(output, cell).parent, received) as lock:
            if received:
                break
            if cell.keys() & _load(output, protocol).keys():
                # Another command works on the same output.
                print(f"{cell}: recorded by another command, at least in part", flush=True)
                continue
            print(f"cell {number}/{len(cells)}: {cell}", flush=True)
            code = call(_command(args, cell), lock, received)
            # What was interrupted or killed stays as it is: the next start makes the same call.
            if code == 0 or (code == 1 and not received):
                table_cells.close(output, cell)
        if not received and cell.keys() - _load(output, protocol).keys():
            failures.append(f"{cell}: {ending(code)}")

    runs = _load(output, protocol)
    where = _write(output, runs) if runs else "no table yet"
    for failure in failures:
        tell(NAME, f"failed: {failure}")
    print(f"{len(wanted & runs.keys())} of {len(wanted)} runs are there; {where}", flush=True)
    if received:
        raise Stopped(received[0], at_once=False)
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
    return report(output, runs, "run", table_report.write_report)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(NAME, "[options]", __doc__, EXAMPLES)
    add = parser.add_argument
    number = {"type": positive, "metavar": "N"}
    add(
        "--settings",
        type=partial(several, partial(one_of, paper_figures.SETTINGS)),
        metavar="NAMES",
        help=f"of {','.join(paper_figures.SETTINGS)} (default: all, or all of cifar10 with "
        "--dataset)",
    )
    add(
        "--optimizers",
        type=partial(several, partial(one_of, paper_figures.OPTIMIZERS)),
        default=paper_figures.OPTIMIZERS,
        metavar="NAMES",
        help=f"of {','.join(paper_figures.OPTIMIZERS)} (default: all)",
    )
    add(
        "--seeds",
        type=seed_count,
        metavar="N",
        default=5,
        help="runs of each setting and optimizer, with the seeds from 0 (default: %(default)s)",
    )
    add("--epochs", **number, default=recipes.EPOCHS, help="default: %(default)s, the paper's")
    add("--batch_size", **number, default=recipes.BATCH_SIZE, help="default: %(default)s, as there")
    add(
        "--precision",
        **choice(recipes.PRECISIONS),
        default="float32",
        help="of activations and convolutions (default: %(default)s)",
    )
    add(
        "--dataset",
        type=partial(data_set, ("digits",)),
        metavar="NAME",
        help="digits or folder:PATH, to take the place of cifar10 (default: none; each setting's "
        "own data)",
    )
    add(
        "--data_dir",
        type=a_path,
        metavar="DIR",
        help="where TFDS keeps its data sets (default: the trainer's)",
    )
    add(
        "--output",
        type=a_path,
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


if __name__ == "__main__":
    leave(main())
