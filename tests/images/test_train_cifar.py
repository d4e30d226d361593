"""The command: what it prints, writes and refuses, and how it ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import tiny
import train_cifar
from images import data, figures, programs, recipes
from tiny import compile_once, use_tiny, write_images
from training import environment

SCRIPT = Path(train_cifar.__file__)
COMMAND = Path(tiny.__file__).with_name("tiny_command.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def tiny(compiled_quickly):
    """Trains the tiny network instead of ResNet-20, on one device."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch)
        compile_once(patch)
        yield


@pytest.fixture(scope="module")
def finished(folder, tiny, tmp_path_factory) -> Path:
    """The output of a whole run."""
    output = tmp_path_factory.mktemp("runs") / "new" / "run"
    assert train_cifar.main([*run_arguments(folder), "--output", str(output)]) == 0
    return output


def run_arguments(folder: Path) -> list[str]:
    return f"--dataloader folder:{folder} --epochs 3 --batch_size 10 --seed 5".split()


def read_metrics(output: Path) -> list[dict]:
    text = (output / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_command_prints_and_repeats_itself(folder, tiny, finished, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    assert train_cifar.main(run_arguments(folder)) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == (
        f"folder:{folder} with resnet20 has no recipe of its own: taking cifar10's with resnet20."
    )
    assert lines[1].startswith(f"resnet20 on folder:{folder} with adamsrt: learning rate 0.001, ")
    for line, metrics in zip(lines[2:5], read_metrics(finished), strict=True):
        assert line.startswith(
            f"epoch {metrics['epoch']}/3: "
            f"train {metrics['train_accuracy']:.2%} (loss {metrics['train_loss']:.4f}), "
            f"validation {metrics['valid_accuracy']:.2%} (loss {metrics['valid_loss']:.4f}), "
        )
    assert lines[5].startswith(f"Test accuracy {summary['test_accuracy']:.2%} ")
    assert len(lines) == 6
    assert err == ""  # no progress bar where there is no terminal


def test_command_writes_its_files(folder, finished):
    output = finished
    assert {path.name for path in output.iterdir()} == {
        ".lock",
        "arguments.json",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
        "checkpoints",
    }
    metrics = read_metrics(output)
    assert [m["epoch"] for m in metrics] == [1, 2, 3]
    for line in metrics:
        assert list(line) == [
            "epoch",
            "learning_rate",
            "train_loss",
            "train_accuracy",
            "valid_loss",
            "valid_accuracy",
            "images_per_second",
        ]
        assert 0 <= line["train_accuracy"] <= 1 and line["images_per_second"] > 0
    assert [m["learning_rate"] for m in metrics] == [1e-3, 1e-4, 1e-5]

    summary = json.loads((output / "summary.json").read_text())
    arguments = {
        "dataset": f"folder:{folder}",
        "model": "resnet20",
        "optimizer": "adamsrt",
        "epochs": 3,
        "batch_size": 10,
        "learning_rate": 1e-3,
        "weight_decay": 7.8125e-6,
        "precision": "float32",
        "geometry": False,
        "seed": 5,
    }
    assert summary["arguments"] == arguments
    written = json.loads((output / "arguments.json").read_text())
    assert written == arguments | {"seeds": 1, "seeds_at_once": 1}
    best = max(metrics, key=lambda m: (m["valid_accuracy"], -m["valid_loss"]))
    assert summary["best_epoch"] == best["epoch"]
    assert 0 <= summary["test_accuracy"] <= 1 and summary["test_loss"] > 0
    assert summary["compile_seconds"] > 0
    # Of the epochs after the first, which have as many images each.
    rates = [line["images_per_second"] for line in metrics[1:]]
    assert summary["images_per_second"] == pytest.approx(2 / (1 / rates[0] + 1 / rates[1]))
    assert summary["seconds"] > sum(46 / line["images_per_second"] for line in metrics)
    assert summary["seeds_at_once"] == 1
    assert summary["versions"].keys() == {"python", *environment.PACKAGES}
    assert summary["versions"]["jax"] == jax.__version__
    assert summary["device"].startswith(jax.default_backend())
    revision = summary["git_revision"]
    assert revision is None or len(revision.removesuffix("-dirty")) == 40
    with Image.open(output / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) >= 600


def test_a_loss_that_is_not_finite_stops_the_command(folder, tiny, tmp_path, capsys):
    arguments = f"--dataset folder:{folder} --optimizer sgd --batch_size 10 --learning_rate 1e30"
    assert train_cifar.main([*arguments.split(), "--output", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("stopped: the training loss is ")
    assert "lower --learning_rate (1e+30)" in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "summary.json").exists()
    assert "training loss" in json.loads((tmp_path / "run/failed.json").read_text())["reason"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_training_stops_at_once(signum, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "load", lambda *_, **__: signal.raise_signal(signum))
    how = {130: "interrupted", 143: "terminated"}[code]
    assert train_cifar.main([]) == code
    assert capsys.readouterr().err == f"train_cifar.py: {how}; nothing is kept without --output\n"
    assert train_cifar.main(["--output", str(tmp_path / "run")]) == code
    assert capsys.readouterr().err == f"train_cifar.py: {how}; nothing was begun\n"


def test_an_interrupt_in_a_callback_of_compiled_code_is_not_lost(folder, tiny, monkeypatch, capfd):
    """An exception may be swallowed there."""
    swallowed, make_step = [], programs.make_step

    def swallow():
        if not swallowed:
            with contextlib.suppress(BaseException):
                swallowed.append(True)
                signal.raise_signal(signal.SIGINT)

    def make_calling_step(*args):
        step = make_step(*args)

        def calling_step(*args, **kwargs):
            jax.debug.callback(swallow)
            return step(*args, **kwargs)

        return calling_step

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(programs, "make_step", make_calling_step)
    # Another size of batch, as the programs of this one are compiled.
    assert train_cifar.main([*run_arguments(folder), "--batch_size", "20"]) == 130
    err = capfd.readouterr().err
    assert swallowed and err == (
        "\nstopping at the next step; Ctrl-C again stops at once\n"
        "train_cifar.py: interrupted; nothing is kept without --output\n"
    )
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupted_after_some_epochs(tmp_path):
    """The command in a process of its own, ended by Ctrl-C."""
    output = tmp_path / "run"
    arguments = f"--epochs 100000 --batch_size 11 --output {output}"
    process = subprocess.Popen(
        [sys.executable, str(COMMAND), *arguments.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # compiled in half the time
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    epochs = [m["epoch"] for m in read_metrics(output)]
    assert len(epochs) >= 2 and epochs == list(range(1, len(epochs) + 1))
    assert err == (
        "\nstopping at the next step; Ctrl-C again stops at once\n"
        f"train_cifar.py: interrupted; --resume goes on with what is in {output}\n"
    )
    names = {".lock", "arguments.json", "metrics.jsonl", "curves.png", "checkpoints"}
    assert {path.name for path in output.iterdir()} == names


def test_help_and_refusals_do_not_start_jax():
    program = (
        "import sys, train_cifar\n"
        "for arguments in (['--help'], ['--epochs', '0']):\n"
        "    try: train_cifar.main(arguments)\n"
        "    except SystemExit: pass\n"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPT.parent, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "examples:" in done.stdout and "(default: 405)" in done.stdout
    assert "Train a ResNet or VGG" in done.stdout


@pytest.mark.parametrize("epochs", [1, 40])
def test_curves(epochs, tmp_path):
    history = [
        figures.Metrics(e, 0.1, 2 / e, 1 - 1 / e, 3 / e, 1 - 1 / e, 100.0)
        for e in range(1, epochs + 1)
    ]
    milestones = recipes.milestones(epochs, 1)
    figures.draw_curves(
        tmp_path / "curves.png",
        history,
        figures.Result(0.5, 1.0, 1) if epochs > 1 else None,
        title="title",
        schedule=recipes.step_schedule(0.1, milestones),
        milestones=milestones,
        steps_per_epoch=1,
    )
    with Image.open(tmp_path / "curves.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10  # something is drawn
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
