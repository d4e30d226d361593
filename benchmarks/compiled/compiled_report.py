"""The lines of runs.jsonl as table.md and table.png, and nothing else in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.words import distinct, number
from compiled import targets
from compiled.compiled_lines import KINDS, MODELS, OPTIMIZERS, WATCHED, Compiled, Setting
from compiled.kernels import COLLECTIVES
from training.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

LAUNCH = 2e-6  # seconds, of a kernel


class Row(NamedTuple):
    """A program as it was last compiled, and as it was before with other figures."""

    last: Compiled
    before: Compiled | None


class Section(NamedTuple):
    """What was compiled for one GPU with the same packages and flags."""

    gpu: str
    versions: str
    flags: str
    rows: dict[tuple[str, str, str], Row]  # by kind, model and optimizer, in the order of the names

    def tables(self) -> dict[tuple[str, str], dict[str, Row]]:
        """By kind and model, and by optimizer within it."""
        tables: dict[tuple[str, str], dict[str, Row]] = {}
        for (kind, model, optimizer), row in self.rows.items():
            tables.setdefault((kind, model), {})[optimizer] = row
        return tables


def sections(programs: Iterable[Compiled]) -> list[Section]:
    """The programs by GPU, versions and flags; the last line of a program counts."""
    found: dict[tuple[str, str, str], dict[tuple[str, str, str], Row]] = {}
    for compiled in programs:
        setting = compiled.setting
        versions = ", ".join(f"{name} {v or 'none'}" for name, v in setting.versions.items())
        of_section = setting.gpu, versions, setting.flags
        rows = found[of_section] = found.pop(of_section, {})  # the last one is of the last line
        key = setting.kind, setting.model, setting.optimizer
        row = rows.get(key)
        rows[key] = Row(compiled, _before(row, compiled) if row else None)
    order = [(k, m, name) for k in KINDS for m in MODELS for name in OPTIMIZERS]
    return [
        Section(*key, {cell: rows[cell] for cell in order if cell in rows})
        for key, rows in found.items()
    ]


def _before(row: Row, compiled: Compiled) -> Compiled | None:
    same_setting = row.last.setting == compiled.setting
    if same_setting and _moved(row.last) == _moved(compiled):
        return row.before
    return row.last if same_setting else None


def _moved(compiled: Compiled) -> tuple[int, int]:
    return compiled.figures.kernels, compiled.figures.nbytes


def predicted(compiled: Compiled) -> tuple[float, float]:
    """Seconds that a step takes by the model: of its bytes, and of its kernels' launches."""
    bandwidth = targets.GPUS[compiled.setting.gpu].bandwidth
    return compiled.figures.nbytes / bandwidth, LAUNCH * compiled.figures.kernels


def passes(compiled: Compiled) -> float:
    """Bytes of all kernels to those of the parameters on each device."""
    figures = compiled.figures
    return figures.nbytes * compiled.setting.devices / figures.parameter_bytes


def write_report(output: Path, programs: Sequence[Compiled]) -> None:
    """Write table.md and table.png into a directory, each whole or not at all.

    Args:
      output: the directory.
      programs: at least one.
    """
    parts = sections(programs)
    replace_file(output / "table.md", lambda path: path.write_text(table(parts), encoding="utf-8"))
    replace_file(output / "table.png", lambda path: draw(path, parts))


NOTES = f"""\
* Nothing here ran: XLA compiled each program for the GPU named, from its data sheet, on a machine
  without one, by JAX's plugin for CUDA 12 and without autotuning, and what it launches was
  counted in its text.
* kernels: launches of a step; a call of a library (cuDNN, cuBLAS, a sort) and a collective are one
  each. "more, a leaf": those more than with `adam`, for each spherical leaf.
* bytes: sizes of the operands and results of all kernels. A kernel that reads a part of an operand,
  or writes a part of one in place, moves less, and a cache saves some. A pass is as many bytes as
  the parameters have; of shared ones, as a GPU's part has.
* **predicted, not measured**: bytes / memory bandwidth + kernels × {1e6 * LAUNCH:g} µs. It knows no
  arithmetic: of a training and of what multiplies matrices (`muon`, `muon_h`) it leaves out most.
* before: kernels and passes of an earlier line of the same program, where they were others.
* An optimizer's step is that of `optimizer_step.py`, with state and parameters donated;
  `{WATCHED}`: wrapped in `with_geometry`.
* shared parameters: each leaf along its longest axis that the GPUs divide, gradients and moments
  too, and a number per group where its group is. No time is predicted: the links decide it.
* a training: the trainer's program for a GPU and one seed, which runs an epoch as one loop. What is
  counted is the loop's body, a whole step, from gathering the batch to the new parameters.
"""


