"""Measure which weights of today's architectures are on spheres, on small networks.

Networks that are there already are skipped: after an interruption the same command goes on.
"""

# JAX is imported only inside the functions that need it, so that --help and --report do not wait
# for it.

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until `main` handles it, Ctrl-C ends the command at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import atlas_lines
import atlas_report
import run_lines
from atlas_lines import LINES, MODELS, Atlas, Leaf
from benchmark_command import make_directory, outcome, report, tell, warn_of
from training.command import a_path, make_parser, one_of, several
from training.ending import leave
from training.signals import StopSignals

if TYPE_CHECKING:
    import jax
    import optax
    from flax import nnx

EXAMPLES = """\
examples:
  python benchmarks/atlas.py
  python benchmarks/atlas.py --models qwen3,gemma3
  python benchmarks/atlas.py --report --output benchmarks/results/atlas
"""
NAME = "atlas.py"
PACKAGES = ("python", "jax", "flax", "optax")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    It is 0 (all is measured), 1 (something failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    args = _parser().parse_args(argv)
    command = partial(_report if args.report else _run, args)
    return outcome(NAME, args.output, command, LINES)


def measure(model: str) -> tuple[Leaf, ...]:
    """What `find_invariant_groups` says of each array of one of `MODELS`."""
    import jax
    from flax import nnx

    import atlas_blocks
    import atlas_images

    networks = atlas_blocks if model in atlas_blocks.NETWORKS else atlas_images
    network = networks.NETWORKS[model](nnx.Rngs(0))
    return measure_network(network, networks.batch(jax.random.key(0)))


def measure_network(network: nnx.Module, batch: tuple[jax.Array, jax.Array]) -> tuple[Leaf, ...]:
    """What `find_invariant_groups` says of each array of a network.

    Args:
      network: a function of inputs that returns logits.
      batch: inputs and labels.
    """
    import jax
    import optax
    from flax import nnx

    import spherical_optax as so

    graphdef, params, stats = nnx.split(network, nnx.Param, ...)

    def loss(params: optax.Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        inputs, labels = batch
        logits = nnx.merge(graphdef, params, stats, copy=True)(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    found = so.find_invariant_groups(loss, params, batch)
    leaves = []
    for evidence, array in zip(found.leaves, jax.tree.leaves(params), strict=True):
        path, axes, verdict, radial, rescaling, _, with_bias = evidence
        groups = None if axes is None else so.group_norm(array, channel_axes=axes).size
        text = None if axes is None else repr(axes)
        figures = _rounded(radial), _rounded(rescaling)
        leaves.append(
            Leaf(path, array.shape, array.size, text, groups, verdict, *figures, with_bias)
        )
    return tuple(leaves)


def _rounded(figure: float | None) -> float | None:
    return None if figure is None else float(f"{figure:.2e}")


def _run(args: argparse.Namespace, signals: StopSignals) -> int:
    output: Path = args.output
    make_directory(output)
    with signals.held():
        from tqdm import tqdm

        import atlas_blocks  # noqa: F401  (for `measure`)
        from training.environment import device_name, find_git_revision, versions

    device, revision = device_name(), find_git_revision()
    packages = {name: version for name, version in versions().items() if name in PACKAGES}
    recorded = [atlas[:3] for atlas in _load(output, warn=True)]
    missing = [model for model in args.models if (model, device, packages) not in recorded]

    failures = []
    bar = tqdm(missing, unit="network", disable=None)
    for model in bar:
        signals.check()
        bar.set_description(model)
        try:
            atlas = Atlas(model, device, packages, revision, measure(model))
        except RuntimeError as error:  # of the device, such as too little memory
            reason = str(error).partition("\n")[0]
            failures.append(f"{model}: {reason}")
        else:
            run_lines.append(output / LINES, atlas_lines.to_lines(atlas))

    atlases = _load(output)
    where = _write(output, atlases) if atlases else "no table"
    for failure in failures:
        tell(NAME, f"failed: {failure}")
    there = len(args.models) - len(missing)
    print(f"{len(missing) - len(failures)} measured, {there} there; {where}")
    return 1 if failures else 0


def _load(output: Path, *, warn: bool = False) -> list[Atlas]:
    atlases, broken = atlas_lines.load(output / LINES)
    if warn:
        warn_of(broken, NAME, output, "array", LINES)
    return atlases


def _report(args: argparse.Namespace, signals: StopSignals) -> int:
    output: Path = args.output
    atlases = _load(output, warn=True)
    where = _write(output, atlases)
    print(f"{len(atlas_lines.latest(atlases))} there; {where}")
    return 0


def _write(output: Path, atlases: list[Atlas]) -> str:
    return report(
        output, atlas_lines.latest(atlases), "whole network", atlas_report.write_report, LINES
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(NAME, "[options]", __doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--models",
        type=partial(several, partial(one_of, MODELS)),
        default=MODELS,
        metavar="NAMES",
        help=f"of {','.join(MODELS)} (default: all)",
    )
    add(
        "--output",
        type=a_path,
        default=Path("runs/atlas"),
        metavar="DIR",
        help=f"directory for {LINES}, table.md and table.png (default: %(default)s)",
    )
    add(
        "--report",
        action="store_true",
        help=f"measure nothing: make table.md and table.png again from {LINES} of --output, "
        "whatever the other options say",
    )
    return parser


if __name__ == "__main__":
    leave(main())
