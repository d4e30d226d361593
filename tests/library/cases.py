"""Every link and optimizer of the library, and their compiled trajectories."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import optax
import pytest

import spherical_optax as so
from watched import AXES, PARAMS, random_tree, stack

# A step, one with what the first leaves behind, and one more.
GRADS = [random_tree(seed) for seed in range(1, 4)]
# For Muon, whose groups are matrices: 24 of 3×4, and the blocks.
MATRICES = so.by_path({"conv": (0, -1), "stack": so.blocks(-1, 4, channel_axes=0)})


class Case(NamedTuple):
    """A factory that takes `channel_axes`, and what is known of it."""

    factory: Callable[..., optax.GradientTransformation]
    needs_params: bool = True
    # Optax's Adam or Muon is inside, which refuses strict promotion and missing updates, and has
    # NaNs in float16, where its eps is 0.
    of_optax: bool = False
    axes: Any = AXES


def watched_adam_srt(*, channel_axes: Any) -> optax.GradientTransformation:
    tx = so.adam_srt(0.1, weight_decay=0.01, channel_axes=channel_axes)
    return so.with_geometry(tx, channel_axes=channel_axes, every=2)


CASES = {
    "adam_g": Case(partial(so.adam_g, 0.1)),
    "adam_s": Case(partial(so.adam_s, 0.1, weight_decay=0.01)),
    "adam_srt": Case(partial(so.adam_srt, 0.1, weight_decay=0.01)),
    "normalize_per_group": Case(so.normalize_per_group, needs_params=False),
    "project_to_tangent_space": Case(so.project_to_tangent_space),
    "reproject_to_sphere": Case(so.reproject_to_sphere),
    "reproject_to_sphere_of_radius": Case(partial(so.reproject_to_sphere, 2.0)),
    "scale_by_adam_g": Case(so.scale_by_adam_g),
    "scale_by_adam_s": Case(so.scale_by_adam_s, needs_params=False),
    "scale_by_adam_srt": Case(so.scale_by_adam_srt),
    "scale_by_adam_srt_isometric": Case(partial(so.scale_by_adam_srt, transport="isometric")),
    "sgd_mrt": Case(partial(so.sgd_mrt, 0.1, weight_decay=0.01)),
    "trace_rt": Case(partial(so.trace_rt, 0.9)),
    "with_geometry": Case(watched_adam_srt),
    "adam_h": Case(partial(so.adam_h, 0.1, adam_weight_decay=0.01), of_optax=True),
    "adamp": Case(partial(so.adamp, 0.1, weight_decay=0.01, nesterov=True), of_optax=True),
    "centralize_per_group": Case(so.centralize_per_group, needs_params=False),
    "follow_great_circle": Case(so.follow_great_circle),
    "hyperball_exp": Case(
        partial(so.hyperball, optax.trace(0.9), 0.1, retraction="exp", zero="skip")
    ),
    "radial_brake": Case(so.radial_brake),
    "rotational": Case(partial(so.rotational, optax.trace(0.9), 0.1)),
    "scale_by_radius": Case(so.scale_by_radius),
    "sgdp": Case(partial(so.sgdp, 0.1, weight_decay=0.01)),
    "muon_h": Case(partial(so.muon_h, 0.1, ns_steps=1), of_optax=True, axes=MATRICES),
    "orthogonalize_per_group": Case(
        partial(so.orthogonalize_per_group, ns_steps=1),
        needs_params=False,
        of_optax=True,
        axes=MATRICES,
    ),
}
READY = (
    "adam_g",
    "adam_s",
    "adam_srt",
    "sgd_mrt",
    "with_geometry",
    "adam_h",
    "adamp",
    "hyperball_exp",
    "rotational",
    "sgdp",
    "muon_h",
)
# What others are made of, as `adam_s` of `scale_by_adam_s`.
PARTS = ("scale_by_adam_s", "scale_by_adam_srt", "trace_rt", "reproject_to_sphere_of_radius")
DISTINCT = [name for name in CASES if name not in PARTS]
# One of each state and of each way to compute.
APART = ("reproject_to_sphere", "scale_by_adam_g", *READY)
WITH_RADIUS = ("reproject_to_sphere", "adam_h", "hyperball_exp", "rotational", "muon_h")  # of init
LINKS = [name for name in CASES if name not in READY]

every_case = pytest.mark.parametrize("name", CASES)
distinct_cases = pytest.mark.parametrize("name", DISTINCT)
cases_apart = pytest.mark.parametrize("name", APART)
without_optax = pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.of_optax])
with_params = pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.needs_params])


@cache  # so that each is compiled once for trees of the same shapes
def make(name: str, axes: Any = None) -> optax.GradientTransformation:
    case = CASES[name]
    return case.factory(channel_axes=case.axes if axes is None else axes)


@partial(jax.jit, static_argnums=0)
def trajectory_end(tx: optax.GradientTransformation, params: Any, grads: Any) -> Any:
    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]


def run(tx: optax.GradientTransformation, params: Any = PARAMS, grads: Any = GRADS) -> Any:
    """The parameters after the gradients, in one compiled scan."""
    return trajectory_end(tx, params, stack(grads))


@cache
def run_alone(name: str) -> Any:
    return run(make(name))


def run_uncompiled(tx: optax.GradientTransformation) -> Any:
    """The same as `run`; the operations of all cases are compiled once, as they are the same."""
    params, state = PARAMS, tx.init(PARAMS)
    for grads in GRADS:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def state_types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
