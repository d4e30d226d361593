"""Random trees and selections, drawn by Hypothesis.

Structures are drawn, and shrink; numbers come from a seed, as drawing each would take longer than
all the rest.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from hypothesis import strategies as st

import spherical_optax as so
from oracle import rows

MOST = 64  # elements of a leaf
NARROW, WIDE = ("bfloat16", "float16", "float32"), ("float64",)


class Pair(NamedTuple):
    kernel: Any
    rest: Any


@st.composite
def shapes(draw: Callable) -> tuple[int, ...]:
    """Of ranks 0 to 5; one in twenty has no elements."""
    shape: list[int] = []
    for _ in range(draw(st.integers(0, 5))):
        shape.append(draw(st.integers(1, max(1, min(8, MOST // math.prod(shape))))))
    if shape and draw(st.integers(0, 19)) == 19:
        shape[draw(st.integers(0, len(shape) - 1))] = 0
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


@st.composite
def trees(draw: Callable, dtypes: tuple[str, ...], of: st.SearchStrategy | None = None) -> Any:
    """One to three leaves, with their types for values, in one of JAX's kinds of containers."""
    leaf = st.builds(jax.ShapeDtypeStruct, of or shapes(), st.sampled_from(dtypes))
    leaves = draw(st.lists(leaf, min_size=1, max_size=3))
    return arrange(draw(st.sampled_from(["leaf", "dict", "list", "tuple", "nested", "nnx"])), leaves)


def random_values(tree: Any, seed: list[int]) -> Any:
    """Normal numbers in the types of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def groups_of(shape: tuple[int, ...], axes: Any) -> np.ndarray:
    """The places of the groups' elements in an array: [groups, d]."""
    places = np.arange(math.prod(shape)).reshape(shape)
    return rows(places, axes if shape and places.size else None)


@st.composite
def axes_of(draw: Callable, shape: tuple[int, ...]) -> Any:
    """A valid `channel_axes`."""
    rank = len(shape)
    if rank == 0:
        return draw(st.sampled_from([None, (), -1, (0, 2), so.blocks(-1, 3)]))  # a scalar takes any
    some = st.lists(st.integers(0, rank - 1), unique=True, max_size=rank)
    signs = st.lists(st.sampled_from([0, -rank]), min_size=rank, max_size=rank)
    named = tuple(axis + sign for axis, sign in zip(draw(some), draw(signs), strict=False))
    match draw(st.sampled_from(["whole", "one", "some", "blocks", "none"])):
        case "none":
            return None
        case "whole":
            return ()
        case "one":
            return draw(st.integers(-rank, rank - 1))
        case "some":
            return named
    axis = draw(st.integers(-rank, rank - 1))
    counts = [n for n in range(1, shape[axis] + 1) if shape[axis] % n == 0] or [1]
    others = tuple(other for other in named if other % rank != axis % rank)
    return so.blocks(axis, draw(st.sampled_from(counts)), channel_axes=others)


def is_matrix(shape: tuple[int, ...], axes: Any) -> bool:
    """Whether each group spans two axes, as Muon's links need it, or has one element."""
    if not shape or not math.prod(shape):
        return True
    group = np.unravel_index(groups_of(shape, axes)[0], shape)
    return sum(len(set(places.tolist())) > 1 for places in group) in (0, 2)


@st.composite
def selections(draw: Callable, tree: Any, matrices: bool) -> tuple[list[Any], Any]:
    """`channel_axes` of each leaf, and the one selection that says so to a link."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(tree)]
    uniform = draw(st.sampled_from(["each", "each", "each", "each", None, (), -1, 0]))
    if uniform == "each":
        axes = [draw(axes_of(shape)) for shape in shapes]
    else:
        axes = [uniform] * len(shapes)
    if matrices:
        axes = [a if is_matrix(s, a) else None for s, a in zip(shapes, axes, strict=True)]
    if axes == [uniform] * len(shapes):
        return axes, uniform
    return axes, select(tree, axes, by_rules=draw(st.booleans()))


def select(tree: Any, axes: list[Any], by_rules: bool = False) -> Any:
    """A selection that gives each leaf its own."""
    names = [line.split("  ")[0] for line in so.describe(tree, None).splitlines()[1:-1]]
    of_path = dict(zip(names, axes, strict=True))
    if not by_rules:
        return lambda path, leaf: of_path[path]
    # Of many rules here each group has one element, which by_path would refuse.
    rules = {f"^{re.escape(name)}$": axes for name, axes in of_path.items()}
    return so.by_path(rules, require_match=False)
