"""The lines of runs.jsonl as table.md and table.png, and nothing else in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.run_lines import Spread
from common.words import distinct, number
from steps.step_runs import COUNTERPARTS, MODELS, OPTAX, OPTIMIZERS, Figures, Measurement
from training.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure


class Section(NamedTuple):
    """What was measured on one device with the same packages."""

    device: str
    versions: str
    rows: dict[tuple[str, str], Measurement]  # by model and optimizer, in the order of the names

    def models(self) -> dict[str, dict[str, Measurement]]:
        """By model, and by optimizer within it."""
        models = {model: {} for model, _ in self.rows}
        for (model, optimizer), measurement in self.rows.items():
            models[model][optimizer] = measurement
        return models


def sections(measurements: Iterable[Measurement]) -> list[Section]:
    """The measurements by device and versions; PyTorch's makes no section of its own."""
    found: dict[tuple[str, str], dict[tuple[str, str], Measurement]] = {}
    for measurement in measurements:
        setting = measurement.setting
        packages = {name: v for name, v in setting.versions.items() if name != "torch"}
        versions = ", ".join(f"{name} {version or 'none'}" for name, version in packages.items())
        rows = found.setdefault((setting.device, versions), {})
        rows[setting.model, setting.optimizer] = measurement
    order = [(model, name) for model in MODELS for name in (*OPTIMIZERS, *COUNTERPARTS)]
    return [
        Section(*key, {cell: rows[cell] for cell in order if cell in rows})
        for key, rows in found.items()
    ]


def write_report(output: Path, measurements: Sequence[Measurement]) -> None:
    """Write table.md and table.png into a directory, each whole or not at all.

    Args:
      output: the directory.
      measurements: at least one.
    """
    parts = sections(measurements)
    replace_file(output / "table.md", lambda path: path.write_text(table(parts), encoding="utf-8"))
    replace_file(output / "table.png", lambda path: draw(path, parts))


NOTES = """\
* A step is the whole jitted update of state and parameters, both donated. A timing is of as many
  steps in a row as take 50 ms or more, and waits for the device at its end; n timings make the
  median and the quartiles (q1–q3).
* ratio to adam: of the times in the same round, in which `optax.adam` ran beside the optimizer. In
  the row `adam` a second adam did: it shows how exact the others are.
* Coupled L2 (5e-4) is part of all but `adamw` and `muon`. `muon` orthogonalises the kernels that
  the spherical optimizers have on spheres, and leaves the rest to its Adam.
* accessed: by XLA's cost analysis, which counts what every kernel reads and writes, from memory or
  from a cache; of copy bandwidth: this per second, relative to a copy of 256 MiB just before. It
  exceeds 100 % where kernels find in a cache what others have read.
* steps of a call: of JAX's; PyTorch's are called one by one. On a GPU a call can take Python longer
  than its step takes the device, and what is timed with one step a call may be the call.
* `torch_adam`: `torch.optim.Adam` as it is; `torch_adam_srt`: AdamSRT as one writes it in plain
  PyTorch; the same shapes and number of threads, in the same rounds.
"""


def table(parts: Sequence[Section]) -> str:
    """The report as Markdown: for each device a table per model, and how to read them.

    Args:
      parts: from `sections`; at least one.
    """
    lines = ["# One optimizer step beside optax.adam", "", "![the same](table.png)", ""]
    for part in parts:
        every = list(part.rows.values())
        ours = [m for m in every if m.setting.optimizer not in COUNTERPARTS] or every
        copies = [measurement.figures.copy_bandwidth / 1e9 for measurement in every]
        torch = distinct(
            m.setting.versions["torch"] for m in every if "torch" in m.setting.versions
        )
        lines += [
            f"## {part.device}",
            "",
            f"* versions: {part.versions}{torch and f', torch {torch}'}",
            f"* git revision: {distinct(m.git_revision or 'unknown' for m in every)}",
            f"* copy bandwidth: {_range(copies)} GB/s",
            f"* steps of a call: {distinct(str(m.setting.steps_per_call) for m in ours)}",
            *(f"* command: `{command}`" for command in _commands(every)),
            "",
        ]
        for model, rows in part.models().items():
            lines += [
                f"### {_title(model, rows)}",
                "",
                "| optimizer | ms (q1–q3) | ratio to adam (q1–q3) | n | accessed, MB | to adam "
                "| state, MB | to adam | temporary, MB | compiling, s | of copy bandwidth |",
                "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
                *(_table_row(optimizer, m.figures) for optimizer, m in rows.items()),
                "",
                *_beside_torch(rows),
            ]
    return "\n".join(lines) + "\n" + NOTES


def _table_row(optimizer: str, figures: Figures) -> str:
    seconds = figures.seconds
    cells = (
        optimizer,
        _spread(Spread(*(1000 * value for value in seconds))),
        _spread(figures.ratio_to_adam),
        str(figures.timings),
        number(figures.bytes_accessed, 1e-6),
        number(figures.bytes_ratio),
        number(figures.state_bytes, 1e-6),
        number(figures.state_ratio),
        number(figures.temporary_bytes, 1e-6),
        number(figures.compile_seconds),
        "–" if figures.bandwidth_share is None else f"{100 * figures.bandwidth_share:.0f} %",
    )
    return f"| {' | '.join(cells)} |"


