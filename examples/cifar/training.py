"""Training and evaluation: one pure step function, two drivers.

The step is a function of (parameters, batch statistics, optimizer state) and of the epoch's order
and key; it gathers its batch from the data set on the device, augments and normalises it. On a GPU
the epoch's full batches run as one `lax.scan`; on a CPU, where XLA runs convolutions inside a scan
some twenty times slower, a Python loop calls the compiled step.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cifar.data import DataSet, Split, augment, normalise

EVALUATION_BATCH = 1250  # divides the validation and test splits of CIFAR


class TrainState(NamedTuple):
    """What a training step changes."""

    params: nnx.State
    batch_stats: nnx.State
    opt_state: optax.OptState


class Batch(NamedTuple):
    """Figures of one batch, or of several along a leading axis."""

    loss: jax.Array  # mean cross-entropy in nats, float32
    correct: jax.Array  # number of images, int32


class Metrics(NamedTuple):
    """Figures of one epoch: losses in nats, accuracies in 0..1, training images per second."""

    epoch: int  # from 1
    learning_rate: float  # of the epoch's first step
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float
    images_per_second: float


class Result(NamedTuple):
    """Figures on the test images of the network of the epoch with the best validation accuracy."""

    test_accuracy: float
    test_loss: float
    best_epoch: int
    compile_seconds: float


class NonFiniteLoss(Exception):
    """A loss became NaN or infinite; the message says which and when."""


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Number of optimizer steps of an epoch, the last and possibly incomplete batch included."""
    return math.ceil(images / batch_size)


