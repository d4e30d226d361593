"""Which leaves of a parameter tree are spherical, and in which groups.

A selection is a value of `channel_axes`: one for all leaves, or a callable `(path, leaf) -> axes`.
Paths are names joined by `/`, the same whether the tree is a dict, an NNX state or an Equinox
module. A selection is asked anew for each tree that it meets and compares names only, because
`nnx.Optimizer` shows `init` and `update` trees of different types.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spherical_optax._ground.groups import Axes, Blocks, Layout, layout

#: A selection: the axes that index groups, for all leaves, or a callable `(path, leaf) -> axes`.
#: Axes are an integer, a tuple of integers (`()` for the whole array), `blocks` of one axis, or
#: `None` for no sphere.
ChannelAxes = Axes | Callable[[str, Any], Axes]


class ByPath(NamedTuple):
    """A selection by path; made by `by_path`."""

    rules: tuple[tuple[str, int | tuple[int, ...] | Blocks | None], ...]
    require_match: bool

    def __call__(self, path: str, leaf: Any = ...) -> int | tuple[int, ...] | Blocks | None:
        """The `channel_axes` of a leaf."""
        refuse_schedule_call(leaf)
        rule = self.first_match(path)
        return None if rule is None else self.rules[rule][1]

    def first_match(self, path: str) -> int | None:
        """The number of the rule that decides on a path."""
        found = (i for i, (pattern, _) in enumerate(self.rules) if re.search(pattern, path))
        return next(found, None)


def refuse_schedule_call(leaf: Any) -> None:
    """Raises `TypeError` if a selection was called with one argument only."""
    if leaf is ...:
        raise TypeError(
            "a selection is called as (path, leaf); optax.inject_hyperparams calls it like a "
            "schedule, unless it is given static_args='channel_axes'"
        )


def by_path(rules: Mapping[str, Axes], *, require_match: bool = True) -> ByPath:
    """Selects the spherical leaves by their paths.

    Args:
      rules: regular expressions, searched in the path (`layers/0/conv1/kernel`), each with the
        `channel_axes` of the leaves where it is found. The first match wins; a leaf without a
        match is classic, as is one whose rule says `None`.
      require_match: whether a rule that does nothing is an error wherever the selection is used:
        one that decides on no leaf, or on classic ones only though it names axes. Turn it off where
        a link sees a part of the tree only.

    Returns:
      A hashable callable `(path, leaf) -> axes` for any `channel_axes` argument.

    Raises:
      TypeError: `rules` is no mapping from strings to values of `channel_axes`.
      ValueError: a rule is not a regular expression.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> axes = so.by_path({"conv|short": -1, "stack/kernel": (0, -1), "query": so.blocks(-1, 8)})
    >>> axes("layers/0/conv1/kernel", None), axes("head/kernel", None)
    (-1, None)
    """
    if not isinstance(rules, Mapping):
        raise TypeError(f"by_path: {rules!r} is not a mapping such as {{'conv': -1}}")
    normalised = []
    for pattern, axes in rules.items():
        if not isinstance(pattern, str):
            raise TypeError(f"by_path: {pattern!r} is not a string such as 'conv'")
        try:
            re.compile(pattern)
            layout((), axes)  # for its TypeError
        except re.error as error:
            raise ValueError(f"by_path: {pattern!r} is not a regular expression: {error}") from None
        except TypeError as error:
            raise TypeError(f"by_path: the rule {pattern!r}: {error}") from None
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
        return map_selected(lambda leaf: leaf.spherical != invert, channel_axes, tree)

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
        return map_selected(
            lambda leaf: spherical if leaf.spherical else classic, channel_axes, tree
        )

    return labels


class Leaf(NamedTuple):
    """A position of a tree, with what a selection says of it."""

    path: str
    value: Any
    groups: Layout
    channel_axes: Axes

    @property
    def spherical(self) -> bool:
        """Whether a group has more than one element; else the treatment is the classic one."""
        return self.groups.shape != self.groups.counts

    @property
    def skipped(self) -> bool:
        """Whether nothing is here: `None`, or the place of a leaf that `optax.masked` hides."""
        return is_hole(self.value)

    @property
    def number(self) -> int:
        """Number of elements."""
        return math.prod(self.groups.shape)

    def __str__(self) -> str:
        if not self.spherical:
            return "classic"
        text = f"{math.prod(self.groups.counts)} × {self.groups.size}"
        if isinstance(self.channel_axes, Blocks):
            text += f", {self.channel_axes.count} blocks of axis {self.channel_axes.axis}"
        return text


def select(tree: optax.Params, channel_axes: ChannelAxes) -> list[Leaf]:
    """Resolves `channel_axes` for each leaf of a tree.

    Raises:
      ValueError: a rule of `by_path` does nothing, two leaves have one path, or the axes do not fit
        a shape.
      TypeError: a spherical leaf is not of a real floating dtype, the axes are no axes, or the
        callable is none of `(path, leaf)`.
    """
    if callable(channel_axes):
        _check_arity(channel_axes)
    leaves = []
    for path, value in named_leaves(tree):
        if is_hole(value) or not hasattr(value, "shape"):
            if isinstance(value, str):
                raise TypeError(f"{path}: {value!r} is no array".removeprefix(": "))
            shape = jnp.shape(value) if not is_hole(value) else ()
            leaves.append(Leaf(path, value, Layout(shape, shape), None))
            continue
        wanted = channel_axes(path, value) if callable(channel_axes) else channel_axes
        try:
            leaf = Leaf(path, value, layout(value.shape, wanted), wanted)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None
        if leaf.spherical and not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"{path}: parameters on a sphere are real floating-point numbers, not "
                f"{value.dtype}; convert them, or give this path channel_axes None"
            )
        leaves.append(leaf)
    if isinstance(channel_axes, ByPath) and channel_axes.require_match and leaves:
        _check_rules(channel_axes, leaves)
    return leaves


def _check_arity(channel_axes: Callable[[str, Any], Axes]) -> None:
    try:
        signature = inspect.signature(channel_axes)
    except ValueError:  # some built-in functions have none
        return
    try:
        signature.bind("path", "leaf")
    except TypeError:
        name = getattr(channel_axes, "__qualname__", repr(channel_axes))
        raise TypeError(
            f"channel_axes: {name}{signature} cannot be called as (path, leaf) -> axes; masks and "
            "labels (so.path_mask, so.path_labels) are not selections, but made from them"
        ) from None


def _check_rules(axes: ByPath, leaves: list[Leaf]) -> None:
    """Raises `ValueError` for the first rule that does nothing."""
    if [leaf.path for leaf in leaves] == [""]:
        raise ValueError(
            "by_path: no parameter path matches a rule, as this is one array and no tree; give one "
            "array axes and not rules. (optax.inject_hyperparams calls masks like schedules, with "
            "a count, unless static_args names their argument)"
        )
    decides = [
        [leaf for leaf in leaves if axes.first_match(leaf.path) == i]
        for i in range(len(axes.rules))
    ]
    for (pattern, wanted), decided in zip(axes.rules, decides, strict=True):
        if not any(re.search(pattern, leaf.path) for leaf in leaves):
            problem = f"no parameter path matches the rule {pattern!r}; correct it"
        elif not decided:
            problem = (
                f"the rule {pattern!r} is never the first to match; put it before the rule that "
                "takes its paths"
            )
        elif wanted is not None and not any(leaf.spherical or leaf.skipped for leaf in decided):
            problem = (
                f"the rule {pattern!r} puts nothing on a sphere: with channel_axes={wanted!r} each "
                f"group of {decided[0].path} {decided[0].groups.shape} has one element; give it "
                "None or other axes"
            )
        else:
            continue
        paths = "\n  ".join(leaf.path for leaf in leaves)
        raise ValueError(
            f"by_path: {problem}, or pass require_match=False where a link sees only a part of the "
            f"tree. Paths:\n  {paths}"
        )


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
    """The paths and leaves of a tree, and its holes.

    Raises:
      ValueError: two leaves have one path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_hole)
    # An nnx.Variable holds its array in the attribute `value`, which `nnx.Optimizer` shows to init
    # and not to update. Beside others, `value` is a name like `query` and `key`.
    children = Counter(
        node for path, _ in leaves for node in {path[:depth] for depth in range(len(path))}
    )
    names = [
        jax.tree_util.keystr(
            path[:-1] if _is_value(path) and children[path[:-1]] == 1 else path,
            simple=True,
            separator="/",
        )
        for path, _ in leaves
    ]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(
            f"{twice}: the path of two leaves; rename one, so that paths tell them apart"
        )
    return [(name, value) for name, (_, value) in zip(names, leaves, strict=True)]


def _is_value(path: tuple[Any, ...]) -> bool:
    last = path[-1] if path else None
    return isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value"
