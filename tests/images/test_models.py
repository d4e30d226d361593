"""The networks: sizes, logits of the published implementation, initial weights, BatchNorm."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spherical_optax as so
from images import models, recipes

pytestmark = pytest.mark.usefixtures("compiled_quickly")

GOLDENS = Path(__file__).parents[1] / "goldens"
FACTS = json.loads((GOLDENS / "models.json").read_text())
IMAGES = jnp.asarray(np.sin(0.01 * np.arange(8 * 32 * 32 * 3)).reshape(8, 32, 32, 3), jnp.float32)


def shapes(name: str) -> Any:
    """The model without values, which costs nothing."""
    classes = FACTS[name]["num_classes"]
    return nnx.eval_shape(lambda: models.MODELS[name](classes, rngs=nnx.Rngs(0)))


def layers(model: Any) -> list[Any]:
    """The layers with parameters, in the order in which the goldens fill them."""
    if isinstance(model, models.VGG):
        convolutions = [layer for block in model.layers for layer in (block.conv, block.bn)]
    else:
        convolutions = [model.conv1, model.bn1]
        for block in model.blocks:
            convolutions += [block.conv1, block.bn1, block.conv2, block.bn2]
            if block.projects:
                convolutions += [block.shortcut_conv, block.shortcut_bn]
    return [*convolutions, model.linear]


def is_batch_norm(layer: Any) -> bool:
    return isinstance(layer, nnx.BatchNorm)


@cache
def filled(name: str) -> tuple[Any, int]:
    """The model with the goldens' fill, and the number of tensors filled."""
    model = shapes(name)
    tensors = 0

    def fill(param: nnx.Param, gain: float, offset: float = 0.0) -> None:
        nonlocal tensors
        wave = np.sin(0.7 * np.arange(param.size) + tensors).reshape(param.shape)
        param.set_value(jnp.asarray(offset + gain * wave, jnp.float32))
        tensors += 1

    for layer in layers(model):
        if is_batch_norm(layer):
            fill(layer.scale, 0.1, offset=1.0)
            fill(layer.bias, 0.1)
            layer.mean.set_value(jnp.zeros(layer.mean.shape))
            layer.var.set_value(jnp.ones(layer.var.shape))
        else:
            fill(layer.kernel, np.sqrt(2 / np.prod(layer.kernel.shape[:-1])))
            if layer.bias is not None:
                fill(layer.bias, 0.1)
    return model, tensors


@nnx.jit(static_argnames="train")
def logits(model: Any, images: jax.Array, train: bool) -> jax.Array:
    return model(images, train=train)


def test_the_command_offers_the_models_that_there_are():
    assert tuple(models.MODELS) == recipes.MODELS


@pytest.mark.parametrize("name", FACTS)
def test_parameter_count(name):
    sizes = [param.size for param in jax.tree.leaves(nnx.state(shapes(name), nnx.Param))]
    assert sum(sizes) == FACTS[name]["parameters"]
    assert filled(name)[1] == FACTS[name]["filled_tensors"]


@pytest.mark.parametrize("name", FACTS)
def test_conv_selects_the_convolution_kernels_and_nothing_else(name):
    params = nnx.state(shapes(name), nnx.Param)
    table = so.path_labels(so.by_path({"conv": -1}))(params)
    labels = jax.tree.leaves(table)
    assert labels.count("spherical") == FACTS[name]["conv_kernels"]
    selected = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "conv" in jax.tree_util.keystr(path)
    ]
    assert len(selected) == FACTS[name]["conv_kernels"]
    assert all(leaf.ndim == 4 for leaf in selected)


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logits_of_the_published_implementation(name, mode):
    model = nnx.clone(filled(name)[0])
    got = np.asarray(logits(model, IMAGES, mode == "train"))
    want = np.load(GOLDENS / "models.npz")[f"{name}/{mode}_logits"]
    # In float32. Batch statistics amplify rounding: run in float64, these networks are up to 5e-4
    # of the largest logit from the goldens in training mode, and 5e-7 in evaluation mode.
    tolerance = {"eval": 1e-5, "train": 2e-3}[mode]
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@cache
def initial() -> Any:
    return nnx.jit(lambda: models.resnet20(10, rngs=nnx.Rngs(0)))()


