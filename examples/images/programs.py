"""What a training compiles: one pure step function, mapped over seeds, and evaluations.

The step is a function of (parameters, batch statistics, optimizer state) and of the epoch's order
and key; it gathers its batch from the data set on the devices, augments and normalises it. It is
mapped over seeds, so every array outside of it has a leading axis of seeds, also when there is one
seed only (which costs nothing). All arrays are whole on every device of a mesh, whose axis `data`
shares out the images of a batch.

On a GPU the epoch's full batches run as one `lax.scan`; on a CPU, where XLA runs convolutions
inside a scan some twenty times slower, a Python loop calls the compiled step.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from images.data import DataSet, Split, augment, normalise, validation_split
from training import geometry
from training.loop import Batch, Run, Scores, Trainer, choose, first_progress

COUNTS, SCORES = ("correct",), ("loss", "accuracy")  # of a batch; of an evaluation
EVALUATION_BATCH = 1250  # divides the validation and test splits of CIFAR


class TrainState(NamedTuple):
    """What a training step changes."""

    params: nnx.State
    batch_stats: nnx.State
    opt_state: optax.OptState


class Network(NamedTuple):
    """What an evaluation needs."""

    params: nnx.State
    batch_stats: nnx.State


class Seeds(NamedTuple):
    """What the seeds of a program differ in from the outset, along a leading axis."""

    key: jax.Array  # of order and augmentation
    train: jax.Array  # int32 [seeds, images]: the places of the images to train on
    valid: jax.Array  # int32 [seeds, images]: those for validation


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh with one axis, `data`, along which the images of a batch are shared out."""
    # Under explicit axes, JAX's default, the gradient of Optax's integer-label loss fails.
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Number of optimizer steps of an epoch, the last and possibly incomplete batch included."""
    return math.ceil(images / batch_size)


def split_model(
    model: nnx.Module, tx: optax.GradientTransformation
) -> tuple[nnx.GraphDef, TrainState]:
    """The static part of a model, and its initial state for the step function."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, TrainState(params, batch_stats, tx.init(params))


def start_run(
    make_model: Callable[[int], nnx.Module],
    tx: optax.GradientTransformation,
    seeds: Sequence[int],
    images: int,
    mesh: Mesh,
) -> tuple[nnx.GraphDef, Seeds, Run]:
    """Begin a run of several seeds.

    Args:
      make_model: gives the model with the initial weights of a seed.
      tx: the optimizer.
      seeds: of validation split, initial weights, order and augmentation; at least one.
      images: number of training images of the data set, those for validation included.
      mesh: from `make_mesh`.
    """
    split = [split_model(make_model(seed), tx) for seed in seeds]
    # The model's init starts from the seed's own key.
    keys = [jax.random.key_data(jax.random.split(jax.random.key(seed))[1]) for seed in seeds]
    places = [validation_split(images, seed) for seed in seeds]
    # Through NumPy, because only that can be put on the devices of other processes.
    state, key, train, valid = jax.device_put(
        jax.tree.map(
            lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]),
            *[(s, k, *p) for (_, s), k, p in zip(split, keys, places, strict=True)],
        ),
        NamedSharding(mesh, PartitionSpec()),
    )
    of_seeds = Seeds(jax.random.wrap_key_data(key), train, valid)
    best = jax.tree.map(jnp.copy, _network(state))
    return split[0][0], of_seeds, Run(state, best, first_progress(len(seeds), COUNTS, SCORES))


def _network(state: TrainState) -> Network:
    return Network(state.params, state.batch_stats)


