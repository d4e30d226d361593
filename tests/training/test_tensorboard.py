"""TensorBoard's files of a run, and the package that writes them."""

import json
import signal
import struct
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from test_runs import signal_at, tiny, train  # noqa: F401  `tiny` is a fixture


def read_events(path: Path) -> list[tuple[str, int, float]]:
    """Tag, step and value of an event file's scalars."""
    content, found = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + size])  # between two checksums
        found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
        content = content[16 + size :]
    return found


def test_tensorboard_has_every_epoch_once_after_resuming(tmp_path, monkeypatch):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, "epoch 2/4", signal.SIGTERM)
        assert train(output, "--tensorboard") == 143
    assert train(output, "--tensorboard", "--resume") == 0
    (path,) = (output / "tensorboard").iterdir()
    tags = {
        "learning_rate": "learning_rate",
        "train_loss": "train/loss",
        "train_accuracy": "train/accuracy",
        "valid_loss": "valid/loss",
        "valid_accuracy": "valid/accuracy",
        "images_per_second": "images_per_second",
    }
    expected = [
        (tags.get(name, name), line["epoch"], pytest.approx(value, rel=1e-6))  # float32
        for file in ("metrics.jsonl", "geometry.jsonl")
        for line in map(json.loads, (output / file).read_text().splitlines())
        for name, value in line.items()
        if name != "epoch"
    ]
    assert len(expected) == 4 * (len(tags) + 6 * 3)
    assert sorted(read_events(path)) == sorted(expected, key=lambda e: e[:2])


def test_tensorboard_without_its_package_is_refused_before_any_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert train(tmp_path / "run", "--tensorboard") == 2
    assert "tensorboardX" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert train(tmp_path / "run") == 0  # nor is it needed
