"""How an update visits the leaves of its trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spherical_optax._groups import widen
from spherical_optax._selection import ChannelAxes, Leaf, is_hole, named_leaves, select


def map_leaves(
    fn: Callable[..., tuple[Any, ...]],
    channel_axes: ChannelAxes,
    updates: optax.Updates,
    *states: optax.Params,
    params: optax.Params | None = None,
) -> tuple[Any, ...]:
    """Calls `fn(axes, update, *states, param)` for each leaf and returns the trees of its results.

    `fn` returns the new update and the new states, in this order; `param` is left out if `params`
    is None. It works in one dtype, that of the update or float32 if that is narrower; its results
    go back to the dtypes of what they replace. Positions without an update stay as they are, with
    their states.

    Raises:
      ValueError: the trees differ; the message names the first such path.
    """
    leaves = select(updates, channel_axes)
    trees = [*states] if params is None else [*states, params]
    columns = [_aligned(leaves, tree, tree is params) for tree in trees]
    results = []
    for leaf, *values in zip(leaves, *columns, strict=True):
        old = [leaf.value, *values]
        if leaf.skipped:
            results.append(old)
            continue
        old = [jnp.asarray(value) for value in old]
        new = fn(leaf.axes, *_in_one_dtype(old))
        results.append([a.astype(b.dtype) for a, b in zip(new, old, strict=False)])
    return tuple(
        jax.tree.unflatten(
            jax.tree.structure(tree, is_leaf=is_hole), [result[i] for result in results]
        )
        for i, tree in enumerate([updates, *states])
    )


def need_params(params: optax.Params | None, link: str) -> optax.Params:
    """Returns `params`; raises `ValueError` with the remedy if it is missing."""
    if params is None:
        raise ValueError(
            f"{link} needs the current parameters: call tx.update(grads, state, params)"
        )
    return params


def _aligned(leaves: list[Leaf], tree: Any, is_params: bool) -> list[Any]:
    what = "the parameters" if is_params else "the optimizer's state"
    named = named_leaves(tree)
    ours, theirs = [leaf.path for leaf in leaves], [path for path, _ in named]
    if ours != theirs:
        odd = next((path for path in ours if path not in theirs), None)
        here, there = "the updates", what
        if odd is None:
            odd = next((path for path in theirs if path not in ours), theirs[0])
            here, there = what, "the updates"
        raise ValueError(
            f"{odd}: in {here} but not at this place in {there}; pass updates, state and "
            "parameters of the same tree, and make the state by tx.init(params)"
        )
    for leaf, (path, value) in zip(leaves, named, strict=True):
        if leaf.skipped:
            continue
        if is_hole(value):
            raise ValueError(f"{path}: has an update but nothing in {what}")
        shape, other = jnp.shape(leaf.value), jnp.shape(value)
        fits = shape == other if is_params else _broadcasts(other, shape)
        if not fits:
            raise ValueError(
                f"{path}: the update has shape {shape}, {what} {other}; pass updates, state and "
                "parameters of the same tree, and make the state by tx.init(params)"
            )
    return [value for _, value in named]


def _in_one_dtype(arrays: list[jax.Array]) -> list[jax.Array]:
    dtype = jnp.finfo(widen(arrays[0]).dtype).dtype
    return [widen(array) if jnp.iscomplexobj(array) else array.astype(dtype) for array in arrays]


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return not shape or (
        len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True))
    )
