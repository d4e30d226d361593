"""The three networks in plain PyTorch, and their training: what the trainer is compared with.

Needs PyTorch, which nothing else here does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from images.recipes import Recipe

PAD = 4
MEAN, STD = 0.5, 0.25  # of pixels / 255; the images are random


def conv_norm(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, padded to keep the image's size at stride 1, and BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=1e-5, momentum=0.1))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, with a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = conv_norm(inputs, outputs, stride=stride)
        self.second = conv_norm(outputs, outputs)
        projects = stride != 1 or inputs != outputs
        self.shortcut = conv_norm(inputs, outputs, 1, stride) if projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet(widths: Sequence[int], blocks_per_stage: int, num_classes: int) -> nn.Sequential:
    """A 3x3 stem, stages of blocks that halve and widen the image, a mean, a linear layer."""
    layers: list[Any] = [conv_norm(3, widths[0]), nn.ReLU()]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for i in range(blocks_per_stage):
            layers.append(Block(inputs, width, 2 if stage > 0 and i == 0 else 1))
            inputs = width
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes)
    return nn.Sequential(*layers, *head)


def vgg(stages: Sequence[Sequence[int]], num_classes: int) -> nn.Sequential:
    """Stages of 3x3 convolutions, each ended by a 2x2 max-pool, and one linear layer."""
    layers: list[Any] = []
    inputs = 3
    for widths in stages:
        for width in widths:
            layers += [conv_norm(inputs, width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, num_classes))


def make_network(model: str, num_classes: int) -> nn.Sequential:
    """The network of a name in `images.recipes.MODELS`: logits [n, num_classes] of [n, 3, 32, 32].

    PyTorch's own initial weights are those of `images.models`: uniform in +-1/sqrt(fan_in).
    """
    match model:
        case "resnet20":
            return resnet((16, 32, 64), 3, num_classes)
        case "resnet18":
            return resnet((64, 128, 256, 512), 2, num_classes)
        case "vgg16":
            stages = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
            return vgg(stages, num_classes)
    raise ValueError(f"unknown model {model!r}")


def augment(images: Tensor) -> Tensor:
    """Crops every image at random after padding it with black, and mirrors a random half.

    Args:
      images: uint8 [n, height, width, channels], on any device.

    Returns:
      uint8 of the same shape.
    """
    n, height, width, _ = images.shape
    device = images.device
    padded = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))
    down, right = torch.randint(0, 2 * PAD + 1, (2, n, 1), device=device)
    rows = down + torch.arange(height, device=device)
    columns = right + torch.arange(width, device=device)
    mirrored = torch.rand(n, 1, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    numbers = torch.arange(n, device=device)
    return padded[numbers[:, None, None], rows[:, :, None], columns[:, None, :]]


def settings(device: str) -> dict[str, Any]:
    """Let PyTorch compute as JAX does by default, and say what it is.

    On a GPU, JAX lets float32 products and convolutions use TensorFloat-32.

    Args:
      device: "cpu" or "cuda".

    Raises:
      RuntimeError: PyTorch cannot use the device.
    """
    # Seconds of compiling shall not be those of reading a cache.
    torch.compiler.config.force_disable_caches = True
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled")  # PyTorch says so at length
    if device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"PyTorch {torch.__version__} sees no GPU")
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # choose convolutions by trying, as XLA does
    return {
        "version": torch.__version__,
        "device": device,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "threads": torch.get_num_threads(),
    }


def make_training(
    model: str,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    batch_size: int,
    precision: str,
    recipe: Recipe,
    device: str,
    compiled: bool,
) -> Callable[[], float]:
    """A function that trains once on all images, and returns the mean loss when it is done.

    A step gathers its batch on the device, crops, mirrors and normalises it, and goes by
    `torch.optim.Adam` with coupled L2.

    Args:
      model: one of `images.recipes.MODELS`.
      images: uint8 [n, 32, 32, 3].
      labels: int [n].
      num_classes: above every label.
      batch_size: divides the number of images.
      precision: "float32", or "bfloat16" for autocast.
      recipe: hyper-parameters of Adam.
      device: "cpu" or "cuda".
      compiled: whether to use channels-last memory, `torch.compile` (its default mode) and the
        fused Adam, instead of PyTorch's defaults.
    """
    torch.manual_seed(0)
    layout = torch.channels_last if compiled else torch.contiguous_format
    network: Any = make_network(model, num_classes)  # Any: its type knows no memory_format
    network = network.to(device, memory_format=layout)
    optimizer = torch.optim.Adam(
        network.parameters(),
        recipe.learning_rate,
        (recipe.b1, recipe.b2),
        weight_decay=recipe.weight_decay,
        fused=compiled or None,
    )
    on_device = torch.from_numpy(images).to(device)
    targets = torch.from_numpy(labels).to(device, torch.int64)
    batches = torch.randperm(len(images)).to(device).split(batch_size)

    def loss_of(images: Tensor, targets: Tensor) -> Tensor:
        x = (augment(images).float() / 255 - MEAN) / STD
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = network(x)
        return F.cross_entropy(logits.float(), targets)

    if compiled:
        torch.compiler.reset()  # else the ninth network would silently run uncompiled
        loss_of = torch.compile(loss_of, fullgraph=True)

    def train() -> float:
        total = torch.zeros((), device=device)
        for chosen in batches:
            optimizer.zero_grad()
            loss = loss_of(on_device[chosen], targets[chosen])
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total.item() / len(batches)  # waits for the device

    return train
