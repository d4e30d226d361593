"""The runs of runs.jsonl beside the paper's figures: table.md and table.png.

Everything shown is made from the lines of runs.jsonl alone, and from `paper_figures`.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.words import distinct
from images import recipes
from table.paper_figures import (
    NOT_COMPARABLE,
    OPTIMIZERS,
    PAIRS,
    PAPER,
    PAPER_SOURCE,
    SETTINGS,
    WHY_NOT_COMPARABLE,
    Accuracy,
    compare,
    mark,
    paper_difference,
    runs_of,
    shared_seeds,
    summarise,
)
from table.table_runs import Key, Protocol, Run
from training.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_report(output: Path, runs: Mapping[Key, Run]) -> None:
    """Write table.md and table.png into a directory, each whole or not at all.

    Args:
      output: the directory.
      runs: at least one; all of one protocol.
    """
    replace_file(output / "table.md", lambda path: path.write_text(table(runs), encoding="utf-8"))
    replace_file(output / "table.png", lambda path: draw(path, runs))


def table(runs: Mapping[Key, Run]) -> str:
    """The report as Markdown: what ran, a table per setting, and how to read them.

    Args:
      runs: at least one; all of one protocol.
    """
    protocol = next(iter(runs.values())).protocol
    every = list(runs.values())
    caution = _caution(protocol)
    lines = [
        "# Test accuracy beside the paper's",
        "",
        f"The paper is {PAPER_SOURCE}.",
        "",
        *([f"**{caution}**", ""] if caution else []),
        f"* epochs: {protocol.epochs}",
        f"* batch size: {protocol.batch_size}",
        f"* precision: {protocol.precision}",
        f"* data: {protocol.stand_in or 'that of each setting'}",
        f"* device: {distinct(run.device for run in every)}",
        f"* versions: {_versions(every)}",
        f"* git revision: {distinct(run.git_revision or 'unknown' for run in every)}",
        "",
        "![the same as a picture](table.png)",
        "",
    ]
    optimizers = _present(runs, 1, OPTIMIZERS)
    beside = [] if caution else ["paper, %", "difference, points"]
    columns = ["ours, %", "n", *beside, "seconds", "compiling, s", "images/s", "seeds at once"]
    for setting in _present(runs, 0, SETTINGS):
        lines += [
            f"## {_title(setting, protocol)}",
            "",
            f"| optimizer | {' | '.join(columns)} |",
            f"|---|{'---:|' * len(columns)}",
            *(_table_row(runs, setting, name, bool(beside)) for name in optimizers),
            "",
            *_table_of_differences(runs, setting),
        ]
    notes = [
        "ours: mean ± sample deviation over n seeds, of the parameters of the epoch with the best "
        "validation accuracy. paper: its mean ± deviation.",
        "differences between optimizers: ours over the seeds that both have, each with itself; the "
        "paper's deviation is the root of the sum of both squared ones.",
        "seconds: wall time of training and validation, without compiling, which comes on top (in "
        "a resumed run that of its last part); images/s: without the first epoch. Seeds trained at "
        "once share a program, and these are the figures of the whole program; means over the n "
        "runs.",
    ]
    if beside:
        notes.append(
            "▲ above, ▼ below: the difference to the paper is more than two deviations, where the "
            "deviation of a difference is the root of the sum of both squared ones; it needs n of "
            "at least 2."
        )
    if NOT_COMPARABLE in optimizers:
        notes.append(WHY_NOT_COMPARABLE)
    return "\n".join([*lines, *(f"* {note}" for note in notes)]) + "\n"


def _caution(protocol: Protocol) -> str:
    """Why no accuracy is comparable with the paper's; empty where its protocol ran on its data."""
    reasons = []
    if protocol.stand_in:
        reasons.append(f"the images are not CIFAR-10's ({protocol.stand_in} stands in for them)")
    if protocol.epochs != recipes.EPOCHS:
        reasons.append(f"the runs have {protocol.epochs} epochs instead of {recipes.EPOCHS}")
    if protocol.batch_size != recipes.BATCH_SIZE:
        reasons.append(
            f"the batches have {protocol.batch_size} images instead of {recipes.BATCH_SIZE}"
        )
    if not reasons:
        return ""
    text = ", and ".join(reasons)
    text += ": accuracies are not to be compared with the paper's, differences between optimizers "
    text += "may be."
    return text[0].upper() + text[1:]


