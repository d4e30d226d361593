"""A wrapper that watches any Optax optimizer's steps on the sphere."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._groups import norm, widen
from spherical_optax._leaves import need_params
from spherical_optax._measures import deformed, radial_part, turned
from spherical_optax._selection import ChannelAxes, is_hole, named_leaves, select

# The rows and columns of the state's arrays; the last row only where there is one momentum.
MEASURES = (
    "angle",
    "effective_learning_rate",
    "radius",
    "radial_fraction",
    "deformation",
    "momentum_radial_fraction",
)
STATISTICS = ("mean", "min", "max")


class WithGeometryState(NamedTuple):
    """State of `with_geometry`."""

    inner_state: optax.OptState  # the wrapped optimizer's own
    count: jax.Array  # int32 [], below `every`; 0 if the next update is measured
    leaves: dict[str, jax.Array]  # by path: float32 (or wider) [5 or 6 measures, 3 statistics]


def with_geometry(
    optimizer: optax.GradientTransformation, *, channel_axes: ChannelAxes, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer, unchanged, and measures its steps on the sphere.

    Updates and state of the optimizer are its own. For each spherical leaf, the state keeps mean,
    minimum and maximum over the groups of, with x and g as passed to `update` and the step s as it
    comes out of it,

        angle                     θ = atan2(|P_x(s)|, |x| + <s, x>/|x|)
        effective_learning_rate   tan θ / (|x| |P_x(g)|), for SGD without momentum η/r²
        radius                    r = |x|
        radial_fraction           |<s, x>| / (|s| |x|)
        deformation               ∠(P_x(s), -P_x(g))
        momentum_radial_fraction  |<m, x>| / (|m| |x|)

    the last one only where the optimizer's state has exactly one field `mu` or `trace`. Wrap the
    whole optimizer, decay and learning rate included, so that g is the loss's gradient and s the
    step that is taken. Read the state with `geometry`.

    Args:
      optimizer: any optimizer; extra arguments of `update` are handed on to it.
      channel_axes: the selection of what is measured; the optimizer need not know of it.
      every: measure the first and then each `every`-th update; between them the state keeps the
        figures. At least 1. Saves time, but not under `vmap`, which computes both branches.

    Returns:
      The optimizer with a state around its own, whose tree never changes.

    Raises:
      ValueError: `every` is below 1, or `update` is called without the parameters or with others.

    References:
      Roburin et al., Neurocomputing 2022 (arXiv 2006.13382): effective learning rate and direction.

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.with_geometry(optax.sgd(0.1), channel_axes=-1)
    >>> params = {"conv": jnp.array([[2.0], [0.0]])}
    >>> grads = {"conv": jnp.array([[0.0], [4.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> so.geometry(state)["conv/effective_learning_rate/mean"] * 2**2  # η, as r = 2
    Array(0.1, dtype=float32)
    """
    every = operator.index(every)
    if every < 1:
        raise ValueError(f"with_geometry: every={every} is not an integer from 1")
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: optax.Params) -> WithGeometryState:
        inner_state = optimizer.init(params)
        momenta = _momenta(inner_state)
        leaves: Any = {}
        for leaf in select(params, channel_axes):
            if leaf.spherical:
                found = momenta.get(leaf.path)
                has_momentum = found is not None and found.shape == leaf.value.shape
                rows = len(MEASURES) if has_momentum else len(MEASURES) - 1
                leaves[leaf.path] = jnp.zeros((rows, len(STATISTICS)), widen(leaf.value).dtype)
        childless = not jax.tree_util.treedef_children(jax.tree.structure(params))
        if not named_leaves(params) and childless and params:
            # A stand-in of optax.tree.map_params: one leaf for all that is no parameter.
            leaves = jnp.zeros(())
        return WithGeometryState(inner_state, jnp.zeros((), jnp.int32), leaves)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, WithGeometryState]:
        params = need_params(params, "with_geometry")
        steps, inner_state = optimizer.update(updates, state.inner_state, params, **extra_args)

        def measure() -> dict[str, jax.Array]:
            points, grads, moves = (dict(named_leaves(tree)) for tree in (params, updates, steps))
            momenta = _momenta(inner_state)
            measured = dict(state.leaves)
            for leaf in select(updates, channel_axes):
                path, old = leaf.path, state.leaves.get(leaf.path)
                if leaf.spherical and old is not None:
                    shape = getattr(points.get(path), "shape", None)
                    if shape != leaf.value.shape:
                        raise ValueError(
                            f"{path}: {leaf.value.shape} in the updates but {shape} in the "
                            "parameters; pass trees of the same structure and shapes"
                        )
                    momentum = momenta.get(path) if len(old) == len(MEASURES) else None
                    arrays = points[path], grads[path], moves[path], momentum
                    measured[path] = _measure(leaf.groups.axes, *arrays).astype(old.dtype)
            return measured

        if every == 1:
            leaves = measure()
        else:
            leaves = jax.lax.cond(state.count == 0, measure, lambda: state.leaves)
        return steps, WithGeometryState(inner_state, (state.count + 1) % every, leaves)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def geometry(state: optax.OptState) -> dict[str, jax.Array]:
    """Reads the measures of `with_geometry` as scalars for a logger.

    Args:
      state: a state of `with_geometry`, or any tree that holds one, such as a chain's state.

    Returns:
      Names such as `blocks/0/conv1/kernel/angle/mean`, each with its figure (under `vmap`, one for
      each state). All are 0 before the first update.

    Raises:
      ValueError: the tree holds no such state, or several.

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.with_geometry(optax.adam(0.1), channel_axes=-1)
    >>> for name in so.geometry(tx.init({"conv": jnp.ones((9, 2))})):
    ...     if name.endswith("mean"):
    ...         print(name)
    conv/angle/mean
    conv/effective_learning_rate/mean
    conv/radius/mean
    conv/radial_fraction/mean
    conv/deformation/mean
    conv/momentum_radial_fraction/mean
    """

    def is_found(node: Any) -> bool:
        return isinstance(node, WithGeometryState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_found) if is_found(node)]
    if len(found) != 1:
        raise ValueError(
            f"geometry: the state holds {len(found)} states of with_geometry and not one; pass the "
            "state of an optimizer wrapped as so.with_geometry(optimizer, channel_axes=...)"
        )
    return {
        "/".join(filter(None, (path, measure, statistic))): figures[..., row, column]
        for path, figures in found[0].leaves.items()
        for row, measure in enumerate(MEASURES[: figures.shape[-2]])
        for column, statistic in enumerate(STATISTICS)
    }


