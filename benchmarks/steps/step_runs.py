"""runs.jsonl: a JSON line for each measurement of an optimizer's step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from common import run_lines
from common.run_lines import Spread

MODELS = ("resnet20", "resnet18", "vgg16", "transformer")
OPTAX = ("adam", "adamw", "sgd", "muon")
OURS = (
    "adam_s",
    "adam_srt",
    "adam_g",
    "sgd_mrt",
    "adam_h",
    "muon_h",
    "adamp",
    "sgdp",
    "rotational",
)
OPTIMIZERS = OPTAX + OURS
# PyTorch's, each with that of ours that does the same work.
COUNTERPARTS = {"torch_adam": "adam", "torch_adam_fused": "adam", "torch_adam_srt": "adam_srt"}


class Setting(NamedTuple):
    """What is measured; of two lines for one setting the last counts."""

    model: str
    optimizer: str
    rounds: int  # asked for
    device: str
    versions: dict[str, str | None]
    steps_per_call: int  # of a compiled program; 1 of PyTorch's


class Figures(NamedTuple):
    """What was found. Of PyTorch's optimizers XLA knows nothing, and None stands for that."""

    timings: int
    steps_per_timing: int
    seconds: Spread  # of a step
    ratio_to_adam: Spread  # of times in the same round
    ratio_of_ours: Spread | None  # the time of our counterpart to that of PyTorch's optimizer
    parameter_bytes: int
    state_bytes: int
    state_ratio: float  # to that of adam
    bytes_accessed: float | None  # by XLA's cost analysis
    bytes_ratio: float | None  # to that of adam
    temporary_bytes: int | None
    compile_seconds: float | None
    copy_bandwidth: float  # bytes per second
    bandwidth_share: float | None  # bytes accessed per second, of that


class Measurement(NamedTuple):
    """A line of runs.jsonl, whose keys are the fields of all three."""

    setting: Setting
    git_revision: str | None
    figures: Figures


SPREADS = ("seconds", "ratio_to_adam", "ratio_of_ours")


def to_line(measurement: Measurement) -> bytes:
    """The measurement as a line of JSON."""
    setting, revision, figures = measurement
    entry: dict[str, Any] = {**setting._asdict(), "git_revision": revision, **figures._asdict()}
    for name in SPREADS:
        entry[name] = entry[name] and entry[name]._asdict()
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def load(path: Path) -> tuple[list[Measurement], list[int]]:
    """The measurements of runs.jsonl, and the numbers (from 1) of the lines that hold none."""
    return run_lines.read(path, _parse)


def _parse(entry: dict[str, Any]) -> Measurement:
    for name in SPREADS:
        entry[name] = entry[name] and Spread(**entry[name])
    entry.setdefault("steps_per_call", 1)  # the first lines have none
    setting = run_lines.checked(Setting(*(entry[name] for name in Setting._fields)))
    if setting.model not in MODELS or setting.optimizer not in (*OPTIMIZERS, *COUNTERPARTS):
        raise ValueError("no setting of the table")
    figures = Figures(*(entry[name] for name in Figures._fields))
    run_lines.checked(figures)
    return run_lines.checked(Measurement(setting, entry["git_revision"], figures))
