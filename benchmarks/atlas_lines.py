"""atlas.jsonl: a JSON line for each array of each network; and what is known of the networks."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import run_lines

LINES = "atlas.jsonl"


class Architecture(NamedTuple):
    """A network of `atlas_blocks` or `atlas_images`."""

    title: str
    arxiv: str | None
    note: str
    size: str | None = None  # a published model, whose blocks have these elements
    elements: dict[str, int] | None = None  # by kernel, as in `Leaf.name`; in one layer


def _attention(width: int, heads: int, pairs: int, head: int) -> dict[str, int]:
    """Elements of the kernels of attention; `pairs` of heads for keys and values."""
    counts = {"query": heads, "key": pairs, "value": pairs, "out": heads}
    return {f"attention/{name}": width * count * head for name, count in counts.items()}


def _gated(width: int, hidden: int) -> dict[str, int]:
    return {f"feed_forward/{name}": width * hidden for name in ("gate", "up", "down")}


ARCHITECTURES = {
    "gpt2": Architecture(
        "GPT-2",
        None,
        "Radford et al. 2019; LayerNorm before; biases, and nothing depends on those of the keys",
    ),
    "llama": Architecture("Llama 3", "2407.21783", "RMSNorm before"),
    "qwen3": Architecture(
        "Qwen3",
        "2505.09388",
        "RMSNorm before, and of each head's query and key",
        "8B",
        _attention(4096, 32, 8, 128) | _gated(4096, 12288),
    ),
    "gemma3": Architecture(
        "Gemma 3",
        "2503.19786",
        "RMSNorm before, behind, and of each head's query and key. The gain before attention is "
        "invariant too: all three kernels that it feeds are",
        "4B",
        _attention(2560, 8, 4, 256) | _gated(2560, 10240),
    ),
    "olmo2": Architecture(
        "OLMo 2",
        "2501.00656",
        "RMSNorm behind, and of all queries and of all keys of a position together",
        "7B",
        _attention(4096, 32, 32, 128) | _gated(4096, 11008),
    ),
    "ngpt": Architecture(
        "nGPT",
        "2410.01131",
        "what its loss says: queries, keys and the output of each layer are normalised. The "
        "normalisation of all rows and columns after each step puts the rest on spheres too, which "
        "is a constraint and no invariance",
        "0.5B",
        {name: 1024**2 for name in ("query", "key", "value", "out")}
        | {name: 4 * 1024**2 for name in ("gate", "up", "down")},
    ),
    "olmoe": Architecture(
        "OLMoE",
        "2409.02060",
        "a mixture of experts (here 8, of which 2 are taken); RMSNorm before, and of all queries "
        "and of all keys. Router and experts are followed by none",
        "1B-7B",
        _attention(2048, 16, 16, 128)
        | {"experts/router": 2048 * 64}
        | {f"experts/{name}": 64 * 2048 * 1024 for name in ("gate", "up", "down")},
    ),
    "mamba2": Architecture(
        "Mamba 2",
        "2405.21060",
        "RMSNorm before; the gated RMSNorm in front of the last projection comes after a SiLU of "
        "each of its factors, and so fixes no kernel's length",
    ),
    "vit": Architecture("ViT", "2010.11929", "LayerNorm before; biases as in GPT-2"),
    "swin2": Architecture(
        "Swin v2",
        "2111.09883",
        "cosine attention, LayerNorm behind; all but the key have biases",
        "B, stage 3",
        {name: 512**2 for name in ("query", "key", "value", "out")}
        | {"up": 4 * 512**2, "down": 4 * 512**2}
        | {"position_up": 2 * 512, "position_down": 512 * 16},
    ),
    "convnext": Architecture(
        "ConvNeXt", "2201.03545", "LayerNorm behind the convolution, which has a bias"
    ),
    "resnet_bn": Architecture(
        "ResNet, BatchNorm", "1512.03385", "behind each convolution, with the batch's statistics"
    ),
    "resnet_gn": Architecture(
        "ResNet, GroupNorm", "1803.08494", "behind each convolution; here 4 groups of channels"
    ),
}
MODELS = tuple(ARCHITECTURES)


class Leaf(NamedTuple):
    """What was measured of an array; see `spherical_optax.Evidence`."""

    path: str
    shape: tuple[int, ...]
    elements: int
    channel_axes: str | None
    groups: int | None
    verdict: str
    radial: float | None
    rescaling: float | None
    with_bias: str | None

    @property
    def in_blocks(self) -> bool:
        """Whether it is part of what repeats."""
        return self.path.startswith("blocks/")

    @property
    def name(self) -> str:
        """The path within a block, without what all kernels have in common."""
        return re.sub(r"^blocks/(\d+/)?|/kernel$", "", self.path)

    @property
    def kind(self) -> str | None:
        """In words, what the groups are beside layers of a stack; one of `KINDS`, or None."""
        if self.with_bias is not None:
            return WITH_BIAS
        if self.channel_axes is None:
            return None
        if "blocks(" in self.channel_axes:
            return "per block of filters"
        axes = ast.literal_eval(self.channel_axes)
        rank = len(self.shape)
        named = {axis % rank for axis in (axes if isinstance(axes, tuple) else (axes,))}
        if re.match(r"blocks/\D", self.path):
            named.discard(0)  # of layers
        kinds = {(): "whole", (rank - 1,): "per filter", (rank - 2,): "per head"}
        return kinds[tuple(named)]


WITH_BIAS = "only with its bias"
KINDS = ("per head", "per filter", "per block of filters", "whole", WITH_BIAS)


class Atlas(NamedTuple):
    """All arrays of a network; of two for one network the last counts."""

    model: str
    device: str
    versions: dict[str, str | None]
    git_revision: str | None
    leaves: tuple[Leaf, ...]

    def share(self, kind: str | None = None, *, in_blocks: bool = True) -> float:
        """Share of weights on spheres, or of those of a kind; of the blocks or of all weights."""
        leaves = [leaf for leaf in self.leaves if leaf.in_blocks or not in_blocks]
        kinds = KINDS[:-1] if kind is None else (kind,)
        part = sum(leaf.elements for leaf in leaves if leaf.kind in kinds)
        return part / sum(leaf.elements for leaf in leaves)

    def of_size(self) -> float | None:
        """Share of the elements of a published model's kernels; None where all or none is."""
        elements = ARCHITECTURES[self.model].elements
        if elements is None:
            return None
        on = {leaf.name for leaf in self.leaves if leaf.channel_axes is not None}
        return sum(n for name, n in elements.items() if name in on) / sum(elements.values())


