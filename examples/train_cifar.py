"""Train a ResNet or VGG on 32x32 images with one of the paper's optimizers."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cifar import recipes

if TYPE_CHECKING:
    from cifar import training

EXAMPLES = """\
examples:
  python examples/train_cifar.py --dataset digits --epochs 10 --batch_size 32
  python examples/train_cifar.py --dataset cifar100 --model resnet18 --output runs/adamsrt
  python examples/train_cifar.py --dataset folder:images.tar.xz --optimizer sgdmrt --epochs 20
"""
MAX_STEPS = 2**31 - 1  # what an optimizer's int32 counts
METRICS = "metrics.jsonl"


class _Refused(Exception):
    """The run cannot start; the message says why."""


class _Stopped(Exception):
    """The run cannot go on; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 (failed), 2 (refused) or 130 (interrupted)."""
    args = _parser().parse_args(argv)
    history: list[training.Metrics] = []  # of the epochs that are finished
    try:
        _check_output(args.output)
        with _interruptible() as check_interrupt:
            return _run(args, history, check_interrupt)
    except _Refused as error:
        return _end(2, f"error: {error}")
    except ModuleNotFoundError as error:
        return _end(2, f"error: {error}; install it with: pip install -e '.[examples]'")
    except _Stopped as error:
        return _end(1, f"stopped: {error}; {_kept(args.output, len(history))}")
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _end(1, f"error: {error}; {_kept(args.output, len(history))}")
    except KeyboardInterrupt:
        return _end(130, f"interrupted; {_kept(args.output, len(history))}")


def _end(code: int, message: str) -> int:
    print(f"train_cifar.py: {message}", file=sys.stderr)
    return code


def _kept(output: Path | None, finished: int) -> str:
    if not finished:
        return "no epoch was finished"
    epochs = "epoch 1" if finished == 1 else f"epochs 1 to {finished}"
    if output is None:
        return f"{epochs} finished, and nothing is kept without --output"
    return f"the metrics of {epochs} are kept in {output / METRICS}"


@contextmanager
def _interruptible() -> Generator[Callable[[], None], None, None]:
    """Makes Ctrl-C raise KeyboardInterrupt, and yields a check that raises it if that got lost.

    It gets lost where Python runs inside a callback of compiled code, which cannot raise.
    """
    interrupted = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    def check() -> None:
        if interrupted:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)


def _run(
    args: argparse.Namespace,
    history: list[training.Metrics],
    check_interrupt: Callable[[], None],
) -> int:
    # Imported here, so that --help and a refusal do not wait for JAX.
    import jax
    from flax import nnx
    from tqdm import tqdm

    from cifar import data, models, report, training

    try:
        images = data.load(args.dataset, data_dir=args.data_dir, seed=args.seed)
    except data.DataError as error:
        raise _Refused(str(error)) from error
    count = len(images.train.labels)
    if args.batch_size > count:
        raise _Refused(f"--batch_size {args.batch_size} is above the {count} training images")
    steps = training.steps_per_epoch(count, args.batch_size)
    if args.epochs * steps > MAX_STEPS:
        raise _Refused(f"--epochs {args.epochs} is above {MAX_STEPS // steps}, the most that fit")
    if args.output:
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _Refused(f"cannot create {args.output}: {error.strerror}") from error

    recipe, exact = recipes.recipe(args.dataset, args.model, args.optimizer)
    if not exact:
        print(
            f"{args.dataset} with {args.model} has no recipe of its own: "
            f"taking cifar10's with {args.model}."
        )
    # The arguments are recorded with the values that are used.
    if args.learning_rate is None:
        args.learning_rate = recipe.learning_rate
    if args.weight_decay is None:
        args.weight_decay = recipe.weight_decay
    milestones = recipes.milestones(args.epochs, steps)
    schedule = recipes.step_schedule(args.learning_rate, milestones)
    tx = recipes.make_optimizer(
        args.optimizer, recipe._replace(weight_decay=args.weight_decay), schedule
    )
    print(
        f"{args.model} on {args.dataset} with {args.optimizer}: "
        f"learning rate {args.learning_rate:g}, weight decay {args.weight_decay:g}, "
        f"{count} training images, {steps} steps an epoch, on {jax.devices()[0].device_kind}.",
        flush=True,
    )

    start = time.perf_counter()
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=count, desc="compiling", unit="img", leave=False, disable=None) as bar:

        def on_batch(seen: int, loss: float, accuracy: float) -> None:
            check_interrupt()
            if seen == 0:
                bar.reset()
                bar.set_description(f"epoch {len(history) + 1}/{args.epochs}")
            else:
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
                bar.update(seen - bar.n)

        def on_epoch(metrics: training.Metrics) -> None:
            if args.output:
                report.append_metrics(args.output / METRICS, metrics)
            history.append(metrics)
            bar.write(
                f"epoch {metrics.epoch}/{args.epochs}: "
                f"train {metrics.train_accuracy:.2%} (loss {metrics.train_loss:.4f}), "
                f"validation {metrics.valid_accuracy:.2%} (loss {metrics.valid_loss:.4f}), "
                f"{metrics.images_per_second:.0f} images/s"
            )
            sys.stdout.flush()

        model = models.MODELS[args.model](len(images.classes), rngs=nnx.Rngs(args.seed))
        try:
            result = training.fit(
                model,
                tx,
                images,
                schedule=schedule,
                epochs=args.epochs,
                batch_size=args.batch_size,
                seed=args.seed,
                on_batch=on_batch,
                on_epoch=on_epoch,
            )
        except training.NonFiniteLoss as error:
            raise _Stopped(f"{error}: lower --learning_rate ({args.learning_rate:g})") from error
    seconds = time.perf_counter() - start

    if args.output:
        arguments = {**vars(args), "output": str(args.output)}
        report.write_summary(args.output / "summary.json", arguments, result, seconds)
        report.draw_curves(
            args.output / "curves.png",
            history,
            result,
            title=f"{args.model} on {args.dataset} with {args.optimizer}, seed {args.seed}",
            schedule=schedule,
            milestones=milestones,
            steps_per_epoch=steps,
        )
    print(
        f"Test accuracy {result.test_accuracy:.2%} (loss {result.test_loss:.4f}) with epoch "
        f"{result.best_epoch}, the best in validation; {seconds:.0f} s.",
        flush=True,
    )
    return 0


def _check_output(output: Path | None) -> None:
    """Refuse an output directory that cannot be written or is taken, without touching anything."""
    if output is None:
        return
    if os.path.lexists(output / METRICS):
        raise _Refused(f"{output} already holds a run: name another --output, or move it away")
    existing = next(p for p in (output, *output.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise _Refused(f"cannot write to {output}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _Refused(f"cannot write to {output}: no permission to write in {existing}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_cifar.py",
        usage="%(prog)s [options]",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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
        type=_positive,
        default=recipes.EPOCHS,
        metavar="N",
        help="the learning rate falls to a tenth after 1/3, 5/9 and 7/9 of them "
        "(default: %(default)s)",
    )
    add(
        "--batch_size",
        type=_positive,
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
        "--data_dir",
        default="~/tensorflow_datasets",
        metavar="DIR",
        help="where TFDS keeps its data sets (default: %(default)s)",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"directory to make for {METRICS}, summary.json and curves.png "
        "(default: none, nothing is written)",
    )
    return parser


def _dataset(text: str) -> str:
    if text in recipes.DATASETS or text.removeprefix("folder:") not in ("", text):
        return text
    raise argparse.ArgumentTypeError(
        f"unknown data set {text!r} (choose from {', '.join(recipes.DATASETS)}, folder:PATH)"
    )


def _positive(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "an integer from 1")


def _seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**32, "an integer from 0 to 4294967295")


def _rate(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < math.inf, "a finite number from 0")


def _number(text: str, kind: type, allowed: Callable[[float], bool], wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


if __name__ == "__main__":
    sys.exit(main())