def table(parts: Sequence[Section]) -> str:
    """The report as Markdown: for each GPU a table per kind and model, and how to read them.

    Args:
      parts: from `sections`; at least one.
    """
    lines = ["# What steps do on a GPU, from compiled programs: predicted, not measured", ""]
    lines += ["![the predicted times](table.png)", ""]
    for part in parts:
        last = [row.last for row in part.rows.values()]
        before = [row.before for row in part.rows.values() if row.before]
        gpu = targets.GPUS[part.gpu]
        lines += [
            f"## {gpu.name}, {gpu.bandwidth / 1e12:.2f} TB/s",
            "",
            f"* versions: {part.versions}",
            f"* XLA_FLAGS: `{part.flags}`",
            f"* git revision: {_revisions(last)}",
            *([f"* git revision of what is before: {_revisions(before)}"] if before else []),
            f"* command: `{_command(last)}`",
            "",
        ]
        for (kind, _), rows in part.tables().items():
            head, row = _TABLES[kind]
            head = ["optimizer", *head, *(["kernels, passes before"] if before else [])]
            lines += [
                f"### {_title(next(iter(rows.values())).last)}",
                "",
                f"| {' | '.join(head)} |",
                f"|---|{'---:|' * (len(head) - 1)}",
            ]
            adam = rows["adam"].last if "adam" in rows else None
            for name, of in rows.items():
                cells = [name, *row(of.last, adam), *([_said(of.before)] if before else [])]
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines) + "\n" + NOTES


def _row_of_step(compiled: Compiled, adam: Compiled | None) -> list[str]:
    figures = compiled.figures
    return [
        *_kernels(compiled, adam),
        f"{passes(compiled):.1f}",
        number(figures.nbytes, 1e-6),
        number(figures.temporary_bytes, 1e-6),
        *_times(compiled, adam),
    ]


def _row_of_sharded(compiled: Compiled, adam: Compiled | None) -> list[str]:
    figures = compiled.figures
    between = [f"{n} {kind}" for kind, n in figures.kinds.items() if kind in COLLECTIVES]
    return [
        *_kernels(compiled, adam),
        f"{passes(compiled):.1f}",
        number(figures.nbytes, 1e-6),
        number(figures.temporary_bytes, 1e-6),
        ", ".join(between) or "none",
        number(figures.collective_bytes, 1e-6),
    ]


def _row_of_training(compiled: Compiled, adam: Compiled | None) -> list[str]:
    figures = compiled.figures
    return [
        *_kernels(compiled, adam),
        str(figures.kinds.get("custom-call", 0)),
        number(figures.nbytes, 1e-9),
        number(figures.temporary_bytes, 1e-9),
        *_times(compiled, adam),
    ]


_TIMES = ["predicted, ms", "to adam"]
_TABLES = {
    "step": (
        ["kernels", "more, a leaf", "passes", "bytes, MB", "temporary, MB", *_TIMES],
        _row_of_step,
    ),
    "sharded": (
        ["kernels", "more, a leaf", "passes", "bytes, MB", "temporary, MB"]
        + ["collectives", "of these, MB"],
        _row_of_sharded,
    ),
    "training": (
        ["kernels", "more, a leaf", "of libraries", "bytes, GB", "temporary, GB", *_TIMES],
        _row_of_training,
    ),
}


def _kernels(compiled: Compiled, adam: Compiled | None) -> list[str]:
    """Kernels, and how many more than adam's for each spherical leaf."""
    figures = compiled.figures
    if adam is None or not figures.spherical_leaves:
        return [str(figures.kernels), "–"]
    more = round((figures.kernels - adam.figures.kernels) / figures.spherical_leaves, 1)
    return [str(figures.kernels), f"{more or 0:.1f}"]  # and not -0.0


def _times(compiled: Compiled, adam: Compiled | None) -> list[str]:
    seconds = sum(predicted(compiled))
    return [number(seconds, 1e3), f"{seconds / sum(predicted(adam)):.2f}" if adam else "–"]


def _said(before: Compiled | None) -> str:
    return f"{before.figures.kernels}, {passes(before):.1f}" if before else "as now"


def _revisions(programs: Iterable[Compiled]) -> str:
    return distinct(compiled.git_revision or "unknown" for compiled in programs)


