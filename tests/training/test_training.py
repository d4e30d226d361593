"""The trainer: an epoch's batches, the two drivers, evaluation, failure, going on."""

import json
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from images import data, figures, programs, recipes
from images.data import Split
from tiny import Tiny, close, end_results, fit, make_data, make_split, prepare
from training import loop

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONSTANT = optax.constant_schedule(0.1)


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
@pytest.mark.parametrize("batch_size", [1, 5, 22])
def test_an_epoch_uses_every_training_image_once(driver, batch_size):
    numbered = np.broadcast_to(np.arange(23, dtype=np.uint8)[:, None, None, None], (23, 32, 32, 3))
    images = make_data()._replace(mean=(0.0,) * 3, std=(1 / 255,) * 3)
    images = images._replace(train=Split(numbered, images.train.labels))
    make_model = lambda seed: Spy(23)  # noqa: E731
    seeds = (0, 2)
    trainer, of_seeds, run = prepare(
        optax.sgd(0.0),
        images,
        batch_size=batch_size,
        make_model=make_model,
        seeds=seeds,
        driver=driver,
    )
    for epochs in (1, 2, 3):
        run = fit(trainer, of_seeds, run, epochs=epochs, schedule=CONSTANT)
        for i, seed in enumerate(seeds):
            train, _ = data.validation_split(23, seed)
            expected = np.isin(np.arange(23), train) * epochs
            np.testing.assert_array_equal(run.state.batch_stats["seen"][...][i], expected)
    # The last batch of the epoch was 22 modulo the batch size.
    assert (np.asarray(run.state.batch_stats["last"][...][0]) >= 0).sum() == batch_size


def test_order_differs_by_epoch_and_seed_and_can_be_reproduced():
    places = jnp.arange(100, 200)
    orders = {
        (seed, epoch): np.asarray(programs.epoch_order(jax.random.key(seed), epoch, places)[0])
        for seed in (0, 1)
        for epoch in (1, 2, 3)
    }
    for order in orders.values():
        np.testing.assert_array_equal(np.sort(order), places)
    assert len({order.tobytes() for order in orders.values()}) == len(orders)
    again, _ = programs.epoch_order(jax.random.key(1), 3, places)
    np.testing.assert_array_equal(again, orders[1, 3])


@cache
def compiled(driver: str) -> tuple[loop.Trainer, programs.Seeds, loop.Run]:
    """The programs that several tests run: 4 full batches and one of 2, for two seeds."""
    images = make_data(pad=2, flip=True)
    return prepare(optax.adam(1e-2), images, batch_size=5, seeds=(0, 1), driver=driver)


def copy(run: loop.Run) -> loop.Run:
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, run)


def test_the_two_drivers_agree():
    runs, calls = {}, {"loop": [], "scan": []}
    for driver in calls:
        trainer, seeds, start = compiled(driver)
        on_batch = calls[driver].append
        run = fit(trainer, seeds, copy(start), epochs=2, schedule=CONSTANT, on_batch=on_batch)
        histories = [[m._replace(images_per_second=0) for m in h] for h in run.progress.history]
        runs[driver] = run.state, run.best, histories
        # An epoch's figures are those of its last call.
        last = calls[driver][-1]
        assert run.progress.history[0][-1].train_loss == last.loss_sum[0] / 22
        assert run.progress.history[0][-1].train_accuracy == last.counts["correct"][0] / 22
    assert [p.step for p in calls["loop"]] == [0, 1, 2, 3, 4, 5] * 2
    assert [p.step for p in calls["scan"]] == [0, 4, 5] * 2
    close(*runs.values(), 1e-5)  # ten steps in float32, compiled differently


