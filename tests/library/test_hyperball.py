"""Hyperball, its radii and its edges; trajectories of the peers are in `test_relatives.py`."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oracle
import spherical_optax as so
from layouts import LAYOUTS, as_rows, random_arrays

pytestmark = pytest.mark.usefixtures("compiled_quickly")
AXES = so.by_path({"w": -1})


@pytest.mark.parametrize("shape, axes", LAYOUTS)
@pytest.mark.parametrize("retraction", ["normalize", "exp"])
@pytest.mark.parametrize("radius", [None, 2.0])
def test_it_is_the_oracle(shape, axes, retraction, radius):
    with jax.enable_x64(True):
        x, *grads = random_arrays(shape, 6)
        tx = so.hyperball(
            optax.identity(), 0.3, channel_axes=axes, radius=radius, retraction=retraction
        )
        directions = [as_rows(g, axes) for g in grads]
        expected = oracle.hyperball(as_rows(x, axes), directions, 0.3, radius, retraction)
        state, update = tx.init(x), jax.jit(tx.update)
        for g, point in zip(grads, expected, strict=True):
            updates, state = update(g, state, x)
            x = optax.apply_updates(x, updates)
            np.testing.assert_allclose(as_rows(x, axes), point, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("eta", [1e-4, 0.1, 1.5, 3.0])
def test_the_exponential_map_travels_the_learning_rate_in_radians(eta):
    x, g = random_arrays((7, 50), 2, "float32")
    tx = so.hyperball(optax.identity(), eta, channel_axes=-1, retraction="exp")
    updates, _ = tx.update(10 * g, tx.init(x), x)
    y = x + updates
    # Adding the update rounds y, which is an angle of some 1e-7.
    np.testing.assert_allclose(so.angle(x, y, channel_axes=-1), eta, rtol=1e-6, atol=5e-7)
    norms = [so.group_norm(z, channel_axes=-1) for z in (x, y)]
    np.testing.assert_allclose(*norms, rtol=1e-6)


def test_normalising_travels_at_most_the_arc_sine_of_the_learning_rate():
    x, g = random_arrays((3, 500), 2, "float32")
    tx = so.hyperball(optax.identity(), 0.5, channel_axes=-1)
    angles = so.angle_per_step(x, tx.update(g, tx.init(x), x)[0], channel_axes=-1)
    assert np.arcsin(0.5) * 0.98 < np.max(angles) <= np.arcsin(0.5) * (1 + 1e-6)


@pytest.mark.parametrize("dtype, d, tolerance", [
    ("float32", 9, 1e-6), ("bfloat16", 576, 1e-3), ("bfloat16", 9, 5e-3)
])  # fmt: skip
@pytest.mark.parametrize(
    "factory",
    [
        partial(so.hyperball, optax.identity()),
        so.adam_h,
        partial(so.muon_h, ns_steps=1),
        partial(so.rotational, optax.identity()),
    ],
    ids=["hyperball", "adam_h", "muon_h", "rotational"],
)
def test_the_radius_stays_over_10000_steps(factory, dtype, d, tolerance):
    """As it is stored; of narrow parameters their own rounding is left."""
    side = math.isqrt(d)
    x = jax.random.normal(jax.random.key(0), (side, side, 2)).astype(dtype)
    tx = factory(0.01, channel_axes=-1)

    @jax.jit
    def walk(x):
        def step(carry, key):
            x, state = carry
            updates, state = tx.update(jax.random.normal(key, x.shape, x.dtype), state, x)
            return (optax.apply_updates(x, updates), state), None

        keys = jax.random.split(jax.random.key(1), 10_000)
        return jax.lax.scan(step, (x, tx.init(x)), keys)[0][0]

    norms = [so.group_norm(z, channel_axes=-1) for z in (walk(x), x)]
    np.testing.assert_allclose(*norms, rtol=tolerance)


@pytest.mark.parametrize("retraction", ["normalize", "exp"])
def test_nothing_moves_without_a_rate_or_a_direction(retraction):
    x, g = random_arrays((4, 3), 2, "float32")
    for eta, u in ((0.0, g), (0.1, 0 * g)):
        for radius in (None, 3.0):  # 3 is off the start
            tx = so.hyperball(
                optax.identity(), eta, channel_axes=-1, radius=radius, retraction=retraction
            )
            assert not np.any(tx.update(u, tx.init(x), x)[0])


def test_a_radial_direction_turns_nothing_along_a_great_circle():
    (x,) = random_arrays((4, 3), 1, "float32")
    tx = so.hyperball(optax.identity(), 0.1, channel_axes=-1, retraction="exp")
    assert not np.any(tx.update(-3.7 * x, tx.init(x), x)[0])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_groups_of_zeros_are_filled_by_the_finite_radii(bad):
    x = jnp.array([[bad, 3.0, 0.0], [1.0, 4.0, 0.0]])
    tx = so.hyperball(optax.identity(), 0.1, channel_axes=-1, zero="fill")
    radius = tx.init(x).radius
    np.testing.assert_allclose(radius[:, 1:], [[5.0, 5.0]], rtol=1e-6)
    assert not jnp.isfinite(radius[0, 0])


WIDER = optax.scale_by_adam(mu_dtype=jnp.float32)  # its updates are wider than bfloat16, too


@pytest.mark.parametrize(
    "factory",
    [
        partial(so.adam_h, 0.1, mu_dtype=jnp.float32),
        partial(so.rotational, WIDER, 0.1),
        partial(so.project_where_invariant, WIDER),
    ],
    ids=["adam_h", "rotational", "project_where_invariant"],
)
def test_updates_have_the_dtype_of_gradients_whatever_the_direction(factory):
    (x,) = random_arrays((4, 3), 1, "bfloat16")
    tx = factory(channel_axes=-1)
    assert tx.update(x, tx.init(x), x)[0].dtype == x.dtype


@pytest.mark.parametrize("factor", [1.7, 2.0])  # with rounding, and without
def test_a_radial_direction_turns_nothing_of_rotational(factor):
    (x,) = random_arrays((4, 3), 1, "float32")
    tx = so.rotational(optax.identity(), 0.1, channel_axes=-1)
    updates, state = tx.update(factor * x, tx.init(x), x)
    # The radius is the root of a sum.
    np.testing.assert_allclose(x + updates, x, rtol=1e-6)
    assert not np.any(state.square)


def zero_start(dtype="float32"):
    (x,) = random_arrays((4, 3), 1, dtype)
    return x.at[:, 1].set(0)


def test_a_group_of_zeros_is_refused_by_default_with_its_path():
    params = {"a": jnp.ones((2, 2)), "w": zero_start()}
    message = "^w: 1 of its 3 groups are zero at init.*zero='skip' or zero='fill'"
    for tx in (so.adam_h(0.1, channel_axes=AXES), so.muon_h(0.1, channel_axes=())):
        with pytest.raises(ValueError, match="zero at init"):
            tx.init(params | {"a": jnp.zeros((2, 2))} | {"w": 0 * params["w"]})
    with pytest.raises(ValueError, match=message):
        so.hyperball(optax.identity(), 0.1, channel_axes=AXES).init(params)
    jax.jit(so.hyperball(optax.identity(), 0.1, channel_axes=AXES).init)(params)  # cannot look


@pytest.mark.parametrize("retraction", ["normalize", "exp"])
def test_a_skipped_group_of_zeros_is_classic_until_it_moves(retraction):
    x, (g,) = zero_start(), random_arrays((4, 3), 1, "float32")
    tx = so.hyperball(optax.identity(), 0.1, channel_axes=-1, retraction=retraction, zero="skip")
    state = tx.init(x)
    updates, state = tx.update(g.at[:, 1].set(0), state, x)
    assert not np.any(updates[:, 1]) and state.radius[0, 1] == 0
    updates, state = tx.update(g, state, x)
    np.testing.assert_allclose(updates[:, 1], -0.1 * g[:, 1], rtol=1e-6)
    x = x + updates
    came_to = so.group_norm(x, channel_axes=-1)
    for _ in range(3):
        updates, state = tx.update(g, state, x)
        x = x + updates
    np.testing.assert_allclose(state.radius[0, 1], came_to[0, 1], rtol=1e-6)
    np.testing.assert_allclose(so.group_norm(x, channel_axes=-1), state.radius, rtol=1e-6)


@pytest.mark.parametrize("retraction", ["normalize", "exp"])
def test_a_filled_group_of_zeros_goes_straight_to_the_root_mean_square(retraction):
    x, (g,) = zero_start(), random_arrays((4, 3), 1, "float32")
    tx = so.hyperball(optax.identity(), 0.1, channel_axes=-1, retraction=retraction, zero="fill")
    state = tx.init(x)
    others = so.group_norm(x, channel_axes=-1)[0, [0, 2]]
    expected = np.sqrt(np.mean(np.square(others)))
    np.testing.assert_allclose(state.radius[0, 1], expected, rtol=1e-6)
    updates, _ = tx.update(g, state, x)
    direction = g[:, 1] / jnp.linalg.norm(g[:, 1])
    np.testing.assert_allclose(updates[:, 1], -expected * direction, rtol=1e-5)
    with pytest.raises(ValueError, match="3 of its 3 groups are zero"):
        tx.init(0 * x)


def test_radii_come_from_a_callable():
    params = {"w": jnp.ones((4, 3)), "wide": jnp.ones((9, 2)), "b": jnp.ones(3)}
    rules = {"w$": 2.0, "wide": jnp.array([[1.0, 5.0]])}
    tx = so.hyperball(
        optax.identity(),
        0.1,
        channel_axes=-1,
        radius=lambda path, leaf: rules["w$" if path == "w" else path],
    )
    updates, _ = tx.update(jax.tree.map(jnp.sin, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(so.group_norm(moved["w"], channel_axes=-1), [[2, 2, 2]], rtol=1e-6)
    np.testing.assert_allclose(so.group_norm(moved["wide"], channel_axes=-1), [[1, 5]], rtol=1e-6)


def test_classic_leaves_take_adamw_at_a_rate_of_their_own():
    params = {"w": jnp.ones((3, 3)), "b": jnp.arange(1.0, 4.0)}
    grads = [jax.tree.map(lambda x, i=i: jnp.sin(x + i), params) for i in range(3)]
    adamw = optax.adamw(0.3, 0.8, 0.9, weight_decay=0.1)
    rates = {"adam_learning_rate": 0.3, "adam_weight_decay": 0.1}
    for tx in (
        so.adam_h(0.02, 0.8, 0.9, channel_axes=AXES, **rates),
        so.muon_h(0.02, channel_axes=so.by_path({"w": ()}), adam_b1=0.8, adam_b2=0.9, **rates),
    ):
        mine, theirs = params, params["b"]
        state, plain = tx.init(params), adamw.init(theirs)
        for g in grads:
            updates, state = tx.update(g, state, mine)
            mine = optax.apply_updates(mine, updates)
            updates, plain = adamw.update(g["b"], plain, theirs)
            theirs = optax.apply_updates(theirs, updates)
        np.testing.assert_allclose(mine["b"], theirs, rtol=1e-6)


def test_schedules_count_the_steps():
    def schedule(count):
        return jnp.array([0.0, 0.1, 0.2])[count]

    x, g = random_arrays((4, 3), 2, "float32")
    tx = so.hyperball(optax.identity(), schedule, channel_axes=-1, retraction="exp")
    state = tx.init(x)
    for angle in (0.0, 0.1, 0.2):
        updates, state = tx.update(g, state, x)
        moved = so.angle_per_step(x, updates, channel_axes=-1)
        np.testing.assert_allclose(moved, np.full((1, 3), angle), rtol=1e-5)


@pytest.mark.parametrize("axes", [-1, (0, 1), ()])
def test_muon_wants_matrices(axes):
    params = {"heads": jnp.ones((2, 6, 5)), "b": jnp.ones(5)}
    selection = so.by_path({"heads": axes})
    if axes == -1:
        so.muon_h(0.1, channel_axes=selection).init(params)  # each of the five a 2×6 matrix
        return
    with pytest.raises(ValueError, match="^heads: .* is no matrix, as it spans [13] axes"):
        so.muon_h(0.1, channel_axes=selection).init(params)


def test_heads_of_a_flat_projection_are_matrices_of_their_own():
    x, g = random_arrays((6, 8), 2, "float32")
    tx = so.orthogonalize_per_group(channel_axes=so.blocks(-1, 2))
    u, _ = tx.update(g, tx.init(x))
    for half in (slice(0, 4), slice(4, 8)):
        values = np.linalg.svd(u[:, half], compute_uv=False)
        assert np.all((0.6 < values) & (values < 1.3))


@pytest.mark.parametrize("retraction", ["normalize", "exp"])
def test_a_group_of_zeros_waits_for_a_rate(retraction):
    x, g = zero_start(), jnp.ones((4, 3))
    tx = so.hyperball(
        optax.identity(),
        lambda count: 0.1 * count,
        channel_axes=-1,
        radius=2.0,
        retraction=retraction,
    )
    state = tx.init(x)
    updates, state = tx.update(g, state, x)
    np.testing.assert_array_equal(updates[:, 1], 0)
    updates, _ = tx.update(g, state, x)
    assert float(jnp.linalg.norm(updates[:, 1])) == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("shape", [(), (1, 3)])
def test_radii_may_be_constants_of_a_compiled_function(shape):
    x = jnp.ones((4, 3))
    good, bad = (jnp.full(shape, radius, jnp.float32) for radius in (2, -1))

    def init(radius):
        return so.hyperball(
            optax.identity(), 0.1, channel_axes=-1, radius=lambda path, leaf: radius
        ).init

    assert jax.jit(init(good))(x).radius.shape == jax.eval_shape(init(good), x).radius.shape
    with pytest.raises(ValueError, match="not positive and finite"):
        jax.jit(init(bad))(x)


def test_a_group_of_zeros_takes_the_first_radius_that_it_comes_to():
    """With `rotational`, as with hyperball's zero="skip"."""
    x, g = zero_start(), jnp.ones((4, 3))
    tx = so.rotational(optax.identity(), 0.1, channel_axes=-1)
    state, radii = tx.init(x), []
    for step in range(4):
        updates, state = tx.update(jnp.roll(g.at[0].set(-3.0), step, 0), state, x)
        x = optax.apply_updates(x, updates)
        radii.append(float(jnp.linalg.norm(x[:, 1])))
    np.testing.assert_allclose(radii, 0.1 * np.sqrt(12), rtol=1e-5)
    seen, unseen = tx.init(x), tx.init(jax.eval_shape(lambda: x))
    for state in (seen, unseen):
        updates, _ = tx.update(g, state, x)
        np.testing.assert_allclose(
            jnp.linalg.norm(x + updates, axis=0), jnp.linalg.norm(x, axis=0), rtol=1e-5
        )


