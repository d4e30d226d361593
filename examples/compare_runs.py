"""Overlay training runs into one picture: mean and deviation over seeds."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until `main` handles it, Ctrl-C ends the command at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from training import ending
from training.files import METRICS, SUMMARY
from training.run_pictures import (
    Arguments,
    Refused,
    check_number,
    check_output,
    differing,
    make_drawing_parser,
    name_common,
    name_run,
    read_arguments,
    read_epochs,
    read_object,
    read_runs,
    write_picture,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = """\
A run is a directory that train_cifar.py or train_lm.py wrote, finished or not. Runs that differ in
nothing but the seed are drawn as one line, their mean, in a band of one sample deviation to either
side.

examples:
  python examples/compare_runs.py runs/adam runs/adamsrt
  python examples/compare_runs.py runs/table/cells/cifar10/resnet20 --output resnet20.png
"""
ZOOM_FROM = 6  # epochs; longer runs show their last third again, in panels of its own

# Line, marker and lightness vary together, so that a print in grey can be read. Their counts have
# no common divisor, so that no look returns before the 280th line.
COLORS = ("#000000", "#c2559e", "#1b2f8a", "#e08a1e", "#9b1c1c", "#6fb8e0", "#2a7f3f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))


class Judge(NamedTuple):
    """By what the runs of an example are judged."""

    unit: str  # of their lines
    valid: str  # fields of a line,
    result: str  # and of a summary
    most: float  # that these can be
    scale: float  # what they are multiplied by
    digits: int
    best: Callable[[Sequence[float]], float]
    label: str  # of the axis
    after: str  # a result's unit
    columns: tuple[str, str]  # of the text: the result, and the best on the way


IMAGES = Judge(
    unit="epoch",
    valid="valid_accuracy",
    result="test_accuracy",
    most=1,
    scale=100,
    digits=2,
    best=max,
    label="validation accuracy (%)",
    after=" %",
    columns=("test accuracy (%)", "best validation (%)"),
)
TEXT = Judge(
    unit="step",
    valid="valid_loss",
    result="valid_loss",
    most=sys.float_info.max,
    scale=1,
    digits=4,
    best=min,
    label="validation loss (nats per byte)",
    after="",
    columns=("validation loss", "lowest so far"),
)


class Run(NamedTuple):
    """One seed's training; accuracies are in %, losses in nats, curves by epoch or evaluation."""

    directory: Path
    arguments: Arguments  # without the seed
    seed: Any
    judge: Judge
    every: int  # epochs or steps between the places of the curves
    train_loss: list[float]
    valid: list[float]
    result: float | None  # None: the run is not finished


Group = list[Run]  # the runs that differ in nothing but the seed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns its exit code: 0, 1 (failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    parser = make_drawing_parser("compare_runs.py", __doc__, EXAMPLES, "compare.png")
    args = parser.parse_args(argv)
    return ending.outcome(parser.prog, lambda _: _compare(args))


def _compare(args: argparse.Namespace) -> None:
    check_output(args.output)
    groups = group_runs(find_runs(args.directories))
    write_picture(args.output, draw(groups))
    print(f"{text_table(groups)}\nThe curves are in {args.output}.", flush=True)


def find_runs(directories: Sequence[Path]) -> list[Run]:
    """Every run at or below the directories, in their order and each once.

    A run without a finished epoch is left out, with a message.

    Raises:
      Refused: for a directory without a run, a damaged file, or no finished epoch at all.
    """
    return read_runs(directories, _read_run)


