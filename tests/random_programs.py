"""Random chains of the library's links and Optax's, with trees for them.

Hypothesis draws, and shrinks, how much there is of all; what it is comes from a seed. Drawn one by
one, the hundred choices of an example take as long as running it, and most examples are variations
of a few.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import settings
from hypothesis import strategies as st

import spherical_optax as so
from numpy_programs import traced
from random_trees import (
    DTYPES,
    groups_of,
    random_selection,
    random_shape,
    random_tree,
    random_values,
)

RATE = [0.03, optax.linear_schedule(0.05, 0.01, 3)]
DECAY = [0.0, 0.01, optax.linear_schedule(0.02, 0.0, 4)]
B1, B2, DTYPE = [0.0, 0.9], [0.5, 0.99], [None, "bfloat16", "float32"]
TRANSPORT = ["rescale", "isometric", "none"]
DIRECTION = [
    optax.identity(),
    optax.trace(0.9, nesterov=True),
    optax.scale_by_adam(0.9, 0.99),
    optax.scale_by_adam(0.9, 0.99, mu_dtype="float32"),  # whose updates may be wider
]
RADIUS = [None, 2.0, lambda path, leaf: 0.5]
FLAG = [False, True]

# The public links and optimizers, and what each argument may be.
OURS: dict[str, dict[str, list[Any]]] = {
    "adam_g": {"learning_rate": RATE, "b1": B1, "weight_decay": DECAY, "mu_dtype": DTYPE},
    "adam_h": {
        "learning_rate": RATE,
        "b1": B1,
        "b2": B2,
        "radius": RADIUS,
        "adam_learning_rate": [None, 0.1],
        "adam_weight_decay": [0.0, 0.01],
        "mu_dtype": DTYPE,
    },
    "adam_s": {"learning_rate": RATE, "b2": B2, "weight_decay": DECAY, "mu_dtype": DTYPE},
    "adam_srt": {"learning_rate": RATE, "b2": B2, "weight_decay": DECAY, "mu_dtype": DTYPE},
    "adamp": {"learning_rate": RATE, "weight_decay": [0.0, 0.01], "nesterov": FLAG},
    "centralize_per_group": {},
    "follow_great_circle": {},
    "hyperball": {
        "direction": DIRECTION,
        "learning_rate": RATE,
        "radius": RADIUS,
        "retraction": ["normalize", "exp"],
        "zero": ["skip", "fill"],
    },
    "muon_h": {
        "learning_rate": RATE,
        "nesterov": FLAG,
        "ns_steps": [1, 3],
        "radius": RADIUS,
        "mu_dtype": DTYPE,
    },
    "normalize_per_group": {},
    "orthogonalize_per_group": {"ns_steps": [1, 3]},
    "project_to_tangent_space": {},
    "project_where_invariant": {"direction": DIRECTION, "weight_decay": [0.0, 0.01]},
    "radial_brake": {"outward": [0.0, 0.5], "inward": [0.0, 1.0]},
    "reproject_to_sphere": {"radius": [None, 2.0]},
    "rotational": {
        "direction": DIRECTION,
        "angle": RATE,
        "update_norm_decay": B1,
        "zero_mean": FLAG,
    },
    "scale_by_adam_g": {"b1": B1, "b2": B2, "transport": TRANSPORT, "mu_dtype": DTYPE},
    "scale_by_adam_s": {"b1": B1, "b2": B2, "eps": [1e-8, 1e-3], "mu_dtype": DTYPE},
    "scale_by_adam_srt": {"b1": B1, "b2": B2, "transport": TRANSPORT, "mu_dtype": DTYPE},
    "scale_by_radius": {},
    "sgd_mrt": {"learning_rate": RATE, "dampening": [0.0, 0.1], "weight_decay": DECAY},
    "sgdp": {
        "learning_rate": RATE,
        "dampening": [0.0, 0.1],
        "weight_decay": [0.0, 0.01],
        "nesterov": FLAG,
    },
    "trace_rt": {"decay": B1, "transport": TRANSPORT, "accumulator_dtype": DTYPE},
    "with_geometry": {"optimizer": DIRECTION[:3], "every": [1, 2]},
}
OF_LAYERS = ("adamp", "project_where_invariant", "sgdp")  # a layer may be a leaf
# Inside is Optax's Adam, whose moments take the dtype of a decay that is an array.
OF_ADAM = ("adam_h", "adamp", "muon_h")
OF_MATRICES = ("muon_h", "orthogonalize_per_group")
# Optax's, by what a number that is not finite may reach there.
OPTAX: dict[str, dict[str, dict[str, list[Any]]]] = {
    "group": {
        "add_decayed_weights": {"weight_decay": [0.01]},
        "ema": {"decay": [0.9]},
        "scale": {"step_size": [-0.5]},
        "scale_by_adam": {"b1": B1, "b2": B2},
        "scale_by_rms": {"decay": [0.9]},
        "scale_by_schedule": {"step_size_fn": [optax.linear_schedule(1.0, 0.5, 3)]},
        "trace": {"decay": [0.9], "nesterov": FLAG},
    },
    "leaf": {"clip_by_block_rms": {"threshold": [1.0]}, "scale_by_trust_ratio": {}},
    "tree": {"clip_by_global_norm": {"max_norm": [1.0]}},
}
REACHES = ("group", "leaf", "tree")
KINDS = ("normal", "normal", "sparse", "zero", "radial")
WRAPPERS = (
    *("", "", "", "MultiSteps", "masked", "partition"),
    *("inject_hyperparams", "with_geometry", "apply_if_finite"),
)


class Link(NamedTuple):
    """A link or optimizer of ours, in a wrapper or none, or one of Optax."""

    name: str
    settings: dict[str, Any]
    wrapper: str

    @property
    def reach(self) -> str:
        """What a number that is not finite may reach."""
        if self.name in OURS:
            if self.wrapper == "apply_if_finite":
                return "tree"
            return "leaf" if self.name in OF_LAYERS else "group"
        return next(reach for reach in REACHES if self.name in OPTAX[reach])

    def make(self, selection: Any) -> optax.GradientTransformation:
        if self.name not in OURS:
            return getattr(optax, self.name)(**self.settings)
        factory = getattr(so, self.name)
        if self.wrapper == "inject_hyperparams" and self.name not in OF_ADAM:
            # What may be an array or a schedule says so.
            types = {k: v for k, v in factory.__annotations__.items() if k != "return"}
            static = [k for k, v in types.items() if not re.search("ArrayLike|Schedule", v)]
            injected = optax.inject_hyperparams(factory, static, hyperparam_dtype=jnp.float32)
            return injected(**self.settings, channel_axes=selection)
        tx = factory(**self.settings, channel_axes=selection)
        match self.wrapper:
            case "MultiSteps":
                return optax.MultiSteps(tx, 2).gradient_transformation()
            case "masked":
                return optax.masked(tx, so.path_mask(selection))
            case "partition":
                parts = {"spherical": tx, "classic": optax.sgd(0.1)}
                return optax.partition(parts, so.path_labels(selection))
            case "with_geometry":
                return so.with_geometry(tx, channel_axes=selection, every=2)
            case "apply_if_finite":
                return optax.apply_if_finite(tx, max_consecutive_errors=5)
        return tx


class Program(NamedTuple):
    """A tree's types, what is on spheres in it, and a chain for it."""

    tree: Any  # of jax.ShapeDtypeStruct
    axes: list[Any]  # `channel_axes` of each leaf
    selection: Any  # the same, as the links are told
    chain: list[Link]
    kind: str  # of numbers
    seed: int

    @property
    def tx(self) -> optax.GradientTransformation:
        return chained(self.chain, self.selection)

    @property
    def reach(self) -> str:
        return max((link.reach for link in self.chain), key=REACHES.index)

    @property
    def groups(self) -> list[np.ndarray]:
        """`groups_of` each leaf."""
        leaves = jax.tree.leaves(self.tree)
        return [groups_of(leaf.shape, axes) for leaf, axes in zip(leaves, self.axes, strict=True)]

    def numbers(self, run: int = 0) -> tuple[Any, list[Any]]:
        """A point and three gradients: normal, half zeros, all zeros, or along the point."""
        sparse = self.kind == "sparse"
        params, *grads = (random_values(self.tree, [self.seed, run, i], sparse) for i in range(4))
        if self.kind == "zero":
            grads = jax.tree.map(np.zeros_like, grads)
        if self.kind == "radial":
            grads = [jax.tree.map(lambda x: np.asarray(1.7 * x, x.dtype), params)] * 3
        return params, grads


