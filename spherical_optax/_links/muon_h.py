"""MuonH: orthogonalised momentum on hyperballs."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from spherical_optax._ground.hyperparams import (
    check_count,
    check_decays,
    check_dtype,
    check_not_negative,
)
from spherical_optax._ground.selection import ChannelAxes, path_labels, select
from spherical_optax._links.hyperball import Radius, on_hyperballs
from spherical_optax._links.ready import DecayMask, stateless_link


def orthogonalize_per_group(
    *, ns_steps: int = 5, channel_axes: ChannelAxes
) -> optax.GradientTransformation:
    """Brings the singular values of each group, a matrix, near to 1.

        u = U S V^T        u <- U S' V^T, with S' between about 0.7 and 1.2

    by Newton and Schulz' iteration, as in `optax.contrib.scale_by_muon`. The group's two axes are
    the matrix; the axes that index groups (layers of a stack, experts, heads, blocks) make a batch.
    Classic leaves pass. A group of zeros stays zero.

    Args:
      ns_steps: iterations, at least 1.
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.

    Returns:
      A gradient transformation without state, which does not need the parameters.

    Raises:
      ValueError: `ns_steps` is below 1; at init, where a group is no matrix.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: Jordan et al., *Muon* (2024).

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.orthogonalize_per_group(channel_axes=())
    >>> u, _ = tx.update(jnp.array([[3.0, 0.0], [0.0, 1.0]]), optax.EmptyState())
    >>> jnp.all((0.6 < jnp.diag(u)) & (jnp.diag(u) < 1.3))
    Array(True, dtype=bool)
    """
    check_count(ns_steps=ns_steps)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        for leaf in select(params, channel_axes):
            if leaf.spherical and len(leaf.groups.axes) != 2:
                raise ValueError(
                    f"{leaf.path}: a group of {leaf.groups.shape} with channel_axes="
                    f"{leaf.channel_axes!r} is no matrix, as it spans {len(leaf.groups.axes)} axes "
                    "and not two; name the others in channel_axes, or give this path None"
                )
        return optax.EmptyState()

    def leaf(axes: tuple[int, ...], u: jax.Array) -> Any:
        if not axes:
            return u
        matrix = optax.contrib.MuonDimensionNumbers(*axes)
        # Without momentum it has nothing to remember, and its state is made and dropped here.
        muon = optax.contrib.scale_by_muon(
            beta=0.0, nesterov=False, ns_steps=ns_steps, weight_dimension_numbers=matrix
        )
        return muon.update(u, muon.init(u))[0]

    return optax.GradientTransformation(init_fn, stateless_link(leaf, channel_axes).update)


def muon_h(
    learning_rate: optax.ScalarOrSchedule,
    beta: ArrayLike = 0.95,
    *,
    nesterov: bool = True,
    ns_steps: int = 5,
    channel_axes: ChannelAxes,
    radius: Radius = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: ArrayLike = 0.9,
    adam_b2: ArrayLike = 0.95,
    adam_eps: ArrayLike = 1e-8,
    adam_weight_decay: ArrayLike = 0.0,
    adam_weight_decay_mask: DecayMask = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """MuonH: Muon's direction on hyperballs, and AdamW elsewhere.

        m <- beta m + g
        u = orthogonalised (g + beta m), or (m) without nesterov
        x <- R N(x - learning_rate R N(u))                              spherical leaves
        x <- x - adam_learning_rate (adam(g) + adam_weight_decay x)     classic leaves

    See `hyperball` for R, N and the learning rate, and `adam_h` for adam(g). A group is a matrix:
    the two axes that it spans; the axes that index groups are layers, experts or heads. Muon's
    factors for the shapes of matrices would cancel here. Unlike `optax.contrib.muon`, the momentum
    has no bias correction, which the published MuonH lacks: the first steps point elsewhere.

    Args:
      learning_rate: of the spherical leaves, a number or a schedule: 0.01 to 0.02 is usual.
      beta: decay of the momentum, in [0, 1).
      nesterov: whether the gradient is counted once more.
      ns_steps: Newton and Schulz' iterations, at least 1.
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      radius: of the spheres, see `hyperball`.
      adam_learning_rate: of the classic leaves, a number or a schedule; by default the same.
      adam_b1: decay of their first moment, in [0, 1).
      adam_b2: decay of their second moment, in [0, 1).
      adam_eps: added to the root of the second moment.
      adam_weight_decay: decoupled decay of the classic leaves, not negative.
      adam_weight_decay_mask: those that decay, see `adam_h`.
      mu_dtype: dtype of the stored momenta; by default that of the parameters.

    Returns:
      A gradient transformation. Nothing that changes the updates may follow it.

    Raises:
      ValueError: as for `hyperball`, with `zero="error"`; at init, where a group is no matrix.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: Wen et al., *Hyperball optimization* (2025), MuonH.

    >>> import jax, jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.muon_h(0.02, channel_axes=0)  # two layers of a stack
    >>> x, g = jax.random.normal(jax.random.key(0), (2, 2, 4, 6))
    >>> updates, _ = tx.update(g, tx.init(x), x)
    >>> angles = so.angle_per_step(x, updates, channel_axes=0)
    >>> jnp.all((0.015 < angles) & (angles < 0.025))
    Array(True, dtype=bool)
    """
    check_decays(beta=beta, adam_b1=adam_b1, adam_b2=adam_b2)
    check_not_negative(adam_eps=adam_eps)
    check_dtype(mu_dtype=mu_dtype)
    direction = optax.partition(
        {
            "spherical": optax.chain(
                optax.trace(beta, nesterov, accumulator_dtype=mu_dtype),
                orthogonalize_per_group(ns_steps=ns_steps, channel_axes=channel_axes),
            ),
            "classic": optax.scale_by_adam(adam_b1, adam_b2, adam_eps, mu_dtype=mu_dtype),
        },
        path_labels(channel_axes),
    )
    return on_hyperballs(
        direction,
        learning_rate,
        channel_axes=channel_axes,
        radius=radius,
        classic_learning_rate=adam_learning_rate,
        classic_weight_decay=adam_weight_decay,
        classic_weight_decay_mask=adam_weight_decay_mask,
        name="muon_h",
    )