def _read_run(directory: Path) -> Run | None:
    arguments = read_arguments(directory)
    judge = IMAGES if "epochs" in arguments else TEXT
    lines = read_epochs(directory / METRICS)
    for number, line in enumerate(lines, 1):
        place = f"{directory / METRICS}, line {number}"
        check_number(place, line, "train_loss", sys.float_info.max)
        check_number(place, line, judge.valid, judge.most)

    path = directory / SUMMARY
    result = None
    if path.exists():
        summary = read_object(path)
        check_number(str(path), summary, judge.result, judge.most)
        result = judge.scale * summary[judge.result]
    if not lines:
        return None
    return Run(
        directory,
        {key: value for key, value in arguments.items() if key != "seed"},
        arguments["seed"],
        judge,
        lines[0][judge.unit],
        [line["train_loss"] for line in lines],
        [judge.scale * line[judge.valid] for line in lines],
        result,
    )


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put the runs together that differ in nothing but the seed, in the order of their first.

    Of two with the same seed as well, one that is not finished is left out, with a message.

    Raises:
      Refused: where both are finished, which are not two samples.
    """
    groups: dict[frozenset[tuple[str, Any]], dict[Any, Run]] = {}
    for run in runs:
        if (run.judge, run.every) != (runs[0].judge, runs[0].every):
            raise Refused(
                f"{runs[0].directory} has a line every {runs[0].every} {runs[0].judge.unit}(s) and "
                f"{run.directory} every {run.every} {run.judge.unit}(s): they cannot be compared"
            )
        seeds = groups.setdefault(frozenset(run.arguments.items()), {})
        other = seeds.setdefault(run.seed, run)
        if other is run:
            continue
        left_out, kept = sorted((other, run), key=lambda r: (_is_finished(r), len(r.train_loss)))
        if _is_finished(left_out):
            raise Refused(
                f"{other.directory} and {run.directory} are the same run twice, with the same "
                f"arguments and seed {run.seed}: leave one out"
            )
        print(f"{left_out.directory} is left out: {kept.directory} got further.", file=sys.stderr)
        seeds[run.seed] = kept
    return [list(seeds.values()) for seeds in groups.values()]


def _is_finished(run: Run) -> bool:
    return run.result is not None


def _arguments(groups: Sequence[Group]) -> list[Arguments]:
    return [group[0].arguments for group in groups]


def title(groups: Sequence[Group]) -> str:
    """What all the groups have in common."""
    return name_common(_arguments(groups))


def label(group: Group, groups: Sequence[Group]) -> str:
    """The optimizer, what else tells the group from the others, n, and the test accuracy."""
    n, test = _n_and_test(group)
    name, judge = name_run(group[0].arguments, _arguments(groups)), group[0].judge
    what = judge.result.replace("_accuracy", "").replace("valid_", "")
    return f"{name} (n = {n})" + (f": {what} {test}{judge.after}" if test else "")


def _n_and_test(group: Group) -> tuple[str, str]:
    """The number of runs, and their results if all are finished."""
    tests = [run.result for run in group if run.result is not None]
    if len(tests) == len(group):
        return str(len(group)), _mean_deviation(tests, group[0].judge)
    return f"{len(group)}, {len(group) - len(tests)} unfinished", ""


def _mean_deviation(values: Sequence[float], judge: Judge) -> str:
    mean = f"{np.mean(values):.{judge.digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1):.{judge.digits}f}"


def text_table(groups: Sequence[Group]) -> str:
    """What is common, and a line for each group with every argument in which they differ."""
    judge, every = groups[0][0].judge, groups[0][0].every
    length = f"{judge.unit}s"
    keys = [key for key in differing(_arguments(groups)) if key not in ("optimizer", length)]
    rows = [["optimizer", *keys, "n", length, *judge.columns]]
    for group in groups:
        arguments, (n, test) = group[0].arguments, _n_and_test(group)
        done = [every * len(run.train_loss) for run in group]
        epochs = f"{min(done)}" if min(done) == max(done) else f"{min(done)} to {max(done)}"
        best = _mean_deviation([judge.best(run.valid) for run in group], judge)
        of = "" if test else f" of {arguments[length]}"
        values = [str(arguments.get(key)) for key in ("optimizer", *keys)]
        rows.append([*values, n, epochs + of, test, best])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*filter(None, [title(groups)]), *lines])


def mean_and_deviation(curves: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample deviation of curves at each epoch that any of them has.

    The deviation is NaN where only one has it.
    """
    epochs = range(max(map(len, curves)))
    values = [[curve[epoch] for curve in curves if epoch < len(curve)] for epoch in epochs]
    deviation = [np.std(v, ddof=1) if len(v) > 1 else math.nan for v in values]
    return np.array([np.mean(v) for v in values]), np.array(deviation)


