"""Links that hold the radii of spheres, bring points back to them, or scale by them.

They concern spherical leaves only: updates of classic leaves, groups of one element included, and
of groups of zeros pass unchanged.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._ground.geometry import to_radius
from spherical_optax._ground.groups import group_norm, zeros_per_group
from spherical_optax._ground.hyperparams import check_shares
from spherical_optax._ground.leaves import map_leaves, need_params
from spherical_optax._ground.selection import ChannelAxes, Leaf, map_selected, select
from spherical_optax._ground.sums import norm, squared_norm
from spherical_optax._links.ready import stateless_link


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
        check_radius(radius)

    def init_fn(params):
        if radius is not None:
            select(params, channel_axes)  # raises if it does not fit
            return optax.EmptyState()
        return ReprojectToSphereState(map_selected(radius_at_init, channel_axes, params))

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


def radius_at_init(leaf: Leaf) -> jax.Array:
    """Norms of the groups, to be stored; a scalar 0 for a classic leaf, zeros for a shape."""
    if not leaf.spherical:
        return jnp.zeros([], jnp.float32)
    if isinstance(leaf.value, jax.ShapeDtypeStruct):
        return zeros_per_group(leaf.value, leaf.groups)
    return group_norm(leaf.value, channel_axes=leaf.channel_axes)


def project_to_sphere(
    params: optax.Params, radius: float | jax.Array, *, channel_axes: ChannelAxes
) -> optax.Params:
    """Brings parameters to their spheres, to start there.

        x <- radius x/|x|

    Args:
      params: parameters.
      radius: positive radius of every sphere.
      channel_axes: the selection.

    Returns:
      The parameters, in their dtypes. Classic leaves and groups of zeros are as they were.

    Raises:
      ValueError: `radius` is no number, or not positive and finite.
      ValueError, TypeError: the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> params = {"conv": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.ones(2)}
    >>> so.project_to_sphere(params, 1.0, channel_axes=-1)["conv"]
    Array([[0.6, 0. ],
           [0.8, 1. ]], dtype=float32)
    """
    check_radius(radius)

    def leaf(axes: tuple[int, ...], x: jax.Array) -> tuple[jax.Array]:
        return (to_radius(x, radius, axes),)

    return map_leaves(leaf, channel_axes, params)[0]


def check_radius(radius: float | jax.Array) -> None:
    """Raises `ValueError` unless it is one number, positive and finite."""
    if radius is None or isinstance(radius, str) or jnp.shape(radius) != ():
        raise ValueError(f"radius={radius!r} is not one number")
    if not isinstance(radius, jax.core.Tracer) and not 0 < float(radius) < math.inf:
        raise ValueError(f"radius={radius!r} is not a positive finite number")


def scale_by_radius(*, channel_axes: ChannelAxes) -> optax.GradientTransformation:
    """Makes updates relative to the radius: multiplies each group by its norm.

        u <- |x| u

    Place it before the learning rate, which is then in units of the radius: behind
    `normalize_per_group`, nearly an angle. Classic leaves, and groups of zeros, keep their updates.

    Args:
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.

    Returns:
      A gradient transformation without state.

    Raises:
      ValueError: `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.scale_by_radius(channel_axes=())
    >>> x = jnp.array([3.0, 4.0])
    >>> tx.update(jnp.array([0.0, 1.0]), tx.init(x), x)[0]
    Array([0., 5.], dtype=float32)
    """

    def leaf(axes: tuple[int, ...], u: jax.Array, x: jax.Array) -> jax.Array:
        if not axes:
            return u
        square = squared_norm(x, axes)
        return u * jnp.sqrt(jnp.where(square == 0, 1, square))

    return stateless_link(leaf, channel_axes, needs_params="scale_by_radius")


def radial_brake(
    outward: float = 0.5, inward: float = 1.0, *, channel_axes: ChannelAxes
) -> optax.GradientTransformation:
    """Slows the change of the radius, and leaves the direction that a step leads to.

        y = x + u        r = |x| + (outward if |y| > |x| else inward) (|y| - |x|)
        u <- r y/|y| - x

    Place it last in a chain, after the learning rate. With 0 and 0 each step keeps the radius that
    it starts from; `reproject_to_sphere` keeps the one of init, and does not drift. Growth by
    tangent steps is slowed as well as that by radial ones.

    Args:
      outward: share of a growth that remains, in [0, 1].
      inward: share of a shrinking that remains, in [0, 1].
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.

    Returns:
      A gradient transformation without state.

    Raises:
      ValueError: a share is not in [0, 1], or `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: the radial brake of NVIDIA's Emerging-Optimizers (2026).

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.radial_brake(0.5, channel_axes=())
    >>> x = jnp.array([3.0, 4.0])
    >>> tx.update(x, tx.init(x), x)[0]  # of a growth from 5 to 10
    Array([1.5, 2. ], dtype=float32)
    """
    check_shares(outward=outward, inward=inward)

    def leaf(axes: tuple[int, ...], u: jax.Array, x: jax.Array) -> jax.Array:
        if not axes:
            return u
        y, before = x + u, norm(x, axes)
        after = norm(y, axes)
        share = jnp.where(after > before, outward, inward).astype(x.dtype)
        target = before + share * (after - before)
        return jnp.where(before == 0, u, to_radius(y, target, axes) - x)

    return stateless_link(leaf, channel_axes, needs_params="radial_brake")