def _measure(
    axes: tuple[int, ...], x: jax.Array, g: jax.Array, s: jax.Array, m: jax.Array | None
) -> jax.Array:
    """The array of a leaf."""
    # Without the barrier XLA would draw the optimizer's arithmetic into these sums.
    arrays = jax.lax.optimization_barrier([a for a in (x, g, s, m) if a is not None])
    x, *vectors = map(widen, arrays)
    g, s, *momentum = (vector.astype(x.dtype) for vector in vectors)
    rows = [
        turned(axes, x, s),
        norm(x, axes),
        radial_part(axes, x, s),
        deformed(axes, x, s, g),
        *(radial_part(axes, x, m) for m in momentum),
    ]
    table = jnp.stack(rows)
    groups = tuple(range(1, table.ndim))
    return jnp.stack([table.mean(groups), table.min(groups), table.max(groups)], axis=1)


def _momenta(state: optax.OptState) -> dict[str, jax.Array]:
    """The momentum of each leaf by path; empty if the state has none, or several."""

    def is_momentum(path: Any, value: Any) -> bool:
        # A dict of parameters may have this name too.
        return isinstance(path[-1], optax.tree_utils.NamedTupleKey)

    found = [
        tree
        for name in ("mu", "trace")
        for _, tree in optax.tree_utils.tree_get_all_with_path(state, name, is_momentum)
    ]
    return {p: m for p, m in named_leaves(found[0]) if not is_hole(m)} if len(found) == 1 else {}