def _table_row(runs: Mapping[Key, Run], setting: str, optimizer: str, beside: bool) -> str:
    """A row, `beside` the paper's figure or without."""
    paper = PAPER[setting][optimizer]
    ours = summarise(runs, setting, optimizer)
    cells = ["–", "0", *([_plus_minus(paper), "–"] if beside else []), *["–"] * 4]
    if ours:
        row = runs_of(runs, setting, optimizer)
        rates = [run.images_per_second for run in row if run.images_per_second is not None]
        cells[:2] = _plus_minus(ours), str(len(row))
        if beside:
            cells[3] = _difference(optimizer, ours, paper)
        cells[-4:] = (
            f"{statistics.fmean(run.seconds for run in row):.0f}",
            f"{statistics.fmean(run.compile_seconds for run in row):.1f}",
            f"{statistics.fmean(rates):.0f}" if rates else "–",
            distinct(str(run.seeds_at_once) for run in row),
        )
    return f"| {' | '.join([optimizer, *cells])} |"


def _table_of_differences(runs: Mapping[Key, Run], setting: str) -> list[str]:
    rows = []
    for pair in PAIRS:
        if ours := compare(runs, setting, pair):
            n = len(shared_seeds(runs, setting, pair))
            paper = _signed(paper_difference(setting, pair))
            rows.append(f"| {' − '.join(pair)} | {_signed(ours)} | {n} | {paper} |")
    if not rows:
        return []
    head = ["| difference | ours, points | n | paper, points |", "|---|---:|---:|---:|"]
    return [*head, *rows, ""]


def _difference(optimizer: str, ours: Accuracy, paper: Accuracy) -> str:
    if optimizer == NOT_COMPARABLE:
        return "not comparable"
    text = f"{ours.mean - paper.mean:+.2f} {mark(optimizer, ours, paper)}"
    return text.strip().replace("-", "−")


def _plus_minus(figure: Accuracy) -> str:
    deviation = "" if figure.deviation is None else f" ± {figure.deviation:.2f}"
    return f"{figure.mean:.2f}{deviation}"


def _signed(figure: Accuracy) -> str:
    deviation = "" if figure.deviation is None else f" ± {figure.deviation:.2f}"
    return f"{figure.mean:+.2f}{deviation}".replace("-", "−")


def _title(setting: str, protocol: Protocol) -> str:
    return f"{setting} on {protocol.stand_in}" if protocol.stand_in else setting


def _present(runs: Mapping[Key, Run], field: int, order: Sequence[str]) -> list[str]:
    names = {key[field] for key in runs}
    return [name for name in order if name in names]


def _versions(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.versions)
    each = {name: {run.versions.get(name) or "unknown" for run in runs} for name in names}
    return ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in each.items())


# Told apart without colour too: by shape, filling and the marks at the right.
_INSIDE: dict[str, Any] = {"color": "#08306b", "marker": "o", "markersize": 7}
_OUTSIDE: dict[str, Any] = {"color": "#c0392b", "marker": "s", "markersize": 7}
_THEIRS: dict[str, Any] = {
    "color": "#8a8a8a",
    "marker": "D",
    "markersize": 6,
    "markerfacecolor": "white",
}
_BARS: dict[str, Any] = {"linestyle": "", "capsize": 3, "elinewidth": 1.5}


