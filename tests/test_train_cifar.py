"""The trainer: an epoch's batches, the two drivers, evaluation; the command and its files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

import train_cifar
from cifar import data, models, recipes, report, training
from cifar.data import DataSet, Split

SCRIPT = Path(train_cifar.__file__)


class Tiny(nnx.Module):
    """A network that compiles in a moment: convolution, BatchNorm, linear layer."""

    def __init__(self, num_classes, *, rngs):
        self.conv = nnx.Conv(3, 4, (4, 4), strides=4, padding=0, use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.linear = nnx.Linear(4, num_classes, rngs=rngs)

    def __call__(self, x, *, train):
        x = nnx.relu(self.bn(self.conv(x), use_running_average=not train))
        return self.linear(x.mean(axis=(1, 2)))


def make_split(images: int, seed: int) -> Split:
    """Images whose brightness depends on their class, of four."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(images) % 4).astype(np.int32)
    noise = rng.integers(0, 100, (images, 32, 32, 3))
    return Split((noise + 50 * labels[:, None, None, None]).clip(0, 255).astype(np.uint8), labels)


def make_data(*, pad: int = 0, flip: bool = False) -> DataSet:
    splits = make_split(22, 0), make_split(6, 1), make_split(70, 2)
    return DataSet("tiny", tuple("abcd"), *splits, (0.5,) * 3, (0.25,) * 3, pad, flip)


def prepare(model, tx, images: DataSet, *, batch_size: int, driver: str, seed: int = 0):
    """The parts of `training.fit` that train for one epoch."""
    train = jax.device_put(images.train)
    graphdef, state = training.split_model(model, tx)
    step = training.make_step(graphdef, tx, images, batch_size)
    key = jax.random.key(seed)
    run = training.make_epoch(step, state, train, batch_size=batch_size, key=key, driver=driver)
    return run, state


class Spy(nnx.Module):
    """Counts how often it is trained on each image, whose colour is its number."""

    def __init__(self, images: int):
        self.weight = nnx.Param(jnp.zeros(()))
        self.seen = nnx.BatchStat(jnp.zeros(images, jnp.int32))
        self.last = nnx.BatchStat(jnp.full(images, -1, jnp.int32))

    def __call__(self, x, *, train):
        numbers = x[:, 0, 0, 0].round().astype(jnp.int32)
        if train:
            self.seen[...] = self.seen[...].at[numbers].add(1)
            self.last[...] = self.last[...].at[: len(numbers)].set(numbers)
        return jnp.zeros((len(x), 4)) + self.weight[...]


@pytest.mark.parametrize("driver", ["loop", "scan"])
@pytest.mark.parametrize("batch_size", [1, 5, 11, 22])
def test_an_epoch_uses_every_training_image_once(driver, batch_size):
    numbered = np.broadcast_to(np.arange(22, dtype=np.uint8)[:, None, None, None], (22, 32, 32, 3))
    images = make_data()._replace(mean=(0.0,) * 3, std=(1 / 255,) * 3)
    images = images._replace(train=Split(numbered, images.train.labels))
    run, state = prepare(Spy(22), optax.sgd(0.0), images, batch_size=batch_size, driver=driver)
    for epoch in (1, 2, 3):
        state, _, _ = run(state, epoch)
        np.testing.assert_array_equal(state.batch_stats["seen"][...], epoch)
    # The last batch of the epoch was 22 modulo the batch size.
    assert (np.asarray(state.batch_stats["last"][...]) >= 0).sum() == batch_size


def test_order_differs_by_epoch_and_seed_and_can_be_reproduced():
    orders = {
        (seed, epoch): np.asarray(training.epoch_order(jax.random.key(seed), epoch, 100)[0])
        for seed in (0, 1)
        for epoch in (1, 2, 3)
    }
    for order in orders.values():
        np.testing.assert_array_equal(np.sort(order), np.arange(100))
    assert len({order.tobytes() for order in orders.values()}) == len(orders)
    again, _ = training.epoch_order(jax.random.key(1), 3, 100)
    np.testing.assert_array_equal(again, orders[1, 3])


