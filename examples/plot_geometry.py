"""Draw what training did on the spheres: one column for each run, one row for each measure."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until `main` handles it, Ctrl-C ends the command at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import language.recipes as of_text
from images import recipes
from training import ending
from training.command import one_of, several
from training.files import ARGUMENTS, GEOMETRY, METRICS
from training.run_pictures import (
    Arguments,
    Refused,
    check_number,
    check_output,
    make_drawing_parser,
    name_common,
    name_run,
    read_arguments,
    read_epochs,
    read_runs,
    write_picture,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = """\
A run is a directory that train_cifar.py or train_lm.py wrote with --geometry, finished or not. Each
line is a layer: the mean over its groups and over the steps of an epoch (of an evaluation, with
train_lm.py), the darker the nearer to the input.

Beside the angle per step stands the one that is predicted for random gradients at the epoch's
learning rate, once weight decay and steps keep the radius in balance. It takes adamw some
1/(2 rate decay) steps to come near it, sgdmrt 1/(4 rate decay), and sgd (1 - momentum) of that.
There is none for adam, adams and adamsrt, whose balance depends on the size of the gradients, nor
for adamg, which has no decay on spheres.

examples:
  python examples/plot_geometry.py runs/sgd runs/sgdmrt runs/adam runs/adamsrt
  python examples/plot_geometry.py runs/three_seeds --measures turn_per_gradient,angle