def draw(path: Path, runs: Mapping[Key, Run]) -> None:
    """Draw the table: a panel per setting, in it ours above the paper's.

    A row is an optimizer's accuracy; or, where accuracies are not comparable with the paper's, the
    difference between two optimizers.

    Args:
      path: of the PNG file.
      runs: at least one; all of one protocol.
    """
    # Imported here, so that --help does not wait for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    protocol = next(iter(runs.values())).protocol
    caution = _caution(protocol)
    settings = _present(runs, 0, SETTINGS)
    columns = min(2, len(settings))
    rows = math.ceil(len(settings) / columns)
    height = 2 + rows * (0.9 + 0.36 * len(PAIRS if caution else _present(runs, 1, OPTIMIZERS)))
    layout = ConstrainedLayoutEngine(h_pad=0.08)  # inches
    figure = Figure(figsize=(1 + 6 * columns, height), layout=layout, dpi=120)
    what = "Differences between optimizers" if caution else "Test accuracy"
    title = (
        f"{what} beside the paper's ({protocol.epochs} epochs, "
        f"batch size {protocol.batch_size}, {protocol.precision})"
    )
    figure.suptitle(f"{title}\n{textwrap.fill(caution, 85 * columns)}".strip(), fontsize="medium")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, setting in zip(panels, settings, strict=False):
        if caution:
            _draw_rows(axes, _differences(runs, setting), "ours (points)")
        else:
            _draw_rows(axes, _accuracies(runs, setting), "ours − paper (points)")
        axes.set_xlabel("difference (points)" if caution else "test accuracy (%)")
        axes.set_title(_title(setting, protocol))
    for axes in panels[len(settings) :]:
        axes.set_axis_off()

    handles = [
        panels[0].errorbar([], [], xerr=[], label=label, **style, **_BARS)
        for label, style in (
            ("ours, mean ± deviation over n seeds", _INSIDE),
            ("ours, difference outside two deviations (▲ above, ▼ below)", _OUTSIDE),
            ("paper, mean ± deviation", _THEIRS),
        )
        if not (caution and style is _OUTSIDE)
    ]
    ncols = len(handles) if columns > 1 else 1
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False)
    FigureCanvasAgg(figure).print_png(path)


class _Row(NamedTuple):
    """A line of the picture."""

    label: str
    ours: Accuracy | None
    paper: Accuracy
    beside: str  # at the right
    marked: bool


def _accuracies(runs: Mapping[Key, Run], setting: str) -> list[_Row]:
    rows = []
    for name in _present(runs, 1, OPTIMIZERS):
        paper, ours = PAPER[setting][name], summarise(runs, setting, name)
        text, marked = "no run", False
        if ours:
            n = len(runs_of(runs, setting, name))
            text = f"{_difference(name, ours, paper)}  (n = {n})"
            marked = bool(mark(name, ours, paper))
        rows.append(_Row(name, ours, paper, text, marked))
    return rows


def _differences(runs: Mapping[Key, Run], setting: str) -> list[_Row]:
    rows = []
    for pair in PAIRS:
        ours, n = compare(runs, setting, pair), len(shared_seeds(runs, setting, pair))
        text = f"{_signed(ours)}  (n = {n})" if ours else "no run"
        rows.append(_Row(" − ".join(pair), ours, paper_difference(setting, pair), text, False))
    return rows


def _draw_rows(axes: Axes, rows: Sequence[_Row], beside: str) -> None:
    for y, row in enumerate(rows):
        axes.errorbar(row.paper.mean, y + 0.17, xerr=row.paper.deviation, **_THEIRS, **_BARS)
        if row.ours:
            style = _OUTSIDE if row.marked else _INSIDE
            axes.errorbar(row.ours.mean, y - 0.17, xerr=row.ours.deviation, **style, **_BARS)
        if y:
            axes.axhline(y - 0.5, color="black", alpha=0.15, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(rows)), [row.beside for row in rows])
    right.set_ylabel(beside)
    right.tick_params(length=0)
    for label, row in zip(right.get_yticklabels(), rows, strict=True):
        if row.marked:
            label.set(color=_OUTSIDE["color"], fontweight="bold")
