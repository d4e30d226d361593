"""A selection as a table: which leaves are on spheres, and what was measured of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import optax

from spherical_optax._ground.selection import ChannelAxes, select


def describe(params: optax.Params, channel_axes: ChannelAxes) -> str:
    """Tabulates a selection, to be looked at before training.

    Args:
      params: parameters, or their shapes (`jax.eval_shape`).
      channel_axes: the selection.

    Returns:
      A line for each leaf, of path, shape, and groups × dimension or "classic"; with a selection
      from `find_invariant_groups`, what it measured too. Above 40 lines, repeated layers share one
      (`blocks/0…11/conv/kernel`). The last line has the totals.

    Raises:
      ValueError, TypeError: the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> params = {"conv": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}
    >>> print(so.describe(params, so.by_path({"conv": so.blocks(-1, 4)})))
    path  shape     groups × dimension
    bias  16        classic
    conv  3×3×8×16  4 × 288, 4 blocks of axis -1
    2 leaves, 1,168 parameters, 98.6 % of them on spheres
    """
    # A selection may bring evidence, as that of `find_invariant_groups` does.
    evidence = getattr(channel_axes, "evidence", None)
    leaves = [leaf for leaf in select(params, channel_axes) if not leaf.skipped]
    rows: list[tuple[str, ...]] = []
    for leaf in leaves:
        shape = "×".join(map(str, leaf.groups.shape)) or "scalar"
        rows.append((leaf.path, shape, str(leaf), evidence(leaf.path) if evidence else ""))
    if len(rows) > 40:
        rows = _repeated_once(rows)
    rows.insert(0, ("path", "shape", "groups × dimension", "measured" if evidence else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    total = sum(leaf.number for leaf in leaves)
    share = sum(leaf.number for leaf in leaves if leaf.spherical) / max(total, 1)
    counted = f"{len(leaves)} leaves, {total:,} parameters"
    return "\n".join([*lines, f"{counted}, {100 * share:.1f} % of them on spheres"])


def _repeated_once(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """One row in place of those that differ in numbers of the path, and in figures measured."""
    families: dict[tuple[str, ...], list[list[str]]] = {}
    for path, shape, groups, measured in rows:
        numbers = re.findall(r"(?<![^/])\d+(?![^/])", path)
        verdict = measured.split(" (")[0]
        pattern = re.sub(r"(?<![^/])\d+(?![^/])", "{}", path.replace("{", "{{").replace("}", "}}"))
        families.setdefault((pattern, shape, groups, verdict), []).append(numbers)
    merged = []
    for (pattern, *rest), members in families.items():
        columns = [sorted(set(map(int, column))) for column in zip(*members, strict=True)]
        if len(members) == math.prod(map(len, columns)):
            members = [[_ranges(column) for column in columns]]
        merged += [(pattern.format(*numbers), *rest) for numbers in members]
    return merged


def _ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as text: `0…3,5`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{run[0]}…{run[-1]}" if run[1:] else f"{run[0]}" for run in runs)