def to_lines(atlas: Atlas) -> bytes:
    """The network as lines of JSON, one for each array."""
    rest = atlas._asdict() | {"leaves": len(atlas.leaves)}
    entries = [{**rest, **leaf._asdict()} for leaf in atlas.leaves]
    return b"".join(json.dumps(entry, allow_nan=False).encode() + b"\n" for entry in entries)


def load(path: Path) -> tuple[list[Atlas], list[int]]:
    """The whole networks in atlas.jsonl, and the numbers (from 1) of the lines that hold no array.

    A network with a line missing is left out.
    """
    lines, broken = run_lines.read(path, _parse)
    found: dict[str, tuple[Atlas, int, dict[str, Leaf]]] = {}
    for atlas, count in lines:
        key = json.dumps([atlas.model, atlas.device, atlas.versions, atlas.git_revision])
        leaves = found.setdefault(key, (atlas, count, {}))[2]
        leaves.update({leaf.path: leaf for leaf in atlas.leaves})
    whole = [
        atlas._replace(leaves=tuple(leaves.values()))
        for atlas, count, leaves in found.values()
        if len(leaves) == count
    ]
    return whole, broken


def latest(atlases: Iterable[Atlas]) -> list[Atlas]:
    """The last one of each network, in the order of `ARCHITECTURES`."""
    by_model = {atlas.model: atlas for atlas in atlases}
    return [by_model[model] for model in MODELS if model in by_model]


def _parse(entry: dict[str, Any]) -> tuple[Atlas, int]:
    if entry["model"] not in MODELS:
        raise ValueError("no network of the atlas")
    leaf = Leaf(*(entry[name] for name in Leaf._fields))._replace(shape=tuple(entry["shape"]))
    _ = run_lines.checked(leaf).kind  # that can be said in words
    rest = {name: entry[name] for name in ("model", "device", "versions", "git_revision")}
    return run_lines.checked(Atlas(**rest, leaves=(leaf,))), entry["leaves"]
