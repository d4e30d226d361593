"""Train a ResNet or VGG on 32x32 images with one of the paper's optimizers."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until `main` handles it, Ctrl-C ends the command at once, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from images import recipes
from training import ending, options
from training.command import Refused, a_path, choice, data_set, make_parser, positive
from training.signals import StopSignals

EXAMPLES = """\
examples:
  python examples/train_cifar.py --dataset digits --epochs 10 --batch_size 32
  python examples/train_cifar.py --dataset cifar100 --model resnet18 --output runs/adamsrt --resume
  python examples/train_cifar.py --dataset folder:images.tar.xz --optimizer sgdmrt --seeds 3
  python examples/train_cifar.py --epochs 30 --optimizer adam --geometry --output runs/adam
  python examples/train_cifar.py --coordinator 10.0.0.1:1234 --num_processes 2 --process_id 0
"""
MAX_STEPS = 2**31 - 1  # what an optimizer's int32 counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns its exit code: 0, 1 (a run failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    parser = _parser()
    args = parser.parse_args(argv)
    options.check(parser, args)
    return ending.training_outcome(parser.prog, args, _train)


def _train(args: argparse.Namespace, signals: StopSignals) -> int:
    # Imported here, so that --help and a refusal do not wait for JAX.
    with signals.held():
        from flax import nnx

        import spherical_optax as so
        from images import data, figures, models, programs
        from training import environment, outputs, processes, runs
        from training.display import say

        if args.tensorboard:  # else a refusal would come after files
            import tensorboardX  # noqa: F401

    devices = environment.devices()
    recipe, exact = recipes.recipe(args.dataset, args.model, args.optimizer)
    groups = runs.seeds_at_once(args.seed, args.seeds, convolutions=True)
    arguments = _arguments(args, recipe) | {"seeds_at_once": len(groups[0])}
    rate, decay = arguments["learning_rate"], arguments["weight_decay"]
    if outputs.is_done(args.output, arguments, resume=args.resume):
        return 0

    images = processes.in_turn(lambda: data.load(args.dataset, data_dir=args.data_dir))
    count = len(data.validation_split(len(images.train.labels), args.seed)[0])
    if args.batch_size > count:
        raise Refused(f"--batch_size {args.batch_size} is above the {count} training images")
    steps = programs.steps_per_epoch(count, args.batch_size)
    if args.epochs * steps > MAX_STEPS:
        raise Refused(f"--epochs {args.epochs} is above {MAX_STEPS // steps}, the most that fit")
    with outputs.claimed(args.output, arguments):
        milestones = recipes.milestones(args.epochs, steps)
        schedule = recipes.step_schedule(rate, milestones)
        tx = recipes.make_optimizer(args.optimizer, recipe._replace(weight_decay=decay), schedule)
        if args.geometry:
            tx = so.with_geometry(tx, channel_axes=recipes.spheres())
        mesh = programs.make_mesh(devices)

        def make_model(seed: int) -> nnx.Module:
            make = models.MODELS[args.model]
            return make(len(images.classes), dtype=args.precision, rngs=nnx.Rngs(seed))

        def begin(seeds: Sequence[int]) -> runs.Begun:
            total = len(images.train.labels)
            graphdef, of_seeds, run = programs.start_run(make_model, tx, seeds, total, mesh)
            compile_trainer = partial(
                programs.compile_trainer, graphdef, tx, images, of_seeds, batch_size=args.batch_size
            )
            return runs.Begun(of_seeds, run, partial(compile_trainer, mesh=mesh))

        def draw(path: Path, seed: int, history: Any, result: Any) -> None:
            figures.draw_curves(
                path,
                history,
                result,
                title=f"{args.model} on {args.dataset} with {args.optimizer}, seed {seed}",
                schedule=schedule,
                milestones=milestones,
                steps_per_epoch=steps,
            )

        job = runs.Job(
            arguments=arguments,
            output=args.output,
            resume=args.resume,
            tensorboard=args.tensorboard,
            task=figures.task(schedule),
            data={"images": len(images.train.labels)},
            epochs=args.epochs,
            steps=steps,
            items=count,
            batch_size=args.batch_size,
            begin=begin,
            draw=draw,
            git_revision=environment.find_git_revision(),
            signals=signals,
        )
        if not exact:
            say(
                f"{args.dataset} with {args.model} has no recipe of its own: "
                f"taking cifar10's with {args.model}."
            )
        several = f"{mesh.size} x " if mesh.size > 1 else ""
        if args.batch_size % mesh.size:
            say(
                f"The {mesh.size} devices do not divide --batch_size {args.batch_size}: "
                "each of them computes every batch whole."
            )
        say(
            f"{args.model} on {args.dataset} with {args.optimizer}: "
            f"learning rate {rate:g}, weight decay {decay:g}, {count} training images, "
            f"{steps} steps an epoch, on {several}{devices[0].device_kind}."
        )
        if len(groups) > 1:
            say("One seed after another.")
        return 0 if runs.train(job, groups) else 1


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


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("train_cifar.py", "[options]", __doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--dataset",
        "--dataloader",
        type=partial(data_set, recipes.DATASETS),
        default="digits",
        metavar="NAME",
        help=f"{', '.join(recipes.DATASETS)}, or folder:PATH, where PATH is a directory, .zip or "
        ".tar[.xz] with train/CLASS/* and test/CLASS/* images (default: %(default)s)",
    )
    add("--model", **choice(recipes.MODELS), default="resnet20", help="default: %(default)s")
    add("--optimizer", **choice(recipes.OPTIMIZERS), default="adamsrt", help="default: %(default)s")
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
    add(
        "--learning_rate",
        type=options.rate,
        metavar="X",
        help="at the start (default: the recipe's)",
    )
    add("--weight_decay", type=options.rate, metavar="X", help="default: the recipe's")
    options.add_seeds(
        parser, "validation split, initial weights, order and augmentation", "one after another"
    )
    add(
        "--precision",
        **choice(recipes.PRECISIONS),
        default="float32",
        help="of activations and convolutions; parameters, statistics, optimizer state and loss "
        "are float32 (default: %(default)s)",
    )
    add(
        "--data_dir",
        type=a_path,
        default="~/tensorflow_datasets",
        metavar="DIR",
        help="where TFDS keeps its data sets (default: %(default)s)",
    )
    options.add_output(parser, "epoch")
    options.add_processes(parser)
    return parser


if __name__ == "__main__":
    ending.leave(main())
