"""The text, the networks and the recipes of `train_lm.py`."""

import os
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spherical_optax as so
from language import models, recipes, text

SIZE = models.Size(vocabulary=64, width=32, depth=2, heads=4)
TOKENS = jax.random.randint(jax.random.key(0), (3, 12), 0, SIZE.vocabulary)
pytestmark = pytest.mark.usefixtures("compiled_quickly")
architectures = pytest.mark.parametrize("name", recipes.ARCHITECTURES)


def decoder(name, **options):
    return models.Decoder(SIZE, recipes.ARCHITECTURES[name], rngs=nnx.Rngs(0), **options)


def parts(name, **options):
    """The network as a function of parameters and tokens, and the parameters."""
    graphdef, params = nnx.split(decoder(name, **options), nnx.Param)
    return lambda params, tokens: nnx.merge(graphdef, params)(tokens), params


def by_name(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def write(directory, files):
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


MANY = {f"part{i}.txt": f"content of {i}".encode() for i in range(25)}


def test_no_file_is_in_both_parts(tmp_path):
    found = text.load([write(tmp_path, MANY)])
    assert found.files == (23, 2)
    train, valid = (part.tobytes().split(b"\0")[:-1] for part in (found.train, found.valid))
    assert sorted(train + valid) == sorted(MANY.values())


def test_the_order_is_of_names_and_the_digest_of_contents(tmp_path):
    one = text.load([write(tmp_path / "a", MANY)])
    other = text.load([write(tmp_path / "b", dict(reversed(MANY.items())))])
    changed = text.load([write(tmp_path / "c", MANY | {"part3.txt": b"other"})])
    np.testing.assert_array_equal(one.train, other.train)
    assert one.sha256 == other.sha256 != changed.sha256


def test_hidden_binary_and_special_files_of_a_directory_are_no_text(tmp_path):
    write(tmp_path, MANY | {".git/config": b"x", "image.png": b"\x89\xff", "nul": b"a\0b"})
    os.mkfifo(tmp_path / "pipe")
    assert sum(text.load([tmp_path]).files) == len(MANY)


def test_the_default_is_the_standard_library_without_its_tests():
    found = text.load()
    whole = found.train.tobytes() + found.valid.tobytes()
    assert b"class OrderedDict" in whole and b"class TestOrderedDict" not in whole
    assert len(found.valid) > 100_000
    assert text.load().sha256 == found.sha256


def test_windows_depend_on_key_and_step_only():
    whole = jnp.arange(200, dtype=jnp.uint8)
    draw = jax.jit(text.draw_windows, static_argnums=3)
    windows = [draw(whole, jax.random.key(key), step, (500, 8)) for key, step in ((0, 5), (1, 5))]
    again = text.draw_windows(whole, jax.random.key(0), 5, (500, 8))
    np.testing.assert_array_equal(windows[0], again)
    assert not np.array_equal(*windows)
    np.testing.assert_array_equal(np.diff(windows[0], axis=1), 1)  # consecutive
    starts = windows[0][:, 0]
    assert starts.min() == 0 and starts.max() == 192  # of 193 places, by 500 draws


def test_windows_of_an_evaluation_are_spread_and_apart():
    windows = text.spread_windows(np.arange(100, dtype=np.uint8), 4, 10)
    np.testing.assert_array_equal(windows[:, 0], [0, 25, 50, 75])
    assert len(text.spread_windows(np.zeros(35, np.uint8), 100, 10)) == 3


@architectures
def test_a_position_sees_no_later_one(name):
    network, params = parts(name)
    before = network(params, TOKENS)
    after = network(params, TOKENS.at[:, 8].add(1))
    np.testing.assert_allclose(before[:, :8], after[:, :8], rtol=1e-5, atol=1e-6)
    assert np.abs(before - after)[:, 8:].max() > 1e-3


@architectures
def test_the_unrolled_network_is_the_scanned_one(name):
    scanned, params = parts(name)
    unrolled, same = parts(name, unroll=True)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    np.testing.assert_allclose(
        scanned(params, TOKENS), unrolled(params, TOKENS), rtol=1e-5, atol=1e-6
    )


def test_rotary_positions_are_relative():
    query, key = jax.random.normal(jax.random.key(1), (2, 8))
    at = jnp.ones((1, 20, 1, 1))
    q, k = (models.rotate(at * x)[0, :, 0] for x in (query, key))
    products = q @ k.T
    np.testing.assert_allclose(products[3, 1], products[17, 15], rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(q, axis=1), jnp.linalg.norm(query), rtol=1e-5)


def test_activations_alone_are_narrow():
    network, params = parts("gemma3", dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert network(params, TOKENS).dtype == "bfloat16"


@architectures
def test_the_invariant_kernels_are_those_without_radial_derivative(name):
    network, state = parts(name, unroll=True)
    params = nnx.to_pure_dict(state)

    def loss(params):
        nnx.replace_by_pure_dict(state, params)
        logits = network(state, TOKENS[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    grads = jax.jit(jax.grad(loss))(params)
    selected = recipes.invariant_kernels(recipes.ARCHITECTURES[name])
    of_selected, of_layers = (
        {
            path: np.max(np.abs(x))
            for path, x in by_name(so.radial_fraction(params, grads, channel_axes=axes)).items()
        }
        for axes in (selected, so.by_path({"blocks/.*/kernel": recipes.LAYERS}))
    )
    assert max(of_selected.values(), default=0) < 1e-4  # of float32, and of an eps of the norms
    others = of_layers.keys() - of_selected.keys()
    assert min(of_layers[path] for path in others) > 3e-4
    assert len(of_selected) == {"llama": 0, "qwen3": 2, "gemma3": 6, "olmo2": 6}[name]


@pytest.mark.parametrize("shape", recipes.SCHEDULES)
def test_learning_rates_rise_and_fall_to_zero(shape):
    schedule = recipes.make_schedule(shape, 0.5, steps=100, warmup=10)
    rates = [float(schedule(step)) for step in range(101)]
    assert 0 < rates[0] < rates[5] < rates[10] == max(rates) == 0.5
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[100] == 0
    assert recipes.make_schedule(shape, 0.5, steps=100, warmup=0)(0) == 0.5


@cache
def trained(name, weight_decay):
    """Parameters before and after two steps with given gradients, by path."""
    _, state = parts("gemma3")
    params = nnx.to_pure_dict(state)
    tx = recipes.make_optimizer(
        name,
        recipes.ARCHITECTURES["gemma3"],
        learning_rate=0.01,
        adam_learning_rate=0.01,
        weight_decay=weight_decay,
        clip=1.0,
    )
    moved, opt_state = params, jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    rng = np.random.default_rng(0)
    for _ in range(2):
        grads = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), params
        )
        updates, opt_state = update(grads, opt_state, moved)
        moved = optax.apply_updates(moved, updates)
    return by_name(params), by_name(moved)


@pytest.mark.parametrize("name", recipes.OPTIMIZERS)
def test_what_is_no_kernel_of_a_block_takes_the_same_adamw_with_all(name):
    _, moved = trained(name, 0.1)
    _, by_adamw = trained("adamw", 0.1)
    for path in moved:
        same = np.allclose(moved[path], by_adamw[path], rtol=1e-5, atol=1e-7)
        own = "blocks" in path and "kernel" in path
        if name in ("adam_s", "adam_srt"):  # gates are not invariant
            own = own and "gate" not in path
        assert same == (not own or name == "adamw"), path


@pytest.mark.parametrize("name", ["adam_h", "muon_h", "rotational"])
def test_kernels_in_blocks_keep_the_radius_of_each_layer_and_head(name):
    on = recipes.kernels()
    radii = [so.radius(params, channel_axes=on) for params in trained(name, 0.1)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *radii)
    assert radii[0]["blocks/attention/query/kernel"].shape == (2, 1, 4, 1)


def test_muon_takes_the_matrices_of_muon_h():
    """Then their steps are parallel from a step to the next, apart from the way to the sphere."""
    steps = []
    for name in ("muon", "muon_h"):
        before, after = trained(name, 0.0)
        steps.append({path: after[path] - before[path] for path in after})
    on = recipes.kernels()
    for path, step in steps[0].items():
        if axes := on(path, step):
            tangent = [
                so.project_to_tangent(before[path], s[path], channel_axes=axes) for s in steps
            ]
            between = so.angle(*tangent, channel_axes=axes)
            assert np.max(between) < 0.2, path
