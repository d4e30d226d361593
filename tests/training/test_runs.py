"""A run's life: stopped, killed and resumed, several seeds, its directory and its files."""

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import train_cifar
from ends import assert_same_end, last_arrays
from ends import figures as end_figures
from images import data, models
from tiny import Tiny, compile_once, draw_nothing, make_data, use_tiny
from training import runs

COMMAND = Path(__file__).with_name("tiny_command.py")
SAYS = runs.say


@pytest.fixture(scope="module", autouse=True)
def tiny(compiled_quickly):
    """Trains the tiny network on tiny images, on one device, and draws nothing."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch, make_data())
        draw_nothing(patch)
        compile_once(patch)
        yield


def train(output: Path, *options: str) -> int:
    arguments = f"--epochs 4 --batch_size 5 --seed 3 --geometry --output {output}".split()
    return train_cifar.main([*arguments, *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The output of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train(output) == 0
    # So a run that goes on must know its best network of before.
    assert json.loads((output / "summary.json").read_text())["best_epoch"] == 1
    return output


def drop_last(output: Path, drop: Callable[[Path], None]) -> int:
    """Do away with the newest checkpoint; gives the epoch that follows the one before.

    While one is written no other is begun, so this is any earlier epoch.
    """
    before, newest = sorted((output / "checkpoints").iterdir(), key=lambda path: int(path.name))
    drop(newest)
    return int(before.name) // 5 + 1


def signal_at(monkeypatch, text: str, signum: int) -> None:
    """Send a signal to this process when a line with this text is printed."""

    def say(line, **kwargs):
        SAYS(line, **kwargs)
        if text in line:
            signal.raise_signal(signum)

    monkeypatch.setattr(runs, "say", say)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_resuming_goes_on(
    signum, code, whole, tmp_path, monkeypatch, capfd
):
    output = tmp_path / "run"
    before = signal.getsignal(signum)
    signal_at(monkeypatch, "epoch 2/4", signum)
    assert train(output) == code
    assert signal.getsignal(signum) is before
    how = {143: "terminated", 130: "interrupted"}[code]
    end = f"train_cifar.py: {how}; --resume goes on with what is in {output}\n"
    assert capfd.readouterr().err.endswith(end)
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2
    assert (output / "curves.png").exists() and not (output / "summary.json").exists()

    monkeypatch.setattr(runs, "say", SAYS)
    assert train(output, "--resume") == 0
    out = capfd.readouterr().out
    assert "going on in epoch 3.\n" in out and "epoch 2/4" not in out
    assert_same_end(output, whole)


def test_a_run_stopped_within_an_epoch_goes_on_there(whole, tmp_path, monkeypatch, capsys):
    output, asked = tmp_path / "run", []
    monkeypatch.setattr(
        runs, "make_stop", lambda signals: lambda: asked.append(0) or len(asked) > 8
    )
    assert train(output) == 143
    monkeypatch.undo()
    assert train(output, "--resume") == 0
    assert "going on in epoch 2 after 3 of its steps.\n" in capsys.readouterr().out
    assert_same_end(output, whole)


def test_a_second_sigterm_changes_nothing(tmp_path, monkeypatch):
    """A scheduler may send it to a whole group of processes, and one of these may hand it on."""

    def twice(line, **kwargs):
        if "epoch 1/" in line:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(runs, "say", twice)
    assert train(tmp_path / "run") == 143
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["5"]


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch, capfd):
    def twice(line, **kwargs):
        if "epoch 1/" in line:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runs, "say", twice)
    assert train(tmp_path / "run") == 130
    assert capfd.readouterr().err.startswith("\nstopping at the next step; ")
    # The epoch's checkpoint had not begun.
    assert not any(p.name.isdecimal() for p in (tmp_path / "run" / "checkpoints").iterdir())


def test_metrics_after_the_checkpoint_are_replaced(whole, tmp_path, capsys):
    """As after a SIGKILL between an epoch's line and its checkpoint, in the middle of a write."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "summary.json").unlink()
    epoch = drop_last(output, shutil.rmtree)
    for name in ("metrics.jsonl", "geometry.jsonl"):
        with (output / name).open("a") as file:
            file.write('{"epoch": 5, "lea')
    assert train(output, "--resume") == 0
    assert f"going on in epoch {epoch}." in capsys.readouterr().out
    assert_same_end(output, whole)


