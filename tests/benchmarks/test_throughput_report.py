"""The throughput's report: table.md and table.png, made from runs.jsonl alone."""

import json
from typing import Any

import numpy as np
from PIL import Image

import training_throughput
from throughput import throughput_report
from throughput_lines import main, step_line, write


def test_report_of_made_up_lines(tmp_path, capsys):
    torch = {"torch": {"version": "9.9", "threads": 2}}
    output = write(
        tmp_path,
        step_line(program="torch_eager", peak_bytes=None, ratio_to_adam=None, **torch),
        step_line(compile_seconds=1),
        step_line(),  # the later one counts
        json.dumps(step_line(model="resnet18"))[:-9],
        step_line(program="adamax"),
        {name: x for name, x in step_line(seeds=4).items() if name != "peak_share"},
        step_line(model="vgg16", batch_size=1024, error="no room"),
        step_line(device="cpu (Y)", seeds=4),
        step_line(versions={"jax": "0.12"}),  # a section of its own
    )
    assert main(output, "--report") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("5 there; ")
    for number in (4, 5, 6):
        assert f"line {number} of {output}/runs.jsonl is no whole measurement" in captured.err
    cpu, gpu, newer = (output / "table.md").read_text().split("## ")[1:]
    assert newer.startswith("gpu (X)\n\n* versions: jax 0.12\n")
    assert cpu.startswith("cpu (Y)\n") and gpu.startswith("gpu (X)\n")
    assert [line for line in gpu.splitlines() if line.startswith("| resnet")] == [
        "| resnet20 | float32 | 128 | 1 | adam | 100 (90–130) | 1 (0.9–1.3) | 1.000 (0.900–1.300) "
        "| 3 | 45.6 % | 12.3 | 1.50 |",
        "| resnet20 | float32 | 128 | 1 | torch_eager | 100 (90–130) | 1 (0.9–1.3) | – | 3 "
        "| 45.6 % | 12.3 | – |",
    ]
    assert "* PyTorch: version 9.9, threads 2\n" in gpu and "PyTorch: version" not in cpu
    assert "* steps, vgg16, float32, 1024, 1, adam: no room\n" in gpu
    assert "* git revision: abc\n" in gpu and "* versions: jax 0.11\n" in cpu


def test_report_of_epochs(tmp_path):
    names = ("kind", "program", "model", "precision", "batch_size", "device", "versions")
    common = {name: step_line()[name] for name in (*names, "git_revision", "compile_seconds")}
    common |= {"kind": "epoch", "projected_minutes": 13.5}

    def line(seconds: float, **changes: Any) -> dict[str, Any]:
        spread = dict.fromkeys(("q1", "median", "q3"), seconds)
        return {**common, "epoch_seconds": spread, **changes}

    lines = [line(3, seeds=4), line(2, seeds=1), line(1, seeds=1, program="adamsrt")]
    assert main(write(tmp_path, *lines, line(5, seeds=4, precision="bfloat16")), "--report") == 0
    text = (tmp_path / "table.md").read_text()
    for row in (
        "float32 | 128 | 1 | adam | 2 (2–2) | 1.00 | 13.5 | 12.3 |",
        "float32 | 128 | 4 | adam | 3 (3–3) | 1.50 | 13.5 | 12.3 |",
        "bfloat16 | 128 | 4 | adam | 5 (5–5) | – | 13.5 | 12.3 |",
    ):
        assert f"| resnet20 | {row}\n" in text


def test_pictures_of_all_and_of_nothing(tmp_path):
    axes = [axis for axis, _ in training_throughput.AXES.values()]
    every = [
        step_line(model=m, precision=p, batch_size=b, seeds=s, program=name)
        for m in axes[0]
        for p in axes[1]
        for b in axes[2]
        for s in axes[3]
        for name in ("adam", "adamsrt", *throughput_report.TORCH)
    ]
    assert main(write(tmp_path, *every), "--report") == 0
    with Image.open(tmp_path / "table.png") as picture:
        assert min(picture.size) > 1000
    assert main(write(tmp_path, step_line(error="no room")), "--report") == 0
    with Image.open(tmp_path / "table.png") as picture:
        assert np.asarray(picture.convert("L")).min() < 128  # it says so
