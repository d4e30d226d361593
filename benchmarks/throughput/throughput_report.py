"""The lines of a throughput's runs.jsonl, and what is made from them: table.md and table.png.

A line is what one program did in one cell. Its "kind" is "steps", "epoch" or "accuracy"; with
"error" in place of the figures, it says why there are none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import run_lines
from common.run_lines import Spread
from common.words import distinct
from images import recipes
from training.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = dict[str, Any]
Key = tuple[Any, ...]

_CELL = ("model", "precision", "batch_size", "seeds")
SETTING = ("kind", *_CELL)
TORCH = ("torch_eager", "torch_compiled")
# The later of two lines of a section counts that agree in all of these.
_KEY = (*SETTING, "program", "dataset", "accuracy", "epochs")
_WHERE = {
    **{"model": str, "precision": str, "batch_size": int, "seeds": int, "program": str},
    **{"device": str, "versions": dict[str, str | None], "git_revision": str | None},
}
_FIGURES: dict[str, dict[str, Any]] = {
    "steps": {"rounds": int, "steps_per_call": int, "images_per_second": Spread}
    | {"step_seconds": Spread, "ratio_to_adam": Spread | None, "compile_seconds": float}
    | {"flops_per_image": float, "matrix_peak": float, "peak_share": float}
    | {"peak_bytes": float | None},
    "epoch": {"epoch_seconds": Spread, "projected_minutes": float, "compile_seconds": float},
    "accuracy": {"epoch": int | None, "seconds": float}
    | {"best_accuracy": float, "compile_seconds": float, "dataset": str}
    | {"accuracy": float, "epochs": int},
}
WATCHED = "+geometry"  # after an optimizer's name: wrapped in `with_geometry`
_NAMES = ("adam", *(name for name in recipes.OPTIMIZERS if name != "adam"))
_PROGRAMS = (*(name + suffix for name in _NAMES for suffix in ("", WATCHED)), *TORCH)


def key(line: Line) -> Key:
    """What a line is about."""
    return (*_section(line), *(line.get(name) for name in _KEY))


def _section(line: Line) -> tuple[str, str]:
    """The part of the report that a line belongs to: a device, and versions of packages."""
    versions = [f"{name} {version or 'unknown'}" for name, version in line["versions"].items()]
    return line["device"], ", ".join(versions)


def load(path: Path) -> tuple[dict[Key, Line], list[int]]:
    """The lines of runs.jsonl that count, and the numbers (from 1) of those that are not whole."""
    found, broken = run_lines.read(path, _parse)
    return dict(found), broken


def _parse(line: Line) -> tuple[Key, Line]:
    run_lines.check(line, _WHERE)
    run_lines.check(line, {"error": str} if "error" in line else _FIGURES[line["kind"]])
    run_lines.check({"torch": line.get("torch")}, {"torch": dict[str, Any] | None})
    _place(line)
    return key(line), line


def write_report(output: Path, lines: Iterable[Line]) -> None:
    """Write table.md and table.png into a directory, each whole or not at all.

    Args:
      output: the directory.
      lines: at least one.
    """
    ordered = sorted(lines, key=_place)
    replace_file(output / "table.md", lambda path: path.write_text(table(ordered), "utf-8"))
    replace_file(output / "table.png", lambda path: draw(path, ordered))


def _place(line: Line) -> tuple:
    """Where a line stands in the report; fails for names that are not known."""
    return (
        _section(line),
        list(_FIGURES).index(line["kind"]),
        recipes.MODELS.index(line["model"]),
        recipes.PRECISIONS.index(line["precision"]),
        line["batch_size"],
        line["seeds"],
        _PROGRAMS.index(line["program"]),
    )


def table(lines: Sequence[Line]) -> str:
    """The report as Markdown: for each device and versions a table per kind, and how to read it."""
    text = ["# Training throughput", "", "![images per second](table.png)", ""]
    for (device, versions), group in itertools.groupby(lines, _section):
        section = list(group)
        text += [
            f"## {device}",
            "",
            f"* versions: {versions}",
            f"* git revision: {distinct(line['git_revision'] or 'unknown' for line in section)}",
            *(f"* PyTorch: {settings}" for settings in _torch_settings(section)),
            "",
        ]
        for kind, make_row in _ROWS.items():
            rows = [line for line in section if line["kind"] == kind and "error" not in line]
            if rows:
                head, row = make_row
                titles = "model | precision | batch | seeds | program".split(" | ") + head
                text += [
                    f"| {' | '.join(titles)} |",
                    f"|{'---|' * 2}{'---:|' * 2}---|{'---:|' * len(head)}",
                    *(f"| {' | '.join([*_cell(line), *row(line, rows)])} |" for line in rows),
                    "",
                ]
        errors = [line for line in section if "error" in line]
        if errors:
            text += ["Without figures:", ""]
            text += [
                f"* {line['kind']}, {', '.join(_cell(line))}: {line['error']}" for line in errors
            ]
            text.append("")
    return "\n".join([*text, *(f"* {note}" for note in _notes(lines))]) + "\n"


def _notes(lines: Sequence[Line]) -> list[str]:
    kinds = {line["kind"] for line in lines if "error" not in line}
    notes = {
        "steps": "images/s: of all seeds of a program together, augmentation included: the median, "
        "and the quartiles over rounds in which the cell's programs ran in turn. ÷ adam: the time "
        "of a step over that with adam in the same of n rounds, likewise; for PyTorch too, over "
        "adam in our trainer. share of peak: three times the forward FLOPs of convolutions and "
        "linear layers, over the device's measured rate in a large matrix product of this "
        "precision. compiling: of all programs of a training; in PyTorch, the first call. peak "
        "memory: where the device tells it, of the whole cell, and only of one that needed more "
        "than all before.",
        "epoch": "an epoch: 47,500 random images, and validation on 2,500; all seeds together. "
        "÷ 1 seed: over the median with one seed in the same setting.",
        "accuracy": "seconds: of training and validation, without compiling, until the first epoch "
        "whose validation accuracy reaches the one stated.",
    }
    found = [notes[kind] for kind in _ROWS if kind in kinds]
    if any(line["program"].endswith(WATCHED) for line in lines):
        found.append(f"{WATCHED}: with every step measured, as by train_cifar.py --geometry.")
    return found


def _cell(line: Line) -> list[str]:
    return [str(line[name]) for name in (*_CELL, "program")]


def _row_of_steps(line: Line, rows: Sequence[Line]) -> list[str]:
    memory, ratio = line["peak_bytes"], line["ratio_to_adam"]
    return [
        _spread(line["images_per_second"], 1, ".0f"),
        _spread(line["step_seconds"], 1e3, ".4g"),
        _spread(ratio, 1, ".3f") if ratio else "–",
        str(line["rounds"]),
        f"{100 * line['peak_share']:.1f} %",
        f"{line['compile_seconds']:.1f}",
        f"{memory / 1e9:.2f}" if memory else "–",
    ]


def _row_of_epoch(line: Line, rows: Sequence[Line]) -> list[str]:
    one = [row for row in rows if key(row) == key({**line, "seeds": 1})]
    median = line["epoch_seconds"]["median"]
    return [
        _spread(line["epoch_seconds"], 1, ".4g"),
        f"{median / one[0]['epoch_seconds']['median']:.2f}" if one else "–",
        f"{line['projected_minutes']:.1f}",
        f"{line['compile_seconds']:.1f}",
    ]


def _row_of_accuracy(line: Line, rows: Sequence[Line]) -> list[str]:
    reached = line["epoch"] is not None
    return [
        line["dataset"],
        f"{100 * line['accuracy']:g} %",
        f"{line['seconds']:.1f}" if reached else f"not reached in {line['epochs']} epochs",
        str(line["epoch"]) if reached else "–",
        f"{100 * line['best_accuracy']:.2f} %",
        f"{line['compile_seconds']:.1f}",
    ]


_ROWS = {
    "steps": (
        ["images/s", "step, ms", "÷ adam", "n", "share of peak", "compiling, s", "peak memory, GB"],
        _row_of_steps,
    ),
    "epoch": (
        ["epoch, s", "÷ 1 seed", f"{recipes.EPOCHS} epochs, minutes", "compiling, s"],
        _row_of_epoch,
    ),
    "accuracy": (
        ["data", "accuracy", "seconds", "epoch", "best accuracy", "compiling, s"],
        _row_of_accuracy,
    ),
}


def _spread(spread: Mapping[str, float], factor: float, form: str) -> str:
    q1, median, q3 = (format(factor * spread[name], form) for name in ("q1", "median", "q3"))
    return f"{median} ({q1}–{q3})"


def _torch_settings(lines: Sequence[Line]) -> list[str]:
    every = [line["torch"] for line in lines if line.get("torch")]
    return sorted({", ".join(f"{name} {value}" for name, value in one.items()) for one in every})


# Told apart without colour too, by hatching.
_BARS: dict[str, dict[str, Any]] = {
    "adam": {"color": "#9ecae1"},
    "adamsrt": {"color": "#08519c"},
    "torch_eager": {"color": "#fdd0a2", "hatch": "//"},
    "torch_compiled": {"color": "#d94801", "hatch": "//"},
}


def draw(path: Path, lines: Sequence[Line]) -> None:
    """Draw images per second: a panel per device, versions, model and precision.

    Args:
      path: of the PNG file.
      lines: in the order of the report.
    """
    # Imported here, so that --help does not wait for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line for line in lines if line["kind"] == "steps" and "error" not in line]
    names = [name for name in _PROGRAMS if any(line["program"] == name for line in steps)]
    panels = [
        (panel, list(group))
        for panel, group in itertools.groupby(
            steps, lambda line: (*_section(line), line["model"], line["precision"])
        )
    ]
    columns = min(2, len(panels)) or 1
    rows = math.ceil(len(panels) / columns) or 1
    figure = Figure(figsize=(1 + 5 * columns, 1.4 + 3.2 * rows), layout="constrained", dpi=120)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, ((device, _, *setting), group) in zip(every, panels, strict=False):
        _draw_panel(axes, group, names)
        title = f"{', '.join(setting)}\n{device}, jax {group[0]['versions'].get('jax')}"
        axes.set_title(title, fontsize="medium")
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    if not panels:
        every[0].text(0.5, 0.5, "no steps were measured", ha="center")
    handles = [every[0].bar([0], [0], label=name, **_style(name)) for name in names]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def _style(name: str) -> dict[str, Any]:
    return {"edgecolor": "white", "linewidth": 0.5, **_BARS.get(name, {"color": "#969696"})}


def _draw_panel(axes: Axes, lines: Sequence[Line], names: Sequence[str]) -> None:
    cells = list(dict.fromkeys((line["batch_size"], line["seeds"]) for line in lines))
    present = [name for name in names if any(line["program"] == name for line in lines)]
    width = 0.8 / len(present)
    for line in lines:
        x = cells.index((line["batch_size"], line["seeds"]))
        x += (present.index(line["program"]) - (len(present) - 1) / 2) * width
        rate = line["images_per_second"]
        below, above = rate["median"] - rate["q1"], rate["q3"] - rate["median"]
        axes.bar(x, rate["median"], width, **_style(line["program"]))
        axes.errorbar(x, rate["median"], [[below], [above]], color="black", linewidth=1, capsize=2)
        if len(cells) * len(present) <= 8:  # more figures would overlap
            label = f"{rate['median']:,.0f}"
            axes.annotate(label, (x, rate["q3"]), (0, 3), textcoords="offset points", ha="center")
    labels = [f"{batch}\n{seeds} seeds" if seeds > 1 else str(batch) for batch, seeds in cells]
    axes.set_xticks(range(len(cells)), labels)
    axes.set_xlim(-0.6, len(cells) - 0.4)
    axes.margins(y=0.12)
    axes.set_xlabel("batch size")
    axes.set_ylabel("images per second")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