def epoch_order(
    key: jax.Array, epoch: int | jax.Array, places: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """An epoch's training images in their order, int32 [images], and the key of its augmentations.

    Depends on `key`, `epoch` and the `places` of the images alone, so any epoch can be reproduced
    without the earlier ones.
    """
    shuffle_key, augment_key = jax.random.split(jax.random.fold_in(key, epoch))
    return jax.random.permutation(shuffle_key, places), augment_key


def make_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    data: DataSet,
    batch_size: int,
    mesh: Mesh,
) -> Callable[..., tuple[TrainState, Batch]]:
    """Build the training step of one seed, `step(state, split, order, key, index, *, size)`.

    It takes the batch `index` of an epoch: the `size` images that follow the first
    `index * batch_size` of `order`. It is pure, so it can be jitted, scanned over `index`, and
    mapped over seeds (over `state`, `order` and `key`).

    Args:
      graphdef: of a model that is called as `model(images, train=True)`.
      tx: the optimizer.
      data: where augmentation, mean and deviation are read from; its images are not used.
      batch_size: images in a full batch.
      mesh: the devices that share a batch.
    """

    def loss_fn(params, batch_stats, images, labels):
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        losses, correct = _losses(model(images, train=True), labels)
        return losses.mean(), (correct.sum(dtype=jnp.int32), nnx.state(model, nnx.BatchStat))

    def step(
        state: TrainState,
        split: Split,
        order: jax.Array,
        key: jax.Array,
        index: int | jax.Array,
        *,
        size: int = batch_size,
    ) -> tuple[TrainState, Batch]:
        chosen = _share(jax.lax.dynamic_slice_in_dim(order, index * batch_size, size), mesh)
        images = augment(
            jax.random.fold_in(key, index), split.images[chosen], pad=data.pad, flip=data.flip
        )
        (loss, (correct, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params,
            state.batch_stats,
            _share(normalise(images, data.mean, data.std), mesh),
            split.labels[chosen],
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        batch = Batch(loss, {"correct": correct}, geometry.measured(opt_state))
        return TrainState(params, batch_stats, opt_state), batch

    return step


def over_seeds(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step of one seed as that of several, whose state, order and key have a leading axis."""
    return jax.vmap(step, (0, None, 0, 0, None))


def over_steps(step: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The first `count` steps of an epoch in one call; its `index` is 0."""

    def scan(state, split, order, key, index):
        del index

        def body(state, i):
            return step(state, split, order, key, i)

        return jax.lax.scan(body, state, jnp.arange(count))

    return scan


def compile_trainer(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    data: DataSet,
    seeds: Seeds,
    state: TrainState,
    *,
    batch_size: int,
    mesh: Mesh,
    driver: str | None = None,
) -> Trainer:
    """Compile all that a training runs; the data set is moved to the devices once.

    The programs serve for any run with as many seeds.

    Args:
      graphdef: of a model that is called as `model(images, train=...)` on float images
        [n, 32, 32, 3].
      tx: the optimizer, its learning rate included.
      data: the data set.
      seeds: from `start_run`.
      state: from `start_run`, for its shapes.
      batch_size: from 1 to the number of training images; an epoch's last batch may be smaller.
      mesh: from `make_mesh`. A batch that its devices do not divide is computed whole on each.
      driver: "scan" (an epoch's full batches in one call) or "loop" (one call per step); by default
        "loop" on a CPU and "scan" elsewhere.
    """
    began = time.perf_counter()
    driver = driver or ("loop" if jax.default_backend() == "cpu" else "scan")
    whole = NamedSharding(mesh, PartitionSpec())
    train_split, test_split = jax.device_put((data.train, data.test), whole)
    images = seeds.train.shape[1]
    full, rest = divmod(images, batch_size)

    def compiled(function, *args, donate=()):
        return jax.jit(function, donate_argnums=donate, out_shardings=whole).lower(*args).compile()

    def shuffled(seeds, epoch):
        return jax.vmap(epoch_order, (0, None, 0))(seeds.key, epoch, seeds.train)

    step = make_step(graphdef, tx, data, batch_size, mesh)
    map_step, last = over_seeds(step), over_seeds(partial(step, size=rest))
    shuffle = compiled(shuffled, seeds, 0)
    args = (state, train_split, *shuffle(seeds, 0), 0)
    # Not compiled before it is called: a scan is cut only by a run that began with the loop.
    run_one = jax.jit(map_step, donate_argnums=0, out_shardings=whole)
    run_full = (
        compiled(over_steps(map_step, full), *args, donate=0)
        if driver == "scan"
        else run_one.lower(*args).compile()
    )
    run_last = compiled(last, *args, donate=0) if rest else run_full

    def train(state, order, index):
        program = run_last if index == full else run_full
        if driver == "scan" and 0 < index < full:
            program = run_one
        return program(state, train_split, *order, index)

    network = _network(state)
    count = len(seeds.key), len(data.test.labels)
    everything = jax.device_put(np.broadcast_to(np.arange(count[1], dtype=np.int32), count), whole)
    validate = _compile_evaluation(graphdef, data, network, train_split, seeds.valid, mesh)
    test = _compile_evaluation(graphdef, data, network, test_split, everything, mesh)
    return Trainer(
        items=images,
        steps=steps_per_epoch(images, batch_size),
        batch_size=batch_size,
        figures=geometry.names(state.opt_state),
        compile_seconds=time.perf_counter() - began,
        shuffle=shuffle,
        train=train,
        network=_network,
        validate=lambda network, seeds: validate(network, seeds.valid),
        test=lambda network: test(network, everything),
        choose=compiled(choose, np.ones(count[0], bool), network, network, donate=2),
    )


def _compile_evaluation(
    graphdef: nnx.GraphDef,
    data: DataSet,
    network: Network,
    split: Split,
    places: jax.Array,
    mesh: Mesh,
) -> Callable[[Network, jax.Array], Scores]:
    """An evaluation with running statistics of `places` of `split`: mean loss and accuracy."""
    count = places.shape[1]
    batch_size = min(EVALUATION_BATCH, max(64, count))
    batch_size += -batch_size % mesh.size

    def sums(network, split, places, start):
        wanted = start + jnp.arange(batch_size)
        chosen = _share(places[jnp.minimum(wanted, count - 1)], mesh)
        model = nnx.merge(graphdef, *network, copy=True)
        images = _share(normalise(split.images[chosen], data.mean, data.std), mesh)
        losses, correct = _losses(model(images, train=False), split.labels[chosen])
        real = wanted < count  # the last batch is padded
        return jnp.sum(losses, where=real), jnp.sum(correct, where=real, dtype=jnp.int32)

    mapped = jax.jit(
        jax.vmap(sums, (0, None, 0, None)), out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    compiled = mapped.lower(network, split, places, 0).compile()

    def evaluate(network: Network, places: jax.Array) -> Scores:
        starts = range(0, count, batch_size)
        parts = jax.device_get([compiled(network, split, places, start) for start in starts])
        means = np.asarray(parts, np.float64).sum(axis=0) / count
        return dict(zip(SCORES, means.tolist(), strict=True))

    return evaluate


def _losses(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each image in nats, in float32 at least, and whether it is right."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, jnp.argmax(logits, axis=-1) == labels


def _share(batch: jax.Array, mesh: Mesh) -> jax.Array:
    """Share a batch out among the devices, or leave it whole on each if they do not divide it."""
    spec = PartitionSpec("data") if len(batch) % mesh.size == 0 else PartitionSpec()
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, spec))