@pytest.mark.parametrize(("total", "devices"), [(50, 1), (1400, 1), (3000, 8)])
def test_evaluation_covers_every_image_once(total, devices):
    images = make_data()._replace(test=make_split(total, 2))

    def make_model(seed):
        model = Tiny(4, rngs=nnx.Rngs(seed))
        model.bn.mean[...] = jnp.array([0.1, -0.2, 0.3, 0.0])
        model.bn.var[...] = jnp.array([0.5, 2.0, 1.0, 3.0])
        return model

    trainer, _, run = prepare(
        optax.sgd(0.0), images, batch_size=22, make_model=make_model, seeds=(5, 6), devices=devices
    )
    scores = trainer.test(run.best)
    losses, accuracies = scores["loss"], scores["accuracy"]

    x = (images.test.images / 255.0 - 0.5) / 0.25
    patches = x.reshape(total, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    for i, seed in enumerate((5, 6)):
        model = make_model(seed)
        y = np.tensordot(patches, np.asarray(model.conv.kernel[...], np.float64), axes=3)
        y = (y - np.asarray(model.bn.mean[...])) / np.sqrt(np.asarray(model.bn.var[...]) + 1e-5)
        y = np.maximum(y, 0).mean(axis=(1, 2)) @ np.asarray(model.linear.kernel[...])
        log_p = y - np.log(np.exp(y).sum(axis=1, keepdims=True))
        assert accuracies[i] == np.mean(y.argmax(axis=1) == images.test.labels)
        # 1e-5: the network in float32 against float64.
        expected = -log_p[np.arange(total), images.test.labels].mean()
        assert losses[i] == pytest.approx(expected, rel=1e-5)


class Clock(nnx.Module):
    """Predicts the class floor(training steps / 2), with more confidence at each step."""

    def __init__(self, start=0):
        self.weight = nnx.Param(jnp.zeros(()))
        self.steps = nnx.BatchStat(jnp.array(start, jnp.int32))

    def __call__(self, x, *, train):
        if train:
            self.steps[...] = self.steps[...] + 1
        logits = 2.0 * self.steps[...] * jax.nn.one_hot(self.steps[...] // 2, 4)
        return jnp.broadcast_to(logits, (len(x), 4)) + self.weight[...]


@pytest.mark.parametrize("driver", ["loop", "scan"])
def test_of_the_epochs_with_the_best_validation_accuracy_the_surest_is_tested(driver):
    images = make_data()
    images = images._replace(
        train=images.train._replace(labels=np.full(23, 2, np.int32)),
        test=images.test._replace(labels=np.full(70, 2, np.int32)),
    )
    schedule = recipes.step_schedule(0.1, (1, 3, 5))
    trainer, seeds, run = prepare(
        optax.sgd(0.0), images, batch_size=22, make_model=Clock, seeds=(0, 2), driver=driver
    )
    # An epoch has one step: the class is 2 after epochs 4 and 5; with seed 2, after 2 and 3.
    run = fit(trainer, seeds, run, epochs=7, schedule=schedule)
    first, second = run.progress.history
    assert [m.epoch for m in first] == [m.epoch for m in second] == [1, 2, 3, 4, 5, 6, 7]
    assert [m.valid_accuracy for m in first] == [0, 0, 0, 1, 1, 0, 0]
    assert [m.valid_accuracy for m in second] == [0, 1, 1, 0, 0, 0, 0]
    rates = [0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    assert [m.learning_rate for m in first] == pytest.approx(rates)
    results = end_results(trainer, run)
    assert [(r.best_epoch, r.test_accuracy) for r in results] == [(5, 1.0), (3, 1.0)]
    for result in results:
        assert result.test_loss == pytest.approx(np.log(1 + 3 * np.exp(-10)), rel=1e-2)


def nan_after_two(step: Any) -> jax.Array:
    return jnp.where(step < 2, 0.0, jnp.nan)


@pytest.mark.parametrize("driver", ["loop", "scan"])
def test_a_loss_that_is_not_finite_ends_the_run(driver):
    tx = optax.scale_by_schedule(nan_after_two)
    trainer, seeds, run = prepare(tx, make_data(), batch_size=5, driver=driver)
    calls = []
    run = fit(
        trainer, seeds, run, epochs=9, schedule=CONSTANT, on_batch=lambda p: calls.append(p.step)
    )
    # The third update makes the parameters NaN, so the fourth loss is the first NaN.
    assert run.progress.failed == ["the training loss is nan at step 4 of epoch 1"]
    assert calls == ([0, 1, 2, 3] if driver == "loop" else [0])
    assert end_results(trainer, run) == [None]


def test_a_validation_loss_that_is_not_finite_ends_the_run():
    # The third update, the last of the epoch, makes the parameters NaN after the last loss.
    tx = optax.scale_by_schedule(nan_after_two)
    trainer, seeds, run = prepare(tx, make_data(), batch_size=8)
    run = fit(trainer, seeds, run, epochs=2, schedule=nan_after_two)
    assert run.progress.failed == ["the validation loss is nan after epoch 1"]
    assert run.progress.history == [[]] and run.progress.epoch == 2


class Fragile(Tiny):
    """Its loss becomes NaN in the first training step, for seed 1."""

    def __init__(self, seed):
        super().__init__(4, rngs=nnx.Rngs(seed))
        self.healthy = nnx.BatchStat(jnp.array(0.0 if seed == 1 else 1.0))

    def __call__(self, x, *, train):
        return super().__call__(x, train=train) / self.healthy[...] * self.healthy[...]


@cache
def trained(seeds: tuple[int, ...], driver: str) -> tuple[loop.Progress, list]:
    options = {"batch_size": 11, "make_model": Fragile, "seeds": seeds, "driver": driver}
    trainer, of_seeds, run = prepare(optax.adam(1e-2), make_data(), **options)
    run = fit(trainer, of_seeds, run, epochs=3, schedule=CONSTANT)
    return run.progress, end_results(trainer, run)


@pytest.mark.parametrize("driver", ["loop", "scan"])
def test_a_seed_that_fails_leaves_the_others_alone(driver):
    progress, results = trained((0, 1, 2), driver)
    assert progress.failed == [None, "the training loss is nan at step 1 of epoch 1", None]
    assert [len(history) for history in progress.history] == [3, 0, 3]
    assert results[1] is None
    _, (alone,) = trained((2,), "loop")
    close(results[2], alone, 1e-5)


def test_a_run_cut_within_an_epoch_goes_on_with_the_other_driver():
    """On a GPU, a run that a CPU began."""
    cut_by, seeds, start = compiled("loop")
    scan, _, _ = compiled("scan")
    go_on = partial(fit, seeds=seeds, epochs=2, schedule=CONSTANT)
    ends = []
    for at in (3, 4, 7, 10):  # of 10 steps
        answers = iter([False] * at + [True])
        run = go_on(cut_by, run=copy(start), stop=lambda answers=answers: next(answers))
        run = go_on(scan, run=run)
        ends.append((run.state, run.best, [[m[:-1] for m in h] for h in run.progress.history]))
    for end in ends[:-1]:
        close(end, ends[-1], 1e-5)  # compiled differently


@pytest.mark.parametrize("driver", ["loop", "scan"])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_end(driver):
    trainer, seeds, start = compiled(driver)
    train = partial(fit, trainer, seeds, epochs=3, schedule=CONSTANT)
    calls = []
    whole = train(copy(start), stop=lambda: calls.append(0))
    for at in range(len(calls)):
        answers = iter([False] * at + [True])
        cut = train(copy(start), stop=lambda answers=answers: next(answers))
        assert (cut.progress.epoch, cut.progress.step) != (4, 0)
        # As a checkpoint keeps it.
        saved = json.loads(json.dumps(loop.to_json(cut.progress)))
        progress = loop.from_json(saved, start.progress, figures.Metrics)
        end = train(cut._replace(progress=progress))
        jax.tree.map(
            np.testing.assert_array_equal, (end.state, end.best), (whole.state, whole.best)
        )
        for a, b in zip(whole.progress, end.progress, strict=True):
            if isinstance(a, list) and a and isinstance(a[0], list):
                assert [[m[:-1] for m in h] for h in a] == [[m[:-1] for m in h] for h in b]
            elif not isinstance(a, float):
                assert a == b


def test_bfloat16_is_for_activations_alone():
    def make_model(seed):
        return Tiny(4, dtype="bfloat16", rngs=nnx.Rngs(seed))

    recipe = recipes.recipe("cifar10", "resnet20", "adamsrt")[0]
    tx = recipes.make_optimizer("adamsrt", recipe, 1e-2)
    curves = []
    for make in (make_model, lambda seed: Tiny(4, rngs=nnx.Rngs(seed))):
        trainer, seeds, run = prepare(tx, make_data(), batch_size=11, make_model=make)
        order = trainer.shuffle(seeds, 1)
        state, batch = trainer.train(run.state, order, 0)
        assert batch.loss.dtype == jnp.float32
        kinds = {x.dtype for x in jax.tree.leaves(state)}
        assert kinds <= {jnp.dtype("float32"), jnp.dtype("int32")}
        run = run._replace(state=state)
        run = fit(trainer, seeds, run, epochs=6, schedule=CONSTANT)
        curves.append([m.train_loss for m in run.progress.history[0]])
    assert curves[0] != curves[1]
    # 8 bits of mantissa, 0.004 a rounding; what the updates make of it grows with the epochs.
    np.testing.assert_allclose(curves[0][:3], curves[1][:3], rtol=0.01)
    assert curves[0][-1] < 0.9 * curves[0][0]
