"""How an update visits the leaves of its trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from spherical_optax._ground.groups import widen
from spherical_optax._ground.selection import ChannelAxes, Leaf, is_hole, named_leaves, select


def map_leaves(
    fn: Callable[..., tuple[Any, ...]],
    channel_axes: ChannelAxes,
    updates: optax.Updates,
    *states: optax.Params,
    params: optax.Params | None = None,
    flags: optax.Params | None = None,
) -> tuple[Any, ...]:
    """Calls `fn(axes, update, *states, param, flag)` for each leaf; returns its results' trees.

    `fn` returns the new update and the new states, in this order; `param` and `flag`, a boolean,
    are left out if their trees are None. It works on the views of a layout, whose reduction axes
    are `axes`, and in one dtype, that of the update or float32 if that is narrower; its results go
    back to the shapes and dtypes of what they replace. Positions without an update stay as they
    are, with their states.

    Raises:
      ValueError: the trees differ; the message names the first such path.
    """
    leaves = select(updates, channel_axes)
    columns = [aligned(leaves, tree, "the updates", "the optimizer's state") for tree in states]
    if params is not None:
        columns.append(aligned(leaves, params, "the updates", "the parameters", exact=True))
    each_flag = [()] * len(leaves)
    if flags is not None:
        each_flag = [(bool(flag),) for flag in aligned(leaves, flags, "the updates", "the mask")]
    results = []
    for leaf, flag, *values in zip(leaves, each_flag, *columns, strict=True):
        old = [leaf.value, *values]
        if leaf.skipped:
            results.append(old)
            continue
        old = [jnp.asarray(value) for value in old]
        new = fn(leaf.groups.axes, *map(leaf.groups.view, _in_one_dtype(old)), *flag)
        results.append([a.reshape(b.shape).astype(b.dtype) for a, b in zip(new, old, strict=False)])
    return tuple(
        jax.tree.unflatten(
            jax.tree.structure(tree, is_leaf=is_hole), [result[i] for result in results]
        )
        for i, tree in enumerate([updates, *states])
    )


def map_groups(
    fn: Callable[..., Any],
    channel_axes: ChannelAxes,
    tree: optax.Params,
    *,
    broadcast: str | None = None,
    **others: optax.Params,
) -> Any:
    """Calls `fn(axes, leaf, *others)` for each spherical leaf; returns the tree of its results.

    `fn` works in the dtype of the leaf, or in float32 if that is narrower, on views of arrays of
    one shape, to which those of the tree named `broadcast` are broadcast, and returns one number
    per group. Positions without a spherical leaf are `None` in the result.

    Raises:
      ValueError: the trees differ; the message names the first such path.
    """
    leaves = select(tree, channel_axes)
    columns = [
        aligned(
            leaves,
            other,
            "the parameters",
            f"`{name}`",
            exact=name != broadcast,
            spheres_only=True,
        )
        for name, other in others.items()
    ]
    results = []
    for leaf, *values in zip(leaves, *columns, strict=True):
        result = None
        if leaf.spherical:
            result = leaf.groups.unview(
                fn(
                    leaf.groups.axes,
                    *_in_one_dtype([_whole(a, leaf) for a in (leaf.value, *values)]),
                )
            )
        results.append(result)
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_hole), results)


def check_trees(channel_axes: ChannelAxes, updates: optax.Updates, params: optax.Params) -> None:
    """Raises `ValueError` with the path where two trees differ, before other links see them."""
    aligned(select(updates, channel_axes), params, "the updates", "the parameters", exact=True)


def need_params(params: optax.Params | None, link: str) -> optax.Params:
    """Returns `params`; raises `ValueError` with the remedy if it is missing."""
    if params is None:
        raise ValueError(
            f"{link} needs the current parameters: call tx.update(grads, state, params)"
        )
    return params


def aligned(
    leaves: list[Leaf],
    tree: Any,
    ours: str,
    theirs: str,
    *,
    exact: bool = False,
    spheres_only: bool = False,
) -> list[Any]:
    """The values of a tree at the places of `leaves`; `ours` and `theirs` name the two trees."""
    remedy = "pass trees of the same structure and shapes, and a state that tx.init(params) made"
    named = named_leaves(tree)
    here, there = [leaf.path for leaf in leaves], [path for path, _ in named]
    if here != there:
        odd = next((path for path in here if path not in there), None)
        has, lacks = ours, theirs
        if odd is None:
            odd = next((path for path in there if path not in here), there[0])
            has, lacks = theirs, ours
        raise ValueError(f"{odd}: in {has} but not at this place in {lacks}; {remedy}")
    for leaf, (path, value) in zip(leaves, named, strict=True):
        if leaf.skipped or (spheres_only and not leaf.spherical):
            continue
        if is_hole(value):
            raise ValueError(f"{path}: in {ours} but not in {theirs}")
        shape, other = jnp.shape(leaf.value), jnp.shape(value)
        if other != shape and (
            exact or not (_broadcasts(other, shape) or other == leaf.groups.counts)
        ):
            raise ValueError(f"{path}: {shape} in {ours} but {other} in {theirs}; {remedy}")
    return [value for _, value in named]


def _in_one_dtype(arrays: list[jax.Array]) -> list[jax.Array]:
    dtype = jnp.finfo(widen(arrays[0]).dtype).dtype
    return [widen(array) if jnp.iscomplexobj(array) else array.astype(dtype) for array in arrays]


def _whole(value: ArrayLike, leaf: Leaf) -> jax.Array:
    """A view of what is broadcast to the shape of a leaf: that, a number per group, or less."""
    groups, value = leaf.groups, jnp.asarray(value)
    if value.shape not in (groups.shape, groups.counts):
        value = jnp.broadcast_to(value, groups.shape)
    return jnp.broadcast_to(groups.view(value), groups.view(leaf.value).shape)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return not shape or (
        len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True))
    )
