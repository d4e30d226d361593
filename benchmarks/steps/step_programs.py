"""One step of an optimizer as a program to be timed, on the parameters of four networks.

Which leaves are spherical here only gives each optimizer its usual work; for the transformer it
says nothing about invariance. The convolutional networks have a sphere per output channel of each
convolution; the transformer one per output feature of its kernels, and one per row of its
embeddings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import spherical_optax as so
from common import timing
from images.models import MODELS
from steps.step_runs import Figures

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 5e-4  # coupled L2, except for adamw and muon, which keep their own
STEPS = 20  # of a call on a GPU, where a call can take Python longer than a step takes the device
TIMING_SECONDS = 0.05  # a timing repeats the step until it takes at least this
MAX_SECONDS = 20.0  # of all timings of an optimizer,
MIN_ROUNDS = 3  # but fewer have no quartiles


class Tree(NamedTuple):
    """What a step works on."""

    params: optax.Params
    grads: optax.Updates
    channel_axes: so.ByPath


class Program(NamedTuple):
    """An optimizer at work on its own copy of a tree's parameters."""

    step: Callable[[], None]  # a call: begins its steps where the last ones end
    wait: Callable[[], object]  # until all steps are done
    renew: Callable[[], object]  # moves all arrays to other places in memory
    state_bytes: int
    bytes_accessed: float | None = None  # by XLA's cost analysis, of one step
    temporary_bytes: int | None = None
    compile_seconds: float | None = None  # from the Python function to the program of a step
    steps: int = 1  # of a call


def make_tree(model: str) -> Tree:
    """The initial parameters of a network and gradients at random.

    Args:
      model: one of `images.models.MODELS`, or "transformer".
    """
    rng = np.random.default_rng(0)

    def normal(x) -> jax.Array:
        return jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32))

    shapes = make_shapes(model)
    params = jax.tree.map(normal, shapes) if model == "transformer" else _network_params(model)
    return Tree(params, jax.tree.map(normal, shapes), spheres(model))


def make_shapes(model: str) -> Any:
    """The shapes of a tree's parameters, and of its gradients; no array is made."""
    if model == "transformer":
        return transformer_shapes()
    return jax.eval_shape(partial(_network_params, model))


def spheres(model: str) -> so.ByPath:
    """Which leaves of a tree are spherical."""
    return so.by_path({"kernel": -1, "embedding": 0} if model == "transformer" else {"conv": -1})


def _network_params(model: str) -> Any:
    return nnx.to_pure_dict(nnx.state(MODELS[model](10, rngs=nnx.Rngs(0)), nnx.Param))


def transformer_shapes() -> dict[str, Any]:
    """The 124 M parameters of GPT-2 small; its head is the transposed token embedding."""
    width, vocabulary, positions, blocks = 768, 50257, 1024, 12

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def linear(inputs: int, outputs: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"kernel": array(inputs, outputs), "bias": array(outputs)}

    def layer_norm() -> dict[str, jax.ShapeDtypeStruct]:
        return {"scale": array(width), "bias": array(width)}

    def block() -> dict[str, Any]:
        return {
            "attention_norm": layer_norm(),
            "query_key_value": linear(width, 3 * width),
            "attention_out": linear(width, width),
            "mlp_norm": layer_norm(),
            "mlp_in": linear(width, 4 * width),
            "mlp_out": linear(4 * width, width),
        }

    return {
        "token_embedding": array(vocabulary, width),
        "position_embedding": array(positions, width),
        "blocks": [block() for _ in range(blocks)],
        "norm": layer_norm(),
    }


def make_optimizer(name: str, channel_axes: Any) -> optax.GradientTransformation:
    """An optimizer of Optax or of this library.

    Muon takes the leaves with a sphere per last index, as matrices with this as the columns, and
    leaves the others to its Adam; MuonH takes the same, a convolution's kernel as a matrix for each
    place.

    Args:
      name: one of `step_runs.OPTIMIZERS`.
      channel_axes: which leaves are spherical; a callable.
    """
    l2 = optax.add_decayed_weights(WEIGHT_DECAY)
    spherical = {"weight_decay": WEIGHT_DECAY, "channel_axes": channel_axes}

    def dimensions(path, x):
        if channel_axes(path_name(path), x) != -1:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), -1)

    def matrices_of(path: str, x: Any) -> Any:
        return tuple(range(x.ndim - 2)) if channel_axes(path, x) == -1 else None

    match name:
        case "adam":
            return optax.chain(l2, optax.adam(LEARNING_RATE))
        case "adamw":
            return optax.adamw(LEARNING_RATE)
        case "sgd":
            return optax.chain(l2, optax.sgd(LEARNING_RATE, momentum=0.9))
        case "muon":
            matrices = partial(jax.tree_util.tree_map_with_path, dimensions)
            return optax.contrib.muon(LEARNING_RATE, muon_weight_dimension_numbers=matrices)
        case "adam_s":
            return so.adam_s(LEARNING_RATE, **spherical)
        case "adam_srt":
            return so.adam_srt(LEARNING_RATE, **spherical)
        case "adam_g":
            return so.adam_g(LEARNING_RATE, **spherical)
        case "sgd_mrt":
            return so.sgd_mrt(LEARNING_RATE, **spherical)
        case "adam_h":
            return so.adam_h(LEARNING_RATE, channel_axes=channel_axes)
        case "muon_h":
            return so.muon_h(LEARNING_RATE, channel_axes=matrices_of)
        case "adamp":
            return so.adamp(LEARNING_RATE, **spherical)
        case "sgdp":
            return so.sgdp(LEARNING_RATE, **spherical)
        case "rotational":
            return so.rotational(optax.scale_by_adam(), LEARNING_RATE, channel_axes=channel_axes)
    raise ValueError(f"unknown optimizer {name!r}")