"""
MOST = 10  # columns

COLORMAP, LIGHTEST = "viridis", 0.88  # of its range; beyond, it is too pale on white
MEAN = {"color": "black", "linewidth": 2.0}
PREDICTED = {"color": "#f16913", "linewidth": 1.6, "linestyle": (0, (4, 1.6))}


class Measure(NamedTuple):
    """How a row is drawn."""

    label: str
    log: bool = True  # where the figures differ by a factor of 10
    unit: float = 1.0  # what the recorded figures are multiplied by


MEASURES = {  # by their names in geometry.jsonl
    "turn_per_gradient": Measure("turn per length\nof gradient"),
    "angle": Measure("angle per step\n(rad)"),
    "radius": Measure("radius"),
    "momentum_radial_fraction": Measure("radial fraction\nof the momentum"),
    "deformation": Measure("deformation\n(degrees)", log=False, unit=180 / np.pi),
    "radial_fraction": Measure("radial fraction\nof the step"),
}
OF_MOMENTUM = "momentum_radial_fraction"  # missing where the optimizer has no single momentum
DEFAULT = tuple(name for name in MEASURES if name != "radial_fraction")


class Run(NamedTuple):
    """One seed's training; curves are by epoch, NaN where a measure was not finite."""

    directory: Path
    arguments: Arguments
    layers: list[str]  # in the network's order
    curves: dict[str, dict[str, np.ndarray]]  # by measure and layer
    predicted: np.ndarray | None  # angle per step, by epoch
    places: np.ndarray  # the epochs, or steps of a language model
    on_text: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns its exit code: 0, 1 (failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    parser = _parser()
    args = parser.parse_args(argv)
    return ending.outcome(parser.prog, lambda _: _plot(args))


def _plot(args: argparse.Namespace) -> None:
    check_output(args.output)
    runs = find_runs(args.directories, args.measures)
    if len(runs) > MOST:
        raise Refused(f"{len(runs)} runs are too many to be read side by side: name up to {MOST}")
    if len({run.on_text for run in runs}) > 1:
        raise Refused("runs on images and on text have no axis in common: draw them apart")
    write_picture(args.output, draw(runs, args.measures))
    count = "1 run is" if len(runs) == 1 else f"{len(runs)} runs are"
    print(f"The curves of {count} in {args.output}.", flush=True)


def predicted_angle(
    optimizer: str, recipe: recipes.Recipe, learning_rate: np.ndarray
) -> np.ndarray | None:
    """The angle per step at which weight decay and steps keep a sphere's radius in balance.

    With the momenta that are not transported, successive steps add up, and so does the decay in
    `sgd`'s buffer: the angles of `adamw` and `sgd` are for gradients that are independent from step
    to step. `rotational` is set to the former.

    Args:
      optimizer: one of `recipes.OPTIMIZERS`.
      recipe: with its weight decay, and b1 or momentum.
      learning_rate: of any shape.

    Returns:
      Radians in the shape of the learning rate; None without decay, and where the balance depends
      on the size of the gradients (`adam`, `adams`, `adamsrt`) or there is none.
    """
    # The library's `equilibrium_angle` and its like, in NumPy, so that no picture starts JAX.
    match optimizer:
        case "adamw" | "rotational":
            share = (1 - recipe.b1) / (1 + recipe.b1)
        case "sgd":
            share = 1 / (1 + recipe.momentum)
        case "sgdmrt":
            share = 1.0
        case _:
            return None
    if recipe.weight_decay == 0:
        return None
    return np.sqrt(2 * np.asarray(learning_rate) * recipe.weight_decay * share)


def find_runs(directories: Sequence[Path], measures: Sequence[str] = tuple(MEASURES)) -> list[Run]:
    """Every run at or below the directories, in their order and each once.

    A run without a finished epoch is left out, with a message.

    Args:
      directories: with runs.
      measures: what is read of them; the angle is there in any case, to know the layers.

    Raises:
      Refused: for a directory without a run, a run without geometry.jsonl, a damaged file, or no
        finished epoch at all.
    """
    return read_runs(directories, partial(_read_run, measures))


def _read_run(measures: Sequence[str], directory: Path) -> Run | None:
    arguments, place = read_arguments(directory), str(directory / ARGUMENTS)
    on_text = "epochs" not in arguments
    models, optimizers = recipes.MODELS, recipes.OPTIMIZERS
    if on_text:
        models, optimizers = tuple(of_text.ARCHITECTURES), of_text.OPTIMIZERS
    for key, known in (("model", models), ("optimizer", optimizers)):
        if arguments[key] not in known:
            raise Refused(f"{place}: damaged, unknown {key} {arguments[key]!r}")
    check_number(place, arguments, "weight_decay", sys.float_info.max)
    path = directory / GEOMETRY
    if not path.exists():
        raise Refused(f"{directory} was made without --geometry: it has no {GEOMETRY}")
    metrics = read_epochs(directory / METRICS)
    measured = [_unstacked(epoch) for epoch in read_epochs(path)]
    for line, epoch in enumerate(metrics, 1):
        place = f"{directory / METRICS}, line {line}"
        check_number(place, epoch, "learning_rate", sys.float_info.max)
    epochs = min(len(metrics), len(measured))  # a run under way may have written one of the two
    if epochs == 0:
        return None

    end = "/angle/mean"
    keys = max(measured, key=len)  # an epoch whose figures were lost has none
    layers = [key.removesuffix(end) for key in keys if key.endswith(end)]
    layers.sort(key=_depth)
    if not layers:
        raise Refused(f"{path}: damaged, it measures no layer")
    curves: dict[str, dict[str, np.ndarray]] = {}
    for measure in measures:
        drawn = MEASURES[measure]
        for layer in layers:
            key = f"{layer}/{measure}/mean"
            if measure != OF_MOMENTUM or key in keys:
                curve = [_figure(path, line, e, key) for line, e in enumerate(measured, 1)]
                curves.setdefault(measure, {})[layer] = drawn.unit * np.array(curve[:epochs])
    decay = arguments["weight_decay"]
    if on_text:
        recipe = recipes.Recipe(0.0, decay, b1=of_text.B1)
    else:
        setting = (str(arguments[key]) for key in ("dataset", "model", "optimizer"))
        recipe = recipes.recipe(*setting)[0]._replace(weight_decay=decay)
    rates = np.array([epoch["learning_rate"] for epoch in metrics[:epochs]])
    predicted = predicted_angle(arguments["optimizer"], recipe, rates)
    if on_text and arguments["optimizer"] == "rotational":
        predicted = rates  # its learning rate is the angle
    places = [epoch.get("epoch", epoch.get("step")) for epoch in metrics[:epochs]]
    return Run(directory, arguments, layers, curves, predicted, np.array(places), on_text)


def _unstacked(epoch: dict[str, Any]) -> dict[str, Any]:
    """Numbers the layers of a stack, whose figures are lists: `blocks/kernel/0`."""
    figures = {}
    for key, value in epoch.items():
        layer, *names = key.rsplit("/", 2)
        if isinstance(value, list):
            figures |= {"/".join([layer, str(i), *names]): own for i, own in enumerate(value)}
        else:
            figures[key] = value
    return figures


def _depth(layer: str) -> tuple[int, list[tuple[int, str]]]:
    """Sorts the layers of the networks of `models` from the first to the last.

    The file has them as text: 10 before 2, and `conv1`, the first, after all `blocks`. A stack's
    layers are numbered at the end.
    """
    parts = layer.split("/")
    if parts[-1].isdecimal():
        parts = [parts[-1], *parts[:-1]]
    return len(parts), [(int(p) if p.isdecimal() else -1, p) for p in parts]


def _figure(path: Path, line: int, epoch: dict[str, Any], key: str) -> float:
    value = epoch.get(key, "")
    if value is None or len(epoch) == 1:
        return np.nan
    if not isinstance(value, int | float):
        raise Refused(f"{path}, line {line}: damaged, {key} is not a number")
    return value if abs(value) <= sys.float_info.max else np.nan


def titles(runs: Sequence[Run]) -> list[str]:
    """For each run the optimizer and what else tells it from the others."""
    arguments = [run.arguments for run in runs]
    names = [name_run(own, arguments) for own in arguments]
    return [
        f"{name}, {run.directory}" if names.count(name) > 1 else name
        for name, run in zip(names, runs, strict=True)
    ]


def _wrap(text: str, width: int) -> str:
    """Break a list at its commas."""
    glued = text.replace(" ", "\N{NO-BREAK SPACE}").replace(",\N{NO-BREAK SPACE}", ", ")
    return textwrap.fill(glued, width).replace("\N{NO-BREAK SPACE}", " ")


def draw(runs: Sequence[Run], measures: Sequence[str] = DEFAULT) -> Figure:
    """Draw the measures, each in a row, of the runs, each in a column."""
    # Imported here, so that --help and a refusal do not wait for it.
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Narrow columns, so that several remain readable in the width of a page.
    column = {1: 4.0, 2: 3.0, 3: 2.5, 4: 2.2}.get(len(runs), 2.0)  # inches
    width = column * len(runs) + 1.0
    shared = _wrap(name_common([run.arguments for run in runs]), int(12 * width))
    headings = [_wrap(title, int(11 * column)) for title in titles(runs)]
    more_lines = shared.count("\n") + max(heading.count("\n") for heading in headings)
    height = 1.9 * len(measures) + 1.1 + 0.17 * more_lines
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle(shared, fontsize="medium", parse_math=False)
    axes = figure.subplots(len(measures), len(runs), sharex=True, sharey="row", squeeze=False)
    depths = ListedColormap(colormaps[COLORMAP](np.linspace(0, LIGHTEST, 256)))
    for row, measure in zip(axes, measures, strict=True):
        for ax, run in zip(row, runs, strict=True):
            _draw_layers(ax, run, measure, depths)
        _scale(row, MEASURES[measure])
    for ax, heading in zip(axes[0], headings, strict=True):
        ax.set_title(heading, fontsize="medium").set_parse_math(False)
    for ax in axes[-1]:
        ax.set_xlabel("step" if runs[0].on_text else "epoch")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    for ax in axes.flat:
        ax.grid(alpha=0.3)

    figure.align_ylabels(axes[:, 0])
    _add_legend(figure, runs, "angle" in measures, depths)
    return figure


def _draw_layers(ax: Any, run: Run, measure: str, depths: Any) -> None:
    """Draw one panel."""
    from matplotlib.patheffects import Normal, Stroke

    if measure not in run.curves:
        note = "not measured:\nthe optimizer has no\nsingle momentum"
        ax.text(0.5, 0.5, note, ha="center", va="center", transform=ax.transAxes, fontsize="small")
        return
    curves = run.curves[measure]
    epochs = run.places
    mark = {"marker": "." if len(epochs) == 1 else ""}  # a line through one point is invisible
    for layer, curve in curves.items():
        depth = run.layers.index(layer) / max(1, len(run.layers) - 1)
        ax.plot(epochs, curve, color=depths(depth), linewidth=0.8, label=layer, **mark)
    if measure == "angle":
        halo = [Stroke(linewidth=3.2, foreground="white"), Normal()]
        mean = np.mean(list(curves.values()), axis=0)
        ax.plot(epochs, mean, label="mean", path_effects=halo, **MEAN, **mark)
        if run.predicted is not None:
            steps = {"drawstyle": "steps-mid", "label": "predicted"}
            ax.plot(epochs, run.predicted, **steps, **PREDICTED, **mark)


def _scale(row: Sequence[Any], measure: Measure) -> None:
    """Set the scale that a row shares."""
    row[0].set_ylabel(measure.label)
    drawn = np.concatenate([line.get_ydata() for ax in row for line in ax.lines] or [[]])
    positive = drawn[drawn > 0]
    if drawn.size == 0:
        row[0].set_yticks([])
    elif measure.log and positive.size and positive.max() > 10 * positive.min():
        row[0].set_yscale("log", nonpositive="mask")
    elif not measure.log:
        row[0].set_ylim(bottom=0)


def _add_legend(figure: Figure, runs: Sequence[Run], angles: bool, depths: Any) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D

    ends = {(run.layers[0], run.layers[-1]) for run in runs}
    first, last = (f" ({name})" for name in ends.pop()) if len(ends) == 1 else ("", "")
    bar = tuple(Line2D([], [], color=depths(i / 11), linewidth=5) for i in range(12))
    entries: dict[str, Any] = {f"layers, from the first{first} to the last{last}": bar}
    if angles:
        entries["mean over the layers"] = Line2D([], [], **MEAN)
        if any(run.predicted is not None for run in runs):
            entries["predicted equilibrium"] = Line2D([], [], **PREDICTED)
    in_one_row = sum(map(len, entries)) + 12 * len(entries) < 14 * figure.get_figwidth()
    legend = figure.legend(
        list(entries.values()),
        [textwrap.fill(text, int(11 * figure.get_figwidth())) for text in entries],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="outside lower center",
        ncols=len(entries) if in_one_row else 1,
        fontsize="small",
        frameon=False,
        handlelength=5,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _parser() -> argparse.ArgumentParser:
    parser = make_drawing_parser("plot_geometry.py", __doc__, EXAMPLES, "geometry.png")
    parser.add_argument(
        "--measures",
        type=partial(several, partial(one_of, tuple(MEASURES))),
        default=",".join(DEFAULT),
        metavar="A,B,...",
        help=f"the rows, of {', '.join(MEASURES)} (default: all but radial_fraction)",
    )
    return parser


if __name__ == "__main__":
    ending.leave(main())
