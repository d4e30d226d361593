"""The measures of points, steps and gradients on the sphere, against NumPy, and their edges."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spherical_optax as so
from layouts import COUNTS, LAYOUTS, as_rows, random_arrays
from oracle import dot

# Rounding of sums in float32 at least: bfloat16 is exact in it, and no result is rounded back.
EPS = {"float64": 1e-13, "bfloat16": 1e-5}
ETA = 0.3


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def lengths(x):
    return np.sqrt(dot(x, x))


def tangents(x, v):
    return v - dot(v, x) / dot(x, x) * x


def turn(x, y):
    """Angle between rows, where neither it nor its complement is small."""
    return np.arccos(dot(x, y) / lengths(x) / lengths(y))


# Each measure as a function of five arrays: point, step, gradient, momentum, division.
MEASURES = {
    "radius": lambda x, s, g, a, b, **axes: so.radius(x, **axes),
    "angle_per_step": lambda x, s, g, a, b, **axes: so.angle_per_step(x, s, **axes),
    "radial_fraction": lambda x, s, g, a, b, **axes: so.radial_fraction(x, s, **axes),
    "deformation": lambda x, s, g, a, b, **axes: so.deformation(x, s, g, **axes),
    "effective_learning_rate": (
        lambda x, s, g, a, b, **axes: so.effective_learning_rate(ETA, x, a, b, **axes)
    ),
}


def rate_of(x, a, b):
    """η_e of rows, for a division of full size."""
    r = lengths(x)
    nu = r * lengths(b) / np.sqrt(x.shape[1])
    c = r * a / (b / (lengths(b) / np.sqrt(x.shape[1])))
    return ETA / (r * nu) / (1 - ETA * dot(c, x / r) / (r * nu))


ORACLES = {
    "radius": lambda x, s, g, a, b: lengths(x),
    "angle_per_step": lambda x, s, g, a, b: turn(x, x + s),
    "radial_fraction": lambda x, s, g, a, b: abs(dot(s, x)) / lengths(s) / lengths(x),
    "deformation": lambda x, s, g, a, b: turn(tangents(x, s), -tangents(x, g)),
    "effective_learning_rate": lambda x, s, g, a, b: rate_of(x, a, b),
}


@pytest.mark.parametrize(
    "layout, dtype", [*((layout, "float64") for layout in LAYOUTS), (LAYOUTS[-1], "bfloat16")]
)
def test_measures_are_the_oracle(layout, dtype):
    (shape, axes), wide = layout, "float64" if dtype == "float64" else "float32"
    arrays = random_arrays(shape, 5, dtype)
    arrays[4] = abs(arrays[4]) + jnp.asarray(0.5, dtype)

    @jax.jit
    def run(*arrays):
        return {name: of(*arrays, channel_axes=axes) for name, of in MEASURES.items()}

    for name, measured in run(*arrays).items():
        assert measured.dtype == wide
        assert measured.shape == COUNTS[layout]
        expected = ORACLES[name](*(as_rows(array, axes) for array in arrays))
        # The rate's denominator may cancel to a tenth or so.
        tolerance = 10 * EPS[dtype] if name == "effective_learning_rate" else EPS[dtype]
        np.testing.assert_allclose(measured.ravel(), expected.ravel(), rtol=tolerance)


@pytest.mark.parametrize("division", ["number", "per group", "full"])
def test_a_division_is_a_number_or_an_array_that_broadcasts(division):
    x, a, full = random_arrays((4, 3, 5), 3)
    full = {
        "number": jnp.full_like(full, 1.7),
        "per group": jnp.broadcast_to(jnp.arange(1.0, 6.0), full.shape),
        "full": abs(full) + 1,
    }[division]
    short = {"number": 1.7, "per group": full[:1, :1], "full": full}[division]
    expected = rate_of(*(as_rows(array, -1) for array in (x, a, full)))
    trees = {"one": x, "two": 2 * x}, {"one": a, "two": 4 * a}
    measured = so.effective_learning_rate(
        ETA, *trees, short if division == "number" else {"one": short, "two": short},
        channel_axes=-1,
    )  # fmt: skip
    np.testing.assert_allclose(measured["one"].ravel(), expected.ravel(), rtol=1e-12)
    # 1/r², and a step of twice the size relative to the point.
    expected = rate_of(*(as_rows(array, -1) for array in (2 * x, 4 * a, full)))
    np.testing.assert_allclose(measured["two"].ravel(), expected.ravel(), rtol=1e-12)


def test_the_learning_rate_may_be_an_array_of_a_schedule():
    x, a = random_arrays((4, 3), 2, "float32")
    of = so.effective_learning_rate(0.1, x, a, 1.0, channel_axes=-1)
    traced = jax.jit(lambda eta: so.effective_learning_rate(eta, x, a, 1.0, channel_axes=-1))
    assert traced(jnp.asarray(0.1)).dtype == "float32"
    np.testing.assert_allclose(traced(jnp.asarray(0.1)), of, rtol=1e-6)


@pytest.mark.parametrize("theta", [1e-7, 1e-5, 1e-3, 0.5])
def test_small_angles_keep_their_digits_in_float32(theta):
    x, v = random_arrays((50, 3), 2, "float32")
    v = so.project_to_tangent(x, v, channel_axes=-1)
    v = v * theta * so.radius(x, channel_axes=-1) / so.group_norm(v, channel_axes=-1)
    step = v - 1e-3 * x  # decay shortens the radius
    xs, steps = as_rows(x, -1), as_rows(step, -1)
    expected = np.arctan2(lengths(tangents(xs, steps)), lengths(xs) + dot(steps, xs) / lengths(xs))
    np.testing.assert_allclose(expected, theta / 0.999, rtol=0.1)
    measured = so.angle_per_step(x, step, channel_axes=-1)
    # Decay is cancelled from the step: an error of float32's 6e-8 of 1e-3, relative to the angle.
    tolerance = 1e-4 * max(1, 1e-5 / theta)
    np.testing.assert_allclose(measured.ravel(), expected.ravel(), rtol=tolerance)
    # The rate is as exact: the tangent of the angle, per length of the momentum on the sphere.
    rate = so.effective_learning_rate(1.0, x, -step, 1.0, channel_axes=-1)
    expected = 1 / (lengths(xs) ** 2 * 0.999)
    np.testing.assert_allclose(rate.ravel(), expected.ravel(), rtol=1e-4)


def test_a_step_beyond_the_centre_turns_by_more_than_a_right_angle():
    x, v = random_arrays((4, 3), 2)
    v = so.project_to_tangent(x, v, channel_axes=-1)
    step = v - 3 * x
    theta = so.angle_per_step(x, step, channel_axes=-1)
    np.testing.assert_allclose(
        theta.ravel(), turn(as_rows(x, -1), as_rows(v - 2 * x, -1)).ravel(), rtol=1e-12
    )
    assert np.all(theta > np.pi / 2)
    rate = so.effective_learning_rate(ETA, x, -step / ETA, 1.0, channel_axes=-1)
    along = so.radius(x, channel_axes=-1) * so.group_norm(v / ETA, channel_axes=-1)
    assert np.all(rate < 0)
    np.testing.assert_allclose(rate * along, np.tan(theta), rtol=1e-12)
    # Just at the centre's height the rate is infinite, and the angle a right one.
    x, v = jnp.array([2.0, 0.0]), jnp.array([0.0, 1.0])
    assert so.angle_per_step(x, v - x, channel_axes=())[0] == np.pi / 2
    assert so.effective_learning_rate(1.0, x, x - v, 1.0, channel_axes=())[0] == np.inf
    # And a step right into the centre, or through it, is no NaN.
    for away, expected in [(1.0, 0.0), (3.0, np.pi)]:
        assert so.angle_per_step(x, -away * x, channel_axes=())[0] == expected


@pytest.mark.parametrize("name", MEASURES)
def test_zeros_give_zeros_and_no_nan(name):
    of = MEASURES[name]
    rng = np.random.default_rng(1)
    combinations = np.array([[i >> bit & 1 for bit in range(5)] for i in range(32)])
    arrays = [jnp.asarray(rng.normal(size=(6, 32)) * kept) for kept in combinations.T]
    assert np.all(np.isfinite(of(*arrays, channel_axes=-1)))
    whole = [jnp.asarray(rng.normal(size=(6, 32))) for _ in range(5)]
    assert np.all(of(*whole, channel_axes=-1) != 0)
    needed = {
        "radius": [0],
        "angle_per_step": [0, 1],
        "radial_fraction": [0, 1],
        "deformation": [1, 2],  # at zero, every vector is tangent
        "effective_learning_rate": [0, 4],  # without a gradient the rate is that of SGD
    }[name]
    for i in needed:
        zeros = [0 * array if i == j else array for j, array in enumerate(whole)]
        assert not np.any(of(*zeros, channel_axes=-1))


def test_values_stay_in_their_ranges():
    # In float32 rounding makes some cosines of parallel vectors larger than 1.
    x = jax.random.normal(jax.random.key(0), (7, 500), jnp.float32)
    share = so.radial_fraction(x, -3 * x, channel_axes=-1)
    assert np.max(share) <= 1 and np.min(share) > 1 - 1e-6
    assert np.max(so.angle_per_step(x, 2 * x, channel_axes=-1)) < 1e-6
    tangent = so.project_to_tangent(x, x[::-1], channel_axes=-1)
    # Rounding, beside a tangent that may be far shorter than what was projected; a GPU sums in
    # another order.
    assert np.max(so.radial_fraction(x, tangent, channel_axes=-1)) < 1e-5
    assert np.max(so.deformation(x, tangent, -tangent, channel_axes=-1)) < 1e-6
    np.testing.assert_allclose(so.deformation(x, tangent, tangent, channel_axes=-1), np.pi)


AXES = so.by_path({"kernel": -1})


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_not_spherical_is_none(name):
    x, *others = random_arrays((4, 3), 5)

    def tree(array):
        return {
            "bias": array[0],
            "hole": None,
            "layer": [{"kernel": array}, array],
            "masked": optax.MaskedNode(),
            "one": {"kernel": array[:1]},  # groups of one element
            "step": jnp.zeros((), jnp.int32),
        }

    measured = MEASURES[name](*map(tree, (x, *others)), channel_axes=AXES)
    expected = MEASURES[name](x, *others, channel_axes=-1)
    assert expected.shape == (1, 3)
    chex.assert_trees_all_equal(
        measured,
        {
            "bias": None,
            "hole": None,
            "layer": [{"kernel": expected}, None],
            "masked": None,
            "one": {"kernel": None},
            "step": None,
        },
    )


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 3, rngs=rngs)


@pytest.mark.parametrize("name", MEASURES)
def test_nnx_states_are_trees_too(name):
    variables = nnx.state(Layer(nnx.Rngs(0)), nnx.Param)
    arrays = nnx.to_pure_dict(variables)
    trees = [jax.tree.map(lambda x, k=k: x + k, variables) for k in range(5)]
    pure = [jax.tree.map(lambda x, k=k: x + k, arrays) for k in range(5)]
    measured = MEASURES[name](*trees, channel_axes=AXES)
    expected = MEASURES[name](*pure, channel_axes=AXES)
    assert expected["linear"]["bias"] is None
    chex.assert_trees_all_equal(nnx.to_pure_dict(measured)["linear"], expected["linear"])


def measures_of_pairs(x, other):
    """Each measure, with the second tree in one of its places."""
    axes = {"channel_axes": -1}
    yield "updates", lambda: so.angle_per_step(x, other, **axes)
    yield "vectors", lambda: so.radial_fraction(x, other, **axes)
    yield "updates", lambda: so.deformation(x, other, x, **axes)
    yield "grads", lambda: so.deformation(x, x, other, **axes)
    yield "momentum", lambda: so.effective_learning_rate(ETA, x, other, 1.0, **axes)
    yield "division", lambda: so.effective_learning_rate(ETA, x, x, other, **axes)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"a": {}, "b": jnp.ones(2)}, "a/kernel: in the parameters but not .*`{}`"),
        ({"a": {"kernel": None}, "b": jnp.ones(2)}, "a/kernel: in the parameters but not in `{}`"),
        ({"a": {"kernel": jnp.ones((4, 2))}, "b": jnp.ones(2)}, r"a/kernel: .*3\).*`{}`"),
        ({"a": {"kernel": jnp.ones((4, 3))}, "b": jnp.ones(2), "c": 1.0}, "c: in `{}` but not"),
    ],
)
def test_trees_that_differ_are_refused_with_the_path(other, message):
    x = {"a": {"kernel": jnp.ones((4, 3))}, "b": jnp.ones(2)}
    for name, call in measures_of_pairs(x, other):
        with pytest.raises(ValueError, match="^" + message.format(name)):
            call()


def test_a_masked_momentum_is_enough():
    x = {"conv": jnp.ones((4, 3)) + jnp.arange(3), "bias": jnp.ones(3)}
    masked = {"conv": jnp.sin(x["conv"]), "bias": optax.MaskedNode()}
    for _, call in measures_of_pairs(x, masked):
        assert call()["bias"] is None and call()["conv"].shape == (1, 3)


def test_only_a_division_broadcasts():
    x = jnp.ones((4, 3))
    for name, call in measures_of_pairs(x, x[:1]):
        if name == "division":
            assert call().shape == (1, 3)
        else:
            with pytest.raises(ValueError, match=r"\(4, 3\) in the parameters but \(1, 3\)"):
                call()


@pytest.mark.parametrize("name", MEASURES)
def test_a_selection_that_does_not_fit_is_refused(name):
    arrays = random_arrays((4, 3), 5)
    with pytest.raises(ValueError, match="out of range"):
        MEASURES[name](*arrays, channel_axes=2)
    trees = ({"kernel": array} for array in arrays)
    with pytest.raises(ValueError, match="no parameter path matches"):
        MEASURES[name](*trees, channel_axes=so.by_path({"conv": -1}))
