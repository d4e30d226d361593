"""The throughput command: what it counts, measures, records and skips, and the report."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import throughput_programs
import throughput_report
import training_throughput
from cifar import data, models, programs, recipes
from flops import forward_flops
from tiny import Tiny

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BENCHMARKS = Path(training_throughput.__file__).parent


@pytest.fixture
def tiny(monkeypatch):
    """Measures a tiny network in place of each model, on few images."""
    for name in recipes.MODELS:
        monkeypatch.setitem(models.MODELS, name, Tiny)
    monkeypatch.setattr(throughput_programs, "EPOCH_IMAGES", 84)  # 80 to train on
    monkeypatch.setattr(throughput_programs, "PAUSE", 0.0)
    monkeypatch.setattr("timing.matrix_peak", lambda dtype: 1e9)


@pytest.fixture
def no_training(tiny, monkeypatch):
    """The trainer's steps take no time."""
    made = (lambda: None), 1.0
    monkeypatch.setattr(throughput_programs, "_trainer_steps", lambda *_: made)


def main(output: Path, *arguments: str) -> int:
    common = ["--batch_sizes", "8", "--rounds", "3", "--output", str(output)]
    return training_throughput.main([*common, *arguments])


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

        def train(state, order, key, index):
            after, batches = trainer.train(state, order, key, index)
            calls.append((index, order.shape, batches.loss.shape))
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
    assert "\n1 measured, 1 failed, 2 there; " in captured.out
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


def step_line(**changes: Any) -> dict[str, Any]:
    spread = {"q1": 90.0, "median": 100.0, "q3": 130.0}
    return {
        "kind": "steps",
        "program": "adam",
        **throughput_programs.Cell("resnet20", "float32", 128, 1)._asdict(),
        "device": "gpu (X)",
        "versions": {"jax": "0.11"},
        "git_revision": "abc",
        "rounds": 3,
        "steps_per_call": 20,
        "images_per_second": spread,
        "step_seconds": {name: value / 1e5 for name, value in spread.items()},
        "ratio_to_adam": {name: value / 1e2 for name, value in spread.items()},
        "flops_per_image": 7,
        "matrix_peak": 1e12,
        "peak_share": 0.456,
        "compile_seconds": 12.34,
        "peak_bytes": 1.5e9,
        **changes,
    }


def write(output: Path, *lines: dict[str, Any] | str) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (output / "runs.jsonl").write_text("\n".join(text) + "\n")
    return output


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


REFUSALS = {
    "--models resnet19": "unknown 'resnet19' (choose from resnet18, ",
    "--precisions float16": "unknown 'float16' (choose from float32, bfloat16)",
    "--batch_sizes 8,0": "'0' is not an integer from 1",
    "--seeds 1,1": "1 is named twice",
    "--optimizers lamb": "unknown 'lamb'",
    "--rounds 0": "'0' is not an integer from 1",
    "--accuracy 90 --dataset digits": "'90' is not a number above 0, to 1",
    "--accuracy 0.9": "--accuracy and --dataset need each other",
    "--dataset digits": "--accuracy and --dataset need each other",
    "--accuracy 0.9 --dataset moons": "There is no data set 'moons'",
    "--accuracy 0.9 --dataset digits --batch_sizes 4000": "4000 is above the 1366 training images",
    "--report": "there are no measurements in ",
}


@pytest.mark.parametrize("arguments", REFUSALS)
def test_refusals(arguments, tmp_path, capsys):
    output = tmp_path / "throughput"
    try:
        code = training_throughput.main([*arguments.split(), "--output", str(output)])
    except SystemExit as error:
        code = error.code
    assert code == 2
    err = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("usage:")]
    assert len(err) == 1 and err[0].startswith("training_throughput.py: error: ")
    assert REFUSALS[arguments] in err[0]
    assert not output.exists()


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


def shapes(model: str) -> list[tuple[int, ...]]:
    """Of the parameters, in PyTorch's layout and any order."""
    made = nnx.eval_shape(lambda: models.MODELS[model](10, rngs=nnx.Rngs(0)))
    return sorted(tuple(x.shape[::-1]) for x in jax.tree.leaves(nnx.state(made, nnx.Param)))


@pytest.mark.parametrize("model", recipes.MODELS)
def test_torch_networks_have_our_parameters(model):
    torch = pytest.importorskip("torch")
    import torch_networks

    with torch.device("meta"):
        network = torch_networks.make_network(model, 10)
    assert sorted(tuple(x.shape) for x in network.parameters()) == shapes(model)
    assert sum(1 for _ in network.buffers()) == 3 * sum(len(s) == 4 for s in shapes(model))


def test_torch_network_gives_our_logits():
    torch = pytest.importorskip("torch")
    import torch_networks

    ours = models.resnet20(10, rngs=nnx.Rngs(0))
    theirs = torch_networks.make_network("resnet20", 10)
    layers: list[Any] = [ours.conv1, ours.bn1]
    for block in ours.blocks:
        layers += [block.conv1, block.bn1, block.conv2, block.bn2]
        if block.projects:
            layers += [block.shortcut_conv, block.shortcut_bn]
    layers.append(ours.linear)
    with torch.no_grad():
        parameters = theirs.parameters()
        for layer in layers:
            first = layer.scale if isinstance(layer, nnx.BatchNorm) else layer.kernel
            for param in (first, layer.bias):
                if param is not None:
                    value = np.asarray(param[...])
                    axes = (3, 2, 0, 1) if value.ndim == 4 else range(value.ndim)[::-1]
                    next(parameters).copy_(torch.tensor(value.transpose(axes)))
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    want = nnx.jit(lambda model, images: model(images, train=True))(ours, images)
    got = theirs.train()(torch.tensor(images).permute(0, 3, 1, 2)).detach().numpy()
    # In float32; batch statistics of few values amplify rounding.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())
    # The running means move equally far.
    mean = theirs.get_buffer("0.1.running_mean").numpy()
    np.testing.assert_allclose(mean, layers[1].mean[...], rtol=0, atol=1e-5)


def test_torch_augmentation():
    torch = pytest.importorskip("torch")
    import torch_networks

    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    augmented = torch_networks.augment(torch.tensor(images)).numpy()
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    found = set()
    for image, around in zip(augmented, padded, strict=True):
        windows = [
            (down, right, mirrored)
            for down in range(9)
            for right in range(9)
            for mirrored in (1, -1)
            if (image == around[down : down + 32, right : right + 32][:, ::mirrored]).all()
        ]
        assert len(windows) == 1
        found |= set(windows)
    for part, every in enumerate((range(9), range(9), (1, -1))):
        assert {window[part] for window in found} == set(every)


@pytest.mark.parametrize("precision", recipes.PRECISIONS)
def test_torch_learns(precision, monkeypatch):
    pytest.importorskip("torch")
    import torch_networks

    make = lambda *_: torch_networks.resnet((4, 8), 1, 4)  # noqa: E731
    monkeypatch.setattr(torch_networks, "make_network", make)
    labels = np.arange(32) % 4
    images = np.broadcast_to(60 * labels[:, None, None, None], (32, 32, 32, 3)).astype(np.uint8)
    train = torch_networks.make_training(
        "resnet20",
        images,
        labels,
        num_classes=4,
        batch_size=16,
        precision=precision,
        recipe=recipes.Recipe(0.01, 0.0),
        device="cpu",
        compiled=False,
    )
    losses = [train() for _ in range(15)]
    assert np.isfinite(losses).all() and losses[-1] < 0.5 < losses[0]


def test_torch_in_the_command(no_training, tmp_path, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    import torch_networks

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
