"""Measure the trainer: images per second, whole epochs, time to an accuracy; beside PyTorch.

The programs of a cell (a model, precision, batch size and number of seeds) run in turn, so that
ratios within a round are fair. What is measured already is skipped: after an interruption the same
command goes on. One device is measured.
"""

# JAX and PyTorch are imported only inside the functions that need them, so that --help and --report
# do not wait for them.

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until `main` handles it, Ctrl-C ends the command at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from common import run_lines
from common.benchmark_command import (
    RUNS,
    Refused,
    make_directory,
    needs_torch,
    outcome,
    prepare_jax,
    report,
    tell,
    warn_of,
)
from images import recipes
from throughput import throughput_report
from throughput.throughput_report import TORCH, WATCHED, Key, Line
from training.command import a_path, data_set, make_parser, number, one_of, positive, several
from training.ending import leave
from training.signals import StopSignals

if TYPE_CHECKING:
    from images.data import DataSet

EXAMPLES = """\
examples:
  python benchmarks/training_throughput.py --torch
  python benchmarks/training_throughput.py --models resnet18 --precisions bfloat16 \\
    --batch_sizes 512 --seeds 1 --epoch
  python benchmarks/training_throughput.py --optimizers adam,adam+geometry
  python benchmarks/training_throughput.py --accuracy 0.9 --dataset digits
  python benchmarks/training_throughput.py --report --output runs/training_throughput
"""
NAME = "training_throughput.py"
# The defaults of what makes a cell: on a GPU, and on a CPU.
AXES: dict[str, tuple[tuple, tuple]] = {
    "models": (("resnet20", "resnet18", "vgg16"), ("resnet20",)),
    "precisions": (recipes.PRECISIONS, ("float32",)),
    "batch_sizes": ((128, 512, 1024), (128,)),
    "seeds": ((1,), (1,)),
}