def split_model(
    model: nnx.Module, tx: optax.GradientTransformation
) -> tuple[nnx.GraphDef, TrainState]:
    """The static part of a model, and its initial state for the step function."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, TrainState(params, batch_stats, tx.init(params))


def epoch_order(key: jax.Array, epoch: int | jax.Array, images: int) -> tuple[jax.Array, jax.Array]:
    """The order of an epoch's images, int32 [images], and the key of its augmentations.

    Depends on `key` and `epoch` alone, so any epoch can be reproduced without the earlier ones.
    """
    shuffle_key, augment_key = jax.random.split(jax.random.fold_in(key, epoch))
    return jax.random.permutation(shuffle_key, images), augment_key


def make_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, data: DataSet, batch_size: int
) -> Callable[..., tuple[TrainState, Batch]]:
    """Build the training step `step(state, split, order, key, index, *, size)`.

    It takes the batch `index` of an epoch: the `size` images that follow the first
    `index * batch_size` of `order`. It is pure, so it can be jitted, scanned over `index`, and
    mapped over seeds (over `state`, `order` and `key`).

    Args:
      graphdef: of a model that is called as `model(images, train=True)`.
      tx: the optimizer.
      data: where augmentation, mean and deviation are read from; its images are not used.
      batch_size: images in a full batch.
    """

    def loss_fn(params, batch_stats, images, labels):
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        logits = model(images, train=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.int32)
        return loss, (correct, nnx.state(model, nnx.BatchStat))

    def step(
        state: TrainState,
        split: Split,
        order: jax.Array,
        key: jax.Array,
        index: int | jax.Array,
        *,
        size: int = batch_size,
    ) -> tuple[TrainState, Batch]:
        chosen = jax.lax.dynamic_slice_in_dim(order, index * batch_size, size)
        images = augment(
            jax.random.fold_in(key, index), split.images[chosen], pad=data.pad, flip=data.flip
        )
        (loss, (correct, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params,
            state.batch_stats,
            normalise(images, data.mean, data.std),
            split.labels[chosen],
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, batch_stats, opt_state), Batch(loss, correct)

    return step


def make_epoch(
    step: Callable[..., tuple[TrainState, Batch]],
    state: TrainState,
    split: Split,
    *,
    batch_size: int,
    key: jax.Array,
    driver: str,
) -> Callable[..., tuple[TrainState, float, float]]:
    """Compile `step`, and build `run(state, epoch, on_batch=None)` that trains for one epoch.

    `run` uses every image once, donates the buffers of `state`, and returns the new state with the
    epoch's mean loss and accuracy. It calls `on_batch(images, loss, accuracy)` at the start, with
    zeros, and then with the figures so far: after each step with the driver "loop", and with "scan"
    after the full batches and after the incomplete one. It raises `NonFiniteLoss` as soon as it
    sees one.

    Args:
      step: from `make_step`, with the same `batch_size`.
      state: the state's shapes.
      split: the training images and labels, on the device.
      batch_size: at most the number of images.
      key: of the order and the augmentations.
      driver: "loop" or "scan".
    """
    images = len(split.labels)
    full, rest = divmod(images, batch_size)

    def scan(state, split, order, key):
        return jax.lax.scan(lambda s, i: step(s, split, order, key, i), state, jnp.arange(full))

    def last(state, split, order, key):
        return step(state, split, order, key, full, size=rest)

    order_of = jax.jit(lambda epoch: epoch_order(key, epoch, images)).lower(0).compile()
    args = (state, split, *order_of(0))
    if driver == "scan":
        run_full = jax.jit(scan, donate_argnums=0).lower(*args).compile()
    else:
        run_full = jax.jit(step, donate_argnums=0).lower(*args, 0).compile()
    run_last = jax.jit(last, donate_argnums=0).lower(*args).compile() if rest else None

    def run(
        state: TrainState,
        epoch: int,
        on_batch: Callable[[int, float, float], None] | None = None,
    ) -> tuple[TrainState, float, float]:
        order, augment_key = order_of(epoch)
        seen, loss_sum, correct = 0, 0.0, 0
        if on_batch:
            on_batch(0, 0.0, 0.0)

        def account(batch: Batch, size: int) -> None:
            nonlocal seen, loss_sum, correct
            losses, corrects = np.atleast_1d(*jax.device_get(batch))
            bad = np.flatnonzero(~np.isfinite(losses))
            if bad.size:
                index = seen // batch_size + int(bad[0])
                raise NonFiniteLoss(
                    f"the training loss is {losses[bad[0]]} at step {index + 1} of epoch {epoch}"
                )
            seen += size * len(losses)
            loss_sum += size * float(losses.sum(dtype=np.float64))
            correct += int(corrects.sum())
            if on_batch:
                on_batch(seen, loss_sum / seen, correct / seen)

        if driver == "scan":
            state, batches = run_full(state, split, order, augment_key)
            account(batches, batch_size)
        else:
            for index in range(full):
                state, batch = run_full(state, split, order, augment_key, index)
                account(batch, batch_size)
        if run_last:
            state, batch = run_last(state, split, order, augment_key)
            account(batch, rest)
        return state, loss_sum / images, correct / images

    return run


def make_evaluation(
    graphdef: nnx.GraphDef, state: TrainState, split: Split, data: DataSet, *, batch_size: int
) -> Callable[[nnx.State, nnx.State], tuple[float, float]]:
    """Compile an evaluation with running statistics, `evaluate(params, batch_stats)`.

    It returns the mean loss and the accuracy over `split`, each image once.

    Args:
      graphdef: of a model that is called as `model(images, train=False)`.
      state: the state's shapes.
      split: the images and labels to evaluate on, on the device.
      data: where mean and deviation are read from.
      batch_size: images at a time; the last batch is padded, and its padding masked.
    """
    count = len(split.labels)

    def sums(params, batch_stats, split, start):
        wanted = start + jnp.arange(batch_size)
        chosen = jnp.minimum(wanted, count - 1)
        labels = split.labels[chosen]
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        logits = model(normalise(split.images[chosen], data.mean, data.std), train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = jnp.argmax(logits, axis=-1) == labels
        real = wanted < count
        return jnp.sum(losses, where=real), jnp.sum(correct, where=real, dtype=jnp.int32)

    compiled = jax.jit(sums).lower(state.params, state.batch_stats, split, 0).compile()

    def evaluate(params: nnx.State, batch_stats: nnx.State) -> tuple[float, float]:
        starts = range(0, count, batch_size)
        parts = jax.device_get([compiled(params, batch_stats, split, start) for start in starts])
        loss_sum = sum(float(loss) for loss, _ in parts)
        return loss_sum / count, sum(int(correct) for _, correct in parts) / count

    return evaluate


def fit(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    data: DataSet,
    *,
    schedule: optax.Schedule,
    epochs: int,
    batch_size: int,
    seed: int,
    driver: str | None = None,
    on_batch: Callable[[int, float, float], None] | None = None,
    on_epoch: Callable[[Metrics], None] | None = None,
) -> Result:
    """Train, and test the network of the epoch with the best validation accuracy.

    Of several such epochs the one with the lowest validation loss counts: on a small validation
    set many epochs share the best accuracy.

    Args:
      model: called as `model(images, train=...)` on float images [n, 32, 32, 3].
      tx: the optimizer, its learning rate included.
      data: the data set; its images and labels are moved to the device once.
      schedule: the learning rate that `tx` uses, for the metrics.
      epochs: at least 1.
      batch_size: from 1 to the number of training images; an epoch's last batch may be smaller.
      seed: of order and augmentation.
      driver: "scan" (one call per epoch) or "loop" (one call per step); by default "loop" on a
        CPU and "scan" elsewhere.
      on_batch: called with the images, mean loss and accuracy so far, from each epoch's start on.
      on_epoch: called with each epoch's metrics.

    Raises:
      NonFiniteLoss: when the training or validation loss is NaN or infinite.
    """
    driver = driver or ("loop" if jax.default_backend() == "cpu" else "scan")
    start = time.perf_counter()
    train, valid, test = jax.device_put((data.train, data.valid, data.test))
    graphdef, state = split_model(model, tx)
    key = jax.random.split(jax.random.key(seed))[1]  # not the key that a model's init starts from
    step = make_step(graphdef, tx, data, batch_size)
    run_epoch = make_epoch(step, state, train, batch_size=batch_size, key=key, driver=driver)
    size = min(EVALUATION_BATCH, max(64, len(valid.labels)))
    validate = make_evaluation(graphdef, state, valid, data, batch_size=size)
    run_test = make_evaluation(graphdef, state, test, data, batch_size=size)
    compile_seconds = time.perf_counter() - start

    steps = steps_per_epoch(len(train.labels), batch_size)
    best, best_epoch, best_figures = (state.params, state.batch_stats), 0, (-1.0, 0.0)
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        state, train_loss, train_accuracy = run_epoch(state, epoch, on_batch)
        seconds = time.perf_counter() - start
        valid_loss, valid_accuracy = validate(state.params, state.batch_stats)
        if not math.isfinite(valid_loss):
            raise NonFiniteLoss(f"the validation loss is {valid_loss} after epoch {epoch}")
        figures = (valid_accuracy, -valid_loss)
        if figures > best_figures:
            # Copied, because the next step donates these buffers.
            best = jax.tree.map(jnp.copy, (state.params, state.batch_stats))
            best_epoch, best_figures = epoch, figures
        if on_epoch:
            on_epoch(
                Metrics(
                    epoch=epoch,
                    # Rounded to what float32 holds: 0.001 and not 0.0010000000474974513.
                    learning_rate=float(f"{schedule((epoch - 1) * steps):.6g}"),
                    train_loss=train_loss,
                    train_accuracy=train_accuracy,
                    valid_loss=valid_loss,
                    valid_accuracy=valid_accuracy,
                    images_per_second=len(train.labels) / seconds,
                )
            )
    test_loss, test_accuracy = run_test(*best)
    return Result(test_accuracy, test_loss, best_epoch, compile_seconds)
