"""Links that constrain updates: tangents, radii over many steps, unit groups."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


@each_dtype
def test_projected_updates_are_tangent_and_the_rest_passes(dtype):
    params, updates = random_trees(dtype)
    tx = so.project_to_tangent_space(channel_axes=-1)
    out, _ = tx.update(updates, tx.init(params), params)
    v, x = (np.asarray(tree["w"], np.float64) for tree in (out, params))
    cosine = (v * x).sum(0) / np.linalg.norm(v, axis=0) / np.linalg.norm(x, axis=0)
    assert np.max(np.abs(cosine)) < {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    chex.assert_trees_all_equal(out["b"], updates["b"])
    assert out["w"].dtype == dtype


@each_dtype
def test_normalised_updates_have_unit_groups_and_the_rest_passes(dtype):
    params, updates = random_trees(dtype)
    updates["w"] = updates["w"].at[:, 1].set(0)
    tx = so.normalize_per_group(channel_axes=-1)
    out, _ = tx.update(updates, tx.init(params))
    norms = np.linalg.norm(np.asarray(out["w"], np.float64), axis=0)
    np.testing.assert_allclose(norms, [1, 0, 1, 1], atol=2 * float(jnp.finfo(dtype).eps))
    chex.assert_trees_all_equal(out["b"], updates["b"])


def random_trees(dtype):
    rng = np.random.default_rng(0)
    return [
        {
            "w": jnp.asarray(rng.normal(size=(9, 4)), dtype),
            "b": jnp.asarray(rng.normal(size=4), dtype),
        }
        for _ in range(2)
    ]


# In bfloat16 the stored elements are rounded to 2^-9, which averages out over large groups only.
@pytest.mark.parametrize(
    "dtype, d, radius, tolerance",
    [
        ("float32", 9, None, 1e-6),
        ("float32", 9, 3.0, 1e-6),
        ("float32", 576, 3.0, 1e-6),
        ("bfloat16", 9, None, 5e-3),
        ("bfloat16", 9, 3.0, 5e-3),
        ("bfloat16", 576, None, 1e-3),
    ],
)
def test_the_radius_is_kept_over_ten_thousand_steps(dtype, d, radius, tolerance):
    tx = optax.chain(optax.scale(1e-2), so.reproject_to_sphere(radius, channel_axes=-1))
    start = jax.random.normal(jax.random.key(0), (d, 4)).astype(dtype)
    scale = so.group_norm(start, channel_axes=-1) if radius is None else radius
    length = jnp.mean(scale) / np.sqrt(d)

    def step(carry, key):
        params, state = carry
        grads = (length * jax.random.normal(key, params.shape)).astype(dtype)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), 10_000)
    run = jax.jit(partial(jax.lax.scan, step))
    (params, _), _ = run((start, tx.init(start)), keys)
    norms = np.linalg.norm(np.asarray(params, np.float64), axis=0)
    wanted = np.linalg.norm(np.asarray(start, np.float64), axis=0) if radius is None else radius
    assert np.max(np.abs(norms / wanted - 1)) < tolerance
    cosines = (np.asarray(params, np.float64) * np.asarray(start, np.float64)).sum(0) / norms
    assert np.max(np.abs(cosines / np.linalg.norm(np.asarray(start, np.float64), axis=0))) < 0.99


def test_reprojection_leaves_classic_leaves_alone():
    params, updates = random_trees("float32")
    for radius in (None, 2.0):
        tx = so.reproject_to_sphere(radius, channel_axes=-1)
        out, _ = tx.update(updates, tx.init(params), params)
        chex.assert_trees_all_equal(out["b"], updates["b"])


def test_a_group_that_is_zero_at_init_moves_freely():
    params, updates = jnp.zeros((3, 2)), jnp.ones((3, 2))
    tx = so.reproject_to_sphere(channel_axes=-1)
    np.testing.assert_array_equal(tx.update(updates, tx.init(params), params)[0], updates)
    tx = so.reproject_to_sphere(2.0, channel_axes=-1)
    out, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(out, axis=0), [2, 2], rtol=1e-6)


def test_the_radius_is_the_one_at_init_and_not_the_current_one():
    tx = so.reproject_to_sphere(channel_axes=())
    state = tx.init(jnp.array([3.0, 4.0]))
    params = jnp.array([6.0, 8.0])
    updates, _ = tx.update(jnp.zeros(2), state, params)
    np.testing.assert_allclose(params + updates, [3, 4], rtol=1e-6)


def test_an_outer_step_is_a_rotation_by_atan():
    # normalise, project, scale by the radius: the angle of a step is atan(learning rate)
    tx = optax.chain(
        so.project_to_tangent_space(channel_axes=-1),
        so.normalize_per_group(channel_axes=-1),
        optax.scale_by_learning_rate(0.2),
        so.reproject_to_sphere(1.0, channel_axes=-1),
    )
    (params, grads) = (tree["w"] for tree in random_trees("float32"))
    params = params / so.group_norm(params, channel_axes=-1)
    updates, _ = tx.update(grads, tx.init(params), params)
    angle = so.angle(params, params + updates, channel_axes=-1)
    np.testing.assert_allclose(angle, np.full((1, 4), np.arctan(0.2)), rtol=1e-5)


def test_a_radius_may_be_traced():
    params, updates = (tree["w"] for tree in random_trees("float32"))

    @jax.jit
    def norms(radius):
        tx = so.reproject_to_sphere(radius, channel_axes=-1)
        out, _ = tx.update(updates, tx.init(params), params)
        return so.group_norm(params + out, channel_axes=-1)

    np.testing.assert_allclose(norms(2.5), np.full((1, 4), 2.5), rtol=1e-6)


@pytest.mark.parametrize(
    "size, dtype, tolerance", [(1e3, "float32", 1e-4), (2.0, "bfloat16", 0.02)]
)
def test_a_start_off_the_sphere_lands_on_it_up_to_rounding_at_its_size(size, dtype, tolerance):
    # The update is rounded where it is as large as the start: by 6e-8 and 2e-3 of its size.
    params = (size * jax.random.normal(jax.random.key(0), (64, 8)) / 8).astype(dtype)
    tx = so.reproject_to_sphere(1.0, channel_axes=-1)
    updates, _ = tx.update(jnp.zeros_like(params), tx.init(params), params)
    norms = np.linalg.norm(np.asarray(optax.apply_updates(params, updates), np.float64), axis=0)
    assert np.max(np.abs(norms - 1)) < tolerance
