"""AdamP and SGDP: steps lose their radial part where the gradient has none."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from spherical_optax._ground.groups import group_size
from spherical_optax._ground.hyperparams import (
    check_decays,
    check_not_negative,
    check_optimizer,
    check_shares,
)
from spherical_optax._ground.leaves import check_trees, map_leaves, need_params
from spherical_optax._ground.selection import ChannelAxes, select
from spherical_optax._ground.sums import inners, sums
from spherical_optax._links.moments import bias_correction, check_moments
from spherical_optax._links.ready import scale_by_learning_rate


def project_where_invariant(
    direction: optax.GradientTransformation,
    *,
    weight_decay: ArrayLike = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    eps: float = 1e-8,
    channel_axes: ChannelAxes,
) -> optax.GradientTransformationExtraArgs:
    """Projects a direction on the tangent space where the gradient is nearly tangent already.

    With g the gradient, u = direction(g), and of each leaf first its groups x, then the whole leaf
    (or the whole layer, see below) as one group of d elements:

        c = max |<g, x>| / max(|g| |x|, eps)                        over the leaf's groups
        if c < delta / sqrt(d):   u <- u - <u, x> x / (|x| + eps)²      and rho = wd_ratio
        u <- u + weight_decay rho x                                 rho = 1 if neither is so

    Place it where the direction would stand, before the learning rate. A layer is what the last of
    the axes that index groups divides into groups: with `(0, -1)` each index of axis 0 is one, with
    `-1` the leaf. The test is a guess: of few elements it finds by chance what is not there, and a
    group without gradient passes it. It is one for all groups of a layer: with a NaN in one of them
    none is projected.

    Args:
      direction: an optimizer without learning rate and sign.
      weight_decay: decoupled decay, not negative.
      delta: what counts as tangent, relative to 1/sqrt(d).
      wd_ratio: share of the decay that what is projected takes.
      eps: floor of norms.
      channel_axes: the selection of the leaves that are tested, and their groups.

    Returns:
      A gradient transformation around that of the direction.

    Raises:
      ValueError: a number is out of range, or `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: Heo et al., *AdamP* (arXiv 2006.08217), algorithms 2 and 3.

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.project_where_invariant(optax.trace(0.9), channel_axes=())
    >>> x, state = jnp.array([2.0, 0.0]), tx.init(jnp.array([2.0, 0.0]))
    >>> u, state = tx.update(jnp.array([1.0, 1.0]), state, x)  # not tangent: as it is
    >>> u, 10 * tx.update(jnp.array([0.0, 1.0]), state, x)[0]  # of the momentum, what turns x
    (Array([1., 1.], dtype=float32), Array([ 0., 19.], dtype=float32))
    """
    check_optimizer(direction=direction)
    check_not_negative(weight_decay=weight_decay, delta=delta, wd_ratio=wd_ratio, eps=eps)
    direction = optax.with_extra_args_support(direction)

    def init_fn(params: optax.Params) -> optax.OptState:
        select(params, channel_axes)  # raises if it does not fit
        return direction.init(params)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        params = need_params(params, "project_where_invariant")
        check_trees(channel_axes, updates, params)
        directions, state = direction.update(updates, state, params, **extra_args)

        def leaf(
            axes: tuple[int, ...], u: jax.Array, g: jax.Array, x: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            share = jnp.zeros((), x.dtype)
            rho = jnp.ones((), x.dtype)
            if axes:
                # The sums of a layer are those of its groups together.
                of_groups = inners(axes, (g, x), (u, x), (g, g), (x, x))
                layer = _layer(axes, x.shape)
                of_layers = sums(layer, of_groups)
                by_group, groups_pass = _projection(of_groups, group_size(x.shape, axes), layer)
                by_layer, layer_passes = _projection(of_layers, group_size(x.shape, layer), layer)
                share = jnp.where(groups_pass, by_group, jnp.where(layer_passes, by_layer, 0))
                rho = jnp.where(groups_pass | layer_passes, jnp.asarray(wd_ratio, x.dtype), rho)
            return u + (jnp.asarray(weight_decay, x.dtype) * rho - share) * x, g

        steps, _ = map_leaves(leaf, channel_axes, directions, updates, params=params)
        return optax.tree.cast_like(steps, updates), state  # a direction may be wider

    def _projection(
        products: list[jax.Array], size: int, layer: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """What x is multiplied by to be taken from u, and whether each layer passes the test."""
        gx, ux, gg, xx = products
        floor = jnp.asarray(eps, xx.dtype)
        x_norm = jnp.sqrt(xx)
        cosine = jnp.abs(gx) / jnp.maximum(jnp.sqrt(gg) * x_norm, floor)
        passes = jnp.max(cosine, axis=layer, keepdims=True) < delta / math.sqrt(size)
        return ux / (x_norm + floor) ** 2, passes

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _layer(axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Reduction axes of whole layers: the groups', and the last that indexes groups."""
    indexing = [axis for axis, n in enumerate(shape) if axis not in axes and n > 1]
    return (*axes, *indexing[-1:])


def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: ArrayLike = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
    channel_axes: ChannelAxes,
) -> optax.GradientTransformationExtraArgs:
    """AdamP: AdamW whose steps lose their radial part where the gradient has none.

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g²
        u = mu, or b1 mu + (1 - b1) g with nesterov
        u <- u/(1 - b1^t) / (sqrt(nu/(1 - b2^t)) + eps)
        x <- x - learning_rate (P(u) + weight_decay rho x)

    P and rho are those of `project_where_invariant`. Adam's learning rates are a good guess.
    Classic leaves take AdamW.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, and floor of norms.
      weight_decay: decoupled decay, not negative.
      delta: what counts as tangent, relative to 1/sqrt(d).
      wd_ratio: share of the decay that what is projected takes.
      nesterov: whether the gradient is counted once more.
      channel_axes: the selection of the leaves that are tested, and their groups.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: a number is out of range, or `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: Heo et al., *AdamP* (arXiv 2006.08217), algorithm 3.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.adamp(0.1, channel_axes=())
    >>> x, g = jnp.array([2.0, 0.0]), jnp.array([0.02, 1.0])
    >>> updates, _ = tx.update(g, tx.init(x), x)  # Adam would step by 0.1 in both
    >>> abs(so.group_inner(updates, x, channel_axes=())) < 1e-6
    Array([ True], dtype=bool)
    """
    check_moments(b1, b2, eps)
    direction = _adam_with_nesterov(b1, b2, eps) if nesterov else optax.scale_by_adam(b1, b2, eps)
    projected = project_where_invariant(
        direction,
        weight_decay=weight_decay,
        delta=delta,
        wd_ratio=wd_ratio,
        eps=eps,
        channel_axes=channel_axes,
    )
    return optax.chain(projected, scale_by_learning_rate(learning_rate))


def _adam_with_nesterov(
    b1: ArrayLike, b2: ArrayLike, eps: ArrayLike
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with AdamP's nesterov, whose bias correction is that of mu."""
    adam = optax.scale_by_adam(b1, b2, eps)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        plain, new = adam.update(updates, state, params)
        assert isinstance(new, optax.ScaleByAdamState)
        correction1, correction2 = (bias_correction(b, new.count) for b in (b1, b2))

        def add(u: jax.Array, g: jax.Array, nu: jax.Array) -> jax.Array:
            root = jnp.sqrt(nu / correction2.astype(nu.dtype)) + jnp.asarray(eps, nu.dtype)
            own = jnp.asarray(1 - b1, u.dtype) * g / (correction1.astype(u.dtype) * root)
            return jnp.asarray(b1, u.dtype) * u + own.astype(u.dtype)

        return jax.tree.map(add, plain, updates, new.nu), new

    return optax.GradientTransformation(adam.init, update_fn)