def test_a_truncated_checkpoint_is_skipped_for_the_one_before(whole, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "summary.json").unlink()

    def truncate(checkpoint: Path) -> None:
        largest = max(checkpoint.rglob("*"), key=lambda p: p.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)

    epoch = drop_last(output, truncate)
    assert train(output, "--resume") == 0
    out, err = capsys.readouterr()
    assert f"going on in epoch {epoch}." in out
    assert err.startswith("warning: skipping the checkpoint ") and err.count("\n") == 1
    assert_same_end(output, whole)


def test_resume_begins_where_there_is_nothing(whole, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(output, "--resume") == 0
    assert "going on" not in capsys.readouterr().out
    assert_same_end(output, whole)


def test_a_finished_run_is_left_alone(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert train(whole, "--resume") == 0
    assert capsys.readouterr().out == f"{whole} is finished.\n"
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--optimizer adam", "optimizer adamsrt and not adam, weight_decay 7.8125e-06 and not 0.0"),
        ("--epochs 5", "epochs 4 and not 5"),
        ("--seeds 2", "seeds 1 and not 2"),
        ("--precision bfloat16", "precision float32 and not bfloat16"),
        ("--learning_rate 0.01 --seed 4", "learning_rate 0.001 and not 0.01, seed 3 and not 4"),
    ],
)
def test_a_run_with_other_arguments_is_refused(options, named, whole, capsys):
    assert train(whole, "--resume", *options.split()) == 2
    assert f"{whole} holds a run with {named}" in capsys.readouterr().err


def test_a_run_of_another_network_is_refused(whole, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "summary.json").unlink()
    before = sorted((output / "checkpoints").rglob("*"))
    monkeypatch.setattr(data, "load", lambda *_, **__: make_data()._replace(classes=("a", "b")))
    assert train(output, "--resume") == 2
    err = capsys.readouterr().err
    assert "does not fit this run" in err and "linear" in err and err.count("\n") == 1
    assert sorted((output / "checkpoints").rglob("*")) == before


