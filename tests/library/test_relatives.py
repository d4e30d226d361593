"""Trajectories that the peers' own code made, in float64: matched, or named where we depart.

The recipes are the blocks of docs/recipes.md.
"""

import json
import re
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so
from replay import replay as points

pytestmark = pytest.mark.usefixtures("compiled_quickly")

HERE = Path(__file__).parents[1]
CASES = json.loads((HERE / "goldens" / "relatives.json").read_text())["cases"]
ARRAYS = np.load(HERE / "goldens" / "relatives.npz")
PAGE = (HERE.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
RECIPES = {}
for block in BLOCKS:
    exec(compile(block, "recipes.md", "exec"), RECIPES)

# Selections in PyTorch's layout: w2 (out, in), conv OIHW, stack (layer, out, in), bias.
WHOLE = so.by_path({"w2|conv|stack|bias": ()}, require_match=False)
WHOLE_MATRICES = so.by_path({"w2|conv|stack": ()}, require_match=False)
BY_LAYER = so.by_path({"w2": (), "conv|stack": 0}, require_match=False)
BY_LAYER_AND_VECTORS = so.by_path({"w2|bias": (), "conv|stack": 0}, require_match=False)
BY_FIRST = so.by_path({"w2|conv|stack": 0}, require_match=False)
COLUMNS = so.by_path({"w2": 1, "stack": (0, 2)}, require_match=False)
ROWS = so.by_path({"w2": 0, "stack": (0, 1)}, require_match=False)
LAST = so.by_path({"w2|conv": 0, "stack": (0, 1), "bias": ()}, require_match=False)

ADAM_95 = {"b1": 0.9, "b2": 0.95}


def rotational(direction, angle, classic, axes, zero_mean=False):
    """Biases take the plain optimizer, whose learning rate enters the angle by its root."""

    def optimizer(learning_rate):
        turning = so.rotational(
            direction,
            lambda count: angle(learning_rate(count)),
            channel_axes=axes,
            zero_mean=zero_mean,
        )
        plain = optax.chain(classic, optax.scale_by_learning_rate(learning_rate))
        return optax.partition({"spherical": turning, "classic": plain}, so.path_labels(axes))

    return optimizer


ADAMW = {
    "direction": optax.scale_by_adam(0.9, 0.98),
    "angle": partial(so.equilibrium_angle, weight_decay=0.1, b1=0.9),
    "classic": optax.chain(optax.scale_by_adam(0.9, 0.98), optax.add_decayed_weights(0.1)),
}
SGDM = {
    "direction": optax.trace(0.9),
    "angle": partial(so.equilibrium_angle_of_sgd, weight_decay=0.01, momentum=0.9),
    "classic": optax.chain(optax.add_decayed_weights(0.01), optax.trace(0.9)),
}
THEIR_QUINTIC = tuple(
    map(tuple, CASES["emopt_muon_hyperball_default_ns"]["hyperparameters"]["coefficients"])
)
MATRIX = optax.contrib.MuonDimensionNumbers
THEIR_MUON = optax.chain(
    optax.trace(0.95),
    optax.contrib.scale_by_muon(
        THEIR_QUINTIC,
        beta=0.0,
        nesterov=False,
        eps=1e-15,
        weight_dimension_numbers={"w2": MATRIX(0, 1), "stack": MATRIX(1, 2)},
    ),
)

MATCHED = {
    "adamp_default": partial(so.adamp, channel_axes=BY_FIRST),
    "adamp_wd_nesterov": partial(so.adamp, weight_decay=0.01, nesterov=True, channel_axes=BY_FIRST),
    "emopt_hyperball_hook_adam": partial(so.adam_h, channel_axes=WHOLE),
    "emopt_hyperball_hook_adam_radius2": partial(so.adam_h, channel_axes=WHOLE, radius=2.0),
    "emopt_hyperball_hook_sgd": partial(so.hyperball, optax.identity(), channel_axes=WHOLE),
    "emopt_hyperball_hook_sgd_zero_grads": partial(
        so.hyperball, optax.identity(), channel_axes=WHOLE
    ),
    "emopt_muon_hyperball_default_ns": partial(so.hyperball, THEIR_MUON, channel_axes=BY_LAYER),
    "emopt_oblique_sgd_dim0": partial(RECIPES["oblique_sgd"], channel_axes=COLUMNS),
    "emopt_oblique_sgd_wd_dim1": partial(
        RECIPES["oblique_sgd"], weight_decay=0.1, channel_axes=ROWS
    ),
    "emopt_radial_brake_adam_out0.5_in1.0": partial(
        RECIPES["adam_with_radial_brake"], channel_axes=WHOLE
    ),
    "emopt_radial_brake_sgd_out0.0_in1.0": lambda learning_rate: optax.chain(
        optax.scale_by_learning_rate(learning_rate), so.radial_brake(0.0, 1.0, channel_axes=WHOLE)
    ),
    "emopt_relative_update_sgd": partial(RECIPES["relative_update"], channel_axes=WHOLE),
    "geoopt_radam_sphere": partial(RECIPES["riemannian_adam"], channel_axes=LAST),
    "geoopt_rsgd_sphere": partial(RECIPES["riemannian_sgd"], channel_axes=LAST),
    "geoopt_rsgd_sphere_exact": partial(RECIPES["riemannian_sgd_exact"], channel_axes=LAST),
    "grug_adamh_b2_95": partial(so.adam_h, channel_axes=BY_LAYER_AND_VECTORS),
    "grug_adamh_zero_grads": partial(so.adam_h, channel_axes=BY_LAYER_AND_VECTORS),
    "kozistr_nero_constraints1": partial(RECIPES["nero"], channel_axes=BY_FIRST),
    "levanter_adamh_default": partial(so.adam_h, b2=0.999, channel_axes=BY_LAYER),
    "levanter_adamh_tangent": partial(
        RECIPES["adam_h_of_tangents"], channel_axes=BY_LAYER, tangent_to=WHOLE_MATRICES
    ),
    "levanter_muonh_default": partial(so.muon_h, channel_axes=BY_LAYER),
    "modded_nanogpt_adamh": partial(so.adam_h, channel_axes=WHOLE),
    "ngpt_adam_dim0": partial(RECIPES["ngpt_adam"], channel_axes=COLUMNS),
    "rotational_adamw_neuron_nomean": rotational(**ADAMW, axes=BY_FIRST),
    "rotational_adamw_tensor_zeromean": rotational(**ADAMW, axes=WHOLE_MATRICES, zero_mean=True),
    "rotational_sgdm_neuron_zeromean": rotational(**SGDM, axes=BY_FIRST, zero_mean=True),
    "rotational_sgdm_tensor_nomean": rotational(**SGDM, axes=WHOLE_MATRICES),
    "sgdp_nesterov_wd": partial(so.sgdp, weight_decay=0.01, nesterov=True, channel_axes=BY_FIRST),
    "sgdp_plain": partial(so.sgdp, momentum=0.0, channel_axes=BY_FIRST),
}
# Leaves that are no part of a comparison, and why.
LEFT_OUT = {
    "levanter_adamh_default": {"bias"},  # theirs freezes vectors, see below
    "levanter_adamh_tangent": {"bias"},
    "kozistr_nero_constraints1": {"bias"},  # scaled by a size of its own
}
TOLERANCE = {"kozistr_nero_constraints1": 1e-7}  # it adds 1e-8 to norms of about 1
DEPARTED = {"geoopt_rsgd_momentum_sphere"}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def centred(x, axes):
    """Without its mean, at its norm: what their constructors do to the weights."""
    middle = x - x.mean(axes, keepdims=True)
    norms = [np.sqrt((y**2).sum(axes, keepdims=True)) for y in (x, middle)]
    return middle * norms[0] / norms[1]


def start(name, leaves):
    params = {leaf: ARRAYS[CASES[name]["params0"][leaf]] for leaf in leaves}
    if "zeromean" in name or "nero" in name:
        for leaf in params.keys() - {"bias"}:
            rest = tuple(range(1, params[leaf].ndim))
            params[leaf] = centred(params[leaf], None if "tensor" in name else rest)
    params = jax.tree.map(jnp.asarray, params)
    return so.project_to_sphere(params, 1.0, channel_axes=BY_FIRST) if "nero" in name else params


def replay(name, factory, leaves):
    """The largest difference of a leaf from theirs, over all steps."""
    case = CASES[name]
    rates = jnp.asarray(case["learning_rate"])
    tx = factory(learning_rate=lambda count: rates[count])
    grads = {leaf: jnp.asarray(ARRAYS[case["grads"][leaf]]) for leaf in leaves}
    params = start(name, leaves)

    @jax.jit
    def trajectory(params, grads):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    out = trajectory(params, grads)
    return {leaf: np.max(np.abs(out[leaf] - ARRAYS[case["params"][leaf]])) for leaf in leaves}


def test_each_trajectory_is_matched_or_named():
    assert MATCHED.keys() | DEPARTED == CASES.keys()


@pytest.mark.parametrize("name", MATCHED)
def test_where_our_rule_is_theirs_so_is_the_trajectory(name):
    leaves = [leaf for leaf in CASES[name]["leaves"] if leaf not in LEFT_OUT.get(name, ())]
    differences = replay(name, MATCHED[name], leaves)
    assert max(differences.values()) < TOLERANCE.get(name, 1e-9), differences


def test_geoopt_seeds_its_buffer_with_the_raw_first_gradient():
    factory = partial(RECIPES["riemannian_sgd"], momentum=0.9, channel_axes=LAST)
    leaves = CASES["geoopt_rsgd_momentum_sphere"]["leaves"]
    assert min(replay("geoopt_rsgd_momentum_sphere", factory, leaves).values()) > 1e-3


def test_levanter_freezes_vectors():
    case = CASES["levanter_adamh_default"]
    theirs = ARRAYS[case["params"]["bias"]]
    np.testing.assert_array_equal(theirs, np.broadcast_to(theirs[0], theirs.shape))
    # Here what is not selected takes AdamW.
    assert replay("levanter_adamh_default", MATCHED["levanter_adamh_default"],
                  CASES["levanter_adamh_default"]["leaves"])["bias"] > 1e-2  # fmt: skip


def test_sgdp_does_not_write_the_projection_into_its_momentum():
    """As the published code does without nesterov, where u and the buffer are one array."""
    tx = so.sgdp(0.1, 0.9, channel_axes=())
    x, g = jnp.array([3.0, 4.0]), jnp.array([-4.0, 3.0])  # tangent
    radial = jnp.array([0.0, 5.0])
    _, state = tx.update(radial, tx.init(x), x)
    updates, state = tx.update(g, state, x)
    np.testing.assert_allclose(so.group_inner(updates, x, channel_axes=()), [0], atol=1e-7)
    np.testing.assert_allclose(optax.tree.get(state, "trace"), g + 0.9 * radial)


def test_oblique_adam_has_the_root_in_its_bias_correction():
    x, g = so.project_to_sphere(jnp.arange(1.0, 5.0), 1.0, channel_axes=()), jnp.ones(4)
    tx = RECIPES["oblique_adam"](0.01, channel_axes=())
    updates, _ = tx.update(g, tx.init(x), x)
    tangent = so.project_to_tangent(x, g, channel_axes=())  # g/|g| by element is 1
    np.testing.assert_allclose(
        so.angle_per_step(x, updates, channel_axes=()),
        jnp.arctan(0.01 * so.group_norm(tangent, channel_axes=())),
        rtol=1e-6,
    )


def test_adam_h_has_a_momentum():
    """HeavyBall's HyperBallAdamW has none: its direction is g/max(sqrt(v), eps)."""
    tx = so.adam_h(0.1, channel_axes=())
    x = jnp.array([3.0, 4.0, 0.0])
    _, state = tx.update(jnp.array([0.0, 0.0, 1.0]), tx.init(x), x)
    updates, _ = tx.update(jnp.zeros(3), state, x)
    assert updates[2] < -0.1


def test_hyperball_is_the_chain_of_its_links():
    leaves = ["w2", "conv", "stack"]
    factory = partial(RECIPES["hyperball_by_links"], optax.scale_by_adam(**ADAM_95))
    differences = replay(
        "grug_adamh_b2_95", partial(factory, channel_axes=BY_LAYER_AND_VECTORS), leaves
    )
    assert max(differences.values()) < 1e-9


def by_links(direction, axes):
    """On hyperballs link by link, and AdamW elsewhere."""
    parts = {
        "spherical": RECIPES["hyperball_by_links"](direction, 0.02, channel_axes=axes),
        "classic": optax.adamw(0.1, **ADAM_95, weight_decay=0.3),
    }
    return optax.partition(parts, so.path_labels(axes))


def rotational_by_links(axes):
    # AdamG without transport and eps makes R u / sqrt(s) of a tangent u.
    parts = {
        "spherical": optax.chain(
            optax.trace(0.9),
            so.project_to_tangent_space(channel_axes=axes),
            so.scale_by_adam_g(0.0, 0.8, 0.0, channel_axes=axes, transport="none"),
            optax.scale_by_learning_rate(0.02),
            so.reproject_to_sphere(channel_axes=axes),
        ),
        "classic": optax.sgd(0.02, 0.9),
    }
    return optax.partition(parts, so.path_labels(axes))


OF_CLASSIC = {"adam_learning_rate": 0.1, "adam_weight_decay": 0.3}
REBUILT = {
    "adam_h": (
        lambda axes: so.adam_h(0.02, channel_axes=axes, **OF_CLASSIC),
        lambda axes: by_links(optax.scale_by_adam(**ADAM_95), axes),
    ),
    "muon_h": (
        lambda axes: so.muon_h(0.02, channel_axes=axes, **OF_CLASSIC),
        lambda axes: by_links(
            optax.chain(
                optax.trace(0.95, nesterov=True), so.orthogonalize_per_group(channel_axes=axes)
            ),
            axes,
        ),
    ),
    "rotational": (
        lambda axes: so.rotational(
            optax.trace(0.9), 0.02, update_norm_decay=0.8, eps=0.0, channel_axes=axes
        ),
        rotational_by_links,
    ),
}


@pytest.mark.parametrize("name", REBUILT)
def test_ready_optimizers_are_chains_of_public_links(name):
    rng = np.random.default_rng(0)
    params, *grads = (
        {"w": jnp.asarray(rng.normal(size=(3, 4, 6))), "b": jnp.asarray(rng.normal(size=6))}
        for _ in range(6)
    )
    axes = so.by_path({"w": 0})
    ready, rebuilt = (points(make(axes), params, grads) for make in REBUILT[name])
    # Sums in another order, which Muon's iteration stretches where singular values are small.
    chex.assert_trees_all_close(ready, rebuilt, rtol=1e-11, atol=1e-11)


def test_layca_turns_by_the_learning_rate():
    x, g = jnp.array([[3.0], [4.0]]), jnp.array([[8.0], [-1.0]])
    tx = RECIPES["layca"](optax.identity(), 0.1, channel_axes=-1)
    updates, _ = tx.update(g, tx.init(x), x)
    np.testing.assert_allclose(
        jnp.tan(so.angle_per_step(x, updates, channel_axes=-1)), [[0.1]], rtol=1e-12
    )
    np.testing.assert_allclose(so.group_norm(x + updates, channel_axes=-1), [[5]], rtol=1e-12)


def test_the_drift_and_the_angle_can_be_logged():
    params = {"w": jnp.arange(1.0, 13.0).reshape(4, 3), "b": jnp.ones(3)}
    radii = so.radius(params, channel_axes=-1)
    tx = so.with_geometry(so.adam_h(0.02, channel_axes=-1), channel_axes=-1)
    grads = jax.tree.map(jnp.sin, params)
    updates, state = tx.update(grads, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert RECIPES["drift"](moved, radii, channel_axes=-1)["w"] < 1e-12
    assert 0.01 < RECIPES["largest_angle"](state) < 0.0201
    shrunk = RECIPES["drift"](jax.tree.map(lambda x: x / 7, moved), radii, channel_axes=-1)
    np.testing.assert_allclose(shrunk["w"], 6 / 7, rtol=1e-6)


def test_recipes_are_short():
    for block in BLOCKS:
        for body in re.findall(r"return optax.chain\(\n(.*?)\n    \)", block, re.DOTALL):
            assert len(body.splitlines()) <= 6
