"""A wrapper that watches any Optax optimizer's steps on the sphere."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._ground.groups import Layout, wide_dtype, widen
from spherical_optax._ground.hyperparams import check_count, check_optimizer
from spherical_optax._ground.leaves import aligned, need_params
from spherical_optax._ground.selection import ChannelAxes, Leaf, is_hole, named_leaves, select
from spherical_optax._ground.sums import alike, inners, nonzero, zero_where

# The rows and columns of the state's arrays; the last row only where there is one momentum.
MEASURES = (
    "angle",
    "turn_per_gradient",
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
    leaves: dict[str, jax.Array]  # by path: float32 (or wider) [..., 5 or 6 measures, 3 statistics]


def with_geometry(
    optimizer: optax.GradientTransformation,
    *,
    channel_axes: ChannelAxes,
    every: int = 1,
    keep: int | Callable[[str, Any], int | None] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer, unchanged, and measures its steps on the sphere.

    Updates and state of the optimizer are its own. For each spherical leaf, the state keeps mean,
    minimum and maximum over the groups of, with x and g as passed to `update` and the step s as it
    comes out of it,

        angle                     θ = atan2(|P_x(s)|, |x| + <s, x>/|x|)
        turn_per_gradient         tan θ / (|x| |P_x(g)|), for SGD without momentum η/r²
        radius                    r = |x|
        radial_fraction           |<s, x>| / (|s| |x|)
        deformation               ∠(P_x(s), -P_x(g))
        momentum_radial_fraction  |<m, x>| / (|m| |x|)

    the last one only where the optimizer's state has exactly one field `mu` or `trace` for the
    leaf. |x| P_x(g) is the gradient at x/|x|: the second one says how far the step turns per length
    of the present gradient. With momentum it grows where gradients fade; `effective_learning_rate`
    is of what the step is made of.

    Wrap the whole optimizer, decay and learning rate included, so that g is the loss's gradient and
    s the step that is taken. A step that is zero in a whole leaf keeps that leaf's figures, such as
    the ones between the steps of `optax.MultiSteps`, and those that `optax.apply_if_finite` skips.
    Around `MultiSteps`, g is the last of the gradients that a step is made of; inside, their mean.

    Args:
      optimizer: any optimizer; extra arguments of `update` are handed on to it.
      channel_axes: the selection of what is measured; the optimizer need not know of it.
      every: measure the first and then each `every`-th update; between them the state keeps the
        figures. At least 1. Saves time, but not under `vmap`, which computes both branches.
      keep: an axis along which figures stay apart, such as 0 for one figure for each layer of a
        stack; or a callable `(path, leaf) -> axis`, such as `by_path`'s, with `None` for leaves
        without. The axis indexes groups in `channel_axes`.

    Returns:
      The optimizer with a state around its own, whose tree never changes.

    Raises:
      ValueError: `every` is below 1, `keep` is an axis that groups span, or `update` is called
        without the parameters or with other trees.

    Source: Roburin et al., Neurocomputing 2022 (arXiv 2006.13382), effective learning rate and
    direction.

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.with_geometry(optax.sgd(0.1), channel_axes=-1)
    >>> params = {"conv": jnp.array([[2.0], [0.0]])}
    >>> grads = {"conv": jnp.array([[0.0], [4.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> so.geometry(state)["conv/turn_per_gradient/mean"] * 2**2  # η, as r = 2
    Array(0.1, dtype=float32)
    """
    check_count(every=every)
    every = operator.index(every)  # a NumPy integer would make the count as wide
    check_optimizer(optimizer=optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: optax.Params) -> WithGeometryState:
        inner_state = optimizer.init(params)
        momenta = _momenta(inner_state)
        leaves: Any = {}
        for leaf in select(params, channel_axes):
            if leaf.spherical:
                axis, momentum = _kept_axis(leaf, keep), momenta.get(leaf.path)
                has_momentum = momentum is not None and momentum.shape == leaf.value.shape
                shape = () if axis is None else (leaf.groups.shape[axis],)
                shape += (len(MEASURES) - (not has_momentum), len(STATISTICS))
                dtype = wide_dtype(leaf.value.dtype)
                leaves[leaf.path] = jnp.zeros_like(leaf.value, dtype, shape)
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
        found = select(updates, channel_axes)
        points = aligned(found, params, "the updates", "the parameters", exact=True)
        places = [i for i, leaf in enumerate(found) if leaf.spherical]
        paths = {found[i].path for i in places}
        missing = {leaf.path for leaf in found if leaf.skipped}
        for path in paths.symmetric_difference(state.leaves) - missing:
            here, there = ("the updates", "state") if path in paths else ("the state", "updates")
            raise ValueError(
                f"{path}: on a sphere in {here} but not in the {there}; pass trees of the same "
                "structure and shapes, and a state that tx.init(params) made"
            )
        steps, inner_state = optimizer.update(updates, state.inner_state, params, **extra_args)

        def measure() -> dict[str, jax.Array]:
            moves, momenta = named_leaves(steps), _momenta(inner_state)
            arrays = []
            for i in places:
                path, value = found[i].path, found[i].value
                has_momentum = state.leaves[path].shape[-2] == len(MEASURES)
                momentum = [momenta[path]] if has_momentum else []
                arrays.append([points[i], value, moves[i][1], *momentum])
            # Without this barrier XLA would draw the optimizer's arithmetic into the sums; without
            # the next, sharded leaves would take their second sums one after another.
            arrays = jax.lax.optimization_barrier(arrays)
            views = [
                _views(found[i].groups, *of_leaf) for i, of_leaf in zip(places, arrays, strict=True)
            ]
            axes = [found[i].groups.axes for i in places]
            sums = [_sums(*of_leaf) for of_leaf in zip(axes, views, strict=True)]
            sums = jax.lax.platform_dependent(
                sums, cuda=_barrier_around_stacks, default=jax.lax.optimization_barrier
            )
            measured = dict(state.leaves)
            for j, i in enumerate(places):
                leaf, old = found[i], state.leaves[found[i].path]
                rows = map(leaf.groups.unview, _figures(axes[j], views[j], sums[j]))
                measured[leaf.path] = _statistics(list(rows), _kept_axis(leaf, keep), old)
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
      Names such as `blocks/0/conv1/kernel/angle/mean`, each with its figure, a scalar or an array
      along the axis that `keep` names (and, under `vmap`, one for each state). All are 0 before the
      first update.

    Raises:
      ValueError: the tree holds no such state, or several.

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.with_geometry(optax.adam(0.1), channel_axes=-1)
    >>> for name in so.geometry(tx.init({"conv": jnp.ones((9, 2))})):
    ...     if name.endswith("mean"):
    ...         print(name)
    conv/angle/mean
    conv/turn_per_gradient/mean
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


