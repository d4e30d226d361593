"""The files of a run: arguments.json, *.jsonl, summary.json, curves.png and tensorboard/."""

import contextlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tensorboardX import SummaryWriter

from training.files import replace_file
from training.loop import Metrics, Result

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "spherical_optax")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    _replace(path, json.dumps(content, indent=2) + "\n")


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write an epoch's figures as a line of JSON each, whole or not at all."""
    _replace(path, "".join(map(_line, lines)))


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add one epoch as one line of JSON, in one write, so that no reader sees half a line."""
    with path.open("ab", buffering=0) as file:
        file.write(_line(line).encode())


def read_lines(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The lines of the first epochs; one with the epoch alone where the file has no whole line."""
    found = {}
    for text in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn or damaged line
            line = json.loads(text)
            found[line["epoch"]] = line
    return [found.get(epoch, {"epoch": epoch}) for epoch in range(1, epochs + 1)]


def open_events(directory: Path) -> SummaryWriter:
    """Begin TensorBoard's event file in place of what is there.

    It is written in the background, and whole once it is closed.
    """
    shutil.rmtree(directory, ignore_errors=True)
    return SummaryWriter(str(directory), flush_secs=5)


def add_events(writer: SummaryWriter, line: dict[str, Any]) -> None:
    """Add an epoch's scalars."""
    for name, value in line.items():
        if name != "epoch" and value is not None:
            # Of train/loss and valid/loss, TensorBoard makes a page for train and one for valid.
            tag = name.replace("train_", "train/").replace("valid_", "valid/")
            writer.add_scalar(tag, value, line["epoch"])


def write_summary(
    path: Path,
    arguments: dict[str, Any],
    result: Result,
    history: Sequence[Metrics],
    *,
    seconds: float,
    compile_seconds: float,
    seeds_at_once: int,
    git_revision: str | None,
) -> None:
    """Write the result of a run with what is needed to repeat it, whole or not at all.

    Args:
      path: of the JSON file.
      arguments: what the run was asked for.
      result: figures on the test images.
      history: its epochs; the images per second of all but the first are averaged.
      seconds: of training and validation.
      compile_seconds: of compilation, which comes on top; of the last part of a resumed run, and 0
        where an earlier seed's programs served.
      seeds_at_once: how many seeds shared the program, and hence the times.
      git_revision: from `find_git_revision`, before the run.
    """
    rates = [m.images_per_second for m in history[1:]]
    summary = {
        **result._asdict(),
        # Every epoch has as many images, so this is all images over all seconds.
        "images_per_second": len(rates) / sum(1 / rate for rate in rates) if rates else None,
        "compile_seconds": compile_seconds,
        "seconds": seconds,
        "seeds_at_once": seeds_at_once,
        "arguments": arguments,
        "versions": versions(),
        "device": device_name(),
        "git_revision": git_revision,
    }
    write_json(path, summary)


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that results depend on; None if not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def device_name() -> str:
    """The devices of this process: `gpu (NVIDIA H100 80GB HBM3)`, `cpu (AMD EPYC, 2 cores)`."""
    if jax.default_backend() == "cpu":
        return f"cpu ({_processor()}, {os.cpu_count()} cores)"
    several = f"{jax.device_count()} x " if jax.device_count() > 1 else ""
    return f"{jax.default_backend()} ({several}{jax.devices()[0].device_kind})"


def find_git_revision() -> str | None:
    """The commit that is checked out, with "-dirty" if tracked files differ from it."""
    directory = str(Path(__file__).parent)
    command = ["git", "-C", directory, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def draw_curves(
    path: Path,
    history: Sequence[Metrics],
    result: Result | None,
    *,
    title: str,
    schedule: Callable[[int], Any],
    milestones: Sequence[int],
    steps_per_epoch: int,
) -> None:
    """Draw loss, accuracy and learning rate over the epochs, whole or not at all.

    Args:
      path: of the PNG file.
      history: at least one epoch.
      result: its test accuracy is marked at the best epoch; None in a run that is not finished.
      title: of the picture.
      schedule: the learning rate by optimizer step.
      milestones: the steps at which it is lowered.
      steps_per_epoch: optimizer steps of an epoch.
    """
    epochs = np.array([m.epoch for m in history])
    figure = Figure(figsize=(7, 8), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": (3, 3, 2)})
    loss_axes, accuracy_axes, rate_axes = axes

    # Told apart without colour too: training dark and solid, validation lighter and dashed.
    few = len(history) <= 30  # with marks for single epochs, without which one epoch is invisible
    training = {"color": "#08306b", "linestyle": "-", "marker": "o" if few else ""}
    validation = {"color": "#e6730b", "linestyle": "--", "marker": "s" if few else ""}
    loss_axes.plot(epochs, [m.train_loss for m in history], **training)
    loss_axes.plot(epochs, [m.valid_loss for m in history], **validation)
    loss_axes.set_ylabel("cross-entropy (nats)")
    if min(min(m.train_loss, m.valid_loss) for m in history) > 0:
        loss_axes.set_yscale("log")

    train_accuracy = [100 * m.train_accuracy for m in history]
    valid_accuracy = [100 * m.valid_accuracy for m in history]
    accuracy_axes.plot(epochs, train_accuracy, label="training", **training)
    accuracy_axes.plot(epochs, valid_accuracy, label="validation", **validation)
    if result:
        accuracy_axes.plot(
            [result.best_epoch],
            [100 * result.test_accuracy],
            color="black",
            linestyle="",
            marker="*",
            markeredgecolor="white",
            markersize=14,
            label=f"test: {100 * result.test_accuracy:.2f} % (epoch {result.best_epoch})",
        )
    accuracy_axes.set_ylabel("accuracy (%)")

    lowered = sorted(set(milestones))
    rates = [float(schedule(step)) for step in (0, *lowered)]
    edges = np.array([0, *lowered, max(epochs[-1] * steps_per_epoch, lowered[-1])])
    rate_axes.stairs(rates, edges / steps_per_epoch, baseline=None, color="black", linewidth=1.5)
    if min(rates) > 0:
        rate_axes.set_yscale("log")
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("epoch")
    rate_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes:
        ax.grid(alpha=0.3)
        for step in lowered:
            label = "milestone" if ax is accuracy_axes and step == lowered[0] else None
            place = step / steps_per_epoch
            ax.axvline(place, color="grey", linestyle=":", linewidth=1.5, label=label)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)

    replace_file(path, FigureCanvasAgg(figure).print_png)


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2] for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
