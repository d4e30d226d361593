"""The throughput command: what it counts, measures, records, skips and refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from PIL import Image

import training_throughput
from images import data, models, programs, recipes
from throughput import throughput_programs, throughput_report
from throughput.flops import forward_flops
from throughput_lines import main, step_line
from tiny import Tiny, compile_once

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BENCHMARKS = Path(training_throughput.__file__).parent


@pytest.fixture
def tiny(monkeypatch):
    """Measures a tiny network in place of each model, on few images and without augmentation."""
    for name in recipes.MODELS:
        monkeypatch.setitem(models.MODELS, name, Tiny)
    monkeypatch.setattr(programs, "augment", lambda key, images, **_: images)
    compile_once(monkeypatch)
    monkeypatch.setattr(throughput_programs, "EPOCH_IMAGES", 9)  # 8 to train on
    monkeypatch.setattr(throughput_programs, "PAUSE", 0.0)
    monkeypatch.setattr("common.timing.matrix_peak", lambda dtype: 1e9)


@pytest.fixture
def no_training(tiny, monkeypatch):
    """The trainer's steps take no time."""
    made = (lambda: None), 1.0
    monkeypatch.setattr(throughput_programs, "_trainer_steps", lambda *_: made)


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]


def test_flops_by_hand():
    stage_1 = 6 * (32 * 32 * 16) * (9 * 16)
    stage_2 = (16 * 16 * 32) * (9 * 16 + 5 * 9 * 32 + 16)  # the last is the shortcut's
    stage_3 = (8 * 8 * 64) * (9 * 32 + 5 * 9 * 64 + 32)
    stem, linear = (32 * 32 * 16) * (9 * 3), 64 * 10
    assert forward_flops(models.resnet20) == 2 * (stem + stage_1 + stage_2 + stage_3 + linear)
    assert forward_flops(Tiny) == 2 * (8 * 8 * 4 * 4 * 4 * 3 + 4 * 10)


@pytest.mark.parametrize("count", [1, 18, 19, 20, 37, 38, 39, 8, 2560, 20480])
def test_with_validation(count):
    total = throughput_programs.with_validation(count)
    assert len(data.validation_split(total, 0)[0]) == count


