"""Random trees, selections and numbers."""

import math
import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

import spherical_optax as so
from oracle import rows

MOST = 64  # elements of a leaf
DTYPES = ("bfloat16", "float16", "float32", "float64")


class Pair(NamedTuple):
    kernel: Any
    rest: Any


def random_shape(rng: random.Random, most_axes: int) -> tuple[int, ...]:
    """One in twenty has no elements."""
    shape: list[int] = []
    for _ in range(max(rng.randint(0, most_axes), rng.randint(0, most_axes))):
        shape.append(rng.randint(1, max(1, min(8, MOST // math.prod(shape)))))
    if shape and rng.random() < 0.05:
        shape[rng.randrange(len(shape))] = 0
    return tuple(shape)


def arrange(kind: str, leaves: list[Any]) -> Any:
    match kind:
        case "leaf":
            return leaves[0]
        case "dict":
            return dict(zip(["kernel", "value", "a.b"], leaves, strict=False))
        case "list":
            return [None, *leaves, optax.MaskedNode()]
        case "tuple":
            return Pair(leaves[0], tuple(leaves[1:]))
        case "nested":
            return {"0": [{"conv/query": leaf} for leaf in leaves], "empty": {}}
    layers = [{"kernel": nnx.Param(leaf)} for leaf in leaves]
    return nnx.State(dict(zip(["conv", "linear", "norm"], layers, strict=False)))


def random_tree(rng: random.Random, shapes: list[tuple[int, ...]], dtypes: Sequence[str]) -> Any:
    """The types of leaves, each of a random dtype, in one of JAX's kinds of containers."""
    leaves = [jax.ShapeDtypeStruct(shape, rng.choice(dtypes)) for shape in shapes]
    return arrange(rng.choice(["leaf", "dict", "list", "tuple", "nested", "nnx"]), leaves)


def random_values(tree: Any, seed: list[int], sparse: bool = False) -> Any:
    """Normal numbers in the types of a tree; sparse ones are half zeros, whole groups too."""
    rng = np.random.default_rng(seed)

    def leaf(kind: Any) -> np.ndarray:
        values = rng.normal(size=kind.shape)
        if sparse:
            for axis in [None, *range(values.ndim)]:
                size = kind.shape if axis is None else kind.shape[axis]
                shown = rng.integers(4, size=size) > 0
                values = values * (
                    shown
                    if axis is None
                    else np.expand_dims(shown, [i for i in range(values.ndim) if i != axis])
                )
        return np.asarray(values, kind.dtype)

    return jax.tree.map(leaf, tree)


def groups_of(shape: tuple[int, ...], axes: Any) -> np.ndarray:
    """The places of the groups' elements in an array: [groups, d]."""
    places = np.arange(math.prod(shape)).reshape(shape)
    return rows(places, axes if shape and places.size else None)


def random_axes(rng: random.Random, shape: tuple[int, ...]) -> Any:
    """A valid `channel_axes`."""
    rank = len(shape)
    if rank == 0:
        return rng.choice([None, (), -1, (0, 2), so.blocks(-1, 3)])  # a scalar takes any
    named = [axis - rng.choice([0, rank]) for axis in rng.sample(range(rank), rank)]
    some = tuple(named[: rng.randint(0, rank - 1)])  # all would leave groups of one element
    kind = rng.choice(["none", "whole", "one", "some", "some", "all", "blocks", "blocks"])
    if kind != "blocks":
        return {"none": None, "whole": (), "one": named[0], "some": some, "all": named}[kind]
    axis = named[-1]
    counts = [n for n in range(1, shape[axis] + 1) if shape[axis] % n == 0] or [1]
    return so.blocks(axis, rng.choice(counts), channel_axes=some)


def is_matrix(shape: tuple[int, ...], axes: Any) -> bool:
    """Whether each group spans two axes, as Muon's links need it, or has one element."""
    if not shape or not math.prod(shape):
        return True
    group = np.unravel_index(groups_of(shape, axes)[0], shape)
    return sum(len(set(places.tolist())) > 1 for places in group) in (0, 2)


def random_selection(rng: random.Random, tree: Any, matrices: bool) -> tuple[list[Any], Any]:
    """`channel_axes` of each leaf, and the one selection that says so to a link."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(tree)]
    axes = [random_axes(rng, shape) for shape in shapes]
    uniform = rng.choice([None, (), -1, 0]) if rng.random() < 0.2 else axes[0]
    if rng.random() < 0.2 and uniform in (None, (), -1, 0):
        axes = [uniform] * len(shapes)
    if matrices:
        axes = [a if is_matrix(s, a) else None for s, a in zip(shapes, axes, strict=True)]
    if axes == [uniform] * len(shapes):
        return axes, uniform
    return axes, select(tree, axes, by_rules=rng.random() < 0.5)


def select(tree: Any, axes: list[Any], by_rules: bool = False) -> Any:
    """A selection that gives each leaf its own."""
    names = [line.split("  ")[0] for line in so.describe(tree, None).splitlines()[1:-1]]
    of_path = dict(zip(names, axes, strict=True))
    if not by_rules:
        return lambda path, leaf: of_path[path]
    # Of many rules here each group has one element, which by_path would refuse.
    rules = {f"^{re.escape(name)}$": axes for name, axes in of_path.items()}
    return so.by_path(rules, require_match=False)