def chained(chain: list[Link], selection: Any) -> optax.GradientTransformation:
    return optax.chain(*(link.make(selection) for link in chain))


def random_link(rng: random.Random, names: Sequence[str], wrappers: Sequence[str] = ("",)) -> Link:
    name = rng.choice(names)
    arguments = (OURS | OPTAX["group"] | OPTAX["leaf"] | OPTAX["tree"])[name]
    settings = {key: rng.choice(values) for key, values in arguments.items()}
    return Link(name, settings, rng.choice(wrappers) if name in OURS else "")


@st.composite
def programs(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = DTYPES,
    kinds: Sequence[str] = KINDS,
    reaches: Sequence[str] = REACHES,
    last: Sequence[str] = (),
    most_links: int = 2,
    shapes: Sequence[tuple[int, ...]] = (),
) -> Program:
    """Links, and a seed; with `last`, one of these is the last. Shapes are random, or of these."""
    number, leaves = draw(st.integers(1, most_links)), draw(st.integers(1, 3))
    most_axes = draw(st.integers(0, 5))
    # Of all that is drawn, as Hypothesis varies a part of it and keeps the rest.
    rng = random.Random(f"{number} {leaves} {most_axes} {draw(st.binary(min_size=4, max_size=4))}")
    of_optax = [name for reach in reaches for name in OPTAX[reach]]
    chain = []
    while len(chain) < number:
        ours = rng.random() < 0.7
        link = random_link(rng, list(OURS), WRAPPERS) if ours else random_link(rng, of_optax)
        if last and len(chain) == number - 1:
            link = random_link(rng, last)
        if link.reach in reaches or last:
            chain.append(link)
    of = [rng.choice(shapes) if shapes else random_shape(rng, most_axes) for _ in range(leaves)]
    tree = random_tree(rng, of, dtypes)
    matrices = any(link.name in OF_MATRICES for link in chain)
    axes, selection = random_selection(rng, tree, matrices)
    return Program(tree, axes, selection, chain, rng.choice(kinds), rng.getrandbits(32))


def examples(share: float) -> settings:
    """A part of the profile's examples, which several tests share."""
    return settings(max_examples=round(share * settings.default.max_examples))


def in_its_dtypes(tree: Any) -> Any:
    return jax.enable_x64(any(leaf.dtype == "float64" for leaf in jax.tree.leaves(tree)))


def stepper(tx: optax.GradientTransformation) -> tuple[Callable, Callable]:
    """`init`, and the updates, the state and the point after a step, by NumPy."""

    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any, Any]:
        updates, state = tx.update(grads, state, params)
        return updates, state, optax.apply_updates(params, updates)

    return traced(tx.init), traced(step)