@pytest.mark.parametrize("factory", [so.adam_h, so.muon_h])
def test_a_mask_says_which_classic_leaves_decay(factory):
    params = {"w": jnp.eye(3), "head": jnp.ones((3, 3)), "gain": jnp.ones(3)}
    grads = jax.tree.map(jnp.zeros_like, params)

    def updates(**decay):
        tx = factory(0.1, channel_axes=so.by_path({"w": ()}), **decay)
        return tx.update(grads, tx.init(params), params)[0]

    plain, all_decay = updates(), updates(adam_weight_decay=0.5)
    mask = {"w": True, "head": True, "gain": False}
    for form in (mask, lambda _: mask):
        masked = updates(adam_weight_decay=0.5, adam_weight_decay_mask=form)
        np.testing.assert_array_equal(masked["gain"], plain["gain"])
        np.testing.assert_array_equal(masked["head"], all_decay["head"])
        np.testing.assert_array_equal(masked["w"], plain["w"])
    assert np.all(np.asarray(all_decay["gain"]) < 0)


def test_a_kernel_of_zeros_that_init_cannot_see_takes_the_classic_rate():
    tx = so.adam_h(0.5, channel_axes=(), adam_learning_rate=0.001)
    x = jnp.zeros((2, 2))
    updates, _ = tx.update(jnp.ones((2, 2)), jax.jit(tx.init)(x), x)
    np.testing.assert_allclose(updates, -0.001, rtol=1e-5)