def test_the_two_drivers_agree():
    images = make_data(pad=2, flip=True)
    results = {}
    for driver in ("loop", "scan"):
        calls = []
        run, state = prepare(
            Tiny(4, rngs=nnx.Rngs(0)), optax.adam(1e-2), images, batch_size=5, driver=driver
        )
        for epoch in (1, 2):
            state, loss, accuracy = run(state, epoch, lambda *call, calls=calls: calls.append(call))
        # The last call of an epoch carries the epoch's figures.
        assert calls[-1] == (22, pytest.approx(loss), pytest.approx(accuracy))
        results[driver] = (state, loss, accuracy), [seen for seen, _, _ in calls]
    assert results["loop"][1] == [0, 5, 10, 15, 20, 22] * 2
    assert results["scan"][1] == [0, 20, 22] * 2
    # 1e-5: ten steps in float32, compiled differently.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        results["loop"][0],
        results["scan"][0],
    )


def test_the_step_maps_over_seeds():
    images, tx = make_data(), optax.adam(1e-2)
    split = jax.device_put(images.train)
    runs = []
    for seed in (0, 1):
        graphdef, state = training.split_model(Tiny(4, rngs=nnx.Rngs(seed)), tx)
        runs.append((state, *training.epoch_order(jax.random.key(seed), 1, 22)))
    step = training.make_step(graphdef, tx, images, 5)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)

    def third_step(state, order, key):
        return step(state, split, order, key, 2)

    mapped = jax.jit(jax.vmap(third_step))(*stacked)
    alone_step = jax.jit(third_step)
    for i, run in enumerate(runs):
        alone = alone_step(*run)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a, b[i], rtol=1e-4, atol=1e-5),
            alone,
            mapped,
        )