def compile_step(
    tx: optax.GradientTransformation,
    state: Any,
    params: Any,
    grads: Any,
    out_shardings: Any = None,
    *,
    steps: int = 1,
) -> jax.stages.Compiled:
    """Compiles (state, params, grads) -> (state, params) with state and params updated in place.

    Of several steps all have the same gradients.
    """

    def step(state, params, grads):
        updates, state = tx.update(grads, state, params)
        # Results in the order of the donated arguments: JAX hands buffers of equal shapes on in
        # this order, and XLA would copy all that it finds in another's place.
        return state, optax.apply_updates(params, updates)

    def several(state, params, grads):
        def body(arrays, _):
            # Tied to what changes, so that what depends on the gradients alone stays in the loop.
            state, params, held = jax.lax.optimization_barrier((*arrays, grads))
            return step(state, params, held), None

        return jax.lax.scan(body, (state, params), length=steps)[0]

    function = step if steps == 1 else several
    jitted = jax.jit(function, donate_argnums=(0, 1), out_shardings=out_shardings)
    return jitted.lower(state, params, grads).compile()


def steps_per_call() -> int:
    """How many steps of JAX's optimizers a call makes on this device."""
    return 1 if jax.default_backend() == "cpu" else STEPS


def jax_program(name: str, tree: Tree) -> Program:
    """The named optimizer of `step_runs.OPTIMIZERS` as a compiled program."""
    steps = steps_per_call()
    tx = make_optimizer(name, tree.channel_axes)
    # Copies, because two of them are donated.
    arrays = jax.tree.map(jnp.copy, (tx.init(tree.params), tree.params, tree.grads))
    began = time.perf_counter()
    compiled = compile_step(tx, *arrays)
    compile_seconds = time.perf_counter() - began
    program = compiled if steps == 1 else compile_step(tx, *arrays, steps=steps)

    def step() -> None:
        nonlocal arrays
        arrays = *program(*arrays), arrays[2]

    def renew() -> None:
        nonlocal arrays
        arrays = jax.block_until_ready(jax.tree.map(jnp.copy, arrays))

    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return Program(
        step,
        lambda: jax.block_until_ready(arrays),
        renew,
        state_bytes=nbytes(arrays[0]),
        bytes_accessed=cost.get("bytes accessed"),
        temporary_bytes=memory.temp_size_in_bytes if memory else None,
        compile_seconds=compile_seconds,
        steps=steps,
    )


def measure(
    program: Program,
    adam: Program,
    rounds: int,
    *,
    parameter_bytes: int,
    bandwidth: float,
    ours: Program | None = None,
    pause: float = 0.0,
) -> Figures:
    """Times a program and Adam in turn, each round with the arrays at other places in memory.

    On a CPU these places decide over a quarter of a step's time and more, for as long as the arrays
    stay there.

    Args:
      program: what to measure.
      adam: `jax_program("adam", tree)`, another than `program`.
      rounds: timings of each, from 1; fewer where they would take more than `MAX_SECONDS`.
      parameter_bytes: size of the parameters that a step updates.
      bandwidth: bytes per second of a copy on this device.
      ours: a third program, or `adam`; the ratio of its time to that of `program` is reported.
      pause: seconds of sleep before each timing.
    """
    timed = {"program": program, "adam": adam}
    if ours:
        timed["ours"] = ours
    calls, seconds_of_round = {}, 0.0
    for name, other in timed.items():
        calls[name], seconds = _calls_of_a_timing(other)
        seconds_of_round += seconds + pause
    rounds = min(rounds, max(MIN_ROUNDS, int(MAX_SECONDS / seconds_of_round)))
    runs = {name: partial(_run, other, calls[name]) for name, other in timed.items()}

    def renew() -> None:
        for other in timed.values():
            other.renew()

    seconds_of_rounds = timing.interleave(runs, rounds, pause=pause, on_round=renew)
    steps = {name: calls[name] * other.steps for name, other in timed.items()}
    times = {name: np.array(seconds_of_rounds[name]) / steps[name] for name in timed}

    seconds = timing.spread(times["program"])
    moved = program.bytes_accessed
    return Figures(
        timings=rounds,
        steps_per_timing=steps["program"],
        seconds=seconds,
        ratio_to_adam=timing.spread(times["program"] / times["adam"]),
        ratio_of_ours=timing.spread(times["ours"] / times["program"]) if ours else None,
        parameter_bytes=parameter_bytes,
        state_bytes=program.state_bytes,
        state_ratio=program.state_bytes / adam.state_bytes,
        bytes_accessed=moved,
        bytes_ratio=moved / adam.bytes_accessed if moved and adam.bytes_accessed else None,
        temporary_bytes=program.temporary_bytes,
        compile_seconds=program.compile_seconds,
        copy_bandwidth=bandwidth,
        bandwidth_share=moved / seconds.median / bandwidth if moved else None,
    )


def nbytes(tree: Any) -> int:
    """The size of the arrays of a tree, or of those that its shapes are of."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as selections see it, `blocks/0/conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _run(program: Program, calls: int) -> float:
    """Makes so many calls, to their end; returns the seconds that they took."""
    began = time.perf_counter()
    for _ in range(calls):
        program.step()
    program.wait()
    return time.perf_counter() - began


def _calls_of_a_timing(program: Program) -> tuple[int, float]:
    """How many calls take `TIMING_SECONDS` or more, and what they take."""
    calls = 1
    while True:
        # Twice, because the first call may be slow, and any other by accident.
        seconds = min(_run(program, calls) for _ in range(2))
        if seconds >= TIMING_SECONDS:
            return calls, seconds
        calls *= 2
