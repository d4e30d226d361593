"""The programs that are compiled for a GPU, from shapes alone, and what is found in them.

Parameters, states and gradients are those of `optimizer_step.py`, trainings those of
`training_throughput.py`.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import spherical_optax as so
from compiled import kernels, targets
from compiled.compiled_lines import WATCHED, Figures, Setting
from images import data, models, programs, recipes
from steps import step_programs
from throughput import throughput_programs

STEPS = 20  # of a call of the trainer's program


def compile_and_count(setting: Setting) -> Figures:
    """Compile a program for its GPU and count what it launches.

    Raises:
      Refused: the plugin for CUDA does not start.
      RuntimeError: XLA cannot compile it.
    """
    began = time.perf_counter()
    mesh = programs.make_mesh(targets.devices(setting.gpu, setting.devices))
    make = _training if setting.kind == "training" else _step
    params, compiled = make(setting, mesh)
    seconds = time.perf_counter() - began

    launched = kernels.launches(compiled.as_text() or "")
    if setting.kind == "training":  # what is outside of the loop runs once an epoch
        launched = [
            kernel._replace(times=kernel.times // STEPS)
            for kernel in launched
            if kernel.times >= STEPS
        ]
    kinds, memory = kernels.count(launched), compiled.memory_analysis()
    between = [kernel for kernel in launched if kernel.kind in kernels.COLLECTIVES]
    spherical = step_programs.spheres(setting.model)
    paths = jax.tree.leaves_with_path(params)
    return Figures(
        parameter_bytes=step_programs.nbytes(params),
        spherical_leaves=sum(
            spherical(step_programs.path_name(path), leaf) is not None for path, leaf in paths
        ),
        kernels=sum(kinds.values()),
        nbytes=kernels.moved(launched),
        temporary_bytes=memory.temp_size_in_bytes if memory else None,
        kinds=kinds,
        collective_bytes=kernels.moved(between),
        compile_seconds=seconds,
    )


def _step(setting: Setting, mesh: Mesh) -> tuple[Any, jax.stages.Compiled]:
    """A step of an optimizer, and the shapes of its parameters."""
    params = step_programs.make_shapes(setting.model)
    axes = step_programs.spheres(setting.model)
    name = setting.optimizer.removesuffix(WATCHED)
    tx = step_programs.make_optimizer(name, axes)
    if name != setting.optimizer:
        tx = so.with_geometry(tx, channel_axes=axes)

    specs = jax.tree.map(lambda leaf: _spec(leaf, mesh), params)
    placed = jax.tree.map(lambda leaf, spec: _placed(leaf, mesh, spec), params, specs)

    def whole(leaf: Any) -> Any:
        return _placed(leaf, mesh, PartitionSpec())

    # A number per group has no part of an axis that the group spans.
    state = optax.tree.map_params(
        tx.init,
        lambda leaf, spec: _placed(leaf, mesh, spec),
        jax.eval_shape(tx.init, params),
        specs,
        transform_non_params=lambda rest: jax.tree.map(whole, rest),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, placed))
    return params, step_programs.compile_step(tx, state, placed, placed, shardings)


def _spec(leaf: Any, mesh: Mesh) -> PartitionSpec:
    """Shares a leaf out along its longest axis that the devices divide, or not at all."""
    longest = max((n for n in leaf.shape if n % mesh.size == 0), default=None)
    if longest is None:
        return PartitionSpec()
    axis = leaf.shape.index(longest)
    return PartitionSpec(*[None] * axis, *mesh.axis_names)


def _placed(leaf: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    if isinstance(leaf, optax.MaskedNode):
        return leaf
    names = [name if n > 1 else None for name, n in zip(spec, leaf.shape, strict=False)]
    sharding = NamedSharding(mesh, PartitionSpec(*names))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _training(setting: Setting, mesh: Mesh) -> tuple[Any, jax.stages.Compiled]:
    """What the trainer compiles for a GPU, an epoch's steps in one loop, for a single seed."""
    batch_size = setting.batch_size or 1
    cell = throughput_programs.Cell(setting.model, setting.precision, batch_size, seeds=1)
    count = throughput_programs.with_validation(STEPS * batch_size)
    images = throughput_programs.synthetic(count)
    name = setting.optimizer.replace("_", "")
    tx, _ = throughput_programs.make_optimizer(cell, name, images, recipes.EPOCHS)

    def make_model() -> nnx.Module:
        make = models.MODELS[setting.model]
        return make(len(images.classes), dtype=setting.precision, rngs=nnx.Rngs(0))

    graphdef, params, batch_stats = nnx.split(nnx.eval_shape(make_model), nnx.Param, nnx.BatchStat)
    state = programs.TrainState(params, batch_stats, jax.eval_shape(tx.init, params))
    places, _ = data.validation_split(len(images.train.labels), 0)
    order, key = jax.eval_shape(
        programs.epoch_order, jax.eval_shape(jax.random.key, 0), 1, jnp.asarray(places)
    )

    def whole(leaf: Any) -> jax.ShapeDtypeStruct:
        return _placed(leaf, mesh, PartitionSpec())

    def of_seeds(leaf: Any) -> jax.ShapeDtypeStruct:
        return whole(jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype))

    step = programs.make_step(graphdef, tx, images, batch_size, mesh)
    train = programs.over_steps(programs.over_seeds(step), STEPS)
    state, order, key = jax.tree.map(of_seeds, (state, order, key))
    jitted = jax.jit(train, donate_argnums=0, out_shardings=NamedSharding(mesh, PartitionSpec()))
    split = jax.tree.map(whole, images.train)
    return params, jitted.lower(state, split, order, key, 0).compile()