@pytest.mark.parametrize("batch_size", [7, 70, 128])
def test_evaluation_covers_every_image_once(batch_size):
    images = make_data()
    model = Tiny(4, rngs=nnx.Rngs(0))
    model.bn.mean[...] = jnp.array([0.1, -0.2, 0.3, 0.0])
    model.bn.var[...] = jnp.array([0.5, 2.0, 1.0, 3.0])
    graphdef, state = training.split_model(model, optax.sgd(0.0))
    test = jax.device_put(images.test)
    evaluate = training.make_evaluation(graphdef, state, test, images, batch_size=batch_size)
    loss, accuracy = evaluate(state.params, state.batch_stats)

    x = (images.test.images / 255.0 - 0.5) / 0.25
    patches = x.reshape(70, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    y = np.tensordot(patches, np.asarray(model.conv.kernel[...], np.float64), axes=3)
    y = (y - np.asarray(model.bn.mean[...])) / np.sqrt(np.asarray(model.bn.var[...]) + 1e-5)
    y = np.maximum(y, 0).mean(axis=(1, 2)) @ np.asarray(model.linear.kernel[...])
    log_p = y - np.log(np.exp(y).sum(axis=1, keepdims=True))
    assert accuracy == np.mean(y.argmax(axis=1) == images.test.labels)
    # 1e-5: the network in float32 against float64.
    assert loss == pytest.approx(-log_p[np.arange(70), images.test.labels].mean(), rel=1e-5)


class Clock(nnx.Module):
    """Predicts the class floor(training steps / 2), with more confidence at each step."""

    def __init__(self):
        self.weight = nnx.Param(jnp.zeros(()))
        self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x, *, train):
        if train:
            self.steps[...] = self.steps[...] + 1
        logits = 2.0 * self.steps[...] * jax.nn.one_hot(self.steps[...] // 2, 4)
        return jnp.broadcast_to(logits, (len(x), 4)) + self.weight[...]


@pytest.mark.parametrize("driver", ["loop", "scan"])
def test_of_the_epochs_with_the_best_validation_accuracy_the_surest_is_tested(driver):
    images = make_data()
    images = images._replace(
        valid=images.valid._replace(labels=np.full(6, 2, np.int32)),
        test=images.test._replace(labels=np.full(70, 2, np.int32)),
    )
    history = []
    result = training.fit(
        Clock(),
        optax.sgd(0.0),
        images,
        schedule=recipes.step_schedule(0.1, (1, 3, 5)),
        epochs=7,  # of one step: the class is 2 after epochs 4 and 5
        batch_size=22,
        seed=0,
        driver=driver,
        on_epoch=history.append,
    )
    assert [m.epoch for m in history] == [1, 2, 3, 4, 5, 6, 7]
    assert [m.valid_accuracy for m in history] == [0, 0, 0, 1, 1, 0, 0]
    rates = [0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    assert [m.learning_rate for m in history] == pytest.approx(rates)
    assert (result.best_epoch, result.test_accuracy) == (5, 1.0)
    assert result.test_loss == pytest.approx(np.log(1 + 3 * np.exp(-10)), rel=1e-2)


def nan_after_two(step: Any) -> jax.Array:
    return jnp.where(step < 2, 0.0, jnp.nan)


@pytest.mark.parametrize("driver", ["loop", "scan"])
def test_a_loss_that_is_not_finite_stops_the_epoch(driver):
    tx = optax.scale_by_schedule(nan_after_two)
    run, state = prepare(Tiny(4, rngs=nnx.Rngs(0)), tx, make_data(), batch_size=5, driver=driver)
    calls = []
    # The third update makes the parameters NaN, so the fourth loss is the first NaN.
    with pytest.raises(training.NonFiniteLoss, match="loss is nan at step 4 of epoch 1"):
        run(state, 1, lambda seen, *_: calls.append(seen))
    assert calls == ([0, 5, 10, 15] if driver == "loop" else [0])


def test_a_validation_loss_that_is_not_finite_stops_training():
    history = []
    # The third update, the last of the epoch, makes the parameters NaN after the last loss.
    with pytest.raises(training.NonFiniteLoss, match="validation loss is nan after epoch 1"):
        training.fit(
            Tiny(4, rngs=nnx.Rngs(0)),
            optax.scale_by_schedule(nan_after_two),
            make_data(),
            schedule=nan_after_two,
            epochs=2,
            batch_size=8,
            seed=0,
            on_epoch=history.append,
        )
    assert history == []


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set as users have them: 4 classes of 12 images to train on and 4 to test on."""
    root = tmp_path_factory.mktemp("images")
    for part, count in (("train", 48), ("test", 16)):
        split = make_split(count, 0)
        for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            directory = root / part / "abcd"[label]
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(directory / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def tiny():
    """Trains the tiny network whatever the model's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "resnet20", Tiny)
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
        "metrics.jsonl",
        "summary.json",
        "curves.png",
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
    assert summary["arguments"] == {
        "dataset": f"folder:{folder}",
        "model": "resnet20",
        "optimizer": "adamsrt",
        "epochs": 3,
        "batch_size": 10,
        "learning_rate": 1e-3,
        "weight_decay": 7.8125e-6,
        "seed": 5,
        "data_dir": "~/tensorflow_datasets",
        "output": str(output),
    }
    best = max(metrics, key=lambda m: (m["valid_accuracy"], -m["valid_loss"]))
    assert summary["best_epoch"] == best["epoch"]
    assert 0 <= summary["test_accuracy"] <= 1 and summary["test_loss"] > 0
    assert 0 < summary["compile_seconds"] < summary["seconds"]
    assert summary["versions"].keys() == {"python", *report.PACKAGES}
    assert summary["versions"]["jax"] == jax.__version__
    assert summary["device"].startswith(jax.default_backend())
    revision = summary["git_revision"]
    assert revision is None or len(revision.removesuffix("-dirty")) == 40
    with Image.open(output / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) >= 600


REFUSALS = {
    "--epochs 0": "argument --epochs: '0' is not an integer from 1",
    "--epochs 1.5": "argument --epochs: '1.5' is not an integer from 1",
    "--batch_size 0": "argument --batch_size: '0' is not an integer from 1",
    "--learning_rate nan": "argument --learning_rate: 'nan' is not a finite number from 0",
    "--learning_rate inf": "argument --learning_rate: 'inf' is not a finite number from 0",
    "--learning_rate -1": "argument --learning_rate: '-1' is not a finite number from 0",
    "--weight_decay=-1e-4": "argument --weight_decay: '-1e-4' is not a finite number from 0",
    "--weight_decay x": "argument --weight_decay: 'x' is not a finite number from 0",
    "--seed -1": "argument --seed: '-1' is not an integer from 0",
    "--model resnet50": "argument --model: invalid choice: 'resnet50'",
    "--optimizer adamax": "argument --optimizer: invalid choice: 'adamax'",
    "--dataset mnist": "argument --dataset/--dataloader: unknown data set 'mnist'",
    "--dataset folder:": "argument --dataset/--dataloader: unknown data set 'folder:'",
    "--dataset folder:/no/such/place": "/no/such/place",
    "--batch_size 100000": "--batch_size 100000 is above the 1366 training images",
    "--epochs 1000000000": "--epochs 1000000000 is above",
}


@pytest.mark.parametrize("arguments", REFUSALS)
def test_refusals(arguments, tmp_path, capsys):
    output = tmp_path / "run"
    try:
        code = train_cifar.main([*arguments.split(), "--output", str(output)])
    except SystemExit as error:
        code = error.code
    assert code == 2
    err = capsys.readouterr().err.splitlines()
    assert len([line for line in err if not line.startswith("usage:")]) == 1
    assert err[-1].startswith("train_cifar.py: error: ")
    assert REFUSALS[arguments] in err[-1]
    assert not output.exists()


def test_outputs_that_are_refused(tmp_path, capsys, monkeypatch):
    def refused(output: Path) -> str:
        assert train_cifar.main(["--output", str(output)]) == 2
        return capsys.readouterr().err

    file = tmp_path / "file"
    file.write_text("mine")
    assert f"{file} is not a directory" in refused(file)
    assert f"{file} is not a directory" in refused(file / "run")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "metrics.jsonl").write_text("mine\n")
    assert f"{taken} already holds a run" in refused(taken)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert f"no permission to write in {tmp_path}" in refused(tmp_path / "run")
    assert file.read_text() == "mine" and (taken / "metrics.jsonl").read_text() == "mine\n"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "taken"}


