"""Replays a list of gradients through an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax


def replay(
    tx: optax.GradientTransformation,
    params: Any,
    grads: Iterable[Any],
    variant: Callable[[Callable], Callable] = jax.jit,
) -> list[Any]:
    """The parameters after each gradient; a callable gradient is evaluated at the parameters."""
    update, state, trajectory = variant(tx.update), tx.init(params), []
    for grad in grads:
        updates, state = update(grad(params) if callable(grad) else grad, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory
