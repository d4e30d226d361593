"""Groups and geometry: invariants over shapes, axes and dtypes, checked with NumPy."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so
from layouts import COUNTS, LAYOUTS, as_rows, random_arrays
from oracle import dot
from oracle import parallel_transport as transported

# Rounding of the result in its dtype; sums run in float32 at least.
EPS = {"float64": 1e-14, "float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def lengths(x, axes):
    x = as_rows(x, axes)
    return np.sqrt(dot(x, x))


@pytest.mark.parametrize("layout, counts", COUNTS.items())
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_norms_and_products_are_summed_over_the_other_axes(layout, counts, dtype):
    shape, axes = layout
    x, y = random_arrays(shape, 2, dtype)
    product = so.group_inner(x, y, channel_axes=axes)
    assert product.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    assert product.shape == counts
    expected = dot(as_rows(x, axes), as_rows(y, axes))
    np.testing.assert_allclose(product.ravel(), expected.ravel(), rtol=0, atol=2e-5)
    norms = so.group_norm(x, channel_axes=axes)
    np.testing.assert_allclose(norms.ravel(), lengths(x, axes).ravel(), rtol=1e-6)


def test_half_precision_is_summed_in_float32():
    x = jnp.full((100_000,), 0.1, jnp.float16)  # a float16 sum of squares overflows or stalls
    np.testing.assert_allclose(so.group_norm(x, channel_axes=()), [31.61], rtol=1e-3)


@pytest.mark.parametrize(
    "layout, dtype",
    [
        *((layout, "float64") for layout in LAYOUTS),
        *((LAYOUTS[-1], dtype) for dtype in EPS if dtype != "float64"),
    ],
)
def test_invariants(layout, dtype):
    (shape, axes), eps = layout, EPS[dtype]
    x, y, a = random_arrays(shape, 3, dtype)

    @jax.jit
    def run(x, y, a):
        keyword = {"channel_axes": axes}
        v = so.project_to_tangent(x, a, **keyword)
        return {
            "v": v,
            "again": so.project_to_tangent(x, v, **keyword),
            "retracted": so.retract(x, a, **keyword),
            "exp": so.exp_map(x, v, **keyword),
            "transported": so.parallel_transport(x, y, v, **keyword),
            "angle": so.angle(x, y, **keyword),
        }

    out = run(x, y, a)
    assert out.pop("angle").dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    assert all(value.dtype == x.dtype and value.shape == shape for value in out.values())
    xs, ys, vs = (as_rows(z, axes) for z in (x, y, out["v"]))
    size = lengths(x, axes) * lengths(a, axes)
    assert np.all(np.abs(dot(vs, xs)) <= eps * size)
    np.testing.assert_allclose(as_rows(out["again"], axes), vs, rtol=0, atol=4 * eps)
    for name in ("retracted", "exp"):
        np.testing.assert_allclose(lengths(out[name], axes), lengths(x, axes), rtol=eps)
    moved = as_rows(out["transported"], axes)
    assert np.all(np.abs(dot(moved, ys)) <= eps * size * 4)
    np.testing.assert_allclose(lengths(moved, -2), lengths(vs, -2), rtol=4 * eps)
    np.testing.assert_allclose(moved, transported(vs, xs, ys), rtol=0, atol=10 * eps)


@pytest.mark.parametrize("theta", [1e-7, 1e-4, 1e-2, 0.5, 1.5, 3.0, 3.1415])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 3e-7), ("float64", 1e-15)])
def test_the_angle_is_the_one_travelled(theta, dtype, tolerance):
    x, a = random_arrays((50, 3), 2, dtype)
    v = so.project_to_tangent(x, a, channel_axes=-1)
    norms = [so.group_norm(z, channel_axes=-1) for z in (x, v)]
    y = so.exp_map(x, theta * norms[0] / norms[1] * v, channel_axes=-1)
    angle = so.angle(x, y, channel_axes=-1)
    # The end point is rounded, which is an angle of some eps; the rest is relative.
    np.testing.assert_allclose(angle, np.full((1, 3), theta), rtol=tolerance, atol=tolerance)


def test_transport_along_a_great_circle_and_back():
    x, a, b = random_arrays((6, 4), 3)
    v, m = (so.project_to_tangent(x, z, channel_axes=-1) for z in (a, b))
    y = so.exp_map(x, v, channel_axes=-1)
    there = so.parallel_transport(x, y, m, channel_axes=-1)
    back = so.parallel_transport(y, x, there, channel_axes=-1)
    np.testing.assert_allclose(back, m, atol=1e-14)


def test_a_retraction_agrees_with_the_exponential_map_to_second_order():
    x, a = random_arrays((6, 4), 2)
    v = so.project_to_tangent(x, a, channel_axes=-1)
    distances = [
        np.max(
            np.abs(so.retract(x, t * v, channel_axes=-1) - so.exp_map(x, t * v, channel_axes=-1))
        )
        for t in (1e-2, 5e-3)
    ]
    assert 7.5 < distances[0] / distances[1] < 8.5


FUNCTIONS = {
    "project_to_tangent": lambda x, y, v, **k: so.project_to_tangent(x, v, **k),
    "retract": lambda x, y, v, **k: so.retract(x, v, **k),
    "exp_map": lambda x, y, v, **k: so.exp_map(x, v, **k),
    "parallel_transport": so.parallel_transport,
    "angle": lambda x, y, v, **k: so.angle(x, y, **k),
    "group_norm": lambda x, y, v, **k: so.group_norm(x, **k),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_finite_where_groups_are_zero(name):
    rng = np.random.default_rng(1)
    arrays = rng.normal(size=(3, 4, 8))
    for group, zeros in enumerate([(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]):
        arrays[list(zeros), :, group] = 0  # each combination of zero x, y, v; one group of none
    arrays = jnp.asarray(arrays, jnp.float32)

    def total(arrays):
        return jnp.sum(FUNCTIONS[name](*arrays, channel_axes=-1))

    value, gradient = jax.value_and_grad(total)(arrays)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))


MEASURES = {
    "angle_per_step": lambda x, y, v, **k: so.angle_per_step(x, v, **k),
    "deformation": lambda x, y, v, **k: so.deformation(x, y, v, **k),
    "effective_learning_rate": lambda x, y, v, **k: so.effective_learning_rate(0.1, x, y, v, **k),
    "radial_fraction": lambda x, y, v, **k: so.radial_fraction(x, v, **k),
    "radius": lambda x, y, v, **k: so.radius(x, **k),
    "group_inner": lambda x, y, v, **k: so.group_inner(x, v, **k),
}
READ = {"angle": "xy", "group_norm": "x", "radius": "x"} | dict.fromkeys(
    ("parallel_transport", "deformation", "effective_learning_rate"), "xyv"
)


@pytest.mark.parametrize("name", FUNCTIONS | MEASURES)
def test_what_is_not_finite_comes_out_in_its_group_alone(name):
    function = jax.jit(partial((FUNCTIONS | MEASURES)[name], channel_axes=-1))
    clean = np.random.default_rng(2).normal(size=(3, 4, 8)).astype("float32")
    clean[0, :, 3], clean[1, :, 4], clean[2, :, 5] = 0, 0, 0  # zeros must not hide it
    expected = np.asarray(function(*clean))
    for argument, group in itertools.product(READ.get(name, "xv"), (2, 3, 4, 5)):
        for bad in (np.nan, np.inf, -np.inf):
            arrays = clean.copy()
            arrays["xyv".index(argument), 1, group] = bad
            out, others = np.asarray(function(*arrays)), np.arange(8) != group
            np.testing.assert_array_equal(out[:, others], expected[:, others])
            assert not np.isfinite(out[:, group]).all(), (argument, group, bad)


@pytest.mark.parametrize("dtype", EPS)
def test_zero_points_are_in_flat_space(dtype):
    x, y, v = random_arrays((4, 3), 3, dtype)
    zero, axes = jnp.zeros_like(x), {"channel_axes": -1}
    chex.assert_trees_all_equal(so.project_to_tangent(zero, v, **axes), v)
    chex.assert_trees_all_equal(so.retract(zero, v, **axes), v)
    chex.assert_trees_all_equal(so.retract(x, -x, **axes), zero)
    chex.assert_trees_all_equal(so.exp_map(zero, v, **axes), v)
    chex.assert_trees_all_equal(so.exp_map(x, zero, **axes), x)
    chex.assert_trees_all_equal(so.parallel_transport(zero, y, v, **axes), v)
    chex.assert_trees_all_equal(so.parallel_transport(x, zero, v, **axes), v)
    assert not so.angle(zero, y, **axes).any() and not so.angle(x, zero, **axes).any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_groups_of_one_element_and_empty_arrays_are_flat(name):
    for shape, axes in [((4, 1), -2), ((4,), None), ((), ()), ((0, 3), -1), ((3, 0), -1)]:
        x, y, v = random_arrays(shape, 3)
        out = FUNCTIONS[name](x, y, v, channel_axes=axes)
        assert out.shape == shape and jnp.all(jnp.isfinite(out))
        if name in ("project_to_tangent", "parallel_transport"):
            np.testing.assert_array_equal(out, v)


def test_the_antipode_has_no_shortest_way_and_gives_no_nan():
    x, a = random_arrays((6, 2), 2)
    v = so.project_to_tangent(x, a, channel_axes=-1)
    np.testing.assert_array_equal(so.parallel_transport(x, -x, v, channel_axes=-1), v)
    np.testing.assert_allclose(so.angle(x, -x, channel_axes=-1), np.full((1, 2), np.pi))


def test_blocks_are_values():
    blocks = so.blocks(-1, 4, channel_axes=0)
    assert blocks == so.blocks(-1, 4, channel_axes=(0,)) != so.blocks(-1, 4)
    assert hash(blocks) == hash(so.blocks(-1, 4, channel_axes=[0]))
    assert eval(repr(blocks)) == blocks and eval(repr(so.blocks(0, 2))) == so.blocks(0, 2)


def test_an_array_of_one_element_has_axes_too():
    with pytest.raises(ValueError, match="out of range"):
        so.group_norm(jnp.ones((1, 1)), channel_axes=7)
    assert so.group_norm(jnp.ones(()), channel_axes=-1).shape == ()
