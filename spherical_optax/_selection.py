"""Which leaves of a parameter tree are spherical, and how an update visits them.

A selection is a value of `channel_axes`: one for all leaves, or a callable `(path, leaf) -> axes`.
Paths are names joined by `/`, the same whether the tree is a dict, an NNX state or an Equinox
module. A selection is asked anew for each tree that it meets and compares names only, because
`nnx.Optimizer` shows `init` and `update` trees of different types.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._groups import Axes, group_size, reduction_axes

ChannelAxes = Axes | Callable[[str, Any], Axes]


class ByPath(NamedTuple):
    """A selection by path; made by `by_path`."""

    rules: tuple[tuple[str, int | tuple[int, ...] | None], ...]
    require_match: bool

    def __call__(self, path: str, leaf: Any) -> int | tuple[int, ...] | None:
        del leaf
        for pattern, axes in self.rules:
            if re.search(pattern, path):
                return axes
        return None


def by_path(rules: Mapping[str, Axes], *, require_match: bool = True) -> ByPath:
    """Selects the spherical leaves by their paths.

    Args:
      rules: regular expressions, searched in the path (`layers/0/conv1/kernel`), each with the
        `channel_axes` of the leaves where it is found. The first match wins; a leaf without a
        match is classic, as is one whose rule says `None`.
      require_match: whether a rule that is found in no path is an error wherever the selection is
        used. Turn it off where a link sees a part of the tree only.

    Returns:
      A hashable callable `(path, leaf) -> axes` for any `channel_axes` argument.

    Raises:
      ValueError: a rule is not a regular expression.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> axes = so.by_path({r"conv|shortcut": -1, r"stack/kernel": (0, -1)})
    >>> axes("layers/0/conv1/kernel", None), axes("head/kernel", None)
    (-1, None)
    """
    normalised = []
    for pattern, axes in rules.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"by_path: {pattern!r} is not a regular expression: {error}") from None
        normalised.append((pattern, tuple(axes) if isinstance(axes, Sequence) else axes))
    return ByPath(tuple(normalised), require_match)


def path_mask(
    channel_axes: ChannelAxes, *, invert: bool = False
) -> Callable[[optax.Params], optax.Params]:
    """Makes a mask of the spherical leaves, for `optax.masked` and the masks of Optax's links.

    Args:
      channel_axes: the selection. A leaf whose groups have one element counts as classic.
      invert: `True` marks the classic leaves instead, such as those to decay.

    Returns:
      A callable from a tree to a tree of booleans.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> params = {"conv": jnp.ones((9, 4)), "bias": jnp.ones(4)}
    >>> so.path_mask(-1, invert=True)(params)
    {'bias': True, 'conv': False}
    """

    def mask(tree: optax.Params) -> optax.Params:
        return map_selected(lambda leaf: bool(leaf.axes) != invert, channel_axes, tree)

    return mask


def path_labels(
    channel_axes: ChannelAxes, *, spherical: str = "spherical", classic: str = "classic"
) -> Callable[[optax.Params], optax.Params]:
    """Labels leaves as spherical or classic, for `optax.partition`.

    Args:
      channel_axes: the selection. A leaf whose groups have one element counts as classic.
      spherical: label of the spherical leaves.
      classic: label of the others.

    Returns:
      A callable from a tree to a tree of labels.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> params = {"conv": jnp.ones((9, 4)), "head": jnp.ones((4, 2))}
    >>> so.path_labels(so.by_path({"conv": -1}))(params)
    {'conv': 'spherical', 'head': 'classic'}
    """

    def labels(tree: optax.Params) -> optax.Params:
        return map_selected(lambda leaf: spherical if leaf.axes else classic, channel_axes, tree)

    return labels


def describe(params: optax.Params, channel_axes: ChannelAxes) -> str:
    """Tabulates a selection, to be looked at before training.

    Args:
      params: parameters, or their shapes (`jax.eval_shape`).
      channel_axes: the selection.

    Returns:
      A line for each leaf: path, shape, and groups × dimension or "classic"; with a selection from
      `find_invariant_groups`, what it measured too.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> params = {"conv": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}
    >>> print(so.describe(params, so.by_path({"conv": -1})))
    path  shape     groups × dimension
    bias  16        classic
    conv  3×3×8×16  16 × 72
    """
    # By name, because `find_invariant_groups` stands above this file and uses it.
    evidence = getattr(channel_axes, "evidence", None)
    rows = [("path", "shape", "groups × dimension", "measured" if evidence else "")]
    for leaf in select(params, channel_axes):
        if leaf.skipped:
            continue
        shape = getattr(leaf.value, "shape", ())
        size = group_size(shape, leaf.axes)
        groups = f"{math.prod(shape) // size} × {size}" if leaf.axes else "classic"
        measured = evidence(leaf.path) if evidence else ""
        rows.append((leaf.path, "×".join(map(str, shape)) or "scalar", groups, measured))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


class Leaf(NamedTuple):
    """A position of a tree, with what a selection says of it."""

    path: str
    value: Any
    axes: tuple[int, ...]  # reduction axes; () is the classic treatment

    @property
    def skipped(self) -> bool:
        """Whether nothing is here: `None`, or the place of a leaf that `optax.masked` hides."""
        return is_hole(self.value)


def select(tree: optax.Params, channel_axes: ChannelAxes) -> list[Leaf]:
    """Resolves `channel_axes` for each leaf of a tree.

    Raises:
      ValueError: a rule of `by_path` is found in no path, or an axis is out of range.
      TypeError: a spherical leaf is not of a real floating dtype, or the axes are no axes.
    """
    named = named_leaves(tree)
    if isinstance(channel_axes, ByPath) and channel_axes.require_match and named:
        for pattern, _ in channel_axes.rules:
            if not any(re.search(pattern, path) for path, _ in named):
                paths = "\n  ".join(path for path, _ in named)
                raise ValueError(
                    f"by_path: no parameter path matches the rule {pattern!r}; correct it, or pass "
                    f"require_match=False where a link sees only a part of the tree. Paths:\n"
                    f"  {paths}"
                )
    leaves = []
    for path, value in named:
        if is_hole(value) or not hasattr(value, "shape"):
            leaves.append(Leaf(path, value, ()))
            continue
        wanted = channel_axes(path, value) if callable(channel_axes) else channel_axes
        try:
            axes = reduction_axes(value.shape, wanted)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None
        if axes and not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"{path}: parameters on a sphere are real floating-point numbers, not "
                f"{value.dtype}; convert them, or give this path channel_axes None"
            )
        leaves.append(Leaf(path, value, axes))
    return leaves


def map_selected(
    fn: Callable[[Leaf], Any], channel_axes: ChannelAxes, tree: optax.Params
) -> optax.Params:
    """Maps `fn` over the leaves of a tree; positions without a leaf stay as they are."""
    leaves = select(tree, channel_axes)
    structure = jax.tree.structure(tree, is_leaf=is_hole)
    return jax.tree.unflatten(
        structure, [leaf.value if leaf.skipped else fn(leaf) for leaf in leaves]
    )


def is_hole(x: Any) -> bool:
    """Whether nothing is here: `None`, or the place of a leaf that `optax.masked` hides."""
    return x is None or isinstance(x, optax.MaskedNode)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The paths and leaves of a tree, and its holes."""
    return [
        (_name(path), value)
        for path, value in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_hole)
    ]


def _name(path: tuple[Any, ...]) -> str:
    # An nnx.Variable holds its array in the attribute `value`; `nnx.Optimizer` shows it to init
    # and not to update.
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")