def test_checkpoints_of_another_run_are_refused(whole, tmp_path, capsys):
    """As if they had been copied: the arrays have the same shapes."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "summary.json").unlink()
    arguments = json.loads((output / "arguments.json").read_text()) | {"learning_rate": 0.01}
    (output / "arguments.json").write_text(json.dumps(arguments))
    assert train(output, "--resume", "--learning_rate", "0.01") == 2
    message = f"{output / 'checkpoints'} holds a run with learning_rate 0.001 and not 0.01"
    assert message in capsys.readouterr().err


def test_a_set_with_other_images_is_refused(whole, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "summary.json").unlink()
    images = make_data()
    fewer = images._replace(train=type(images.train)(*[x[:-1] for x in images.train]))
    monkeypatch.setattr(data, "load", lambda *_, **__: fewer)
    assert train(output, "--resume") == 2
    assert "images 23 and not 22" in capsys.readouterr().err


def test_seeds_that_were_trained_in_turn_are_not_resumed_at_once(tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, "seed 4: epoch 2/4", signal.SIGTERM)
        assert train(output, "--seeds", "2") == 143
    monkeypatch.setattr(runs, "seeds_at_once", lambda *_, **__: [[3, 4]])
    assert train(output, "--seeds", "2", "--resume") == 2
    assert "holds a run with seeds_at_once 1 and not 2" in capsys.readouterr().err


def test_a_directory_where_another_process_is_at_work_is_refused(tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    with (output / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train(output, "--resume") == 2
    assert f"another process is at work in {output}" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == [".lock"]


def test_the_newest_two_checkpoints_are_kept_with_the_best_network(whole):
    steps = sorted(int(path.name) for path in (whole / "checkpoints").iterdir())
    assert len(steps) == 2 and steps[0] in (5, 10, 15) and steps[1] == 20
    arrays = last_arrays(whole)
    assert any("best" in name and "conv" in name for name in arrays)
    assert any("state" in name and "mu" in name and "conv" in name for name in arrays)


def test_only_language_models_on_a_gpu_are_trained_at_once(monkeypatch):
    alone = [[3], [4]]
    for convolutions in (False, True):
        assert runs.seeds_at_once(3, 2, convolutions=convolutions) == alone
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert runs.seeds_at_once(3, 2, convolutions=True) == alone
    assert runs.seeds_at_once(3, 2, convolutions=False) == [[3, 4]]


@pytest.mark.parametrize("together", [False, True])
def test_several_seeds(together, whole, tmp_path, monkeypatch, capsys):
    """One after another, or at once, as language models on a GPU; stopped and resumed."""
    output = tmp_path / "run"
    if together:
        monkeypatch.setattr(runs, "seeds_at_once", lambda *_, **__: [[1, 2, 3]])
    options = "--seed 1 --seeds 3 --tensorboard".split()
    with monkeypatch.context() as patch:
        line = "epoch 2/4" if together else "seed 2: epoch 2/4"
        signal_at(patch, line, signal.SIGTERM)
        assert train(output, *options) == 143
    assert train(output, "--resume", *options) == 0
    out = capsys.readouterr().out
    assert ("One seed after another" in out) != together
    assert ("seed 1: finished before.\n" in out) != together
    assert ("(means of 3 seeds)\n" in out) == together
    assert (output / "checkpoints").exists() == together
    summaries = []
    for seed in (1, 2, 3):
        directory = output / f"seed-{seed}"
        names = {"arguments.json", "metrics.jsonl", "geometry.jsonl", "summary.json", "curves.png"}
        names.add("tensorboard")
        if not together:
            names.add("checkpoints")
        assert {path.name for path in directory.iterdir()} == names
        summaries.append(json.loads((directory / "summary.json").read_text()))
        assert summaries[-1]["arguments"] == json.loads((directory / "arguments.json").read_text())
        assert summaries[-1]["arguments"]["seed"] == seed
        assert summaries[-1]["seeds_at_once"] == (3 if together else 1)
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]
        assert f"seed {seed}: Test accuracy {summaries[-1]['test_accuracy']:.2%}" in out
    # Compiled for the first of them, and again after the stop.
    compiled = [summary["compile_seconds"] > 0 for summary in summaries]
    assert compiled == ([True] * 3 if together else [True, True, False])
    accuracies = [summary["test_accuracy"] for summary in summaries]
    deviation = 100 * np.std(accuracies, ddof=1)
    assert out.splitlines()[-1] == (
        f"Test accuracy {np.mean(accuracies):.2%} ± {deviation:.2f} "
        "(standard deviation) of 3 seeds."
    )
    if not together:
        assert end_figures(output / "seed-3")[1] == end_figures(whole)[1]


@pytest.mark.parametrize("together", [False, True])
def test_a_seed_that_fails_leaves_the_others(together, tmp_path, monkeypatch, capsys):
    made = []

    def fragile(*args, **kwargs) -> Tiny:
        made.append(Tiny(*args, **kwargs))
        if len(made) == 2:
            made[-1].linear.bias[...] = made[-1].linear.bias[...] + np.nan
        return made[-1]

    monkeypatch.setitem(models.MODELS, "resnet20", fragile)
    if together:
        monkeypatch.setattr(runs, "seeds_at_once", lambda *_, **__: [[1, 2, 3]])
    output = tmp_path / "run"
    assert train(output, "--seed", "1", "--seeds", "3") == 1
    out, err = capsys.readouterr()
    message = "the training loss is nan at step 1 of epoch 1: lower --learning_rate (0.001)"
    assert err == f"seed 2: stopped: {message}\n"
    finished = [(output / f"seed-{seed}/summary.json").exists() for seed in (1, 2, 3)]
    assert finished == [True, False, True]
    assert "of 2 seeds" in out