def test_steps_and_epochs(tiny, tmp_path, capsys):
    arguments = ["--precisions", "bfloat16", "--epoch"]
    assert main(tmp_path, *arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("4 measured, 0 failed, 4 there; ")
    lines = read(tmp_path)
    assert [(line["kind"], line["program"]) for line in lines] == [
        (kind, name) for kind in ("steps", "epoch") for name in ("adam", "adamsrt")
    ]
    for line in lines:
        cell = throughput_programs.Cell("resnet20", "bfloat16", 8, 1)._asdict()
        assert cell.items() <= line.items()
        assert line["device"].startswith("cpu (") and line["versions"]["jax"] == jax.__version__
        assert line["compile_seconds"] > 0
    for line in lines[:2]:
        step, rate = line["step_seconds"], line["images_per_second"]
        assert 0 < step["q1"] <= step["median"] <= step["q3"]
        # The rates are those of the same three timings, whose middle one is the median.
        assert rate["median"] == pytest.approx(8 / step["median"])
        assert line["flops_per_image"] == 3 * forward_flops(Tiny)
        share = rate["median"] * line["flops_per_image"] / line["matrix_peak"]
        assert line["peak_share"] == pytest.approx(share)
        ratio = line["ratio_to_adam"]
        assert (ratio == {"q1": 1, "median": 1, "q3": 1}) == (line["program"] == "adam")
    for line in lines[2:]:
        minutes = 405 * line["epoch_seconds"]["median"] / 60
        assert line["projected_minutes"] == pytest.approx(minutes)

    text = (tmp_path / "table.md").read_text()
    assert text.count("| resnet20 | bfloat16 | 8 | 1 | adamsrt | ") == 2
    with Image.open(tmp_path / "table.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300

    # Everything is there: nothing is measured, and the report is made again.
    (tmp_path / "table.md").unlink()
    assert main(tmp_path, *arguments, "--optimizers", "adamsrt") == 0
    assert "\n0 measured, 0 failed, 4 there; " in capsys.readouterr().out
    assert read(tmp_path) == lines and (tmp_path / "table.md").read_text() == text


def test_what_is_measured_is_the_trainer(tiny, monkeypatch):
    """Whole batches in one call of its program, as many steps as a call has elsewhere."""
    calls = []
    compile_trainer = programs.compile_trainer

    def spy(*args, **kwargs):
        trainer = compile_trainer(*args, **kwargs, driver="scan")

        def train(state, order, index):
            after, batches = trainer.train(state, order, index)
            calls.append((index, order[0].shape, batches.loss.shape))
            return after, batches

        return trainer._replace(train=train)

    monkeypatch.setattr(programs, "compile_trainer", spy)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    figures = throughput_programs.measure_steps(
        throughput_programs.Cell("resnet20", "float32", 4, 2),
        ["adamsrt"],
        None,
        rounds=2,
        peak=lambda: 1.0,
        on_round=lambda: None,
    )["adamsrt"]
    assert calls == [(0, (2, 80), (20, 2))] * 3  # once before the rounds
    assert figures["steps_per_call"] == 20 and figures["ratio_to_adam"] is None


def test_steps_can_be_watched(tiny, tmp_path, monkeypatch):
    figures = []
    compile_trainer = programs.compile_trainer

    def spy(*args, **kwargs):
        trainer = compile_trainer(*args, **kwargs)
        figures.append(len(trainer.figures))
        return trainer

    monkeypatch.setattr(programs, "compile_trainer", spy)
    arguments = ["--batch_sizes", "8", "--rounds", "3"]
    assert main(tmp_path, *arguments, "--optimizers", "adam,adam+geometry") == 0
    assert figures == [0, 18]
    plain, watched = read(tmp_path)
    assert watched["program"] == "adam+geometry" and watched["ratio_to_adam"]["median"] > 0
    assert "\n* +geometry: " in (tmp_path / "table.md").read_text()


def test_time_to_an_accuracy(no_training, tmp_path, capsys):
    def measure(accuracy: str) -> dict[str, Any]:
        arguments = ["--accuracy", accuracy, "--dataset", "digits", "--epochs", "3"]
        code = main(tmp_path, "--batch_sizes", "683", "--optimizers", "sgd", *arguments)
        assert code == 0
        return read(tmp_path)[-1]

    missed = measure("1.0")
    assert missed["kind"] == "accuracy" and missed["epoch"] is None
    reached = measure(str(missed["best_accuracy"]))
    assert reached["epoch"] <= 3 and reached["best_accuracy"] == missed["best_accuracy"]
    assert 0 < reached["seconds"]
    assert [x["kind"] for x in read(tmp_path)] == ["steps", "accuracy", "accuracy"]
    text = (tmp_path / "table.md").read_text()
    assert "| digits | 100 % | not reached in 3 epochs | – | " in text
    best = f"{100 * missed['best_accuracy']:g} %"
    assert f"| digits | {best} | {reached['seconds']:.1f} | {reached['epoch']} | " in text


def test_a_cell_that_does_not_fit(no_training, tmp_path, capsys, monkeypatch):
    fits, full = throughput_programs._trainer_steps, True

    def make(cell, *rest):
        if cell.batch_size > 8 and full:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\n  while trying")
        return fits(cell, *rest)

    monkeypatch.setattr(throughput_programs, "_trainer_steps", make)
    arguments = ["--batch_sizes", "16,8", "--optimizers", "adam"]
    assert main(tmp_path, *arguments) == 1
    message = "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying"
    captured = capsys.readouterr()
    assert captured.err == (
        f"training_throughput.py: failed: steps resnet20 float32 16 1 adam: {message}\n"
    )
    assert "\n1 measured, 1 failed, 1 there; " in captured.out
    assert [line.get("error") for line in read(tmp_path)] == [message, None]
    assert message in (tmp_path / "table.md").read_text()

    full = False  # what failed is tried again
    assert main(tmp_path, *arguments) == 0
    assert "\n1 measured, 0 failed, 2 there; " in capsys.readouterr().out
    assert message not in (tmp_path / "table.md").read_text()


def test_a_program_that_fails_later(tiny, monkeypatch):
    calls = []

    def train() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise jax.errors.JaxRuntimeError("the device is lost")

    monkeypatch.setattr(throughput_programs, "_trainer_steps", lambda *_: (train, 1.0))
    cell = throughput_programs.Cell("resnet20", "float32", 8, 1)
    rest = {"rounds": 9, "peak": lambda: 1.0, "on_round": lambda: None}
    figures = throughput_programs.measure_steps(cell, ["adam", "sgd"], None, **rest)
    assert figures == dict.fromkeys(
        ["adam", "sgd"], {"error": "JaxRuntimeError: the device is lost"}
    )


def test_more_rounds_other_versions_and_settings_are_measured(tmp_path):
    recorded = {throughput_report.key(line): line for line in [step_line(torch={"threads": 2})]}

    def is_there(**changes) -> bool:
        return training_throughput._is_there(step_line(torch={"threads": 2}, **changes), recorded)

    assert is_there() and is_there(rounds=2) and is_there(git_revision="def")
    assert not is_there(rounds=4)
    assert not is_there(versions={"jax": "0.12"})
    assert not is_there(seeds=4)
    assert not training_throughput._is_there(step_line(), recorded)


def test_interruption_keeps_what_is_there(no_training, tmp_path, capsys, monkeypatch):
    measure = throughput_programs.measure_steps

    def interrupted(cell, *args, **kwargs):
        if cell.batch_size == 16:
            raise KeyboardInterrupt
        return measure(cell, *args, **kwargs)

    monkeypatch.setattr(throughput_programs, "measure_steps", interrupted)
    arguments = ["--batch_sizes", "8,16", "--optimizers", "adam"]
    assert main(tmp_path, *arguments) == 130
    assert capsys.readouterr().err.endswith(
        f"interrupted; what {tmp_path}/runs.jsonl holds is kept, and the same command goes on from "
        "there\n"
    )
    monkeypatch.setattr(throughput_programs, "measure_steps", measure)
    assert main(tmp_path, *arguments) == 0
    assert [line["batch_size"] for line in read(tmp_path)] == [8, 16]


def test_torch_that_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch_networks", raising=False)
    assert main(tmp_path / "throughput", "--torch") == 2
    err = capsys.readouterr().err
    assert "error: --torch needs PyTorch (" in err and err.count("\n") == 1
    assert not (tmp_path / "throughput").exists()


def test_help_and_refusals_start_no_jax():
    program = (
        "import sys, training_throughput\n"
        "for arguments in (['--help'], ['--seeds', '0'], ['--report', '--output', 'nowhere']):\n"
        "    try: training_throughput.main(arguments)\n"
        "    except SystemExit: pass\n"
        "sys.exit(bool({'jax', 'matplotlib', 'numpy', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "(default: 20)" in done.stdout


def test_torch_in_the_command(no_training, tmp_path, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    from throughput import torch_networks

    make = lambda *_: torch_networks.resnet((4, 8), 1, 10)  # noqa: E731
    monkeypatch.setattr(torch_networks, "make_network", make)

    def no_compiler(*args, **kwargs):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert main(tmp_path, "--torch", "--seeds", "1,2", "--optimizers", "adam") == 1
    err = capsys.readouterr().err
    assert "failed: steps resnet20 float32 8 1 torch_compiled: RuntimeError: no working C++" in err
    eager, compiled = (x for x in read(tmp_path) if x["program"].startswith("torch"))
    assert eager["torch"]["version"] == torch.__version__ and eager["seeds"] == 1
    assert eager["ratio_to_adam"]["median"] > 0 and compiled["error"].endswith("compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert main(tmp_path, "--torch", "--optimizers", "adam") == 0
    assert read(tmp_path)[-1]["step_seconds"]["median"] > 0
