"""What holds of any tree, any selection and any chain, by Hypothesis.

An example is a program of its own, of shapes that no other has. JAX traces it, which takes some 20
ms, and NumPy runs each of its steps in one: compiled, an example would take a second. In `examples`
each test says which part it has of all: 2,000 examples, here and in `test_equivalences.py`, or
50,000 by

    pytest --hypothesis-profile=long tests/library/test_{properties,equivalences}.py
"""

from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given

import spherical_optax as so
from numpy_programs import traced
from oracle import dot
from random_programs import OURS, Link, Program, examples, in_its_dtypes, programs, stepper


def test_every_public_link_is_drawn():
    found = set()
    for name in so.__all__:
        returns = getattr(getattr(so, name), "__annotations__", {}).get("return", "")
        if "GradientTransformation" in str(returns):
            found.add(name)
    assert found == set(OURS)


def run(step: Callable, state: Any, params: Any, grads: list[Any]) -> tuple[Any, Any]:
    """The point and the state after the gradients."""
    for g in grads:
        _, state, params = step(g, state, params)
    return params, state


@examples(0.47)
@given(programs())
def test_types_are_kept_and_what_is_not_finite_stays_in_its_group(program):
    """And comes out there, where no wrapper skips it."""
    with in_its_dtypes(program.tree):
        init, step = stepper(program.tx)
        params, grads = program.numbers()
        state = init(params)
        updates, second, after = step(grads[0], state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes((updates, second), (grads[0], state))
        chex.assert_trees_all_equal_shapes_and_dtypes(after, params)

        rng = np.random.default_rng(program.seed)
        leaf = rng.integers(len(program.axes))
        group = rng.choice(program.groups[leaf]) if program.groups[leaf].size else []
        if program.reach == "tree" or not len(group):
            return
        place, bad = rng.choice(group), rng.choice([np.nan, np.inf, -np.inf])
        if rng.integers(2):
            clean, _ = run(step, second, after, grads[1:])
            spoiled, _ = run(step, second, after, [spoil(grads[1], leaf, place, bad), grads[2]])
        else:
            clean, _ = run(step, state, params, grads[:2])
            params = spoil(params, leaf, place, bad)
            spoiled, _ = run(step, init(params), params, grads[:2])
        for i, (found, expected) in enumerate(
            zip(*map(jax.tree.leaves, (spoiled, clean)), strict=True)
        ):
            others = np.ones(found.size, bool)
            if i == leaf:
                assert not np.isfinite(found.ravel()[group]).all()
                others[group if program.reach == "group" else ...] = False
            np.testing.assert_array_equal(found.ravel()[others], expected.ravel()[others])


def spoil(tree: Any, leaf: int, place: int, bad: float) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    leaves[leaf] = np.array(leaves[leaf])
    leaves[leaf].flat[place] = bad
    return jax.tree.unflatten(structure, leaves)


# Points, updates and momenta on the sphere.

# Of unit roundings: sums of up to 64 products, and the few operations around them.
ARITHMETIC = 100


def rounding(dtype: Any) -> float:
    return float(np.finfo(np.float32 if np.dtype(dtype).itemsize < 4 else dtype).eps)


def spheres(program: Program, *trees: Any) -> Iterator[tuple[Any, ...]]:
    """Of each leaf on spheres its dtype, and its groups as rows in float64."""
    leaves = zip(program.groups, *map(jax.tree.leaves, trees), strict=True)
    for groups, *arrays in leaves:
        if groups.size > len(groups):
            yield arrays[0].dtype, *(np.asarray(a, np.float64).ravel()[groups] for a in arrays)


def length(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(dot(rows, rows))[:, 0]


def last_link(program: Program) -> tuple[Callable, Callable]:
    """`init`, and the last link's input, its output, the state and the point after a step."""
    *before, last = (link.make(program.selection) for link in program.chain)
    before = optax.chain(optax.identity(), *before)

    def init(params: Any) -> tuple[Any, Any]:
        return before.init(params), last.init(params)

    def step(grads: Any, state: Any, params: Any) -> tuple[Any, ...]:
        incoming, first = before.update(grads, state[0], params)
        updates, second = last.update(incoming, state[1], params)
        return incoming, updates, (first, second), optax.apply_updates(params, updates)

    return traced(init), traced(step)


def radius_to_come(link: Link, start: np.ndarray, x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """What the link says of |x| after its step, per group, from |x| at init."""
    before, after = length(x), length(x + u)
    match link.name:
        case "adam_g":
            return np.ones(len(x))
        case "follow_great_circle":
            return before
        case "radial_brake":
            share = np.where(after > before, link.settings["outward"], link.settings["inward"])
            return before + share * (after - before)
    radius = link.settings.get("radius")
    return start if radius is None else np.full(len(x), 0.5 if callable(radius) else radius)


def radius_lost(link: Link, x: np.ndarray, u: np.ndarray, eps: float) -> np.ndarray:
    """Share of the radius that `rotational` may be off by, as it measures the tangent part of u."""
    tangent = u - dot(u, x) / np.maximum(dot(x, x), 1e-300) * x
    share = dot(tangent, tangent)[:, 0] / np.maximum(dot(u, u)[:, 0], 1e-300)
    # Of what is radial but for rounding, twice itself.
    lost = np.minimum(2.0, ARITHMETIC * eps / np.maximum(share, 1e-300))
    angle = link.settings["angle"]
    mean = angle(0) if callable(angle) else angle  # the largest
    return mean**2 / 2 / (1 - link.settings["update_norm_decay"]) * lost


ENDS = (
    "adam_g",
    "adam_h",
    "follow_great_circle",
    "hyperball",
    "muon_h",
    "radial_brake",
    "reproject_to_sphere",
    "rotational",
)


@examples(0.19)
@given(programs(last=ENDS))
def test_points_stay_on_their_spheres(program):
    with in_its_dtypes(program.tree):
        init, step = last_link(program)
        params, grads = program.numbers()
        start, state = params, init(params)
        for g in grads:
            old = params
            incoming, updates, state, params = step(g, state, old)
            for dtype, x0, x, u, out, y in spheres(program, start, old, incoming, updates, params):
                expected = radius_to_come(program.chain[-1], length(x0), x, u)
                own = jnp.finfo(dtype)
                # Half a unit of the update's rounding and half of the point's, by element; and
                # the arithmetic before, of numbers as large as these.
                allowed = float(own.eps) * (length(out) + length(y))
                allowed += float(own.smallest_subnormal) * np.sqrt(x.shape[1])
                scale = length(x) + expected
                if program.chain[-1].name in ("follow_great_circle", "radial_brake"):
                    scale = scale + length(u)
                allowed += ARITHMETIC * rounding(dtype) * scale
                if program.chain[-1].name == "rotational":
                    allowed += radius_lost(program.chain[-1], x, u, rounding(dtype)) * length(x)
                # A direction of zeros moves nothing, a group of zeros has no radius, and float16
                # has an end, in Optax's Adam too.
                checked = np.any(out, axis=1) & np.any(x0, axis=1) & np.isfinite(length(u))
                if dtype == np.float16:
                    checked &= np.isfinite(length(y))
                assert np.all((abs(length(y) - expected) <= allowed)[checked])


UPDATES = ("project_to_tangent_space", "centralize_per_group", "normalize_per_group")


@examples(0.08)
@given(programs(last=UPDATES))
def test_updates_are_tangent_or_centred_or_of_length_1(program):
    with in_its_dtypes(program.tree):
        init, step = last_link(program)
        params, (grads, *_) = program.numbers()
        incoming, updates, _, _ = step(grads, init(params), params)
        for dtype, x, u, out in spheres(program, params, incoming, updates):
            own = jnp.finfo(dtype)
            rounded = float(own.eps) * length(out) + float(own.smallest_subnormal) * out.shape[1]
            rounded += ARITHMETIC * rounding(dtype) * length(u)
            match program.chain[-1].name:
                case "project_to_tangent_space":
                    off, allowed = dot(out, x)[:, 0], rounded * length(x)
                case "centralize_per_group":
                    off, allowed = out.sum(1), rounded * np.sqrt(out.shape[1])
                case "normalize_per_group":
                    off = length(out) - np.any(u, axis=1)
                    allowed = float(own.eps) + ARITHMETIC * rounding(dtype)
            finite = np.isfinite(length(u))
            assert np.all((abs(off) <= allowed)[finite])


TRANSPORTED = ("scale_by_adam_srt", "scale_by_adam_g", "trace_rt")


@examples(0.12)
@given(programs(last=TRANSPORTED, most_links=1))
def test_momenta_of_tangent_gradients_are_tangent(program):
    (link,) = program.chain
    if link.settings["transport"] == "none":
        link = link._replace(settings=link.settings | {"transport": "isometric"})
    with in_its_dtypes(program.tree):
        tx = optax.chain(link.make(program.selection), optax.scale(-0.05))
        init, step = stepper(tx)
        params, grads = program.numbers()
        project = traced(so.project_to_tangent_space(channel_axes=program.selection).update)
        state = init(params)
        momentum = lambda state: state[0].trace if link.name == "trace_rt" else state[0].mu  # noqa: E731
        for g in grads:
            g, _ = project(g, optax.EmptyState(), params)
            before = momentum(state)
            _, state, after = step(g, state, params)
            stored = spheres(program, momentum(state))
            here = spheres(program, params, g, before)
            for (kept, m), (dtype, x, g, old) in zip(stored, here, strict=True):
                own, wide = jnp.finfo(kept), rounding(dtype)
                # The gradient's own radial part, and rounding of what is summed and stored.
                share = np.maximum(1, length(x))
                allowed = share * abs(dot(g, x)[:, 0])
                allowed += ARITHMETIC * wide * (share * length(g) + length(old)) * length(x)
                allowed += float(own.eps) * length(m) * length(x) + float(own.smallest_subnormal)
                assert np.all(abs(dot(m, x)[:, 0]) <= allowed)
            params = after
