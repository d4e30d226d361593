"""The geometry that a training records: means, minima and maxima over the steps of an epoch."""

import json

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import spherical_optax as so
import train_cifar
from images import figures, recipes
from tiny import Tiny, fit, make_data, prepare, use_tiny
from training import loop, records

SCHEDULE = optax.constant_schedule(0.1)
AXES = recipes.spheres()


@pytest.fixture(autouse=True)
def _quickly(compiled_quickly):
    """Nothing here looks at rounding."""


@pytest.mark.parametrize("driver", ["loop", "scan"])
def test_an_epoch_has_the_figures_of_all_its_steps(driver):
    tx = so.with_geometry(optax.sgd(SCHEDULE, 0.9), channel_axes=AXES)
    trainer, seeds, run = prepare(tx, make_data(), batch_size=5, seeds=(0, 3), driver=driver)
    order = trainer.shuffle(seeds, 1)
    state, steps = jax.tree.map(jax.numpy.copy, run.state), []
    for index in range(0, trainer.steps, 4 if driver == "scan" else 1):
        before = jax.device_get(state.params)
        state, batch = trainer.train(state, order, index)
        figures = np.asarray(batch.geometry, np.float64)
        steps.extend(figures.reshape(-1, 2, len(trainer.figures)))
        if driver == "loop":  # the first figures are of the parameters before the step
            radii = np.linalg.norm(before["conv"]["kernel"][...].reshape(2, -1, 4), axis=1)
            at = trainer.figures.index("conv/kernel/radius/max")
            np.testing.assert_allclose(figures[:, at], radii.max(axis=1), rtol=1e-5)
    assert len(steps) == trainer.steps == 5

    epochs = []
    fit(trainer, seeds, run, epochs=2, schedule=SCHEDULE, on_epoch=epochs.append)
    for seed in range(2):
        found = epochs[0].progress.epoch_geometry[seed]
        assert list(found) == list(trainer.figures) and len(found) == 6 * 3
        for i, name in enumerate(trainer.figures):
            values = [step[seed, i] for step in steps]
            kind = {"mean": np.mean, "min": np.min, "max": np.max}[name.rpartition("/")[2]]
            np.testing.assert_allclose(found[name], kind(values), rtol=1e-5, err_msg=name)
        assert epochs[1].progress.epoch_geometry[seed] != found


def test_the_steps_before_a_stop_within_an_epoch_are_counted():
    tx = so.with_geometry(optax.sgd(SCHEDULE), channel_axes=AXES)
    trainer, seeds, run = prepare(tx, make_data(), batch_size=5)
    copy = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, run)
    whole = fit(trainer, seeds, copy, epochs=1, schedule=SCHEDULE)
    asked = []
    cut = fit(
        trainer,
        seeds,
        run,
        epochs=1,
        schedule=SCHEDULE,
        stop=lambda: asked.append(0) or len(asked) > 3,
    )
    assert cut.progress.step == 3
    saved = json.loads(json.dumps(loop.to_json(cut.progress)))  # as in a checkpoint
    progress = loop.from_json(saved, cut.progress, figures.Metrics)
    cut = cut._replace(progress=progress)
    end = fit(trainer, seeds, cut, epochs=1, schedule=SCHEDULE)
    assert end.progress.epoch_geometry == whole.progress.epoch_geometry


def test_what_is_lost_of_a_file_stays_empty(tmp_path):
    path = tmp_path / "geometry.jsonl"
    path.write_text('{"epoch": 1, "a": 1.5}\n{"epo\n[3]\n{"epoch": 4, "a": 2.5}\n{"epoch": 5}')
    lines = records.read_lines(path, "epoch", [1, 2, 3, 4])
    assert lines == [{"epoch": 1, "a": 1.5}, {"epoch": 2}, {"epoch": 3}, {"epoch": 4, "a": 2.5}]
    assert records.read_lines(tmp_path / "none", "epoch", [1, 2]) == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("optimizer", recipes.OPTIMIZERS)
def test_every_optimizers_kernels_and_momentum_are_measured(optimizer):
    recipe, _ = recipes.recipe("cifar10", "resnet20", optimizer)
    tx = so.with_geometry(recipes.make_optimizer(optimizer, recipe, 0.1), channel_axes=AXES)
    params = nnx.state(Tiny(4, rngs=nnx.Rngs(0)), nnx.Param)
    figures = jax.eval_shape(lambda params: so.geometry(tx.init(params)), params)
    measures = {name.rpartition("/")[0] for name in figures}
    assert {name.rpartition("/")[0] for name in measures} == {"conv/kernel"}
    assert {"conv/kernel/angle", "conv/kernel/momentum_radial_fraction"} <= measures


def test_the_command_records_the_geometry_and_trains_as_without(tmp_path, monkeypatch, capsys):
    use_tiny(monkeypatch, make_data())
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    arguments = ["--epochs", "2", "--batch_size", "11", "--output"]
    assert train_cifar.main([*arguments, str(plain)]) == 0
    assert train_cifar.main([*arguments, str(watched), "--geometry"]) == 0
    assert not (plain / "geometry.jsonl").exists()
    lines = [json.loads(line) for line in (watched / "geometry.jsonl").read_text().splitlines()]
    assert [line.pop("epoch") for line in lines] == [1, 2]
    for line in lines:
        for name in {name.rpartition("/")[0] for name in line}:
            low, mean, high = (line[f"{name}/{kind}"] for kind in ("min", "mean", "max"))
            assert 0 <= low <= mean <= high, name
        assert line["conv/kernel/angle/min"] > 0 and line["conv/kernel/radius/min"] > 0
        assert "conv/kernel/momentum_radial_fraction/mean" in line
    losses = [
        [
            json.loads(line)["train_loss"]
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (plain, watched)
    ]
    # XLA may fuse, and so round, differently.
    np.testing.assert_allclose(*losses, rtol=1e-4)

    # A run is resumed as it began.
    capsys.readouterr()
    assert train_cifar.main([*arguments, str(plain), "--resume", "--geometry"]) == 2
    assert "holds a run with geometry False and not True" in capsys.readouterr().err


def test_geometry_needs_an_output(capsys):
    with pytest.raises(SystemExit) as end:
        train_cifar.main(["--geometry"])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("error: --geometry needs --output\n")
