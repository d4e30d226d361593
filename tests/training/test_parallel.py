"""Several seeds at once and several devices give the runs of each alone and of one."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from images import programs, recipes
from tiny import Tiny, close, end_results, fit, make_data, prepare, start

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONSTANT = optax.constant_schedule(0.1)


def alone_and_together(tx, *, seeds=(0, 7, 3), make_model=None):
    """The same 20 steps one by one, and mapped over seeds."""
    kwargs = {"batch_size": 11, "driver": "loop"}
    if make_model:
        kwargs["make_model"] = make_model
    images = make_data(pad=2, flip=True)
    trainer, *first = prepare(tx, images, seeds=seeds[:1], **kwargs)
    others = [start(tx, images, seeds=(seed,), **kwargs) for seed in seeds[1:]]
    alone = []
    for of_seed, run in [first, *others]:
        run = fit(trainer, of_seed, run, epochs=10, schedule=CONSTANT)
        alone.append((run, end_results(trainer, run)[0]))
    trainer, of_seeds, run = prepare(tx, images, seeds=seeds, **kwargs)
    run = fit(trainer, of_seeds, run, epochs=10, schedule=CONSTANT)
    return alone, (run, end_results(trainer, run))


def check_alone_and_together(alone, together, tolerance: float) -> None:
    run, results = together
    for i, (one, result) in enumerate(alone):
        of_seed = jax.tree.map(lambda x, i=i: x[i : i + 1], (run.state, run.best))
        close(of_seed, (one.state, one.best), tolerance)
        close(results[i], result, tolerance)
        pairs = zip(run.progress.history[i], one.progress.history[0], strict=True)
        for mapped, single in pairs:
            assert mapped.epoch == single.epoch and mapped.images_per_second > 0
            close(mapped[1:-1], single[1:-1], tolerance)
    # What was compared differs between the seeds.
    assert len({history[0].train_loss for history in run.progress.history}) == len(alone)


def test_seeds_at_once_are_those_of_each_alone():
    """In float64, so that rounding hides nothing; that the optimizers can be mapped is tested."""
    recipe = recipes.recipe("cifar10", "resnet20", "adamsrt")[0]

    def in_float64(seed):
        model = Tiny(4, dtype=jnp.float64, rngs=nnx.Rngs(seed))
        for _, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.Param | nnx.BatchStat):
                variable.set_value(variable[...].astype(jnp.float64))
        return model

    with jax.enable_x64(True):
        tx = recipes.make_optimizer("adamsrt", recipe, recipe.learning_rate)
        both = alone_and_together(tx, make_model=in_float64)
        check_alone_and_together(*both, 1e-8)


def trained_on(devices: int, driver: str) -> tuple:
    """Of 22 images, 8 devices share the batches of 8 and each computes the last of 6."""
    trainer, seeds, run = prepare(
        optax.adam(1e-2),
        make_data(pad=2, flip=True),
        batch_size=8,
        seeds=(0, 1),
        devices=devices,
        driver=driver,
    )
    run = fit(trainer, seeds, run, epochs=5, schedule=CONSTANT)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(run.state))
    assert len(jax.tree.leaves(run.state)[0].sharding.device_set) == devices
    curves = [[m._replace(images_per_second=0) for m in h] for h in run.progress.history]
    return curves, run.best, end_results(trainer, run)


@pytest.fixture(scope="module")
def on_one_device(compiled_quickly) -> tuple:
    return trained_on(1, "loop")


@pytest.mark.parametrize("driver", ["loop", "scan"])
def test_devices_that_share_a_batch_give_the_same_run(driver, on_one_device):
    # 15 steps in float32, summed in another order.
    close(trained_on(8, driver), on_one_device, 1e-4)


def test_a_batch_is_computed_in_parts():
    """The compiled step of 8 devices holds an eighth of the batch in each, after normalisation."""
    images, tx, mesh = (
        make_data(pad=2, flip=True),
        optax.sgd(0.1),
        programs.make_mesh(jax.devices()),
    )
    graphdef, state = programs.split_model(Tiny(4, rngs=nnx.Rngs(0)), tx)
    step = jax.jit(programs.make_step(graphdef, tx, images, 16, mesh))
    args = (state, images.train, *programs.epoch_order(jax.random.key(0), 1, jnp.arange(22)), 0)
    text = step.lower(*args).compile().as_text()
    assert "f32[2,32,32,3]" in text and "f32[16,32,32,3]" not in text
