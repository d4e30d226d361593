"""runs.jsonl: a JSON line for each program that was compiled for a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from common import run_lines
from compiled.targets import GPUS
from steps import step_runs

MODELS = step_runs.MODELS
WATCHED = "+geometry"  # after an optimizer's name: wrapped in `with_geometry`
OPTIMIZERS = ("adam", f"adam{WATCHED}", *(name for name in step_runs.OPTIMIZERS if name != "adam"))
SHARDS = 4  # GPUs that share out the parameters
SHARDED = ("resnet18", "transformer")  # models
CELLS = {  # precision and batch size of a training
    "resnet20": ("float32", 128),
    "resnet18": ("bfloat16", 512),
    "vgg16": ("bfloat16", 512),
}
TRAINED = ("adam", f"adam{WATCHED}", "adam_srt")  # optimizers
KINDS = ("step", "sharded", "training")


class Setting(NamedTuple):
    """What is compiled."""

    kind: str
    model: str
    optimizer: str
    gpu: str
    devices: int  # such GPUs, which share out the parameters
    precision: str  # of the network in a training; parameters are float32
    batch_size: int | None
    versions: dict[str, str | None]
    flags: str  # XLA_FLAGS


class Figures(NamedTuple):
    """What was found."""

    parameter_bytes: int
    spherical_leaves: int
    kernels: int  # collectives among them
    nbytes: int  # operands and results of all kernels
    temporary_bytes: int | None
    kinds: dict[str, int]  # how many kernels of each
    collective_bytes: int
    compile_seconds: float


class Compiled(NamedTuple):
    """A line of runs.jsonl, whose keys are the fields of all three."""

    setting: Setting
    git_revision: str | None
    figures: Figures


def settings(
    models: tuple[str, ...],
    optimizers: tuple[str, ...],
    gpus: tuple[str, ...],
    versions: dict[str, str | None],
    flags: str,
) -> list[Setting]:
    """All that there is to compile of these models and optimizers, for these GPUs."""
    return [
        Setting(kind, model, optimizer, gpu, *_how(kind, model), versions, flags)
        for gpu in gpus
        for kind in KINDS
        for model in models
        for optimizer in optimizers
        if exists(kind, model, optimizer)
    ]


def _how(kind: str, model: str) -> tuple[int, str, int | None]:
    """Devices, precision and batch size."""
    if kind == "training":
        return 1, *CELLS[model]
    return SHARDS if kind == "sharded" else 1, "float32", None


def exists(kind: str, model: str, optimizer: str) -> bool:
    """Whether such a program is compiled at all."""
    if kind == "sharded":
        return model in SHARDED
    return kind == "step" or (model in CELLS and optimizer in TRAINED)


def to_line(compiled: Compiled) -> bytes:
    """The program as a line of JSON."""
    setting, revision, figures = compiled
    entry = {**setting._asdict(), "git_revision": revision, **figures._asdict()}
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def load(path: Path) -> tuple[list[Compiled], list[int]]:
    """The programs of runs.jsonl, and the numbers (from 1) of the lines that hold none."""
    return run_lines.read(path, _parse)


def _parse(entry: dict[str, Any]) -> Compiled:
    setting = run_lines.checked(Setting(*(entry[name] for name in Setting._fields)))
    kind, model, optimizer, gpu = setting[:4]
    known = kind in KINDS and model in MODELS and optimizer in OPTIMIZERS and gpu in GPUS
    if not known or not exists(kind, model, optimizer):
        raise ValueError("no program of the table")
    figures = run_lines.checked(Figures(*(entry[name] for name in Figures._fields)))
    if not figures.parameter_bytes or not setting.devices:
        raise ValueError("no parameters")
    if not 0 < figures.kernels == sum(figures.kinds.values()):
        raise ValueError("no kernels")
    return run_lines.checked(Compiled(setting, entry["git_revision"], figures))
