"""The trainer: an epoch's batches, the two drivers, evaluation, which epoch is tested."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cifar import recipes, training
from cifar.data import DataSet, Split
from tiny import Tiny, make_data


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
