"""Train a ResNet or VGG on 32x32 images with one of the paper's optimizers."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from images import recipes
from training.command import make_parser, number, positive
from training.signals import Stopped, StopSignals, stop_signals

EXAMPLES = """\
examples:
  python examples/train_cifar.py --dataset digits --epochs 10 --batch_size 32
  python examples/train_cifar.py --dataset cifar100 --model resnet18 --output runs/adamsrt --resume
  python examples/train_cifar.py --dataset folder:images.tar.xz --optimizer sgdmrt --seeds 3
  python examples/train_cifar.py --epochs 30 --optimizer adam --geometry --output runs/adam
  python examples/train_cifar.py --coordinator 10.0.0.1:1234 --num_processes 2 --process_id 0
"""
MAX_STEPS = 2**31 - 1  # what an optimizer's int32 counts


class _Refused(Exception):
    """The run cannot start; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns its exit code: 0, 1 (a run failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    args = _parse(argv)
    code, alone = _outcome(args)
    if alone and args.coordinator:
        # At its end, Python would wait for the other processes, which wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _outcome(args: argparse.Namespace) -> tuple[int, bool]:
    """The exit code, and whether it is this process's alone if there are several."""
    try:
        with stop_signals() as signals:
            return _run(args, signals), False
    except _Refused as error:
        return _end(2, f"error: {error}"), True
    except ModuleNotFoundError as error:
        return _end(2, f"error: {error}; install it with: pip install -e '.[examples]'"), True
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, True
    except OSError as error:
        return _end(1, f"error: {error}"), True
    except Stopped as stopped:
        how = "interrupted" if stopped.signum == signal.SIGINT else "terminated"
        return _end(128 + stopped.signum, f"{how}; {_how_to_go_on(args.output)}"), stopped.at_once


def _end(code: int, message: str) -> int:
    print(f"train_cifar.py: {message}", file=sys.stderr)
    return code


def _how_to_go_on(output: Path | None) -> str:
    if output is None:
        return "nothing is kept without --output"
    if not output.exists():
        return "nothing was begun"
    return f"--resume goes on with what is in {output}"


def _run(args: argparse.Namespace, signals: StopSignals) -> int:
    # Imported here, so that --help and a refusal do not wait for JAX.
    from images import data
    from training import processes, runs

    try:
        if args.coordinator:
            processes.join(args.coordinator, args.num_processes, args.process_id)
            with signals.defer():  # to a step that all processes agree on
                return _train(args, signals)
        return _train(args, signals)
    except (data.DataError, processes.JoinError, runs.OutputError) as error:
        raise _Refused(str(error)) from error


def _train(args: argparse.Namespace, signals: StopSignals) -> int:
    import jax
    from flax import nnx

    import spherical_optax as so
    from images import data, models, programs
    from training import processes, records, runs

    recipe, exact = recipes.recipe(args.dataset, args.model, args.optimizer)
    groups = _groups(args)
    arguments = _arguments(args, recipe) | {"seeds_at_once": len(groups[0])}
    rate, decay = arguments["learning_rate"], arguments["weight_decay"]
    if args.output:
        if processes.leads():
            runs.check_output(args.output, arguments, resume=args.resume)
        if all(map(runs.is_finished, runs.run_directories(args.output, arguments).values())):
            runs.say(f"{args.output} is finished.")
            return 0

    images = processes.in_turn(lambda: data.load(args.dataset, data_dir=args.data_dir))
    count = len(data.validation_split(len(images.train.labels), args.seed)[0])
    if args.batch_size > count:
        raise _Refused(f"--batch_size {args.batch_size} is above the {count} training images")
    steps = programs.steps_per_epoch(count, args.batch_size)
    if args.epochs * steps > MAX_STEPS:
        raise _Refused(f"--epochs {args.epochs} is above {MAX_STEPS // steps}, the most that fit")
    lock = None  # held as long as this is referenced
    if args.output and processes.leads():
        lock = runs.claim_output(args.output, arguments)

    def make_model(seed: int) -> nnx.Module:
        make = models.MODELS[args.model]
        return make(len(images.classes), dtype=args.precision, rngs=nnx.Rngs(seed))

    milestones = recipes.milestones(args.epochs, steps)
    schedule = recipes.step_schedule(rate, milestones)
    tx = recipes.make_optimizer(args.optimizer, recipe._replace(weight_decay=decay), schedule)
    job = runs.Job(
        arguments=arguments,
        output=args.output,
        resume=args.resume,
        tensorboard=args.tensorboard,
        images=images,
        make_model=make_model,
        tx=so.with_geometry(tx, channel_axes=recipes.spheres()) if args.geometry else tx,
        schedule=schedule,
        milestones=milestones,
        steps_per_epoch=steps,
        mesh=programs.make_mesh(jax.devices()),
        git_revision=records.find_git_revision(),
        signals=signals,
    )
    if not exact:
        runs.say(
            f"{args.dataset} with {args.model} has no recipe of its own: "
            f"taking cifar10's with {args.model}."
        )
    devices = f"{job.mesh.size} x " if job.mesh.size > 1 else ""
    if args.batch_size % job.mesh.size:
        runs.say(
            f"The {job.mesh.size} devices do not divide --batch_size {args.batch_size}: "
            "each of them computes every batch whole."
        )
    runs.say(
        f"{args.model} on {args.dataset} with {args.optimizer}: "
        f"learning rate {rate:g}, weight decay {decay:g}, {count} training images, "
        f"{steps} steps an epoch, on {devices}{jax.devices()[0].device_kind}."
    )
    if len(groups) > 1:
        runs.say("One seed after another: on a CPU that is faster than several at once.")
    try:
        return 0 if runs.train(job, groups) else 1
    finally:
        if lock:
            lock.close()


def _arguments(args: argparse.Namespace, recipe: recipes.Recipe) -> dict[str, Any]:
    """The arguments that decide the outcome, with the values that are used."""
    rate, decay = args.learning_rate, args.weight_decay
    return {
        "dataset": args.dataset,
        "model": args.model,
        "optimizer": args.optimizer,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "learning_rate": recipe.learning_rate if rate is None else rate,
        "weight_decay": recipe.weight_decay if decay is None else decay,
        "precision": args.precision,
        "geometry": args.geometry,
        "seed": args.seed,
        "seeds": args.seeds,
    }


def _groups(args: argparse.Namespace) -> list[list[int]]:
    """The seeds that are trained at once."""
    import jax

    seeds = list(range(args.seed, args.seed + args.seeds))
    return [seeds] if jax.default_backend() != "cpu" else [[seed] for seed in seeds]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as they can be without the data."""
    parser = _parser()
    args = parser.parse_args(argv)
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
    return args


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("train_cifar.py", "[options]", __doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--dataset",
        "--dataloader",
        type=_dataset,
        default="digits",
        metavar="NAME",
        help=f"{', '.join(recipes.DATASETS)}, or folder:PATH, where PATH is a directory, .zip or "
        ".tar[.xz] with train/CLASS/* and test/CLASS/* images (default: %(default)s)",
    )
    add("--model", choices=recipes.MODELS, default="resnet20", help="default: %(default)s")
    add("--optimizer", choices=recipes.OPTIMIZERS, default="adamsrt", help="default: %(default)s")
    add(
        "--epochs",
        type=positive,
        default=recipes.EPOCHS,
        metavar="N",
        help="the learning rate falls to a tenth after 1/3, 5/9 and 7/9 of them "
        "(default: %(default)s)",
    )
    add(
        "--batch_size",
        type=positive,
        default=recipes.BATCH_SIZE,
        metavar="N",
        help="images in a step (default: %(default)s)",
    )
    add("--learning_rate", type=_rate, metavar="X", help="at the start (default: the recipe's)")
    add("--weight_decay", type=_rate, metavar="X", help="default: the recipe's")
    add(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of validation split, initial weights, order and augmentation (default: %(default)s)",
    )
    add(
        "--seeds",
        type=positive,
        default=1,
        metavar="K",
        help="train K networks, with the seeds from --seed on, at once (on a CPU one after "
        "another); each has its files in DIR/seed-N (default: %(default)s)",
    )
    add(
        "--precision",
        choices=recipes.PRECISIONS,
        default="float32",
        help="of activations and convolutions; parameters, statistics, optimizer state and loss "
        "are float32 (default: %(default)s)",
    )
    add(
        "--data_dir",
        default="~/tensorflow_datasets",
        metavar="DIR",
        help="where TFDS keeps its data sets (default: %(default)s)",
    )
    add(
        "--output",
        type=Path,
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
        help="measure each step on the sphere, and write every epoch's angle per step, effective "
        "learning rate, radius and more of each kernel to DIR/geometry.jsonl",
    )
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
    several.add_argument("--process_id", type=_index, metavar="I", help="which one this is, from 0")
    return parser


def _dataset(text: str) -> str:
    if text in recipes.DATASETS or text.removeprefix("folder:") not in ("", text):
        return text
    raise argparse.ArgumentTypeError(
        f"unknown data set {text!r} (choose from {', '.join(recipes.DATASETS)}, folder:PATH)"
    )


def _coordinator(text: str) -> str:
    host, _, port = text.rpartition(":")
    if text == "auto" or (host and port.isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither HOST:PORT nor auto")


def _index(text: str) -> int:
    return number(text, int, lambda value: value >= 0, "an integer from 0")


def _seed(text: str) -> int:
    return number(text, int, lambda value: 0 <= value < 2**32, "an integer from 0 to 4294967295")


def _rate(text: str) -> float:
    return number(text, float, lambda value: 0 <= value < math.inf, "a finite number from 0")


if __name__ == "__main__":
    sys.exit(main())