def _command(programs: Sequence[Compiled]) -> str:
    """The command that compiles this again, but for --output."""
    options = [f"--gpus {programs[0].setting.gpu}"]
    for option, known in (("model", MODELS), ("optimizer", OPTIMIZERS)):
        there = {getattr(compiled.setting, option) for compiled in programs}
        if len(there) < len(known):
            options.append(f"--{option}s {','.join(name for name in known if name in there)}")
    return f"python benchmarks/compiled_for_gpu.py {' '.join(options)}"


def _title(compiled: Compiled) -> str:
    setting, figures = compiled.setting, compiled.figures
    parameters = f"{number(figures.parameter_bytes, 1e-6)} MB of parameters"
    leaves = f"{figures.spherical_leaves} spherical leaves"
    match setting.kind:
        case "training":
            return f"training {setting.model}, {_cell(setting)} ({leaves})"
        case "sharded":
            return f"{setting.model} shared by {setting.devices} GPUs ({parameters}, {leaves})"
    return f"{setting.model} ({parameters}, {leaves})"


def _cell(setting: Setting) -> str:
    return f"batch {setting.batch_size}, {setting.precision}"


# Told apart without colour too, by the hatching.
_BYTES = {"color": "#e6730b"}
_LAUNCHES = {"facecolor": "white", "edgecolor": "#08306b", "hatch": "////"}


def draw(path: Path, parts: Sequence[Section]) -> None:
    """Draw the predicted times: panels per GPU, a panel per model, a bar per optimizer.

    Args:
      path: of the PNG file.
      parts: from `sections`; at least one.
    """
    # Imported here, so that --help does not wait for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    panels = [
        {key: rows for key, rows in part.tables().items() if key[0] != "sharded"} for part in parts
    ]
    columns = min(2, max(1, *map(len, panels)))
    heights = [_height(of_part, columns) for of_part in panels]
    figure = Figure(
        figsize=(1 + 6 * columns, 1 + sum(heights)),
        layout=ConstrainedLayoutEngine(h_pad=0.08),  # inches
        dpi=100,
    )
    figure.suptitle(
        "Time of a step as its compiled program predicts it, NOT MEASURED:\n"
        f"bytes / memory bandwidth + kernels × {1e6 * LAUNCH:g} µs, without arithmetic"
    )
    strips = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights).flat
    for strip, part, of_part in zip(strips, parts, panels, strict=True):
        _draw_section(strip, part, of_part, columns)
    handles = [
        Patch(label="bytes / bandwidth", **_BYTES),
        Patch(label="launches", **_LAUNCHES),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def _height(panels: dict[tuple[str, str], dict[str, Row]], columns: int) -> float:
    """Inches of a section: in each row of panels, those of the one with most bars."""
    bars = [len(rows) for rows in panels.values()] or [1]
    rows = [max(bars[i : i + columns]) for i in range(0, len(bars), columns)]
    return 0.6 + sum(1 + 0.27 * most for most in rows)


def _draw_section(
    strip: SubFigure,
    part: Section,
    panels: dict[tuple[str, str], dict[str, Row]],
    columns: int,
) -> None:
    strip.suptitle(targets.GPUS[part.gpu].name, fontsize="large")
    rows = max(1, math.ceil(len(panels) / columns))
    bars = [len(of_model) for of_model in panels.values()] or [1]
    ratios = [1 + 0.27 * max(bars[i : i + columns]) for i in range(0, len(bars), columns)]
    every = list(strip.subplots(rows, columns, squeeze=False, height_ratios=ratios).flat)
    for axes, of_model in zip(every, panels.values(), strict=False):
        axes.set_title(_title(next(iter(of_model.values())).last), fontsize="medium")
        _draw_model(axes, of_model)
    for axes in every[len(panels) :]:
        axes.set_axis_off()


def _draw_model(axes: Axes, rows: dict[str, Row]) -> None:
    beside = []
    for y, row in enumerate(rows.values()):
        moving, launching = (1000 * seconds for seconds in predicted(row.last))
        axes.barh(y, moving, height=0.7, **_BYTES)
        axes.barh(y, launching, left=moving, height=0.7, **_LAUNCHES)
        if row.before:
            was = 1000 * sum(predicted(row.before))
            axes.plot([was, was], [y - 0.4, y + 0.4], color="black", linewidth=2)
        beside.append(f"{number(moving + launching)}   ({row.last.figures.kernels} kernels)")
    axes.set_xlabel(
        "predicted, ms" + "; a black line: before" * any(r.before for r in rows.values())
    )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(rows)), beside)
    right.tick_params(length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
