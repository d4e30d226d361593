"""Overlay training runs into one picture: mean and deviation over seeds."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cifar.command import make_parser
from cifar.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = """\
A run is a directory that train_cifar.py wrote, finished or not. Runs that differ in nothing but the
seed are drawn as one line, their mean, in a band of one sample deviation to either side.

examples:
  python examples/compare_runs.py runs/adam runs/adamsrt
  python examples/compare_runs.py runs/table/cells/cifar10/resnet20 --output resnet20.png
"""
ARGUMENTS, METRICS, SUMMARY = "arguments.json", "metrics.jsonl", "summary.json"  # of a run
SETTING = ("dataset", "model", "optimizer")
SEEDS = ("seed", "seeds", "seeds_at_once")  # the latter do not change a run
OWN = ("learning_rate", "weight_decay")  # every optimizer's recipe has its own
ZOOM_FROM = 6  # epochs; longer runs show their last third again, in panels of its own

# Line, marker and lightness vary together, so that a print in grey can be read. Their counts have
# no common divisor, so that no look returns before the 280th line.
COLORS = ("#000000", "#c2559e", "#1b2f8a", "#e08a1e", "#9b1c1c", "#6fb8e0", "#2a7f3f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))


class Run(NamedTuple):
    """One seed's training; accuracies are in %, losses in nats, curves by epoch."""

    directory: Path
    arguments: dict[str, Any]  # without SEEDS
    seed: Any
    train_loss: list[float]
    valid_accuracy: list[float]
    test_accuracy: float | None  # None: the run is not finished


Group = list[Run]  # the runs that differ in nothing but the seed


class _Refused(Exception):
    """The runs cannot be compared; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 (failed), 2 (refused) or 130 (interrupted)."""
    args = _parser().parse_args(argv)
    try:
        _check_output(args.output)
        groups = group_runs(find_runs(args.directories))
        write_picture(args.output, draw(groups))
        print(f"{text_table(groups)}\nThe curves are in {args.output}.", flush=True)
        return 0
    except _Refused as error:
        return _end(2, f"error: {error}")
    except ModuleNotFoundError as error:
        return _end(2, f"error: {error}; install it with: pip install -e '.[examples]'")
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _end(1, f"error: {error}")
    except KeyboardInterrupt:
        return _end(130, "interrupted")


def _end(code: int, message: str) -> int:
    print(f"compare_runs.py: {message}", file=sys.stderr)
    return code


def find_runs(directories: Sequence[Path]) -> list[Run]:
    """Every run at or below the directories, in their order and each once.

    A run without a finished epoch is left out, with a message.

    Raises:
      _Refused: for a directory without a run, a damaged file, or no finished epoch at all.
    """
    runs: dict[Path, Run] = {}
    for directory in directories:
        if not directory.is_dir():
            raise _Refused(f"no such directory: {directory}")
        below = [metrics.parent for metrics in sorted(directory.rglob(METRICS))]
        found = [path for path in below if (path / ARGUMENTS).is_file()]
        if not found:
            raise _Refused(f"no run (with {ARGUMENTS} and {METRICS}) at or below {directory}")
        runs |= {path.resolve(): _read_run(path) for path in found}
    for run in runs.values():
        if not run.train_loss:
            print(f"{run.directory} has not finished an epoch: left out.", file=sys.stderr)
    started = [run for run in runs.values() if run.train_loss]
    if not started:
        raise _Refused("no run has finished an epoch")
    return started