class _Job(NamedTuple):
    """What is measured together: one line of runs.jsonl per program."""

    lines: list[Line]  # still without figures
    rounds: int
    measure: Callable[..., dict[str, dict[str, Any]]]  # figures by program; takes `on_round`


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    It is 0 (all is measured), 1 (something failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    args = _parse(argv)
    command = partial(_report if args.report else _run, args)
    return outcome(NAME, args.output, command)


def _run(args: argparse.Namespace, signals: StopSignals) -> int:
    with signals.held():
        prepare_jax(torch=args.torch)
        import jax

        from training.environment import device_name, find_git_revision, versions

    if jax.default_backend() != "cpu" and jax.device_count() > 1:
        raise Refused(
            f"one device is measured, and {jax.device_count()} are visible: hide the others, for "
            "NVIDIA's with CUDA_VISIBLE_DEVICES=0"
        )
    on_cpu = jax.default_backend() == "cpu"
    for name, axis in AXES.items():
        setattr(args, name, getattr(args, name) or axis[on_cpu])
    images = _load_images(args) if args.accuracy else None
    torch = _torch_settings() if args.torch else None
    output: Path = args.output
    make_directory(output)

    where = {
        "device": device_name(),
        "versions": versions(),
        "git_revision": find_git_revision(),
    }
    print(f"measuring on {where['device']}", flush=True)
    recorded, measured, failed = _load(output, warn=True), 0, 0
    for job in _jobs(args, images, torch, where, signals):
        if all(_is_there(line, recorded) for line in job.lines):
            continue
        signals.check()
        lines = _measure(job, signals)
        run_lines.append(output / RUNS, b"".join(json.dumps(x).encode() + b"\n" for x in lines))
        measured += len(lines)
        for line in lines:
            if "error" in line:
                failed += 1
                tell(NAME, f"failed: {_name(line)}: {line['error']}")

    recorded = _load(output)
    where = _write(output, recorded)
    there = sum("error" not in line for line in recorded.values())
    print(f"{measured - failed} measured, {failed} failed, {there} there; {where}")
    return 1 if failed else 0


def _load_images(args: argparse.Namespace) -> DataSet:
    from images import data

    images = data.load(args.dataset, data_dir="~/tensorflow_datasets")
    count = len(data.validation_split(len(images.train.labels), 0)[0])
    for size in args.batch_sizes:
        if size > count:
            raise Refused(f"a batch size of {size} is above the {count} training images")
    return images


def _torch_settings() -> dict[str, Any]:
    """Version, device and settings of PyTorch."""
    import jax

    with needs_torch():
        from throughput import torch_networks

        return torch_networks.settings("cpu" if jax.default_backend() == "cpu" else "cuda")


def _jobs(
    args: argparse.Namespace,
    images: DataSet | None,
    torch: dict[str, Any] | None,
    where: dict[str, Any],
    signals: StopSignals,
) -> Iterator[_Job]:
    """All that is wanted, cell by cell."""
    with signals.held():
        from common import timing
        from throughput import throughput_programs

    peak = cache(timing.matrix_peak)
    axes = [getattr(args, name) for name in AXES]
    for cell in itertools.starmap(throughput_programs.Cell, itertools.product(*axes)):
        base = {**cell._asdict(), **where}
        alone = cell.seeds == 1
        lines = [{"kind": "steps", "program": name, **base} for name in args.optimizers]
        device = None
        if torch and alone:
            device = torch["device"]
            lines += [{"kind": "steps", "program": name, **base, "torch": torch} for name in TORCH]
        measure = partial(
            throughput_programs.measure_steps,
            cell,
            args.optimizers,
            device,
            rounds=args.rounds,
            peak=partial(peak, cell.precision),
        )
        yield _Job([{**line, "rounds": args.rounds} for line in lines], args.rounds, measure)
        if args.epoch:
            lines = [{"kind": "epoch", "program": name, **base} for name in args.optimizers]
            measure = partial(throughput_programs.measure_epochs, cell, args.optimizers)
            yield _Job(lines, throughput_programs.EPOCH_ROUNDS, measure)
        if images and alone:
            goal = {"accuracy": args.accuracy, "epochs": args.epochs}
            for name in args.optimizers:
                line = {"kind": "accuracy", "program": name, **base, **goal}
                line["dataset"] = args.dataset
                measure = partial(throughput_programs.measure_accuracy, cell, name, images, **goal)
                yield _Job([line], args.epochs, measure)


def _is_there(line: Line, recorded: dict[Key, Line]) -> bool:
    found = recorded.get(throughput_report.key(line))
    if not found or "error" in found:
        return False
    return found.get("torch") == line.get("torch") and found.get("rounds", 0) >= line.get(
        "rounds", 0
    )


def _measure(job: _Job, signals: StopSignals) -> list[Line]:
    from tqdm import tqdm

    def on_round(rounds: int = 1) -> None:
        signals.check()
        bar.update(rounds)

    first = job.lines[0]
    with tqdm(
        total=job.rounds, desc=_name(first, program=len(job.lines) == 1), disable=None
    ) as bar:
        figures = job.measure(on_round=on_round)
    return [{**line, **figures[line["program"]]} for line in job.lines]


def _name(line: Line, *, program: bool = True) -> str:
    names = throughput_report.SETTING + (("program",) if program else ())
    return " ".join(str(line[name]) for name in names)


def _load(output: Path, *, warn: bool = False) -> dict[Key, Line]:
    lines, broken = throughput_report.load(output / RUNS)
    if warn:
        warn_of(broken, NAME, output, "measurement")
    return lines


def _report(args: argparse.Namespace, signals: StopSignals) -> int:
    output: Path = args.output
    lines = _load(output, warn=True)
    where = _write(output, lines)
    print(f"{len(lines)} there; {where}")
    return 0


def _write(output: Path, lines: dict[Key, Line]) -> str:
    return report(output, lines.values(), "measurement", throughput_report.write_report)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.accuracy is None) != (args.dataset is None):
        parser.error("--accuracy and --dataset need each other")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(NAME, "[options]", __doc__, EXAMPLES)
    add = parser.add_argument
    for what, kind, meaning in (
        ("models", partial(one_of, recipes.MODELS), ""),
        ("precisions", partial(one_of, recipes.PRECISIONS), ""),
        ("batch_sizes", positive, ", images of a step and seed"),
        ("seeds", positive, ", how many are trained at once"),
    ):
        default, on_cpu = (",".join(map(str, names)) for names in AXES[what])
        if on_cpu != default:
            default += f"; on a CPU {on_cpu}"
        add(
            f"--{what}",
            type=partial(several, kind),
            metavar="A,B,...",
            help=f"default: {default}{meaning}",
        )
    add(
        "--optimizers",
        type=partial(several, _optimizer),
        default=("adam", "adamsrt"),
        metavar="A,B,...",
        help=f"of {','.join(recipes.OPTIMIZERS)}, each plain or with {WATCHED} after its name, as "
        "with train_cifar.py --geometry (default: adam,adamsrt)",
    )
    add(
        "--rounds",
        type=positive,
        default=20,
        metavar="N",
        help="timings of each program; a timing is of one step on a CPU, of 20 elsewhere "
        "(default: %(default)s)",
    )
    add(
        "--torch",
        action="store_true",
        help="also the same networks in PyTorch with Adam, as they are and compiled "
        "(default: no; needs PyTorch; not with several seeds at once)",
    )
    add(
        "--epoch",
        action="store_true",
        help="also whole epochs of 47,500 random images with validation on 2,500, three for each "
        "optimizer, which takes hours on a CPU (default: no)",
    )
    accuracy = parser.add_argument_group(
        "time to an accuracy", "Trains seed 0 in each cell with one seed, by the published recipe."
    )
    accuracy.add_argument(
        "--accuracy",
        type=_share,
        metavar="A",
        help="train until the validation accuracy reaches this, above 0 to 1 (default: no)",
    )
    accuracy.add_argument(
        "--dataset",
        type=partial(data_set, recipes.DATASETS),
        metavar="NAME",
        help=f"{', '.join(recipes.DATASETS)}, or folder:PATH",
    )
    accuracy.add_argument(
        "--epochs",
        type=positive,
        default=30,
        metavar="N",
        help="at most so many; the learning rate falls after 1/3, 5/9 and 7/9 of them "
        "(default: %(default)s)",
    )
    add(
        "--output",
        type=a_path,
        default=Path("runs/training_throughput"),
        metavar="DIR",
        help=f"directory for {RUNS}, table.md and table.png (default: %(default)s)",
    )
    add(
        "--report",
        action="store_true",
        help=f"measure nothing: make table.md and table.png again from {RUNS} of --output, "
        "whatever the other options say",
    )
    return parser


def _optimizer(text: str) -> str:
    return one_of(recipes.OPTIMIZERS, text.removesuffix(WATCHED)) and text


def _share(text: str) -> float:
    return number(text, float, lambda value: 0 < value <= 1, "a number above 0, to 1")


if __name__ == "__main__":
    leave(main())
