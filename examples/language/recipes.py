"""The networks that `train_lm.py` knows, which of their weights are on spheres, and optimizers.

JAX is imported only inside the functions that need it, so that the command can read its choices and
defaults from here and still answer `--help` at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import optax

    import spherical_optax as so


class Architecture(NamedTuple):
    """How blocks are built; see `models`."""

    norms: Literal["before", "around", "behind"]  # attention and feed-forward layer
    qk_norm: Literal["none", "head", "whole"]  # of queries and keys: each head, or all together
    activation: Literal["swiglu", "geglu", "squared_relu"]


ARCHITECTURES = {
    "llama": Architecture("before", "none", "swiglu"),
    "qwen3": Architecture("before", "head", "swiglu"),
    "gemma3": Architecture("around", "head", "geglu"),
    "olmo2": Architecture("behind", "whole", "swiglu"),
}
ACTIVATIONS = ("swiglu", "geglu", "squared_relu")
SCHEDULES = ("cosine", "linear")


class Recipe(NamedTuple):
    """Hyper-parameters of an optimizer; an optimizer reads those that it has."""

    learning_rate: float  # of the kernels in blocks that it takes
    weight_decay: float | None = 0.1  # of the kernels in blocks that have no fixed radius


# For some hundred steps of small networks: the middle of what `benchmarks/lm_sweep.py` tries, and
# within a factor of four of the best that it found.
# Longer trainings of larger ones want smaller ones.
RECIPES = {
    "adamw": Recipe(0.01),
    "muon": Recipe(0.08),
    "adam_s": Recipe(0.01),
    "adam_srt": Recipe(0.01),
    "adam_h": Recipe(0.03, None),
    "muon_h": Recipe(0.04, None),
    "rotational": Recipe(0.03, None),
}
OPTIMIZERS = tuple(RECIPES)
ADAM_LEARNING_RATE = 0.01  # of embeddings, head and gains
B1, B2 = 0.9, 0.95
ATTENTION = "attention/(query|key|value)/kernel"  # (depth, width, heads, head size)
MATRICES = "(attention/out|feed_forward/.*)/kernel"  # (depth, inputs, outputs)
LAYERS, HEADS = (0,), (0, 2)  # the axes that index groups


def kernels() -> so.ByPath:
    """All kernels in blocks: what hyperballs and Muon take, per layer, and per head where it is."""
    import spherical_optax as so

    return so.by_path({ATTENTION: HEADS, MATRICES: LAYERS})


def layers(path: str, leaf: Any) -> int | None:
    """The axis of the layers of a stack, for `with_geometry`'s `keep`."""
    return 0 if "blocks" in path else None


def invariant_kernels(style: Architecture) -> so.ByPath:
    """The radially invariant kernels of an architecture.

    Queries and keys are, where they are normalised, and what is linear between an input and a norm
    behind it: all kernels of a block with such norms, except the gates.
    """
    import spherical_optax as so

    rules: dict[str, Any] = {}
    if style.qk_norm != "none":
        rules["attention/(query|key)/kernel"] = HEADS if style.qk_norm == "head" else LAYERS
    if style.norms != "before":
        rules["(attention/(value|out)|feed_forward/(up|down))/kernel"] = LAYERS
    return so.by_path(rules) if rules else so.by_path({".*": None})


def spheres(optimizer: str, style: Architecture) -> so.ByPath:
    """The groups that an optimizer keeps on spheres."""
    return invariant_kernels(style) if optimizer in ("adam_s", "adam_srt") else kernels()


def make_schedule(shape: str, peak: float, steps: int, warmup: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 to the peak, then as the shape says to 0 at the end."""
    import optax

    rest = max(1, steps - warmup)
    fall = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[shape]
    if not warmup:
        return fall
    # Not 0 at the first step, which would be lost.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(
    name: str,
    style: Architecture,
    *,
    learning_rate: optax.ScalarOrSchedule,
    adam_learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    clip: float,
) -> optax.GradientTransformation:
    """The optimizer of a training: one global clip, then each kind of weights by its own rule.

    Args:
      name: one of `OPTIMIZERS`.
      style: of the network.
      learning_rate: of the kernels in blocks that are the optimizer's own.
      adam_learning_rate: of all others, which take AdamW.
      weight_decay: of the kernels in blocks whose radius is not fixed: decoupled, and where they
        are on spheres (`adam_s`, `adam_srt`) none.
      clip: largest norm of all gradients together.
    """
    import optax

    import spherical_optax as so

    on = spheres(name, style)
    others = optax.adamw(
        adam_learning_rate, B1, B2, weight_decay=weight_decay, mask=so.path_mask(kernels())
    )
    match name:
        case "adamw":
            own = optax.adamw(learning_rate, B1, B2, weight_decay=weight_decay)
        case "muon":
            own = optax.contrib.muon(
                learning_rate,
                weight_decay=weight_decay,
                muon_weight_dimension_numbers=_matrices,
            )
        case "adam_s":
            own = so.adam_s(learning_rate, B1, B2, channel_axes=on)
        case "adam_srt":
            own = so.adam_srt(learning_rate, B1, B2, channel_axes=on)
        case "adam_h":
            own = so.adam_h(learning_rate, B1, B2, channel_axes=on)
        case "muon_h":
            own = so.muon_h(learning_rate, channel_axes=on)
        case "rotational":
            own = so.rotational(optax.scale_by_adam(B1, B2), learning_rate, channel_axes=on)
        case _:
            raise ValueError(f"unknown optimizer {name!r}")
    each = optax.partition({"spherical": own, "classic": others}, so.path_labels(on))
    return optax.chain(optax.clip_by_global_norm(clip), each)


def _matrices(params: optax.Params) -> Any:
    """For Muon: the same matrices as MuonH's, of inputs by outputs."""
    import jax
    from optax.contrib import MuonDimensionNumbers

    return jax.tree.map(
        lambda x: MuonDimensionNumbers(x.ndim - 3 if x.ndim == 4 else 1, -1), params
    )