def test_initial_weights_are_uniform_in_one_over_root_fan_in():
    for layer in layers(initial()):
        if is_batch_norm(layer):
            np.testing.assert_array_equal(layer.scale[...], 1.0)
            np.testing.assert_array_equal(layer.bias[...], 0.0)
            continue
        limit = np.prod(layer.kernel.shape[:-1]) ** -0.5
        for param in [layer.kernel] + [layer.bias] * (layer.bias is not None):
            values = np.abs(param[...]) / limit
            assert values.max() <= 1 + 1e-6  # rounding of the limit
            # One of 10 biases is expected beyond 0.2, and one of 432 weights or more beyond 0.9.
            assert values.max() > (0.9 if values.size > 400 else 0.2)
            if values.size > 400:  # where 0.06 is more than 4 standard deviations of the mean
                assert np.mean(values**2) == pytest.approx(1 / 3, abs=0.06)


def test_number_of_classes():
    model = nnx.eval_shape(lambda: models.resnet20(7, rngs=nnx.Rngs(0)))
    assert model.linear.kernel.shape == (64, 7)


def test_logits_in_training_do_not_depend_on_the_filters_lengths():
    model = initial()
    images = jax.random.normal(jax.random.key(0), IMAGES.shape)
    scaled = nnx.clone(model)
    rng = np.random.default_rng(1)
    for layer in layers(scaled):
        if isinstance(layer, nnx.Conv):
            lengths = rng.uniform(1, 8, layer.kernel.shape[-1]).astype(np.float32)
            layer.kernel[...] = layer.kernel[...] * lengths
    base = np.asarray(logits(nnx.clone(model), images, True))
    # BatchNorm's epsilon of 1e-5, against variances of order 0.1, adds up over 19 layers.
    np.testing.assert_allclose(logits(scaled, images, True), base, atol=2e-3 * np.abs(base).max())
    scaled.linear.kernel[...] = 2 * scaled.linear.kernel[...]
    assert np.abs(logits(scaled, images, True) - base).max() > 0.1 * np.abs(base).max()


def test_batch_norm_moves_by_a_tenth():
    """Flax's momentum 0.9 is PyTorch's 0.1, and the running variance is the biased one."""
    model = nnx.clone(filled("resnet20")[0])
    model.bn1.mean[...] = jnp.full(16, 2.0)
    model.bn1.var[...] = jnp.full(16, 3.0)
    activations = np.asarray(model.conv1(IMAGES), np.float64)
    logits(model, IMAGES, True)
    mean, variance = activations.mean(axis=(0, 1, 2)), activations.var(axis=(0, 1, 2))
    # 1e-5: a float32 mean of 8192 numbers of order 1.
    np.testing.assert_allclose(model.bn1.mean[...], 0.9 * 2 + 0.1 * mean, atol=1e-5)
    np.testing.assert_allclose(model.bn1.var[...], 0.9 * 3 + 0.1 * variance, atol=1e-5)


def test_evaluation_leaves_the_statistics_alone():
    model = nnx.clone(filled("resnet20")[0])
    logits(model, IMAGES, False)
    np.testing.assert_array_equal(model.bn1.mean[...], 0.0)
    np.testing.assert_array_equal(model.bn1.var[...], 1.0)


@pytest.mark.parametrize("name", models.MODELS)
def test_bfloat16_is_for_activations_and_convolutions_alone(name):
    abstract = nnx.eval_shape(lambda: models.MODELS[name](10, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)

    def train(state, images):
        model = nnx.merge(graphdef, state)
        logits = model(images, train=True)
        return logits, nnx.state(model)

    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    program, (logits, after) = jax.make_jaxpr(train, return_shape=True)(state, images)
    assert logits.dtype == jnp.bfloat16
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves((state, after)))
    heavy = [e for e in program.eqns if e.primitive.name in ("conv_general_dilated", "dot_general")]
    assert len(heavy) == {"resnet20": 22, "resnet18": 21, "vgg16": 14}[name]
    assert {v.aval.dtype for e in heavy for v in e.invars} == {jnp.dtype("bfloat16")}
