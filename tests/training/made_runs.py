"""Directories of runs as train_cifar.py leaves them, without training."""

import json
from pathlib import Path

import numpy as np


def make_run(directory: Path, *, epochs=4, done=None, test_accuracy=None, **changed) -> Path:
    """A run as train_cifar.py leaves it, finished if it has a test accuracy."""
    arguments = {
        "dataset": "digits",
        "model": "resnet20",
        "optimizer": "adamsrt",
        "epochs": epochs,
        "batch_size": 32,
        "learning_rate": 0.001,
        "weight_decay": 7.8125e-06,
        "precision": "float32",
        "seed": 0,
    } | changed
    rng = np.random.default_rng(arguments["seed"])
    lines = [
        {
            "epoch": epoch,
            "learning_rate": 0.001,
            "train_loss": 2 / epoch + rng.random() / 10,
            "train_accuracy": 0.5,
            "valid_loss": 1.0,
            "valid_accuracy": 0.9 - 0.5 / epoch + rng.random() / 10,
            "images_per_second": 100.0,
        }
        for epoch in range(1, (epochs if done is None else done) + 1)
    ]
    directory.mkdir(parents=True)
    (directory / "arguments.json").write_text(json.dumps(arguments))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    if test_accuracy is not None:
        summary = {"test_accuracy": test_accuracy, "arguments": arguments}
        (directory / "summary.json").write_text(json.dumps(summary, indent=2))
    return directory


LAYERS = ("conv1/kernel", "blocks/0/conv1/kernel", "blocks/0/conv2/kernel")
OF_GEOMETRY = ("angle", "turn_per_gradient", "radius", "radial_fraction", "deformation")


def add_geometry(run: Path, *, layers=LAYERS, momentum=True) -> Path:
    """Add the measures of --geometry to a run: random, with a mean between minimum and maximum."""
    arguments = run / "arguments.json"
    arguments.write_text(json.dumps(json.loads(arguments.read_text()) | {"geometry": True}))
    rng = np.random.default_rng(0)
    measures = (*OF_GEOMETRY, "momentum_radial_fraction") if momentum else OF_GEOMETRY
    lines = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        measured = {"epoch": json.loads(line)["epoch"]}
        for layer in layers:
            for measure in measures:
                low, mean, high = sorted(10 ** rng.uniform(-3, 0, 3))
                spread = {"mean": mean, "min": low, "max": high}
                measured |= {f"{layer}/{measure}/{key}": x for key, x in spread.items()}
        lines.append(json.dumps(measured) + "\n")
    (run / "geometry.jsonl").write_text("".join(lines))
    return run
