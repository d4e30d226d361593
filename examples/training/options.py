"""The options that trainings share, and what of them can be checked before there is data."""

import argparse
import math
from typing import Any

from training.command import a_path, number, positive

MAX_SEEDS = 10_000


def add_seeds(parser: Any, of: str, order: str) -> None:
    """Add --seed and --seeds; `of` says what a seed decides, `order` in which they are trained."""
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help=f"of {of} (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds",
        type=seed_count,
        default=1,
        metavar="K",
        help=f"train K networks, with the seeds from --seed on, {order}; each has its files in "
        "DIR/seed-N (default: %(default)s)",
    )


def add_output(parser: Any, every: str) -> None:
    """Add --output, --resume, --tensorboard, --geometry; `every` names what gives a line."""
    add = parser.add_argument
    add(
        "--output",
        type=a_path,
        metavar="DIR",
        help="directory to make for arguments.json, metrics.jsonl, summary.json, curves.png and "
        "checkpoints (default: none, nothing is written)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --output from its last checkpoint; begin where there is none",
    )
    add(
        "--tensorboard",
        action="store_true",
        help="write TensorBoard's event files too, in DIR/tensorboard",
    )
    add(
        "--geometry",
        action="store_true",
        help=f"measure each step on the sphere, and write every {every}'s angle per step, "
        "turn per length of gradient, radius and more of each kernel to DIR/geometry.jsonl",
    )


def add_processes(parser: Any) -> None:
    """Add --coordinator, --num_processes and --process_id."""
    several = parser.add_argument_group(
        "several processes",
        "Each is started with the same arguments and uses its own devices; --output is one "
        "directory that all of them see.",
    )
    several.add_argument(
        "--coordinator",
        type=_coordinator,
        metavar="HOST:PORT",
        help="of process 0; 'auto' under SLURM, Open MPI, Kubernetes or on a TPU pod, which know "
        "all three (default: there is one process)",
    )
    several.add_argument(
        "--num_processes", type=positive, metavar="N", help="how many processes there are"
    )
    several.add_argument(
        "--process_id", type=from_zero, metavar="I", help="which one this is, from 0"
    )


def check(parser: Any, args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if args.seed + args.seeds > 2**32:
        parser.error(f"--seeds {args.seeds} from --seed {args.seed} goes beyond {2**32 - 1}")
    for name in ("resume", "tensorboard", "geometry"):
        if getattr(args, name) and args.output is None:
            parser.error(f"--{name} needs --output")
    given = [args.num_processes is not None, args.process_id is not None]
    if any(given) and (args.coordinator in (None, "auto")):
        parser.error("--num_processes and --process_id need --coordinator HOST:PORT")
    if args.coordinator not in (None, "auto"):
        if not all(given):
            parser.error("--coordinator HOST:PORT needs --num_processes and --process_id")
        if args.process_id >= args.num_processes:
            parser.error(f"--process_id {args.process_id} is not below {args.num_processes}")


def rate(text: str) -> float:
    """A learning rate or a decay."""
    return number(text, float, lambda value: 0 <= value < math.inf, "a finite number from 0")


def _coordinator(text: str) -> str:
    host, _, port = text.rpartition(":")
    if text == "auto" or (host and port.isdecimal() and 0 < int(port) < 2**16):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither HOST:PORT, with a port from 1 to 65535, nor auto"
    )


def from_zero(text: str) -> int:
    """An integer from 0."""
    return number(text, int, lambda value: value >= 0, "an integer from 0")


def seed_count(text: str) -> int:
    """A number of seeds."""
    return number(
        text, int, lambda value: 1 <= value <= MAX_SEEDS, f"an integer from 1 to {MAX_SEEDS}"
    )


def _seed(text: str) -> int:
    return number(text, int, lambda value: 0 <= value < 2**32, "an integer from 0 to 4294967295")
