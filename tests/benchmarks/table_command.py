"""Runs the table command with the fake trainer, and looks at what it leaves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import reproduce_table
from table_lines import draw_nothing

HERE = Path(__file__).parent
TWO = ["--settings", "cifar10/resnet20,svhn/vgg16", "--optimizers", "adam,sgd", "--seeds", "2"]


@pytest.fixture
def trainer(tmp_path, monkeypatch) -> Path:
    """The fake trainer, in place of the real one."""
    return use_fake_trainer(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The output of TWO without interruption."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        use_fake_trainer(directory, patch)
        draw_nothing(patch)
        assert main(directory / "table", *TWO) == 0
    return directory / "table"


def use_fake_trainer(directory: Path, patch: pytest.MonkeyPatch) -> Path:
    path = directory / "fake" / "trainer.py"
    path.parent.mkdir()
    shutil.copy(HERE / "fake_trainer.py", path)
    patch.setattr(reproduce_table, "TRAINER", path)
    return path


def calls(trainer: Path) -> list[str]:
    path = trainer.with_name("calls.txt")
    return path.read_text().splitlines() if path.exists() else []


def main(output: Path, *arguments: str) -> int:
    return reproduce_table.main([*arguments, "--epochs", "3", "--output", str(output)])


def start(trainer: Path, output: Path, *arguments: str, patience: float = 30, **environment: str):
    """Starts the command in a process group of its own, as a terminal does."""
    command = [sys.executable, str(HERE / "killed_table.py"), *arguments]
    own = {"TRAINER": str(trainer), "PATIENCE": str(patience), "KILL": ""}
    return subprocess.Popen(
        [*command, "--epochs", "3", "--output", str(output)],
        env=os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def lines_of(output: Path) -> list[str]:
    """The whole lines, sorted."""
    lines = (output / "runs.jsonl").read_bytes().split(b"\n")
    return sorted(line.decode() for line in lines if line.endswith(b"}"))


def checkpoints(output: Path) -> list[Path]:
    return list(output.rglob("checkpoints"))


def assert_same(output: Path, whole: Path) -> None:
    assert lines_of(output) == lines_of(whole)
    assert (output / "table.md").read_text() == (whole / "table.md").read_text()
    assert not checkpoints(output)
