"""A GPU has programs of its own, in which sums come together; what comes out is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so
from cases import CASES, READY, run
from layouts import LAYOUTS, random_arrays

# But for MuonH, whose groups are matrices; its sums are those of hyperball.
SEVERAL_SUMS = [
    *(name for name in READY if name != "muon_h"),
    "scale_by_adam_g",
    "scale_by_adam_srt_isometric",
]
SHAPES = {f"leaf{i}": shape for i, (shape, _) in enumerate(LAYOUTS)} | {"bias": (6,)}
AXES = so.by_path({f"leaf{i}$": axes for i, (_, axes) in enumerate(LAYOUTS)})
CONVOLUTIONS = {"conv1": (3, 3, 4, 8), "conv2": (3, 3, 8, 8), "scale": (8,)}


def of_a_gpu(*operands, cuda=None, default, **_):
    return (cuda or default)(*operands)


@pytest.mark.parametrize("name", SEVERAL_SUMS)
def test_the_programs_of_a_gpu_give_the_same(name, monkeypatch):
    with jax.enable_x64(True):
        trees = zip(*(random_arrays(shape, 4) for shape in SHAPES.values()), strict=True)
        params, *grads = (dict(zip(SHAPES, arrays, strict=True)) for arrays in trees)
        expected = run(CASES[name].factory(channel_axes=AXES), params, grads)
        monkeypatch.setattr(jax.lax, "platform_dependent", of_a_gpu)
        found = run(CASES[name].factory(channel_axes=AXES), params, grads)
    for path in SHAPES:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-11, atol=1e-13)


def test_what_is_not_finite_stays_in_its_group_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", of_a_gpu)
    params = jnp.ones((3, 3, 4, 5)).at[0, 1, 2, 3].set(jnp.nan)
    tx = so.adam_srt(0.1, channel_axes=-1)
    updates, _ = jax.jit(tx.update)(jnp.ones_like(params), tx.init(params), params)
    assert np.isnan(updates).all(axis=(0, 1, 2)).tolist() == [False, False, False, True, False]


def exported(tx, platforms):
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in CONVOLUTIONS.items()
    }
    state = jax.eval_shape(tx.init, params)
    return jax.export.export(jax.jit(tx.update), platforms=platforms)(params, state, params)


@pytest.mark.parametrize("name", ["adam_srt", "adam_g", "sgd_mrt", "rotational"])
def test_an_update_is_exported_for_a_gpu_with_one_stack_of_products_a_leaf(name):
    tx = CASES[name].factory(channel_axes=so.by_path({"conv": -1}))
    stacks = {
        platform: exported(tx, [platform]).mlir_module().count("stablehlo.concatenate")
        for platform in ("cpu", "cuda")
    }
    assert stacks == {"cpu": 0, "cuda": 2}


def test_an_update_exported_for_two_platforms_runs_on_this_one():
    tx = so.adam_srt(0.1, channel_axes=so.by_path({"conv": -1}))
    params = {name: jnp.full(shape, 0.5) for name, shape in CONVOLUTIONS.items()}
    state = tx.init(params)
    updates, _ = exported(tx, ["cpu", "cuda"]).call(params, state, params)
    expected, _ = tx.update(params, state, params)
    for path in CONVOLUTIONS:
        np.testing.assert_allclose(updates[path], expected[path], rtol=1e-6)
