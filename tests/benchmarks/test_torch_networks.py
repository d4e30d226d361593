"""PyTorch's side of the throughput: the same networks, augmentation and training."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from images import models, recipes

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def shapes(model: str) -> list[tuple[int, ...]]:
    """Of the parameters, in PyTorch's layout and any order."""
    made = nnx.eval_shape(lambda: models.MODELS[model](10, rngs=nnx.Rngs(0)))
    return sorted(tuple(x.shape[::-1]) for x in jax.tree.leaves(nnx.state(made, nnx.Param)))


@pytest.mark.parametrize("model", recipes.MODELS)
def test_torch_networks_have_our_parameters(model):
    torch = pytest.importorskip("torch")
    from throughput import torch_networks

    with torch.device("meta"):
        network = torch_networks.make_network(model, 10)
    assert sorted(tuple(x.shape) for x in network.parameters()) == shapes(model)
    assert sum(1 for _ in network.buffers()) == 3 * sum(len(s) == 4 for s in shapes(model))


def test_torch_network_gives_our_logits():
    torch = pytest.importorskip("torch")
    from throughput import torch_networks

    ours = models.resnet20(10, rngs=nnx.Rngs(0))
    theirs = torch_networks.make_network("resnet20", 10)
    layers: list[Any] = [ours.conv1, ours.bn1]
    for block in ours.blocks:
        layers += [block.conv1, block.bn1, block.conv2, block.bn2]
        if block.projects:
            layers += [block.shortcut_conv, block.shortcut_bn]
    layers.append(ours.linear)
    with torch.no_grad():
        parameters = theirs.parameters()
        for layer in layers:
            first = layer.scale if isinstance(layer, nnx.BatchNorm) else layer.kernel
            for param in (first, layer.bias):
                if param is not None:
                    value = np.asarray(param[...])
                    axes = (3, 2, 0, 1) if value.ndim == 4 else range(value.ndim)[::-1]
                    next(parameters).copy_(torch.tensor(value.transpose(axes)))
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    want = nnx.jit(lambda model, images: model(images, train=True))(ours, images)
    got = theirs.train()(torch.tensor(images).permute(0, 3, 1, 2)).detach().numpy()
    # In float32; batch statistics of few values amplify rounding.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())
    # The running means move equally far.
    mean = theirs.get_buffer("0.1.running_mean").numpy()
    np.testing.assert_allclose(mean, layers[1].mean[...], rtol=0, atol=1e-5)


def test_torch_augmentation():
    torch = pytest.importorskip("torch")
    from throughput import torch_networks

    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    augmented = torch_networks.augment(torch.tensor(images)).numpy()
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    found = set()
    for image, around in zip(augmented, padded, strict=True):
        windows = [
            (down, right, mirrored)
            for down in range(9)
            for right in range(9)
            for mirrored in (1, -1)
            if (image == around[down : down + 32, right : right + 32][:, ::mirrored]).all()
        ]
        assert len(windows) == 1
        found |= set(windows)
    for part, every in enumerate((range(9), range(9), (1, -1))):
        assert {window[part] for window in found} == set(every)


@pytest.mark.parametrize("precision", recipes.PRECISIONS)
def test_torch_learns(precision, monkeypatch):
    pytest.importorskip("torch")
    from throughput import torch_networks

    make = lambda *_: torch_networks.resnet((4, 8), 1, 4)  # noqa: E731
    monkeypatch.setattr(torch_networks, "make_network", make)
    labels = np.arange(32) % 4
    images = np.broadcast_to(60 * labels[:, None, None, None], (32, 32, 32, 3)).astype(np.uint8)
    train = torch_networks.make_training(
        "resnet20",
        images,
        labels,
        num_classes=4,
        batch_size=16,
        precision=precision,
        recipe=recipes.Recipe(0.01, 0.0),
        device="cpu",
        compiled=False,
    )
    losses = [train() for _ in range(15)]
    assert np.isfinite(losses).all() and losses[-1] < 0.5 < losses[0]
