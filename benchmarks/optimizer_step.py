"""Time one step of each optimizer beside optax.adam, on the parameters of four networks.

A timing is of many steps in a row; on a GPU a compiled call makes 20 of them, elsewhere one.
Measurements that are there already are skipped: after an interruption the same command goes on.
"""

# JAX and PyTorch are imported only inside the functions that need them, so that --help and --report
# do not wait for them.

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until `main` handles it, Ctrl-C ends the command at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from common import run_lines
from common.benchmark_command import (
    RUNS,
    make_directory,
    needs_torch,
    outcome,
    prepare_jax,
    report,
    tell,
    warn_of,
)
from steps import step_report, step_runs
from steps.step_runs import COUNTERPARTS, MODELS, OPTIMIZERS, Figures, Measurement, Setting
from training.command import a_path, make_parser, one_of, positive, several
from training.ending import leave
from training.signals import StopSignals

if TYPE_CHECKING:
    from steps.step_programs import Program, Tree

EXAMPLES = """\
examples:
  python benchmarks/optimizer_step.py --models resnet20,resnet18
  python benchmarks/optimizer_step.py --optimizers adam,adam_srt --torch
  python benchmarks/optimizer_step.py --report --output runs/optimizer_step
"""
NAME = "optimizer_step.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    It is 0 (all is measured), 1 (something failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    args = _parser().parse_args(argv)
    command = partial(_report if args.report else _run, args)
    return outcome(NAME, args.output, command)


def _run(args: argparse.Namespace, signals: StopSignals) -> int:
    with signals.held():
        prepare_jax(torch=args.torch)
        from steps.step_programs import steps_per_call
        from training.environment import device_name, find_git_revision, versions

    of_torch = _torch_optimizers() if args.torch else {}
    output: Path = args.output
    make_directory(output)

    device, packages, revision = device_name(), versions(), find_git_revision()
    programs = [(name, packages, steps_per_call()) for name in args.optimizers]
    programs += [(name, packages | of, 1) for name, of in of_torch.items()]
    wanted = [
        Setting(model, name, args.rounds, device, of, steps)
        for model in args.models
        for name, of, steps in programs
    ]
    recorded = [measurement.setting for measurement in _load(output, warn=True)]
    missing = [setting for setting in wanted if setting not in recorded]

    failures = []
    for setting, result in _measure(missing, signals) if missing else ():
        if isinstance(result, Figures):
            line = step_runs.to_line(Measurement(setting, revision, result))
            run_lines.append(output / RUNS, line)
        else:
            failures.append(f"{setting.optimizer} on {setting.model}: {result}")

    measurements = _load(output)
    where = _write(output, measurements) if measurements else "no table"
    for failure in failures:
        tell(NAME, f"failed: {failure}")
    print(f"{len(missing) - len(failures)} measured, {len(wanted) - len(missing)} there; {where}")
    return 1 if failures else 0


def _torch_optimizers() -> dict[str, dict[str, str]]:
    """The names of PyTorch's optimizers, each with the version of PyTorch."""
    with needs_torch():
        import torch

        from steps import torch_optimizers

        return {name: {"torch": torch.__version__} for name in torch_optimizers.names()}


def _measure(
    settings: Sequence[Setting], signals: StopSignals
) -> Iterator[tuple[Setting, Figures | str]]:
    """Measures the settings, model by model; yields figures, or why there are none."""
    with signals.held():
        from tqdm import tqdm

        from steps import step_programs

    with tqdm(total=len(settings), unit="optimizer", disable=None) as bar:
        for model in dict.fromkeys(setting.model for setting in settings):
            bar.set_description(model)
            tree = adam = None
            for setting in [setting for setting in settings if setting.model == model]:
                signals.check()
                bar.set_description(f"{model}, {setting.optimizer}")
                try:
                    if tree is None or adam is None:
                        tree = step_programs.make_tree(model)
                        adam = step_programs.jax_program("adam", tree)
                    result = _figures(setting, tree, adam)
                except RuntimeError as error:  # of the device, such as too little memory
                    result = str(error).partition("\n")[0]
                yield setting, result
                bar.update()


def _figures(setting: Setting, tree: Tree, adam: Program) -> Figures:
    import jax

    from common import timing
    from steps.step_programs import jax_program, measure, nbytes

    # Each time, because neighbours on a shared machine take varying parts of it.
    bandwidth = timing.copy_bandwidth(rounds=5)
    common = {"parameter_bytes": nbytes(tree.params), "bandwidth": bandwidth}
    name = setting.optimizer
    if name in OPTIMIZERS:
        return measure(jax_program(name, tree), adam, setting.rounds, **common)
    from steps import torch_optimizers

    counterpart = COUNTERPARTS[name]
    ours = adam if counterpart == "adam" else jax_program(counterpart, tree)
    program = torch_optimizers.torch_program(name, tree)
    pause = torch_optimizers.PAUSE if jax.default_backend() == "cpu" else 0.0
    return measure(program, adam, setting.rounds, **common, ours=ours, pause=pause)


def _load(output: Path, *, warn: bool = False) -> list[Measurement]:
    measurements, broken = step_runs.load(output / RUNS)
    if warn:
        warn_of(broken, NAME, output, "measurement")
    return measurements


def _report(args: argparse.Namespace, signals: StopSignals) -> int:
    output: Path = args.output
    measurements = _load(output, warn=True)
    where = _write(output, measurements)
    print(f"{len(measurements)} there; {where}")
    return 0


def _write(output: Path, measurements: list[Measurement]) -> str:
    return report(output, measurements, "measurement", step_report.write_report)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(NAME, "[options]", __doc__, EXAMPLES)
    add = parser.add_argument
    for what, known in (("models", MODELS), ("optimizers", OPTIMIZERS)):
        add(
            f"--{what}",
            type=partial(several, partial(one_of, known)),
            default=known,
            metavar="NAMES",
            help=f"of {','.join(known)} (default: all)",
        )
    add(
        "--rounds",
        type=positive,
        default=20,
        metavar="N",
        help="timings of each optimizer; fewer, but at least 3, where N of them take more than "
        "20 seconds (default: %(default)s)",
    )
    add(
        "--torch",
        action="store_true",
        help="also PyTorch's Adam and a plain AdamSRT in PyTorch (default: no; needs PyTorch)",
    )
    add(
        "--output",
        type=a_path,
        default=Path("runs/optimizer_step"),
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


if __name__ == "__main__":
    leave(main())
