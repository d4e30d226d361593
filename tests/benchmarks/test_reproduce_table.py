"""The table command: its cells, their failures, the lines of runs.jsonl, and refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import reproduce_table
import table_command
import table_lines
from table import paper_figures, table_runs
from table_command import TWO, assert_same, calls, checkpoints, lines_of, main
from table_lines import line, names, report, write_lines

BENCHMARKS = Path(reproduce_table.__file__).parent
# Fixtures.
trainer, whole, no_picture = table_command.trainer, table_command.whole, table_lines.no_picture


def test_runs_what_is_missing(trainer, no_picture, tmp_path, capfd):
    output = tmp_path / "new" / "table"
    arguments = ["--settings", "svhn/vgg16,cifar10/resnet20", "--optimizers", "sgd,adam"]
    assert main(output, *arguments, "--seeds", "2", "--data_dir", "data") == 0
    first = output / "cells" / "svhn" / "vgg16" / "sgd" / "seeds-0-1"
    assert calls(trainer)[0] == (
        "--dataset=svhn --model=vgg16 --optimizer=sgd --epochs=3 --batch_size=128 "
        f"--precision=float32 --seed=0 --seeds=2 --output={first} --data_dir=data --resume"
    )
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        "cell 1/4: svhn/vgg16 with sgd, seeds 0 to 1",
        "cell 2/4: svhn/vgg16 with adam, seeds 0 to 1",
        "cell 3/4: cifar10/resnet20 with sgd, seeds 0 to 1",
        "cell 4/4: cifar10/resnet20 with adam, seeds 0 to 1",
        f"8 of 8 runs are there; the table is in {output}/table.md and table.png",
    ]
    assert err == ""
    assert not checkpoints(output)
    lines = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert [
        (line["setting"], line["arguments"]["optimizer"], line["arguments"]["seed"])
        for line in lines
    ] == [
        (s, o, n)
        for s in ("svhn/vgg16", "cifar10/resnet20")
        for o in ("sgd", "adam")
        for n in (0, 1)
    ]
    summary = json.loads((first / "seed-1" / "summary.json").read_text())
    curve = [{"epoch": epoch, "valid_accuracy": 0.5} for epoch in (1, 2, 3)]
    assert lines[1] == {"setting": "svhn/vgg16", **summary, "curve": curve}

    before = (output / "table.md").read_text()
    assert main(output, *arguments, "--seeds", "2") == 0  # nothing is missing
    assert len(calls(trainer)) == 4 and (output / "table.md").read_text() == before

    # Without svhn's adam with seed 0 and cifar10's with seed 1, and what could give them back:
    kept = lines[:2] + lines[3:7]
    (output / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    shutil.rmtree(output / "cells")
    capfd.readouterr()
    assert main(output, *arguments, "--seeds", "4") == 0
    assert capfd.readouterr().out.splitlines()[:-1] == [
        "cell 1/5: svhn/vgg16 with sgd, seeds 2 to 3",
        "cell 2/5: svhn/vgg16 with adam, seed 0",
        "cell 3/5: svhn/vgg16 with adam, seeds 2 to 3",
        "cell 4/5: cifar10/resnet20 with sgd, seeds 2 to 3",
        "cell 5/5: cifar10/resnet20 with adam, seeds 1 to 3",
    ]
    assert len(lines_of(output)) == 16 == len(set(lines_of(output)))


def test_defaults_are_the_papers(trainer, no_picture, tmp_path):
    output = tmp_path / "table"
    assert (
        reproduce_table.main(["--seeds", "1", "--optimizers", "adamg", "--output", str(output)])
        == 0
    )
    protocol = table_runs.Protocol(405, 128, "float32", None)
    runs, _ = table_runs.load(output / "runs.jsonl")
    assert {key[0] for key in runs} == set(paper_figures.PAPER)
    assert {run.protocol for run in runs.values()} == {protocol}
    assert "not to be read as errors" not in (output / "table.md").read_text()


@pytest.mark.parametrize(
    ("fail", "ending", "recorded"),
    [
        ("adam:1:1", "exit code 1", 1),
        ("adam:0:2", "exit code 2", 0),
        ("adam:1:-9", "killed by signal 9 (Killed)", 0),
        ("adam:1:0", "exit code 0 without the results of all seeds", 1),
    ],
)
def test_a_cell_that_fails_does_not_stop_the_others(
    fail, ending, recorded, whole, trainer, tmp_path, monkeypatch, capfd
):
    output = tmp_path / "table"
    monkeypatch.setenv("FAIL", fail)
    assert main(output, *TWO) == 1
    out, err = capfd.readouterr()
    assert err.splitlines() == [
        f"reproduce_table.py: failed: {setting} with adam, seeds 0 to 1: {ending}"
        for setting in ("cifar10/resnet20", "svhn/vgg16")
    ]
    count = 4 + 2 * recorded
    assert f"{count} of 8 runs are there; the table is in" in out
    assert len(lines_of(output)) == count
    # What may be resumed keeps its checkpoints.
    assert bool(checkpoints(output)) == (not recorded)
    monkeypatch.delenv("FAIL")
    assert main(output, *TWO) == 0
    assert_same(output, whole)


def test_lines_that_are_no_runs(whole, trainer, no_picture, tmp_path, capfd):
    whole = shutil.copytree(whole, tmp_path / "table")
    good = (whole / "runs.jsonl").read_text()
    first, *rest = good.splitlines()
    capfd.readouterr()
    for torn in (
        first[:-20],
        "[]",
        "3",
        json.dumps({**json.loads(first), "setting": "cifar10/alexnet"}),
        json.dumps({**json.loads(first), "test_accuracy": float("nan")}),
        json.dumps({name: value for name, value in json.loads(first).items() if name != "device"}),
    ):
        trainer.with_name("calls.txt").unlink(missing_ok=True)
        (whole / "runs.jsonl").write_text("\n".join([*rest, torn]))
        assert main(whole, *TWO) == 0
        lines = (whole / "runs.jsonl").read_text().split("\n")
        assert lines[:8] == [*rest, torn] and lines[9:] == [""]
        assert json.loads(lines[8]) == json.loads(first)
        warning = f"warning: line 8 of {whole}/runs.jsonl is no whole run and is ignored\n"
        assert warning in capfd.readouterr().err
        # The run is in the cell's directory still: nothing is trained again.
        assert calls(trainer) == []

    (whole / "runs.jsonl").write_text("\n".join([*rest, first]))  # only the newline is missing
    assert main(whole, *TWO) == 0
    assert report(whole) == 0
    assert capfd.readouterr().err == ""


PROTOCOLS = {
    "--epochs 4": "--epochs 3, not 4",
    "--batch_size 64": "--batch_size 128, not 64",
    "--precision bfloat16": "--precision float32, not bfloat16",
    "--dataset digits": "--dataset (none), not digits",
}


@pytest.mark.parametrize("arguments", PROTOCOLS)
def test_an_output_has_one_protocol(arguments, trainer, no_picture, tmp_path, capfd):
    output = write_lines(tmp_path / "table", line("cifar10/resnet20", "sgd", 0, 90, epochs=3))
    command = ["--epochs", "3", "--seeds", "1", "--output", str(output)]
    assert reproduce_table.main([*command, *arguments.split()]) == 2
    assert capfd.readouterr().err == (
        f"reproduce_table.py: error: {output}/runs.jsonl holds a run of another protocol: "
        f"{PROTOCOLS[arguments]}\n"
    )
    assert calls(trainer) == [] and names(output) == {"runs.jsonl"}


def test_a_stand_in_serves_cifar10_only(trainer, no_picture, tmp_path, capsys):
    output = tmp_path / "table"
    arguments = ["--dataset", "folder:a b", "--optimizers", "sgd", "--seeds", "1"]
    assert main(output, *arguments) == 0
    runs, _ = table_runs.load(output / "runs.jsonl")
    assert {key[0] for key in runs} == {f"cifar10/{m}" for m in ("resnet20", "resnet18", "vgg16")}
    assert {run.protocol.stand_in for run in runs.values()} == {"folder:a b"}
    assert "## cifar10/vgg16 on folder:a b\n" in (output / "table.md").read_text()
    assert "--dataset=folder:a b --model=resnet20 " in calls(trainer)[0]


def test_help_and_refusals_start_neither_jax_nor_matplotlib():
    program = (
        "import sys, reproduce_table\n"
        "for arguments in (['--help'], ['--epochs', '0']):\n"
        "    try: reproduce_table.main(arguments)\n"
        "    except SystemExit: pass\n"
        "sys.exit(bool({'jax', 'matplotlib', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "(default: 5)" in done.stdout