def draw(groups: Sequence[Group]) -> Figure:
    """Draw training loss and validation over the epochs or steps, and again over the last third."""
    # Imported here, so that --help and a refusal do not wait for it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    judge, every = groups[0][0].judge, groups[0][0].every
    last = max(len(run.train_loss) for group in groups for run in group)
    starts = [0, last * 2 // 3] if last >= ZOOM_FROM else [0]
    width = 5 + 4 * len(starts)  # inches, as the height
    labels = [textwrap.fill(label(group, groups), 8 * width) for group in groups]
    columns = 2 if max(map(len, labels)) <= 4 * width else 1
    height = 8 + 0.22 * math.ceil(len(groups) / columns)

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(textwrap.fill(title(groups), 9 * width), parse_math=False)
    axes = figure.subplots(2, len(starts), sharex="col", squeeze=False)
    for i, group in enumerate(groups):
        curves = [run.train_loss for run in group], [run.valid for run in group]
        for row, (mean, deviation) in zip(axes, map(mean_and_deviation, curves), strict=True):
            for ax, start in zip(row, starts, strict=True):
                _draw_group(ax, mean, deviation, (start, last, every), i, len(groups))
    for ax, start in zip(axes[0], starts, strict=True):
        pad = max(0.5, 0.03 * (last - start))
        ax.set_xlim(every * (start + 1 - pad), every * (last + pad))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    for ax in axes[0, 1:]:
        ax.set_title(f"last third of the {judge.unit}s", fontsize="medium")

    loss_axes, valid_axes = axes
    loss_axes[0].set_ylabel("training loss (nats)")
    lowest = min(line.get_ydata().min() for line in loss_axes[0].lines)
    if lowest > 0:
        loss_axes[0].set_yscale("log")
        # A band that reaches zero must not stretch the axis.
        loss_axes[0].set_ylim(bottom=max(loss_axes[0].get_ylim()[0], lowest / 2))
    valid_axes[0].set_ylabel(judge.label)
    for ax in valid_axes:
        if judge is IMAGES:
            ax.set_ylim(top=min(ax.get_ylim()[1], 101))
        ax.set_xlabel(judge.unit)
    figure.legend(
        loss_axes[0].lines,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=5,
        title="mean over the seeds, band: ± sample deviation" if max(map(len, groups)) > 1 else "",
    )
    for text in figure.legends[0].get_texts():
        text.set_parse_math(False)
    return figure


def _draw_group(
    ax: Any,
    mean: np.ndarray,
    deviation: np.ndarray,
    places: tuple[int, int, int],
    i: int,
    count: int,
) -> None:
    """Draw line and band of group i of count, from one place of its curve to another.

    Args:
      ax: where.
      mean: of the curves.
      deviation: of the curves.
      places: the first to be drawn, the last there is, and what a place counts for on the axis.
      i: the number of the group.
      count: of groups.
    """
    start, last, every = places
    mean, deviation = mean[start:], deviation[start:]
    epochs = every * np.arange(start + 1, start + 1 + len(mean))
    color = COLORS[i % len(COLORS)]
    step = math.ceil((last - start) / 12)  # epochs between markers
    ax.plot(
        epochs,
        mean,
        color=color,
        linestyle=LINES[i % len(LINES)],
        linewidth=1.4,
        marker=MARKERS[i % len(MARKERS)],
        markersize=6,
        markevery=(i * step // count, step),  # in turn, not upon one another
    )
    alpha = min(0.15, 0.5 / count)  # pale even where all bands lie upon one another
    ax.fill_between(
        epochs, mean - deviation, mean + deviation, color=color, alpha=alpha, linewidth=0
    )


if __name__ == "__main__":
    ending.leave(main())