def _kept_axis(leaf: Leaf, keep: int | Callable[[str, Any], int | None] | None) -> int | None:
    axis = keep(leaf.path, leaf.value) if callable(keep) else keep
    if axis is None:
        return None
    shape, counts = leaf.groups.shape, leaf.groups.counts
    if not hasattr(axis, "__index__"):
        raise TypeError(f"{leaf.path}: keep={axis!r} is no axis, and no callable (path, leaf)")
    axis = operator.index(axis)
    if not -len(shape) <= axis < len(shape) or counts[axis] != shape[axis]:
        raise ValueError(
            f"{leaf.path}: keep={axis} does not index groups: along the axes of {shape} there are "
            f"{counts}"
        )
    return axis % len(shape)


def _views(groups: Layout, x: jax.Array, *vectors: jax.Array) -> list[jax.Array]:
    """x, g, s and, where there is one, m, in one dtype."""
    point = groups.view(widen(x))
    return [point, *(groups.view(widen(v)).astype(point.dtype) for v in vectors)]


def _sums(axes: tuple[int, ...], views: list[jax.Array]) -> list[jax.Array]:
    """Squared norms of a leaf's arrays, then their products with the first."""
    x, *vectors = views
    return inners(axes, *((v, v) for v in views), *((x, v) for v in vectors))


