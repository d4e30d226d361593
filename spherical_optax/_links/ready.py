"""Links without state, and what the ready optimizers put around theirs: decay, a learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from spherical_optax._ground.groups import widen
from spherical_optax._ground.hyperparams import check_rates, check_weight_decay
from spherical_optax._ground.leaves import map_leaves, need_params
from spherical_optax._ground.selection import ChannelAxes, select
from spherical_optax._links.moments import decay_at

# Which leaves decay: a tree of booleans, or a prefix of one as with Optax, or a callable from the
# parameters to one; None: all.
DecayMask = optax.Params | Callable[[optax.Params], optax.Params] | None


def decay_flags(mask: DecayMask, params: Any) -> optax.Params | None:
    """The tree of a mask, for the `flags` of `map_leaves`."""
    tree: Any = mask
    # A mask of one of Equinox's modules is callable, as they are.
    if callable(mask) and all(map(callable, jax.tree.leaves(mask))):
        tree = mask(params)
    try:
        return None if tree is None else jax.tree.broadcast(tree, params)
    except ValueError:
        return tree  # which `map_leaves` refuses, with the path


def stateless_link(
    leaf: Callable[..., jax.Array], channel_axes: ChannelAxes, *, needs_params: str | None = None
) -> optax.GradientTransformation:
    """A link of `leaf(axes, update)` or, where it has a name, of `leaf(axes, update, param)`."""

    def init_fn(params: optax.Params) -> optax.EmptyState:
        select(params, channel_axes)  # raises if it does not fit
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        params = need_params(params, needs_params) if needs_params else None
        updates, *_ = map_leaves(
            lambda axes, *arrays: (leaf(axes, *arrays),), channel_axes, updates, params=params
        )
        return updates, state

    return optax.GradientTransformation(init_fn, update_fn)


def add_coupled_decay(
    weight_decay: optax.ScalarOrSchedule,
    optimizer: str,
    *,
    mask: DecayMask = None,
    except_spherical: ChannelAxes = None,
) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` that refuses other trees and keeps the dtype of the updates.

    Optax would broadcast updates of another shape against the parameters. The leaves that
    `except_spherical` selects take no decay.
    """
    check_weight_decay(weight_decay)

    def init_fn(params: optax.Params) -> optax.OptState:
        del params
        if callable(weight_decay):
            return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        params = need_params(params, optimizer)
        count = state.count if callable(weight_decay) else 0
        decay = decay_at(count, weight_decay)

        def leaf(
            axes: tuple[int, ...], g: jax.Array, x: jax.Array, decays: bool = True
        ) -> tuple[jax.Array]:
            if axes or decay is None or not decays:
                return (g,)
            return (g + jnp.asarray(decay, g.dtype) * x,)

        flags = decay_flags(mask, params)
        (updates,) = map_leaves(leaf, except_spherical, updates, params=params, flags=flags)
        if callable(weight_decay):
            state = optax.ScaleByScheduleState(optax.safe_increment(count))
        return updates, state

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    """`optax.scale_by_learning_rate` that keeps the dtype of the updates.

    Optax multiplies by an array, such as one that `optax.inject_hyperparams` traces, in the wider
    of the two dtypes, and refuses to under strict promotion.
    """
    check_rates(learning_rate=learning_rate)
    rate = optax.scale_by_learning_rate(learning_rate)

    def scaled(update: ArrayLike) -> jax.Array:
        wide = widen(update)
        return (-jnp.asarray(learning_rate, wide.dtype) * wide).astype(jnp.result_type(update))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        if isinstance(learning_rate, jax.Array):
            return jax.tree.map(scaled, updates), state
        new, state = rate.update(updates, state, params)
        return jax.tree.map(lambda a, b: jnp.asarray(a, jnp.result_type(b)), new, updates), state

    return optax.GradientTransformation(rate.init, update_fn)
