"""What a training of a language model compiles: one pure step function, and an evaluation.

The step is a function of (parameters, optimizer state), a key and the step's number; it draws its
windows from the text on the devices, so that any step can be reproduced. It is mapped over seeds,
so every array outside of it has a leading axis of seeds, also when there is one seed only.

A mesh has two axes. Both share out the windows of a batch; `fsdp` shares out the parameters too,
and with them gradients, moments and radii: each array along its longest axis that it divides,
except the leading ones of seeds and layers.

On a GPU the steps between two evaluations run as one `lax.scan`; on a CPU a Python loop calls the
compiled step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from language.text import Text, draw_windows, spread_windows
from training import geometry
from training.loop import Batch, Run, Scores, Trainer, choose, first_progress

SCORES = ("loss",)  # of an evaluation
EVALUATED = 256  # windows of the validation text, at most
AXES = ("data", "fsdp")  # of a mesh


class TrainState(NamedTuple):
    """What a training step changes."""

    params: nnx.State
    opt_state: optax.OptState


def make_mesh(devices: Sequence[jax.Device], shape: tuple[int, int]) -> Mesh:
    """A mesh with the axes `data` and `fsdp`; the product of their sizes is that of the devices."""
    # Under explicit axes, JAX's default, the gradient of Optax's integer-label loss fails.
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 2, devices=devices)


def start_run(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    tx: optax.GradientTransformation,
    seeds: Sequence[int],
    mesh: Mesh,
) -> tuple[nnx.GraphDef, jax.Array, Run]:
    """Begin a run of several seeds, each parameter where the mesh has its place.

    Args:
      make_model: gives the model with initial weights.
      tx: the optimizer.
      seeds: of initial weights and windows; at least one.
      mesh: from `make_mesh`.

    Returns:
      The static part of the model, a key of each seed, and the run.
    """
    graphdef = nnx.split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))), nnx.Param)[0]

    def init(key: jax.Array) -> tuple[TrainState, jax.Array]:
        init_key, window_key = jax.random.split(key)
        params = nnx.state(make_model(nnx.Rngs(init_key)), nnx.Param)
        return TrainState(params, tx.init(params)), window_key

    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    shapes = jax.eval_shape(jax.vmap(init), keys)
    state, window_keys = jax.jit(jax.vmap(init), out_shardings=_shardings(shapes, mesh))(keys)
    best = jax.tree.map(jnp.copy, state.params)
    return graphdef, window_keys, Run(state, best, first_progress(len(seeds), [], SCORES))


def _shardings(state: Any, mesh: Mesh) -> Any:
    """Where each array of a state lies; those of the optimizer as the parameters of their paths.

    An array that has one number for several of a parameter's, such as for each group, is whole
    along those axes.
    """

    def name(path: Any) -> str:
        return jax.tree_util.keystr(path, simple=True, separator="/")

    params = {name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(state[0].params)}

    def place(path: Any, leaf: Any) -> NamedSharding:
        own = f"/{name(path)}"
        param = next((param for param in params if own.endswith(f"/{param}")), None)
        spec: list[str | None] = []
        if param is not None and len(params[param]) == len(leaf.shape):
            axis = _shared_axis(param, params[param], mesh.shape["fsdp"])
            if axis is not None and leaf.shape[axis] == params[param][axis]:
                spec = [None] * axis + ["fsdp"]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, state)


def _shared_axis(path: str, shape: Sequence[int], parts: int) -> int | None:
    """The axis of a parameter, with one of seeds in front, that is shared out in so many parts."""
    if not path.split("/")[-2].endswith(("kernel", "embedding")):  # a gain is small
        return None
    first = 2 if "blocks" in path else 1  # layers are gone through one after the other
    axes = [axis for axis in range(first, len(shape)) if shape[axis] % parts == 0]
    return max(axes, key=lambda axis: shape[axis], default=None) if parts > 1 else None


def make_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    shape: tuple[int, int],
    mesh: Mesh,
) -> Callable[..., tuple[TrainState, Batch]]:
    """Build the training step of one seed, `step(state, text, key, number)`.

    Args:
      graphdef: of a model that is called as `model(tokens)`.
      tx: the optimizer.
      shape: number of windows in a batch, and of tokens that each of them predicts.
      mesh: the devices that share a batch.
    """
    windows, context = shape

    def loss_fn(params: nnx.State, tokens: jax.Array) -> jax.Array:
        return _losses(nnx.merge(graphdef, params, copy=True), tokens).mean()

    def step(
        state: TrainState, text: jax.Array, key: jax.Array, number: jax.Array
    ) -> tuple[TrainState, Batch]:
        tokens = _share(draw_windows(text, key, number, (windows, context + 1)), mesh)
        loss, grads = jax.value_and_grad(loss_fn)(state.params, tokens)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state), Batch(loss, {}, geometry.measured(opt_state))

    return step


def compile_trainer(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    text: Text,
    keys: jax.Array,
    state: TrainState,
    *,
    shape: tuple[int, int],
    steps: int,
    mesh: Mesh,
    driver: str | None = None,
) -> Trainer:
    """Compile all that a training runs; the text is moved to the devices once.

    Args:
      graphdef: of a model that is called as `model(tokens)`.
      tx: the optimizer, its learning rate included.
      text: at least one window long in each part.
      keys: from `start_run`.
      state: from `start_run`, for its shapes and shardings.
      shape: number of windows in a batch, and of tokens that each of them predicts.
      steps: between two evaluations.
      mesh: from `make_mesh`.
      driver: "scan" (all steps between two evaluations in one call) or "loop" (one call per step);
        by default "loop" on a CPU and "scan" elsewhere.
    """
    began = time.perf_counter()
    driver = driver or ("loop" if jax.default_backend() == "cpu" else "scan")
    whole = NamedSharding(mesh, PartitionSpec())
    train_text = jax.device_put(text.train, whole)
    places = jax.tree.map(lambda x: x.sharding, state)
    map_step = jax.vmap(make_step(graphdef, tx, shape, mesh), (0, None, 0, None))

    def scan(state, text, keys, first):
        def body(state, number):
            return map_step(state, text, keys, number)

        return jax.lax.scan(body, state, first + jnp.arange(steps))

    def compiled(function):
        jitted = jax.jit(function, donate_argnums=0, out_shardings=(places, whole))
        return jitted.lower(state, train_text, keys, np.int32(0)).compile()

    run_one = None if driver == "scan" else compiled(map_step)
    run_all = compiled(scan) if driver == "scan" else None

    def train(state, order, index):
        nonlocal run_one
        keys, first = order
        if run_all and index == 0:
            return run_all(state, train_text, keys, np.int32(first))
        # A scan is cut only by a run that began with the loop.
        run_one = run_one or compiled(map_step)
        return run_one(state, train_text, keys, np.int32(first + index))

    evaluate = _compile_evaluation(graphdef, text, state.params, shape, mesh)
    windows, context = shape
    return Trainer(
        items=steps * windows * context,
        steps=steps,
        batch_size=windows * context,
        figures=geometry.names(state.opt_state),
        compile_seconds=time.perf_counter() - began,
        shuffle=lambda keys, epoch: (keys, (epoch - 1) * steps),
        train=train,
        network=lambda state: state.params,
        validate=lambda network, keys: evaluate(network),
        test=evaluate,
        choose=jax.jit(choose, donate_argnums=2, out_shardings=places.params),
    )


def _compile_evaluation(
    graphdef: nnx.GraphDef, text: Text, params: nnx.State, shape: tuple[int, int], mesh: Mesh
) -> Callable[[nnx.State], Scores]:
    """The mean loss on windows that are the same each time."""
    size, context = shape
    windows = spread_windows(text.valid, EVALUATED, context + 1)
    count = len(windows)
    padded = np.resize(windows, (count + -count % size, context + 1))
    batches = jax.device_put(
        padded.reshape(-1, size, context + 1), NamedSharding(mesh, PartitionSpec())
    )

    def losses(params: nnx.State, batches: jax.Array) -> jax.Array:
        def of_batch(tokens: jax.Array) -> jax.Array:
            tokens = _share(tokens.astype(jnp.int32), mesh)
            return _losses(nnx.merge(graphdef, params, copy=True), tokens).mean(axis=1)

        return jax.lax.map(of_batch, batches).reshape(-1)[:count].mean()

    mapped = jax.jit(
        jax.vmap(losses, (0, None)), out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    compiled = mapped.lower(params, batches).compile()
    return lambda params: {"loss": np.asarray(compiled(params, batches), np.float64).tolist()}


def _losses(model: Any, tokens: jax.Array) -> jax.Array:
    """Cross-entropy of each next token in nats, in float32 at least: [windows, context]."""
    logits = model(tokens[:, :-1])
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def _share(windows: jax.Array, mesh: Mesh) -> jax.Array:
    """Share windows out among the devices, or leave them whole on each if they do not divide."""
    spec = PartitionSpec(AXES) if len(windows) % mesh.size == 0 else PartitionSpec()
    return jax.lax.with_sharding_constraint(windows, NamedSharding(mesh, spec))