def _beside_torch(rows: dict[str, Measurement]) -> list[str]:
    """A list of how our optimizers compare with PyTorch's."""
    lines = [
        f"* `{COUNTERPARTS[name]}` takes {_spread(measurement.figures.ratio_of_ours)} of the time "
        f"of `{name}`."
        for name, measurement in rows.items()
        if measurement.figures.ratio_of_ours
    ]
    return [*lines, ""] if lines else []


def _commands(measurements: Sequence[Measurement]) -> list[str]:
    """The commands that measure this again, but for --output."""
    commands = []
    for rounds in dict.fromkeys(m.setting.rounds for m in measurements):
        settings = [m.setting for m in measurements if m.setting.rounds == rounds]
        models = tuple(dict.fromkeys(setting.model for setting in settings))
        optimizers = {setting.optimizer for setting in settings}
        names = tuple(name for name in OPTIMIZERS if name in optimizers)
        options = [f"--models {','.join(models)}"] if models != MODELS else []
        if names != OPTIMIZERS:
            options.append(f"--optimizers {','.join(names)}")
        options.append(f"--rounds {rounds}")
        if optimizers & COUNTERPARTS.keys():
            options.append("--torch")
        commands.append(f"python benchmarks/optimizer_step.py {' '.join(options)}")
    return commands


def _title(model: str, rows: dict[str, Measurement]) -> str:
    nbytes = next(iter(rows.values())).figures.parameter_bytes
    return f"{model} ({number(nbytes, 1e-6)} MB of parameters)"


def _spread(spread: Spread) -> str:
    return f"{number(spread.median)} ({number(spread.q1)}–{number(spread.q3)})"


def _range(values: Sequence[float]) -> str:
    first, last = number(min(values)), number(max(values))
    return first if first == last else f"{first} to {last}"


# Told apart without colour too, by the hatching.
_STYLES: dict[str, dict[str, Any]] = {
    "Optax": {"color": "#8a8a8a"},
    "this library": {"color": "#e6730b"},
    "PyTorch": {"facecolor": "white", "edgecolor": "#08306b", "hatch": "////"},
}


def draw(path: Path, parts: Sequence[Section]) -> None:
    """Draw the ratios to adam: a row of panels per device, a panel per model, a bar per optimizer.

    Args:
      path: of the PNG file.
      parts: from `sections`; at least one.
    """
    # Imported here, so that --help does not wait for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    columns = min(2, max(len(part.models()) for part in parts))
    heights = [
        0.8 + math.ceil(len(models) / columns) * (0.9 + 0.3 * max(map(len, models.values())))
        for models in (part.models() for part in parts)
    ]
    figure = Figure(
        figsize=(1 + 5.5 * columns, 0.6 + sum(heights)),
        layout=ConstrainedLayoutEngine(h_pad=0.08),  # inches
        dpi=120,
    )
    figure.suptitle("Time of one optimizer step, relative to optax.adam (median, quartiles)")
    strips = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights).flat
    for strip, part in zip(strips, parts, strict=True):
        _draw_section(strip, part, columns)
    handles = [Patch(label=label, **style) for label, style in _STYLES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def _draw_section(strip: SubFigure, part: Section, columns: int) -> None:
    jax = next(iter(part.rows.values())).setting.versions.get("jax")
    strip.suptitle(f"{part.device}, jax {jax}", fontsize="medium")
    models = part.models()
    rows = math.ceil(len(models) / columns)
    panels = list(strip.subplots(rows, columns, squeeze=False).flat)
    for axes, (model, its_rows) in zip(panels, models.items(), strict=False):
        axes.set_title(_title(model, its_rows), fontsize="medium")
        _draw_model(axes, {name: m.figures for name, m in its_rows.items()})
    for axes in panels[len(models) :]:
        axes.set_axis_off()


def _draw_model(axes: Axes, figures: dict[str, Figures]) -> None:
    beside = []
    for y, (name, of_it) in enumerate(figures.items()):
        kind = "PyTorch" if name in COUNTERPARTS else "Optax" if name in OPTAX else "this library"
        q1, median, q3 = of_it.ratio_to_adam
        axes.barh(y, median - 1, left=1, height=0.7, **_STYLES[kind])
        axes.plot([q1, q3], [y, y], color="black", linewidth=1.5, marker="|")
        beside.append(f"{number(median)}   ({number(of_it.seconds.median, 1000)} ms)")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time / time of optax.adam")
    axes.set_yticks(range(len(figures)), list(figures))
    axes.set_ylim(len(figures) - 0.4, -0.6)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(figures)), beside)
    right.tick_params(length=0)

    # A logarithmic axis: half the time is as far from 1 as twice the time.
    least = min(0.5, *(of_it.ratio_to_adam.q1 for of_it in figures.values()))
    most = max(2.0, *(of_it.ratio_to_adam.q3 for of_it in figures.values()))
    axes.set_xscale("log")
    axes.set_xlim(least / 1.1, most * 1.1)
    powers = range(math.ceil(math.log2(least / 1.1)), math.floor(math.log2(most * 1.1)) + 1)
    axes.set_xticks([2.0**power for power in powers], [f"{2.0**power:g}" for power in powers])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
