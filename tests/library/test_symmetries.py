"""What the optimizers' steps must not depend on, and what they do with momenta and with zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so
from invariant import ROUNDING, assert_close
from published import OPTIMIZERS, random_arrays
from replay import replay


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_do_not_leak_into_each_other(name):
    x, grads = random_arrays(6, 5, 4, steps=10)
    tx = OPTIMIZERS[name](channel_axes=-1)
    before = np.stack(replay(tx, jnp.asarray(x), jnp.asarray(grads)))
    x[:, 2], grads[:, :, 2] = 7 * x[:, 2] - 1, 3 * grads[:, :, 2] + 2
    after = np.stack(replay(tx, jnp.asarray(x), jnp.asarray(grads)))
    others = [0, 1, 3]
    np.testing.assert_array_equal(before[..., others], after[..., others])
    assert np.all(np.any(before[..., 2] != after[..., 2], axis=1))


def rotation_error(tx):
    """Distance between a trajectory of rotated inputs and the rotated trajectory, relative."""
    x, grads = random_arrays(7, 8, 3, steps=10)
    rotation, _ = np.linalg.qr(np.random.default_rng(8).normal(size=(8, 8)))
    plain = rotation @ np.stack(replay(tx, jnp.asarray(x), jnp.asarray(grads)))
    rotated = np.stack(replay(tx, jnp.asarray(rotation @ x), jnp.asarray(rotation @ grads)))
    return np.max(np.abs(plain - rotated)) / np.max(np.abs(plain))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rotation_of_each_group_rotates_the_trajectory(name):
    assert rotation_error(OPTIMIZERS[name](channel_axes=-1)) < ROUNDING


def test_a_rotation_changes_the_trajectory_of_adam():
    assert rotation_error(optax.adam(0.05, 0.8, 0.95)) > 0.01


# The step of AdamS is a direction, that of SGD grows with the gradient, that of AdamG is an angle.
@pytest.mark.parametrize(
    "name, power", [("adam_s", 1), ("adam_srt", 1), ("sgd_mrt", 2), ("adam_g", 0)]
)
def test_directions_do_not_depend_on_the_scale(name, power):
    x, grads = random_arrays(9, 3, 3, 2, 4, steps=10)
    factory = getattr(so, name)
    extra = {} if name == "sgd_mrt" else {"eps": 0.0}

    # The gradient of a radially invariant function grows as the radius shrinks.
    gradients = [lambda x, v=v: v / so.group_norm(x, channel_axes=-1) for v in jnp.asarray(grads)]

    def directions(scale):
        tx = factory(0.02 * scale**power, channel_axes=-1, **extra)
        points = replay(tx, jnp.asarray(scale * x), gradients)
        return np.stack([point / so.group_norm(point, channel_axes=-1) for point in points])

    expected = directions(1.0)
    for scale in (1e-3, 30.0):
        assert_close(directions(scale), expected, 1e-11)


@pytest.mark.parametrize("name", ["scale_by_adam_srt", "scale_by_adam_g", "trace_rt"])
@pytest.mark.parametrize("transport", ["rescale", "isometric"])
def test_the_transported_momentum_is_tangent_where_it_arrives(name, transport):
    x, grads = map(jnp.asarray, random_arrays(10, 3, 3, 2, 4, steps=5))
    args = (0.9,) if name == "trace_rt" else ()
    link = getattr(so, name)(*args, channel_axes=-1, transport=transport)
    state = link.init(x)
    for grad in grads:
        updates, state = link.update(grad, state, x)
        x = x - 0.1 * updates
    # With a zero gradient the update is the transported momentum times a number per group.
    updates, _ = link.update(jnp.zeros_like(x), state, x)
    lengths = so.group_norm(updates, channel_axes=-1) * so.group_norm(x, channel_axes=-1)
    assert np.all(np.asarray(lengths) > 1e-3)
    assert np.max(np.abs(so.group_inner(updates, x, channel_axes=-1) / lengths)) < 1e-15


@pytest.mark.parametrize("name", ["scale_by_adam_srt", "trace_rt"])
def test_isometric_transport_keeps_the_length_of_the_momentum(name):
    x, grads = map(jnp.asarray, random_arrays(11, 6, 4, steps=2))
    args = (0.9,) if name == "trace_rt" else ()
    link = getattr(so, name)(*args, channel_axes=-1, transport="isometric")
    plain = getattr(so, name)(*args, channel_axes=-1, transport="none")
    _, state = link.update(grads[0], link.init(x), x)
    turned = x + 0.3 * grads[1]
    norms = [
        so.group_norm(tx.update(jnp.zeros_like(x), state, turned)[0], channel_axes=-1)
        for tx in (link, plain)
    ]
    assert_close(*map(np.asarray, norms))


def test_adam_g_from_off_the_sphere_follows_the_projected_start():
    x, directions = random_arrays(14, 5, 4, steps=15)
    axes = {"channel_axes": -1}
    grads = [
        lambda x, v=v: so.project_to_tangent(x, v / so.group_norm(x, **axes), **axes)
        for v in jnp.asarray(directions)
    ]
    tx = so.adam_g(0.1, weight_decay=0.1, **axes)
    start = jnp.asarray(x) * jnp.array([1e-3, 0.5, 2.0, 1e4])
    far = np.stack(replay(tx, start, grads))
    near = np.stack(replay(tx, start / so.group_norm(start, **axes), grads))
    assert_close(far, near, 1e-8)  # eps = 1e-8 is the only length in the formula
    assert_close(np.linalg.norm(far, axis=1), np.ones((15, 4)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_of_zeros_is_not_frozen(name):
    # It has no direction yet: no projection, and AdamG counts its radius as 1.
    x, grads = random_arrays(17, 6, 3, steps=1)
    x[:, 1] = 0
    (after,) = replay(OPTIMIZERS[name](channel_axes=-1), jnp.asarray(x), jnp.asarray(grads))
    step, grad = np.asarray(after)[:, 1], grads[0][:, 1]
    cosine = step @ grad / np.linalg.norm(step) / np.linalg.norm(grad)
    assert_close(cosine, -1.0)


def test_a_group_that_leaves_zero_starts_anew():
    # A gradient at zero has no |x| g to be remembered as; what it did to the first step stays.
    x, grads = random_arrays(18, 6, 2, steps=2)
    link, plain = so.scale_by_adam_srt(channel_axes=-1), so.scale_by_adam_s(channel_axes=-1)
    zero, here = jnp.zeros_like(x), jnp.asarray(x)
    first, state = link.update(jnp.asarray(grads[0]), link.init(zero), zero)
    expected, _ = plain.update(jnp.asarray(grads[0]), plain.init(zero))
    assert_close(np.asarray(first), np.asarray(expected))
    _, after = link.update(jnp.asarray(grads[1]), state, here)
    _, anew = link.update(jnp.asarray(grads[1]), link.init(here), here)
    assert_close(np.asarray(after.nu), np.asarray(anew.nu))


def test_a_group_of_any_size_starts_with_a_step_of_size_one():
    # In float32, where |x|² |g|² of the small ones is 0 although |x|² is not. As in a warm-up from
    # 0, the group stays in its place at first.
    x = jnp.tile(jnp.array([0.0, 1e-22, 1e-16, 1e-3], jnp.float32), (4, 1))
    g = jnp.full((4, 4), 1e-3, jnp.float32).at[:2].multiply(-1)  # tangent
    tx = so.scale_by_adam_srt(eps=0.0, channel_axes=-1)
    update = jax.jit(tx.update)
    state = tx.init(x)
    for step in range(301):
        updates, state = update(g, state, x)
        if step in (0, 1, 300):
            # mu/(1 - b1^t) is the gradient, and the second moment its square.
            assert_close(np.abs(np.asarray(updates)), np.ones((4, 4)), 1e-4)


@pytest.mark.parametrize("name", ["scale_by_adam_srt", "trace_rt"])
@pytest.mark.parametrize("transport", ["rescale", "isometric", "none"])
def test_decay_alone_does_not_turn_a_group(name, transport):
    # The momentum is radial, and its tangent part is rounding, which no mode may blow up.
    x = jax.random.normal(jax.random.key(0), (9, 16), jnp.float32)
    args = (0.9,) if name == "trace_rt" else ()
    tx = optax.chain(
        optax.add_decayed_weights(1e-2),
        getattr(so, name)(*args, channel_axes=-1, transport=transport),
        optax.scale_by_learning_rate(0.01),
    )
    after = replay(tx, x, [jnp.zeros_like(x)] * 50)[-1]
    assert np.max(so.angle(x, after, channel_axes=-1)) < 1e-5
    assert np.max(so.group_norm(after, channel_axes=-1) / so.group_norm(x, channel_axes=-1)) < 1
