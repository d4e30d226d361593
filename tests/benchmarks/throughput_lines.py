"""The throughput command in short, and made-up lines of its runs.jsonl."""

import json
from pathlib import Path
from typing import Any

import training_throughput
from throughput import throughput_programs


def main(output: Path, *arguments: str) -> int:
    common = ["--batch_sizes", "8", "--rounds", "3", "--output", str(output)]
    return training_throughput.main([*common, *arguments])


def step_line(**changes: Any) -> dict[str, Any]:
    spread = {"q1": 90.0, "median": 100.0, "q3": 130.0}
    return {
        "kind": "steps",
        "program": "adam",
        **throughput_programs.Cell("resnet20", "float32", 128, 1)._asdict(),
        "device": "gpu (X)",
        "versions": {"jax": "0.11"},
        "git_revision": "abc",
        "rounds": 3,
        "steps_per_call": 20,
        "images_per_second": spread,
        "step_seconds": {name: value / 1e5 for name, value in spread.items()},
        "ratio_to_adam": {name: value / 1e2 for name, value in spread.items()},
        "flops_per_image": 7,
        "matrix_peak": 1e12,
        "peak_share": 0.456,
        "compile_seconds": 12.34,
        "peak_bytes": 1.5e9,
        **changes,
    }


def write(output: Path, *lines: dict[str, Any] | str) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (output / "runs.jsonl").write_text("\n".join(text) + "\n")
    return output
