"""The lines of atlas.jsonl as table.md and table.png, and nothing else in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from architectures.atlas_lines import ARCHITECTURES, KINDS, MODELS, WITH_BIAS, Atlas
from training.files import replace_file


def write_report(output: Path, atlases: Sequence[Atlas]) -> None:
    """Write table.md and table.png into a directory, each whole or not at all.

    Args:
      output: the directory.
      atlases: at least one, from `atlas_lines.latest`.
    """
    text = report(atlases)
    replace_file(output / "table.md", lambda path: path.write_text(text, encoding="utf-8"))
    replace_file(output / "table.png", lambda path: draw(path, atlases))


NOTES = """\
* A weight is on a sphere if the loss (cross-entropy of random labels) does not depend on the length
  of its group, as `find_invariant_groups` measures at perturbed parameters, in float32.
* of the blocks: of all weights in what repeats, gains and biases included; embeddings, stems, last
  norms and heads are not. of the network: with these, at this small size.
* published size: of the elements of the kernels in a layer of the named model, if those measured
  here are on spheres there; shares differ by fewer heads of keys than of queries, by the width of
  the feed-forward layer, and by the number of experts.
* per head, per filter, …: what a sphere holds; whole: one sphere for each array of each layer.
* only with its bias: kernel and bias together have no length that matters; the kernel alone has,
  and `use_bias=False` would put it on a sphere. They are not counted.
* Queries, keys and values have kernels of their own here. Fused into one, as in the published code
  of GPT-2 and Swin v2, they have no groups in common that are invariant.
* Embeddings start at a standard deviation of 1, nGPT's at a length of 1. At a usual 0.02 a first
  block without a norm before it (OLMo 2), this small, gives so little that the epsilon of the norm
  behind it (1e-6) spoils the invariance of its values.
"""


def report(atlases: Sequence[Atlas]) -> str:
    """The report as Markdown: a row for each architecture, and how to read it."""
    models = [atlas.model for atlas in atlases]
    options = "" if tuple(models) == MODELS else f" --models {','.join(models)}"
    versions = _distinct(
        ", ".join(f"{name} {version or 'none'}" for name, version in atlas.versions.items())
        for atlas in atlases
    )
    notes = [
        f"* {architecture.title}: {architecture.note}."
        for architecture in (ARCHITECTURES[model] for model in models)
    ]
    lines = [
        "# Where the spheres are",
        "",
        "![the same](table.png)",
        "",
        *table(atlases),
        "",
        f"* device: {_distinct(atlas.device for atlas in atlases)}",
        f"* versions: {versions}",
        f"* git revision: {_distinct(atlas.git_revision or 'unknown' for atlas in atlases)}",
        f"* command: `python benchmarks/atlas.py{options}`",
        *_margin(atlases),
        "",
        "## The networks",
        "",
        *notes,
        "",
        "## How to read it",
        "",
    ]
    return "\n".join(lines) + "\n" + NOTES


def table(atlases: Iterable[Atlas]) -> list[str]:
    """The rows of the table, with its head."""
    return [
        "| architecture | of the blocks | of the network | published size | on spheres |",
        "|---|---:|---:|---:|---|",
        *map(_row, atlases),
    ]


def _row(atlas: Atlas) -> str:
    architecture = ARCHITECTURES[atlas.model]
    title = architecture.title
    if architecture.arxiv:
        title = f"[{title}](https://arxiv.org/abs/{architecture.arxiv})"
    shares = (_percent(atlas.share(in_blocks=in_blocks)) for in_blocks in (True, False))
    share = atlas.of_size()
    if share is None:
        of_size = "100 %" if atlas.share() else "0 %"
    else:
        of_size = f"{_percent(share)} ({architecture.size})"
    return f"| {' | '.join((title, *shares, of_size, _in_words(atlas)))} |"


def _in_words(atlas: Atlas) -> str:
    """Which weights of the blocks are on spheres, and in which groups."""
    parts = []
    for kind in KINDS:
        names = dict.fromkeys(
            leaf.name.rpartition("/")[2] if leaf.path.endswith("/kernel") else leaf.name
            for leaf in atlas.leaves
            if leaf.in_blocks and leaf.kind == kind
        )
        if names:
            share = f" ({_percent(atlas.share(kind))})" if kind == WITH_BIAS else ""
            parts.append(f"{', '.join(names)}: {kind}{share}")
    return "; ".join(parts) or "–"


def _margin(atlases: Iterable[Atlas]) -> list[str]:
    """How far from the tolerance the measured ratios are."""
    ratios = [
        (leaf.verdict, leaf.rescaling)
        for atlas in atlases
        for leaf in atlas.leaves
        if leaf.rescaling is not None
    ]
    on = [ratio for verdict, ratio in ratios if verdict == "invariant"]
    off = [ratio for verdict, ratio in ratios if verdict == "not invariant"]
    parts = [f"at most {max(on):.0e} where it is"] if on else []
    parts += [f"at least {min(off):.0e} where it is not"] if off else []
    return [f"* R/D, which decides on invariance at 1e-2: {', '.join(parts)}"] if parts else []


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# Told apart without colour too, by the hatching.
_STYLES: dict[str, dict[str, Any]] = {
    "per head": {"color": "#08306b"},
    "per filter": {"color": "#e6730b"},
    "per block of filters": {"facecolor": "#fdbe85", "edgecolor": "#e6730b", "hatch": "..."},
    "whole": {"facecolor": "#6baed6", "edgecolor": "white", "hatch": "//"},
    WITH_BIAS: {"facecolor": "white", "edgecolor": "#8a8a8a", "hatch": "xx"},
}


def draw(path: Path, atlases: Sequence[Atlas]) -> None:
    """Draw the shares of the blocks' weights, a bar for each architecture.

    Args:
      path: of the PNG file.
      atlases: at least one.
    """
    # Imported here, so that --help does not wait for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(8.5, 1.6 + 0.36 * len(atlases)), layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.set_title("Share of the blocks' weights on spheres")
    for y, atlas in enumerate(atlases):
        left = 0.0
        axes.barh(y, 100, height=0.7, color="#eeeeee")
        for kind, style in _STYLES.items():
            share = 100 * atlas.share(kind)
            if share:
                axes.barh(y, share, left=left, height=0.7, **style)
            left += share
        axes.text(101, y, _percent(atlas.share()), va="center")
    axes.set_yticks(range(len(atlases)), [ARCHITECTURES[atlas.model].title for atlas in atlases])
    axes.set_ylim(len(atlases) - 0.4, -0.6)
    axes.set_xlim(0, 109)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("share, %")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles = [Patch(label=kind, **style) for kind, style in _STYLES.items()]
    handles.append(Patch(label="on none", color="#eeeeee"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    FigureCanvasAgg(figure).print_png(path)