def _barrier_around_stacks(sums: list[list[jax.Array]]) -> list[list[jax.Array]]:
    """A barrier around all sums. For CUDA one around single sums would copy each of them."""
    stacks = [jnp.stack(of_leaf) if alike(of_leaf) else of_leaf for of_leaf in sums]
    return [list(of_leaf) for of_leaf in jax.lax.optimization_barrier(stacks)]


def _figures(
    axes: tuple[int, ...],
    views: list[jax.Array],
    sums: list[jax.Array],
) -> list[jax.Array]:
    """The measures, one number per group each, and |s|².

    An angle that is accurate where it is small needs the tangents, and their difference, at equal
    length. Their lengths by `sums` are close to it, and a second round of sums corrects them: two
    rounds, for all leaves at once, where they are sharded.
    """
    (x, g, s, *_), (xx, gg, ss, *mm), (xg, xs, *xm) = views, sums[: len(views)], sums[len(views) :]
    divisor, radius = nonzero(xx), jnp.sqrt(xx)
    ahead = 1 + xs / divisor
    # P_x(s) = s_length u and -P_x(g) = g_length w, with u and w of nearly length 1.
    s_length, u = _tangent_of_length_1(x, s, xs, divisor, ss)
    g_length, w = _tangent_of_length_1(x, -g, -xg, divisor, gg)
    uu, ww, difference, total = inners(axes, *((v, v) for v in (u, w, u - w, u + w)))
    u_norm, w_norm = jnp.sqrt(uu), jnp.sqrt(ww)
    turned, steepest = s_length * u_norm, g_length * w_norm
    unequal = (u_norm - w_norm) ** 2
    deformation = 2 * jnp.arctan2(
        jnp.sqrt(jnp.maximum(difference - unequal, 0)), jnp.sqrt(jnp.maximum(total - unequal, 0))
    )
    per_gradient = turned / nonzero(xx * steepest)
    return [
        zero_where(xx == 0, jnp.arctan2(turned, radius * ahead)),
        per_gradient / jnp.where(per_gradient == 0, 1, ahead),
        radius,
        _share(xs, ss, radius),
        zero_where(uu * ww == 0, deformation),
        *(_share(*products, radius) for products in zip(xm, mm, strict=True)),
        ss,
    ]


def _statistics(rows: list[jax.Array], kept: int | None, old: jax.Array) -> jax.Array:
    """The array of a leaf: as it was if the step, whose |s|² is the last row, is zero."""
    table = jnp.stack(rows)
    over = tuple(axis + 1 for axis in range(table.ndim - 1) if axis != kept)
    mean, least, most = table.mean(over), table.min(over), table.max(over)
    new = jnp.moveaxis(jnp.stack([mean, least, most])[:, :-1], (1, 0), (-2, -1))
    return jnp.where(most[-1][..., None, None] == 0, old, new.astype(old.dtype))


def _tangent_of_length_1(
    x: jax.Array, v: jax.Array, xv: jax.Array, xx: jax.Array, vv: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """P_x(v) as a length and a vector whose length is 1, but for cancellation in the former."""
    share = xv / xx
    least = jnp.finfo(vv.dtype).eps * vv  # where v is radial but for rounding
    length = jnp.sqrt(jnp.maximum(vv - share * xv, least))
    return length, (v - share * x) / nonzero(length)


def _share(xv: jax.Array, vv: jax.Array, radius: jax.Array) -> jax.Array:
    return jnp.minimum(abs(xv) / nonzero(jnp.sqrt(vv) * radius), 1)  # rounding may exceed it


def _momenta(state: optax.OptState) -> dict[str, jax.Array]:
    """The momentum of each leaf, by path, that has exactly one."""

    def is_momentum(path: Any, value: Any) -> bool:
        # A dict of parameters may have this name too.
        return isinstance(path[-1], optax.tree_utils.NamedTupleKey)

    found: dict[str, list[jax.Array]] = {}
    for name in ("mu", "trace"):
        for _, tree in optax.tree_utils.tree_get_all_with_path(state, name, is_momentum):
            for path, momentum in named_leaves(tree):
                if not is_hole(momentum):
                    found.setdefault(path, []).append(momentum)
    return {path: momenta[0] for path, momenta in found.items() if len(momenta) == 1}
