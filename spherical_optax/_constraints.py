"""Links that keep updates or parameters where they belong on a sphere.

They concern spherical leaves only: updates of classic leaves, groups of one element included, and
of groups of zeros pass unchanged.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._geometry import tangent, to_radius
from spherical_optax._groups import group_norm, nonzero, norm, zeros_per_group
from spherical_optax._leaves import map_leaves, need_params
from spherical_optax._selection import ChannelAxes, Leaf, map_selected, select


def project_to_tangent_space(*, channel_axes: ChannelAxes) -> optax.GradientTransformation:
    """Removes from each group of the updates its radial part at the parameters.

        u <- u - (<u, x>/|x|²) x

    Place it behind a preconditioner whose radial part changes the radius but not the loss, or
    first in a chain to project the gradients. The step still leaves the sphere at second order:
    `reproject_to_sphere` removes that.

    Args:
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.

    Returns:
      A gradient transformation without state.

    Raises:
      ValueError: `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.project_to_tangent_space(channel_axes=())
    >>> x = jnp.array([2.0, 0.0])
    >>> tx.update(jnp.array([5.0, 1.0]), tx.init(x), x)[0]
    Array([0., 1.], dtype=float32)
    """

    def init_fn(params):
        select(params, channel_axes)  # raises if it does not fit
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        def leaf(axes, u, x):
            return (tangent(x, u, axes),)

        params = need_params(params, "project_to_tangent_space")
        (updates,) = map_leaves(leaf, channel_axes, updates, params=params)
        return updates, state

    return optax.GradientTransformation(init_fn, update_fn)


class ReprojectToSphereState(NamedTuple):
    """State of `reproject_to_sphere`."""

    radius: optax.Params  # float32 at least, one number per group; a scalar 0 for classic leaves


def reproject_to_sphere(
    radius: float | jax.Array | None = None, *, channel_axes: ChannelAxes
) -> optax.GradientTransformation:
    """Puts the point that the updates lead to on its sphere.

        y = x + u        u <- radius y/|y| - x

    Place it last in a chain, after the learning rate: what would follow changes x + u again. The
    radius is stored at init, not measured anew at each step, as rounding would make it drift.
    Updates are rounded in their dtype: bring parameters narrower than float32 near to a given
    radius before training, or the first step misses it.

    Args:
      radius: positive radius of every sphere; `None` keeps the one that each group has at init. A
        group that is zero then has none, and moves freely. So do all groups if init is shown shapes
        (`jax.ShapeDtypeStruct`) instead of arrays.
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: `radius` is no number, or not positive and finite, or `update` is called without
        the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = optax.chain(optax.sgd(0.1), so.reproject_to_sphere(channel_axes=()))
    >>> x = jnp.array([3.0, 4.0])
    >>> updates, _ = tx.update(jnp.array([7.0, -8.0]), tx.init(x), x)
    >>> so.group_norm(optax.apply_updates(x, updates), channel_axes=())
    Array([5.], dtype=float32)
    """
    if radius is not None:
        if isinstance(radius, str) or jnp.shape(radius) != ():
            raise ValueError(
                f"radius={radius!r} is not one number; None keeps the radius of each group"
            )
        if not isinstance(radius, jax.core.Tracer) and not 0 < float(radius) < math.inf:
            raise ValueError(f"radius={radius!r} is not a positive finite number")

    def init_fn(params):
        def stored(leaf: Leaf) -> jax.Array:
            if not leaf.spherical:
                return jnp.zeros([], jnp.float32)
            if isinstance(leaf.value, jax.ShapeDtypeStruct):
                return zeros_per_group(leaf.value, leaf.groups)
            return group_norm(leaf.value, channel_axes=leaf.channel_axes)

        if radius is not None:
            select(params, channel_axes)  # raises if it does not fit
            return optax.EmptyState()
        return ReprojectToSphereState(map_selected(stored, channel_axes, params))

    def update_fn(updates, state, params=None):
        def leaf(axes, u, x, target):
            if not axes:
                return u
            return to_radius(x + u, target, axes) - x

        params = need_params(params, "reproject_to_sphere")
        if radius is not None:
            (updates,) = map_leaves(
                lambda axes, u, x: (leaf(axes, u, x, radius),),
                channel_axes,
                updates,
                params=params,
            )
            return updates, state
        updates, radii = map_leaves(
            lambda axes, u, r, x: (leaf(axes, u, x, r), r),
            channel_axes,
            updates,
            state.radius,
            params=params,
        )
        return updates, ReprojectToSphereState(radii)

    return optax.GradientTransformation(init_fn, update_fn)


def normalize_per_group(*, channel_axes: ChannelAxes) -> optax.GradientTransformation:
    """Gives each group of the updates norm 1.

        u <- u/|u|

    A group of zeros stays zero, and so does one whose norm is below 1e-19, where float32 has no
    square. Noise gets norm 1 like everything else: coupled weight decay before a projection leaves
    rounding errors of a group without gradient, which this link would turn into steps.

    Args:
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.

    Returns:
      A gradient transformation without state, which does not need the parameters.

    Raises:
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.normalize_per_group(channel_axes=-1)
    >>> grads = jnp.array([[3.0, 0.0], [4.0, 0.0]])
    >>> tx.update(grads, tx.init(grads))[0]
    Array([[0.6, 0. ],
           [0.8, 0. ]], dtype=float32)
    """

    def init_fn(params):
        select(params, channel_axes)  # raises if it does not fit
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        del params

        def leaf(axes, u):
            return (u / nonzero(norm(u, axes)) if axes else u,)

        (updates,) = map_leaves(leaf, channel_axes, updates)
        return updates, state

    return optax.GradientTransformation(init_fn, update_fn)
