"""The picture of a run, curves.png: figures and learning rate over its epochs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.files import replace_file


class Panel(NamedTuple):
    """A figure of the training and of the validation, at each of the places."""

    label: str
    train: Sequence[float]
    valid: Sequence[float]
    log: bool = False  # where all are above 0


class Star(NamedTuple):
    """The result, marked in the last panel."""

    place: float
    value: float
    label: str


def draw(
    path: Path,
    places: Sequence[float],
    panels: Sequence[Panel],
    star: Star | None,
    *,
    title: str,
    unit: str,
    rates: Sequence[float],
    edges: Sequence[float],
    milestones: Sequence[float],
    log_rates: bool = True,
) -> None:
    """Draw panels above each other, and below them the learning rate, whole or not at all.

    Args:
      path: of the PNG file.
      places: of the lines on the axis that all share, one at least.
      panels: with the figures of these lines.
      star: None in a run that is not finished.
      title: of the picture.
      unit: of the places: "epoch" or "step".
      rates: learning rates.
      edges: the places between which each of them holds, so one more.
      milestones: the places at which the learning rate is lowered.
      log_rates: whether its axis is logarithmic.
    """
    figure = Figure(figsize=(7, 2 + 3 * len(panels)), layout="constrained")
    # A path may hold a $, or bytes that are no text.
    figure.suptitle(title.encode("utf-8", "replace").decode(), parse_math=False)
    ratios = {"height_ratios": (*[3] * len(panels), 2)}
    axes = figure.subplots(len(panels) + 1, 1, sharex=True, gridspec_kw=ratios)
    *panel_axes, rate_axes = axes

    # Told apart without colour too: training dark and solid, validation lighter and dashed.
    few = len(places) <= 30  # with marks for single epochs, without which one epoch is invisible
    of_training: Any = {"color": "#08306b", "linestyle": "-", "marker": "o" if few else ""}
    of_validation: Any = {"color": "#e6730b", "linestyle": "--", "marker": "s" if few else ""}
    labels = [(None, None)] * (len(panels) - 1) + [("training", "validation")]
    for ax, panel, (train, valid) in zip(panel_axes, panels, labels, strict=True):
        ax.plot(places, panel.train, label=train, **of_training)
        ax.plot(places, panel.valid, label=valid, **of_validation)
        ax.set_ylabel(panel.label)
        if panel.log and min(*panel.train, *panel.valid) > 0:
            ax.set_yscale("log")
    if star:
        panel_axes[-1].plot(
            [star.place],
            [star.value],
            color="black",
            linestyle="",
            marker="*",
            markeredgecolor="white",
            markersize=14,
            label=star.label,
        )

    rate_axes.stairs(rates, edges, baseline=None, color="black", linewidth=1.5)
    if log_rates and min(rates) > 0:
        rate_axes.set_yscale("log")
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel(unit)
    rate_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes:
        ax.grid(alpha=0.3)
        for i, place in enumerate(milestones):
            label = "milestone" if ax is panel_axes[-1] and i == 0 else None
            ax.axvline(place, color="grey", linestyle=":", linewidth=1.5, label=label)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)

    replace_file(path, FigureCanvasAgg(figure).print_png)
