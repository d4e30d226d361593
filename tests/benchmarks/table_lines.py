"""Made-up lines of the table's runs.jsonl, and the report made from them."""

import json
from pathlib import Path

import pytest

import reproduce_table
from table import table_report


@pytest.fixture
def no_picture(monkeypatch) -> None:
    draw_nothing(monkeypatch)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Takes the place of the slow picture."""
    patch.setattr(table_report, "draw", lambda path, runs: path.write_bytes(b"picture"))


def line(
    setting: str, optimizer: str, seed: int, percent: float, *, dataset: str = "", **other
) -> dict:
    own, model = setting.split("/")
    arguments = {
        "dataset": dataset or own,
        "model": model,
        "optimizer": optimizer,
        "epochs": other.pop("epochs", 405),
        "batch_size": other.pop("batch_size", 128),
        "precision": other.pop("precision", "float32"),
        "seed": seed,
    }
    return {
        "setting": setting,
        "test_accuracy": percent / 100,
        "images_per_second": 1000.0 + seed,
        "compile_seconds": 10.0 + seed,
        "seconds": 100.0 + seed,
        "seeds_at_once": 2,
        "arguments": arguments,
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "device": "cpu (2 cores)",
        "git_revision": "abc",
        "curve": [],
    } | other


def write_lines(output: Path, *lines: dict) -> Path:
    output.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (output / "runs.jsonl").write_text(text)
    return output


def report(output: Path) -> int:
    return reproduce_table.main(["--report", "--output", str(output)])


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}
