"""The script for a GPU, with a Python in its place that only notes what it is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "on_a_gpu.sh"
STAGES = ("tests", "optimizer_step", "throughput_of_resnet18", "throughput_of_resnet20", "table")


@pytest.fixture
def run(tmp_path):
    """Runs the script; its Python has JAX with `backend`, and fails at arguments with `fails`."""

    def run(*arguments, backend="gpu", fails="no such", python=tmp_path / "python"):
        (tmp_path / "python").write_text(
            f"""#!/bin/sh
case "$*" in
  *default_backend*) echo "a warning" >&2; echo {backend} ;;
  *torch.cuda*) exit 1 ;;
  *'{fails}'*) echo "$*" >>"{tmp_path}/asked"; exit 3 ;;
  *) echo "$*" >>"{tmp_path}/asked" ;;
esac
"""
        )
        (tmp_path / "python").chmod(0o755)
        return subprocess.run(
            ["bash", SCRIPT, *map(str, arguments)],
            env=os.environ | {"PYTHON": str(python)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize(
    "arguments, settings, message",
    [
        ([], {}, "a folder for the results is needed, and at most images beside it; see --help"),
        (["out", "images", "more"], {}, "a folder for the results is needed, and at most"),
        (["--tinny", "out"], {}, "unknown option --tinny; see --help"),
        (["out", "nowhere"], {}, "there is no nowhere"),
        (["out"], {"backend": "cpu"}, "sees no GPU but a cpu; with --tiny the script is tried"),
        (["out"], {"python": "/nowhere/python"}, "JAX does not work with /nowhere/python: "),
    ],
)
def test_what_cannot_be_is_refused(arguments, settings, message, run, tmp_path):
    result = run(*arguments, **settings)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "asked").exists() and not (tmp_path / "out").exists()


def test_a_stage_that_fails_does_not_stop_the_next(run, tmp_path):
    (tmp_path / "images").mkdir()
    result = run("out", "images", fails="optimizer_step.py")
    assert result.returncode == 1
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[0] for line in asked] == [
        "-m",
        "benchmarks/optimizer_step.py",
        "benchmarks/training_throughput.py",
        "benchmarks/training_throughput.py",
        "benchmarks/reproduce_table.py",
        "benchmarks/compiled_for_gpu.py",
    ]
    assert f"--dataset folder:{tmp_path / 'images'}" in asked[4] and "--epochs 20" in asked[4]
    _, *ended = (tmp_path / "out" / "stages.txt").read_text().splitlines()  # behind the date
    assert [line.split(":")[0] for line in ended] == [*STAGES, "predictions"]
    assert [line.split("exit code ")[1][0] for line in ended] == ["0", "3", "0", "0", "0", "0"]


def test_without_images_the_table_is_left_out(run, tmp_path):
    result = run("--tiny", "out", backend="cpu")
    assert result.returncode == 0, result.stderr
    assert "table: left out, as no images were given" in result.stdout
    assert "reproduce_table" not in (tmp_path / "asked").read_text()


@pytest.mark.long
def test_its_commands_are_ones_that_there_are(tmp_path):
    """At their tiny sizes, on this device."""
    result = subprocess.run(
        ["bash", SCRIPT, "--tiny", tmp_path / "out"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "out" / "optimizer_step" / "predicted.md").exists()