def test_a_loss_that_is_not_finite_stops_the_command(folder, tiny, tmp_path, capsys):
    arguments = f"--dataset folder:{folder} --optimizer sgd --batch_size 10 --learning_rate 1e30"
    assert train_cifar.main([*arguments.split(), "--output", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("train_cifar.py: stopped: the training loss is ")
    assert "lower --learning_rate (1e+30)" in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "summary.json").exists()


def test_interrupted_before_the_first_epoch(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupt)
    assert train_cifar.main([]) == 130
    assert capsys.readouterr().err == "train_cifar.py: interrupted; no epoch was finished\n"


def test_an_interrupt_that_gets_lost_is_raised_again(folder, tiny, monkeypatch, capsys):
    """Where Python runs in a callback of compiled code, a KeyboardInterrupt may be swallowed."""
    swallowed = []

    def learning_rate(step):
        if not swallowed:
            with contextlib.suppress(KeyboardInterrupt):
                swallowed.append(True)
                signal.raise_signal(signal.SIGINT)
        return 0.1

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(recipes, "step_schedule", lambda *_: learning_rate)
    assert train_cifar.main(run_arguments(folder)) == 130
    assert swallowed and "interrupted; no epoch was finished" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupted_after_some_epochs(folder, tmp_path):
    """The real command with a real network, ended by Ctrl-C."""
    output = tmp_path / "run"
    arguments = f"--dataset folder:{folder} --epochs 100000 --batch_size 20 --output {output}"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
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
        f"train_cifar.py: interrupted; the metrics of epochs 1 to {len(epochs)} "
        f"are kept in {output / 'metrics.jsonl'}\n"
    )
    assert {path.name for path in output.iterdir()} == {"metrics.jsonl"}


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


@pytest.mark.parametrize("epochs", [1, 40])
def test_curves(epochs, tmp_path):
    history = [
        training.Metrics(e, 0.1, 2 / e, 1 - 1 / e, 3 / e, 1 - 1 / e, 100.0)
        for e in range(1, epochs + 1)
    ]
    milestones = recipes.milestones(epochs, 1)
    report.draw_curves(
        tmp_path / "curves.png",
        history,
        training.Result(0.5, 1.0, 1, 0.0),
        title="title",
        schedule=recipes.step_schedule(0.1, milestones),
        milestones=milestones,
        steps_per_epoch=1,
    )
    with Image.open(tmp_path / "curves.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10  # something is drawn
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
