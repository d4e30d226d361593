"""What `with_geometry` measures at each step, over the steps of an epoch."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spherical_optax as so


def names(opt_state: optax.OptState) -> tuple[str, ...]:
    """The names of the figures; none where the optimizer is not wrapped in `with_geometry`.

    Those of a stack's layers are numbered, `blocks/kernel/0/angle/mean`.

    Args:
      opt_state: of several seeds, along a leading axis.
    """
    every = []
    for name, figures in _figures(opt_state).items():
        leaf, measure, statistic = name.rsplit("/", 2)
        layers = range(figures.shape[1]) if figures.ndim > 1 else [None]
        for layer in layers:
            place = leaf if layer is None else f"{leaf}/{layer}"
            every.append(f"{place}/{measure}/{statistic}")
    return tuple(every)


def measured(opt_state: optax.OptState) -> jax.Array:
    """The figures of one seed's last step in the order of their names, float32 [figures]."""
    figures = [jnp.ravel(figure) for figure in _figures(opt_state).values()]
    return jnp.concatenate(figures) if figures else jnp.zeros(0)


def _figures(opt_state: optax.OptState) -> dict[str, jax.Array]:
    return so.geometry(opt_state) if isinstance(opt_state, so.WithGeometryState) else {}


def add(
    before: list[list[float]] | None, steps: np.ndarray, names: Sequence[str]
) -> list[list[float]]:
    """Add steps [steps, seeds, figures] to those of an epoch so far: sums of means; minima; maxima.

    Args:
      before: what this function gave for the earlier steps of the epoch; None for the first.
      steps: the figures of each step and seed.
      names: of the figures.
    """
    steps = steps.astype(np.float64)
    if before is not None:
        steps = np.concatenate([np.asarray(before)[None], steps])
    kind = np.array([name.rpartition("/")[2] for name in names])
    least, most = steps.min(axis=0), steps.max(axis=0)
    sums = steps.sum(axis=0)
    return np.where(kind == "mean", sums, np.where(kind == "min", least, most)).tolist()


def of_epoch(added: list[list[float]], names: Sequence[str], steps: int) -> list[dict[str, float]]:
    """For each seed the means over an epoch's steps, the smallest minima and the largest maxima."""
    parts = [steps if name.endswith("/mean") else 1 for name in names]
    return [
        {name: value / n for name, value, n in zip(names, values, parts, strict=True)}
        for values in added
    ]


def line(unit: str, number: int, figures: dict[str, float]) -> dict[str, float | None]:
    """What float32 holds of an epoch's figures; None for what is infinite or no number."""
    finite = {k: float(f"{v:.7g}") if math.isfinite(v) else None for k, v in figures.items()}
    return {unit: number} | finite