def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    *,
    dampening: float = 0.0,
    weight_decay: ArrayLike = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
    channel_axes: ChannelAxes,
) -> optax.GradientTransformationExtraArgs:
    """SGDP: SGD with momentum whose steps lose their radial part where the gradient has none.

        m <- momentum m + (1 - dampening) g
        u = m, or g + momentum m with nesterov
        x <- x - learning_rate (P(u) + weight_decay rho x / (1 - momentum))

    P and rho are those of `project_where_invariant`. In the published code without nesterov, u is
    the momentum's own memory, and the projection is written into it; here the momentum stays as it
    is. Classic leaves take SGD with decoupled decay.

    Args:
      learning_rate: a number or a schedule.
      momentum: decay of the buffer, in [0, 1).
      dampening: share of each gradient that is left out, in [0, 1]; the first one's too.
      weight_decay: decoupled decay, not negative.
      delta: what counts as tangent, relative to 1/sqrt(d).
      wd_ratio: share of the decay that what is projected takes.
      nesterov: whether the gradient is counted once more.
      channel_axes: the selection of the leaves that are tested, and their groups.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: a number is out of range, or `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: Heo et al., *AdamP* (arXiv 2006.08217), algorithm 2.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.sgdp(0.5, channel_axes=())
    >>> x, g = jnp.array([2.0, 0.0]), jnp.array([0.02, 1.0])
    >>> abs(tx.update(g, tx.init(x), x)[0]).round(4)
    Array([0. , 0.5], dtype=float32)
    """
    check_decays(momentum=momentum)
    check_shares(dampening=dampening)
    check_not_negative(weight_decay=weight_decay)
    undamped = optax.trace(momentum, nesterov=False)
    damped = not isinstance(dampening, int | float) or dampening  # what is traced may be any
    direction = optax.chain(optax.scale(1 - dampening), undamped) if damped else undamped
    if nesterov:
        direction = _plus_gradient(direction, momentum)
    projected = project_where_invariant(
        direction,
        weight_decay=weight_decay / (1 - momentum),
        delta=delta,
        wd_ratio=wd_ratio,
        channel_axes=channel_axes,
    )
    return optax.chain(projected, scale_by_learning_rate(learning_rate))


def _plus_gradient(
    direction: optax.GradientTransformation, momentum: float
) -> optax.GradientTransformation:
    """`g + momentum m`, with m the direction."""

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        moved, state = direction.update(updates, state, params)
        return jax.tree.map(lambda g, m: g + momentum * m, updates, moved), state

    return optax.GradientTransformation(direction.init, update_fn)
