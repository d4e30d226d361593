"""Compile steps for an H100, an H200 and an A100 without a GPU, and count what the programs do.

Kernels, passes over the parameters, bytes, temporaries and collectives are counted; times are
predicted from them, and not measured. What is compiled already, of the commit that is checked out,
is skipped: after an interruption the same command goes on.
"""

# JAX is imported only inside the functions that need it, so that --help and --report do not wait
# for it.

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until `main` handles it, Ctrl-C ends the command at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from common import run_lines
from common.benchmark_command import (
    RUNS,
    make_directory,
    outcome,
    prepare_jax,
    report,
    tell,
    warn_of,
)
from compiled import compiled_lines, compiled_report, targets
from compiled.beside import beside
from compiled.compiled_lines import MODELS, OPTIMIZERS, Compiled, Figures, Setting
from compiled.targets import GPUS
from steps import step_runs
from training.command import Refused, a_path, make_parser, one_of, several
from training.ending import leave
from training.files import replace_file
from training.signals import StopSignals

EXAMPLES = """\
examples:
  python benchmarks/compiled_for_gpu.py --models resnet20,resnet18
  python benchmarks/compiled_for_gpu.py --optimizers adam,adam_srt --gpus h100
  python benchmarks/compiled_for_gpu.py --report --output runs/compiled_for_gpu
  python benchmarks/compiled_for_gpu.py --output benchmarks/results/compiled_for_gpu \\
    --beside runs/optimizer_step
"""
NAME = "compiled_for_gpu.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    It is 0 (all is compiled), 1 (something failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    args = _parser().parse_args(argv)
    command = partial(_beside if args.beside else _report if args.report else _run, args)
    return outcome(NAME, args.output, command)


def _run(args: argparse.Namespace, signals: StopSignals) -> int:
    with signals.held():
        plugin = targets.prepare()
        prepare_jax(torch=False)
        from training.environment import find_git_revision, versions

        targets.devices(args.gpus[0], 1)  # refuses a plugin that does not start
    output: Path = args.output
    make_directory(output)

    packages, revision = versions() | plugin, find_git_revision()
    wanted = compiled_lines.settings(
        args.models, args.optimizers, args.gpus, packages, os.environ["XLA_FLAGS"]
    )
    # Of changed files, or of none that git knows, nobody knows whether they are those of the lines.
    known = revision and not revision.endswith("-dirty")
    recorded = [of for of in _load(output, warn=True) if known and of.git_revision == revision]
    there = [compiled.setting for compiled in recorded]
    missing = [setting for setting in wanted if setting not in there]

    failures = []
    for setting, result in _compile(missing, signals) if missing else ():
        if isinstance(result, Figures):
            line = compiled_lines.to_line(Compiled(setting, revision, result))
            run_lines.append(output / RUNS, line)
        else:
            failures.append(f"{_name(setting)}: {result}")

    programs = _load(output)
    where = _write(output, programs) if programs else "no table"
    for failure in failures:
        tell(NAME, f"failed: {failure}")
    print(f"{len(missing) - len(failures)} compiled, {len(wanted) - len(missing)} there; {where}")
    return 1 if failures else 0


def _compile(
    settings: Sequence[Setting], signals: StopSignals
) -> Iterator[tuple[Setting, Figures | str]]:
    """Compiles the programs; yields figures, or why there are none."""
    with signals.held():
        from tqdm import tqdm

        from compiled import compiled_programs

    with tqdm(total=len(settings), unit="program", disable=None) as bar:
        for setting in settings:
            signals.check()
            bar.set_description(_name(setting))
            try:
                result = compiled_programs.compile_and_count(setting)
            except (RuntimeError, ValueError) as error:
                result = str(error).partition("\n")[0]
            yield setting, result
            bar.update()


def _name(setting: Setting) -> str:
    return f"{setting.kind} {setting.optimizer} on {setting.model} for {setting.gpu}"


def _load(output: Path, *, warn: bool = False) -> list[Compiled]:
    programs, broken = compiled_lines.load(output / RUNS)
    if warn:
        warn_of(broken, NAME, output, "program")
    return programs


def _report(args: argparse.Namespace, signals: StopSignals) -> int:
    output: Path = args.output
    programs = _load(output, warn=True)
    where = _write(output, programs)
    print(f"{len(programs)} there; {where}")
    return 0


def _beside(args: argparse.Namespace, signals: StopSignals) -> int:
    measured: Path = args.beside
    programs = _load(args.output, warn=True)
    measurements, broken = step_runs.load(measured / RUNS)
    warn_of(broken, NAME, measured, "measurement")
    for found, what, where in (
        (programs, "program", args.output),
        (measurements, "measurement", measured),
    ):
        if not found:
            raise Refused(f"there are no {what}s in {where / RUNS}")
    text = beside(programs, measurements)
    replace_file(measured / "predicted.md", lambda path: path.write_text(text, encoding="utf-8"))
    print(f"the predictions beside the measurements are in {measured / 'predicted.md'}")
    return 0


def _write(output: Path, programs: list[Compiled]) -> str:
    return report(output, programs, "program", compiled_report.write_report)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(NAME, "[options]", __doc__, EXAMPLES)
    add = parser.add_argument
    for what, known in (("models", MODELS), ("optimizers", OPTIMIZERS), ("gpus", tuple(GPUS))):
        add(
            f"--{what}",
            type=partial(several, partial(one_of, known)),
            default=known,
            metavar="NAMES",
            help=f"of {','.join(known)} (default: all)",
        )
    add(
        "--output",
        type=a_path,
        default=Path("runs/compiled_for_gpu"),
        metavar="DIR",
        help=f"directory for {RUNS}, table.md and table.png (default: %(default)s)",
    )
    add(
        "--report",
        action="store_true",
        help=f"compile nothing: make table.md and table.png again from {RUNS} of --output, "
        "whatever the other options say",
    )
    add(
        "--beside",
        type=a_path,
        metavar="DIR",
        help="compile nothing: write the times predicted from --output beside those that "
        f"optimizer_step.py measured, whose {RUNS} is in DIR, to predicted.md there",
    )
    return parser


if __name__ == "__main__":
    leave(main())