def _read_run(directory: Path) -> Run:
    path = directory / ARGUMENTS
    arguments = _object(path, _text(path))
    for key in (*SETTING, "epochs", "seed", *arguments):
        if not isinstance(arguments.get(key, []), str | int | float | None):
            raise _Refused(f"{path}: damaged, {key} is missing or no plain value")

    path = directory / METRICS
    *lines, last = _text(path).split("\n")
    epochs = [_object(path, text, line) for line, text in enumerate(lines, 1)]
    with contextlib.suppress(_Refused):  # the last line may be torn: of a run under way, or killed
        epochs.append(_object(path, last))
    for line, epoch in enumerate(epochs, 1):
        place = f"{path}, line {line}"
        if epoch.get("epoch") != line:
            raise _Refused(f"{place}: damaged, it is not of epoch {line}")
        _check_number(place, epoch, "train_loss", sys.float_info.max)
        _check_number(place, epoch, "valid_accuracy", 1)

    path = directory / SUMMARY
    test_accuracy = None
    if path.exists():
        summary = _object(path, _text(path))
        _check_number(str(path), summary, "test_accuracy", 1)
        test_accuracy = 100 * summary["test_accuracy"]
    return Run(
        directory,
        {key: value for key, value in arguments.items() if key not in SEEDS},
        arguments["seed"],
        [epoch["train_loss"] for epoch in epochs],
        [100 * epoch["valid_accuracy"] for epoch in epochs],
        test_accuracy,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise _Refused(f"cannot read {path}: {error.strerror}") from error


def _object(path: Path, text: str, first_line: int = 1) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise _Refused(f"{path}, line {line}: damaged, not JSON ({error.msg})") from error
    if not isinstance(value, dict):
        raise _Refused(f"{path}, line {first_line}: damaged, not a JSON object")
    return value


def _check_number(place: str, values: dict[str, Any], key: str, most: float) -> None:
    value = values.get(key)
    if not isinstance(value, int | float) or not 0 <= value <= most:  # NaN is in no range
        range_ = "from 0 to 1" if most == 1 else "from 0"
        raise _Refused(f"{place}: damaged, {key} is not a finite number {range_}")


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put the runs together that differ in nothing but the seed, in the order of their first.

    Of two with the same seed as well, one that is not finished is left out, with a message.

    Raises:
      _Refused: where both are finished, which are not two samples.
    """
    groups: dict[frozenset[tuple[str, Any]], dict[Any, Run]] = {}
    for run in runs:
        seeds = groups.setdefault(frozenset(run.arguments.items()), {})
        other = seeds.setdefault(run.seed, run)
        if other is run:
            continue
        left_out, kept = sorted((other, run), key=lambda r: (_is_finished(r), len(r.train_loss)))
        if _is_finished(left_out):
            raise _Refused(
                f"{other.directory} and {run.directory} are the same run twice, with the same "
                f"arguments and seed {run.seed}: leave one out"
            )
        print(f"{left_out.directory} is left out: {kept.directory} got further.", file=sys.stderr)
        seeds[run.seed] = kept
    return [list(seeds.values()) for seeds in groups.values()]


def _is_finished(run: Run) -> bool:
    return run.test_accuracy is not None


def _differing(groups: Sequence[Group]) -> list[str]:
    """The arguments that are not the same in all groups."""
    keys = dict.fromkeys(key for group in groups for key in group[0].arguments)
    return [key for key in keys if len({g[0].arguments.get(key) for g in groups}) > 1]


def _named(arguments: dict[str, Any], keys: Sequence[str]) -> list[str]:
    return [f"{key} {arguments.get(key)}" for key in keys]


def title(groups: Sequence[Group]) -> str:
    """What all the groups have in common."""
    arguments, different = groups[0][0].arguments, _differing(groups)
    setting = [str(arguments[key]) for key in ("model", "dataset") if key not in different]
    common = [key for key in arguments if key not in (*SETTING, *different)]
    return ", ".join([*filter(None, [" on ".join(setting)]), *_named(arguments, common)])


def label(group: Group, groups: Sequence[Group]) -> str:
    """The optimizer, what else tells the group from the others, n, and the test accuracy.

    Learning rate and weight decay are named only where they differ for the same optimizer in the
    same setting: between optimizers they differ by the recipes.
    """
    arguments = group[0].arguments
    alike = [g for g in groups if all(g[0].arguments[k] == arguments[k] for k in SETTING)]
    keys = [key for key in _differing(groups) if key not in ("optimizer", *OWN)]
    keys += [key for key in _differing(alike) if key in OWN]
    n, test = _n_and_test(group)
    name = ", ".join([str(arguments["optimizer"]), *_named(arguments, keys)])
    return f"{name} (n = {n})" + (f": test {test} %" if test else "")


def _n_and_test(group: Group) -> tuple[str, str]:
    """The number of runs, and their test accuracy if all are finished."""
    tests = [run.test_accuracy for run in group if run.test_accuracy is not None]
    if len(tests) == len(group):
        return str(len(group)), _mean_deviation(tests)
    return f"{len(group)}, {len(group) - len(tests)} unfinished", ""


def _mean_deviation(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2f}"


def text_table(groups: Sequence[Group]) -> str:
    """What is common, and a line for each group with every argument in which they differ."""
    keys = [key for key in _differing(groups) if key not in ("optimizer", "epochs")]
    rows = [["optimizer", *keys, "n", "epochs", "test accuracy (%)", "best validation (%)"]]
    for group in groups:
        arguments, (n, test) = group[0].arguments, _n_and_test(group)
        done = [len(run.train_loss) for run in group]
        epochs = f"{min(done)}" if min(done) == max(done) else f"{min(done)} to {max(done)}"
        best = _mean_deviation([max(run.valid_accuracy) for run in group])
        of = "" if test else f" of {arguments['epochs']}"
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
    """Draw training loss and validation accuracy over the epochs, and again over the last third."""
    # Imported here, so that --help and a refusal do not wait for it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

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
        curves = [run.train_loss for run in group], [run.valid_accuracy for run in group]
        for row, (mean, deviation) in zip(axes, map(mean_and_deviation, curves), strict=True):
            for ax, start in zip(row, starts, strict=True):
                _draw_group(ax, mean[start:], deviation[start:], start, last, i, len(groups))
    for ax, start in zip(axes[0], starts, strict=True):
        pad = max(0.5, 0.03 * (last - start))
        ax.set_xlim(start + 1 - pad, last + pad)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    for ax in axes[0, 1:]:
        ax.set_title("last third of the epochs", fontsize="medium")

    loss_axes, accuracy_axes = axes
    loss_axes[0].set_ylabel("training loss (nats)")
    lowest = min(line.get_ydata().min() for line in loss_axes[0].lines)
    if lowest > 0:
        loss_axes[0].set_yscale("log")
        # A band that reaches zero must not stretch the axis.
        loss_axes[0].set_ylim(bottom=max(loss_axes[0].get_ylim()[0], lowest / 2))
    accuracy_axes[0].set_ylabel("validation accuracy (%)")
    for ax in accuracy_axes:
        ax.set_ylim(top=min(ax.get_ylim()[1], 101))
        ax.set_xlabel("epoch")
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
    ax: Any, mean: np.ndarray, deviation: np.ndarray, start: int, last: int, i: int, count: int
) -> None:
    """Draw line and band of group i of count, from epoch start + 1 on."""
    epochs = np.arange(start + 1, start + 1 + len(mean))
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


def write_picture(path: Path, figure: Figure) -> None:
    """Write a PNG file, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    replace_file(path, FigureCanvasAgg(figure).print_png)


def _check_output(path: Path) -> None:
    """Refuse a picture that cannot be written, without touching anything."""
    if path.is_dir():
        raise _Refused(f"cannot write {path}: it is a directory")
    if not path.parent.is_dir():
        raise _Refused(f"cannot write {path}: {path.parent} is not a directory")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _Refused(f"cannot write {path}: no permission to write in {path.parent}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("compare_runs.py", "[options] DIR...", __doc__, EXAMPLES)
    add = parser.add_argument
    add("directories", type=Path, nargs="+", metavar="DIR", help="with runs at or below it")
    add(
        "--output",
        type=_png,
        default="compare.png",
        metavar="FILE",
        help="the picture to write, a .png file (default: %(default)s)",
    )
    return parser


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
