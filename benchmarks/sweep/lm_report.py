"""The sweep as a table and a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweep import lm_runs
from sweep.lm_runs import Run
from training.files import replace_file

MARKERS = "osD^v"
BASE = "adamw"  # what the others are compared with


def write_report(output: Path, runs: Sequence[Run]) -> None:
    """Write table.md and table.png."""
    text = "\n".join(_lines(runs))
    replace_file(output / "table.md", lambda path: path.write_text(text, encoding="utf-8"))
    replace_file(output / "table.png", lambda path: _draw(path, runs))


def _names(runs: Sequence[Run], field: str) -> list[Any]:
    return list(dict.fromkeys(getattr(run.key, field) for run in runs))


def _of(runs: Sequence[Run], **fields: Any) -> list[Run]:
    """The runs whose keys have these fields, by learning rate and seed."""
    chosen = [
        run
        for run in runs
        if all(getattr(run.key, name) == value for name, value in fields.items())
    ]
    return sorted(chosen, key=lambda run: run.key)


def at_edge(runs: Sequence[Run], best: lm_runs.Key) -> bool:
    """Whether an optimizer's best learning rate is the smallest or the largest that was tried."""
    fields = best._asdict() | {"seed": 0}
    del fields["learning_rate"]
    rates = [run.key.learning_rate for run in _of(runs, **fields)]
    return best.learning_rate in (min(rates), max(rates))


def mean_and_deviation(losses: Sequence[float]) -> tuple[float, float]:
    """Of seeds; the deviation of one is not known."""
    return float(np.mean(losses)), float(np.std(losses, ddof=1)) if len(losses) > 1 else math.nan


def _spread(losses: Sequence[float]) -> str:
    mean, deviation = mean_and_deviation(losses)
    return f"{mean:.4f}" if math.isnan(deviation) else f"{mean:.4f} ± {deviation:.4f}"


def _lines(runs: Sequence[Run]) -> list[str]:
    lines = ["# Learning rates of optimizers on small language models", ""]
    lines += ["![validation loss over learning rate](table.png)", ""]
    protocol = ", ".join(f"{name} {value}" for name, value in runs[0].protocol.items())
    lines += [f"* {protocol}"]
    for name in ("device", "versions", "git_revision"):
        seen = dict.fromkeys(_words(run.source[name]) for run in runs if run.source[name])
        lines.append(f"* {name.replace('_', ' ')}: {'; '.join(seen)}")
    architectures, widths = _names(runs, "architecture"), sorted(_names(runs, "width"))
    for architecture, width in itertools.product(architectures, widths):
        lines += ["", f"## {architecture}, width {width}", ""]
        lines += _table(runs, architecture, width)
    return [
        *lines,
        "",
        "* Validation loss at the end, in nats per byte; of the best learning rate the mean and",
        "  the deviation over seeds, and its difference to the best of `adamw`.",
        "* The learning rate is that of the kernels in blocks that the optimizer takes; all other",
        "  weights take AdamW with the same one everywhere. `adam_srt` takes what is radially",
        "  invariant.",
        "* (edge): the best one is the smallest or the largest that was tried, and a better one",
        "  may lie beyond. –: the loss was no number.",
        "",
    ]


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return str(value)


def _table(runs: Sequence[Run], architecture: str, width: int) -> list[str]:
    here = _of(runs, architecture=architecture, width=width)
    first = [run for run in here if run.key.seed == 0]
    best = {key.optimizer: key for key in lm_runs.best(first)}
    losses = {
        name: [run.loss for run in here if run.key[:4] == key[:4]] for name, key in best.items()
    }
    lines = [
        "| optimizer | best learning rate | loss | seeds | to adamw | by learning rate, seed 0 |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name in _names(runs, "optimizer"):
        if name not in best:
            continue
        rate = f"{best[name].learning_rate:g}" + (" (edge)" if at_edge(runs, best[name]) else "")
        difference = "–"
        if BASE in losses and name != BASE:
            difference = f"{np.mean(losses[name]) - np.mean(losses[BASE]):+.4f}"
        grid = ", ".join(
            f"{run.key.learning_rate:g}: {run.loss:.3f}" if run.losses
            else f"{run.key.learning_rate:g}: –"
            for run in first
            if run.key.optimizer == name
        )  # fmt: skip
        lines.append(
            f"| {name} | {rate} | {_spread(losses[name])} | {len(losses[name])} | {difference} "
            f"| {grid} |"
        )
    return lines


def _draw(path: Path, runs: Sequence[Run]) -> None:
    """A row an architecture, a panel an optimizer, a line a width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    architectures, optimizers = _names(runs, "architecture"), _names(runs, "optimizer")
    widths = sorted(_names(runs, "width"))
    size = (2.2 * len(optimizers) + 1, 2.4 * len(architectures) + 0.8)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(len(architectures), len(optimizers), sharey="row", squeeze=False)
    for (i, architecture), (j, optimizer) in itertools.product(
        enumerate(architectures), enumerate(optimizers)
    ):
        ax = axes[i, j]
        for k, width in enumerate(widths):
            own = _of(runs, architecture=architecture, optimizer=optimizer, width=width)
            first = [run for run in own if run.key.seed == 0 and run.losses]
            color = f"C{k}"
            ax.plot(
                [run.key.learning_rate for run in first],
                [run.loss for run in first],
                color=color,
                marker=MARKERS[k % len(MARKERS)],
                label=f"width {width}" if i == j == 0 else None,
            )
            if first:
                lowest = min(first, key=lambda run: run.loss)
                seeds = [run for run in own if run.key[:4] == lowest.key[:4]]
                ax.errorbar(
                    [lowest.key.learning_rate],
                    *([value] for value in mean_and_deviation([run.loss for run in seeds])),
                    color="black",
                    marker="*",
                    markersize=10,
                    capsize=3,
                    linestyle="",
                    zorder=3,
                    label="best, ± deviation of seeds" if i == j == k == 0 else None,
                )
        ax.set_xscale("log", base=10)
        rates = sorted({run.key.learning_rate for run in _of(runs, optimizer=optimizer)})
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize="small", rotation=45)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        if i == 0:
            ax.set_title(optimizer, fontsize="medium")
        if i == len(architectures) - 1:
            ax.set_xlabel("learning rate")
        if j == 0:
            ax.set_ylabel(f"{architecture}\nvalidation loss")
    figure.legend(loc="outside lower center", ncols=len(widths) + 1, frameon=False)
    FigureCanvasAgg(figure).print_png(path)
