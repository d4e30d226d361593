"""Train a small language model on bytes of text, with the weights of its blocks on spheres."""

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

from language import recipes
from training import ending, options
from training.command import Refused, a_path, choice, make_parser, positive
from training.signals import StopSignals

EXAMPLES = """\
examples:
  python examples/train_lm.py --optimizer muon_h --output runs/muon_h
  python examples/train_lm.py --architecture gemma3 --optimizer adam_srt --show_selection
  python examples/train_lm.py --text books/ notes.txt --steps 2000 --eval_every 100 --width 256
  python examples/train_lm.py --mesh data=2,fsdp=4 --precision bfloat16 --output runs/lm --resume
"""
MAX_STEPS = 2**31 - 1  # what an optimizer's int32 counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns its exit code: 0, 1 (a run failed), 2 (refused), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    parser = _parser()
    args = parser.parse_args(argv)
    options.check(parser, args)
    _check(parser, args)
    return ending.training_outcome(parser.prog, args, _train)


def _train(args: argparse.Namespace, signals: StopSignals) -> int:
    # Imported here, so that --help and a refusal do not wait for JAX.
    with signals.held():
        import jax
        from flax import nnx

        import spherical_optax as so
        from language import figures, models, programs, text
        from training import environment, outputs, runs
        from training.display import say

        if args.tensorboard:  # else a refusal would come after files
            import tensorboardX  # noqa: F401

    devices = environment.devices()
    mesh = programs.make_mesh(devices, _mesh_shape(args.mesh, len(devices)))
    content = text.load(args.text)
    for name, part in (("training", content.train), ("validation", content.valid)):
        if len(part) <= args.context:
            raise Refused(f"the {len(part)} bytes for {name} hold no window of --context + 1")
    groups = runs.seeds_at_once(args.seed, args.seeds, convolutions=False)
    style = _style(args)
    arguments = _arguments(args, style, content) | {"seeds_at_once": len(groups[0])}
    if outputs.is_done(args.output, arguments, resume=args.resume):
        return 0

    size = models.Size(text.VOCABULARY, args.width, args.depth, args.heads)
    unroll = jax.default_backend() == "cpu" if args.unroll is None else args.unroll

    def make_model(rngs: nnx.Rngs) -> models.Decoder:
        return models.Decoder(size, style, unroll=unroll, dtype=args.precision, rngs=rngs)

    if args.show_selection:
        _show_selection(args, make_model(nnx.Rngs(args.seed)), content)
        return 0
    with outputs.claimed(args.output, arguments):
        make_schedule = partial(
            recipes.make_schedule, args.schedule, steps=args.steps, warmup=arguments["warmup_steps"]
        )
        schedule = make_schedule(peak=arguments["learning_rate"])
        tx = recipes.make_optimizer(
            args.optimizer,
            style,
            learning_rate=schedule,
            adam_learning_rate=make_schedule(peak=args.adam_learning_rate),
            weight_decay=arguments["weight_decay"],
            clip=args.clip,
        )
        if args.geometry:
            tx = so.with_geometry(tx, channel_axes=recipes.kernels(), keep=recipes.layers)
        shape = (args.batch_size, args.context)

        def begin(seeds: Sequence[int]) -> runs.Begun:
            graphdef, keys, run = programs.start_run(make_model, tx, seeds, mesh)
            compile_trainer = partial(
                programs.compile_trainer, graphdef, tx, content, keys, shape=shape, mesh=mesh
            )
            return runs.Begun(keys, run, partial(compile_trainer, steps=args.eval_every))

        def draw(path: Path, seed: int, history: Any, result: Any) -> None:
            title = f"{args.architecture} with {args.optimizer}, seed {seed}"
            figures.draw_curves(path, history, result, title=title, schedule=schedule)

        job = runs.Job(
            arguments=arguments,
            output=args.output,
            resume=args.resume,
            tensorboard=args.tensorboard,
            task=figures.task(schedule),
            data={},
            epochs=args.steps // args.eval_every,
            steps=args.eval_every,
            items=args.eval_every * args.batch_size * args.context,
            batch_size=args.batch_size * args.context,
            begin=begin,
            draw=draw,
            git_revision=environment.find_git_revision(),
            signals=signals,
        )
        _say_what(args, arguments, content, mesh, make_model)
        if len(groups) > 1:
            say("One seed after another.")
        return 0 if runs.train(job, groups) else 1


def _say_what(
    args: argparse.Namespace, arguments: dict[str, Any], content: Any, mesh: Any, make_model: Any
) -> None:
    import jax
    from flax import nnx

    from training.display import say

    model = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    if args.batch_size % mesh.size:
        say(
            f"The {mesh.size} devices do not divide --batch_size {args.batch_size}: "
            "each of them computes every batch whole."
        )
    devices = f"{mesh.size} x " if mesh.size > 1 else ""
    files = "{} and {}".format(*content.files)
    say(
        f"{args.architecture} of {count:,} parameters with {args.optimizer}: learning rate "
        f"{arguments['learning_rate']:g} of the kernels in blocks, {args.adam_learning_rate:g} of "
        f"the rest; {len(content.train):,} and {len(content.valid):,} bytes of {files} files for "
        f"training and validation, on {devices}{jax.devices()[0].device_kind}."
    )


def _show_selection(args: argparse.Namespace, model: Any, content: Any) -> None:
    """Print which weights an optimizer has on spheres, and which are radially invariant."""
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import spherical_optax as so
    from language import text

    style = _style(args)
    graphdef, params = nnx.split(model, nnx.Param)
    windows = text.spread_windows(content.train, 4, min(args.context, 32) + 1)

    def loss(params: nnx.State, tokens: Any) -> Any:
        logits = nnx.merge(graphdef, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    print(f"On spheres with {args.optimizer}:")
    print(so.describe(params, recipes.spheres(args.optimizer, style)))
    print("\nRadially invariant, as measured:", flush=True)
    print(so.describe(params, so.find_invariant_groups(loss, params, jnp.int32(windows))))


def _arguments(
    args: argparse.Namespace, style: recipes.Architecture, content: Any
) -> dict[str, Any]:
    """The arguments that decide the outcome, with the values that are used."""
    recipe, rate, decay = recipes.RECIPES[args.optimizer], args.learning_rate, args.weight_decay
    warmup = args.steps // 10 if args.warmup_steps is None else args.warmup_steps
    return {
        "text": " ".join(map(str, args.text)) or "standard library",
        "text_sha256": content.sha256,
        "architecture": args.architecture,
        "activation": style.activation,
        "qk_norm": style.qk_norm,
        "width": args.width,
        "depth": args.depth,
        "heads": args.heads,
        "context": args.context,
        "batch_size": args.batch_size,
        "optimizer": args.optimizer,
        "steps": args.steps,
        "eval_every": args.eval_every,
        "learning_rate": recipe.learning_rate if rate is None else rate,
        "adam_learning_rate": args.adam_learning_rate,
        "weight_decay": (recipe.weight_decay or 0.0) if decay is None else decay,
        "warmup_steps": warmup,
        "schedule": args.schedule,
        "clip": args.clip,
        "precision": args.precision,
        "geometry": args.geometry,
        "seed": args.seed,
        "seeds": args.seeds,
    }


def _style(args: argparse.Namespace) -> recipes.Architecture:
    style = recipes.ARCHITECTURES[args.architecture]
    if args.activation:
        style = style._replace(activation=args.activation)
    if args.qk_norm is False:
        return style._replace(qk_norm="none")
    if args.qk_norm and style.qk_norm == "none":
        return style._replace(qk_norm="head")
    return style


def _mesh_shape(given: dict[str, int] | None, devices: int) -> tuple[int, int]:
    shape = (given or {}).get("data"), (given or {}).get("fsdp")
    data, fsdp = shape
    data = max(devices // (fsdp or 1), 1) if data is None else data
    fsdp = max(devices // data, 1) if fsdp is None and data else fsdp or 1
    if data * fsdp != devices:
        raise Refused(f"--mesh data={data},fsdp={fsdp} is for {data * fsdp} devices, not {devices}")
    return data, fsdp


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if args.steps % args.eval_every:
        parser.error(f"--eval_every {args.eval_every} does not divide --steps {args.steps}")
    if args.steps > MAX_STEPS:
        parser.error(f"--steps {args.steps} is above {MAX_STEPS}")
    if args.width % (2 * args.heads):
        parser.error(f"--width {args.width} is no even multiple of --heads {args.heads}")
    if args.warmup_steps is not None and args.warmup_steps >= args.steps:
        parser.error(f"--warmup_steps {args.warmup_steps} is not below --steps {args.steps}")
    if args.weight_decay and recipes.RECIPES[args.optimizer].weight_decay is None:
        parser.error(f"--weight_decay: {args.optimizer} keeps the radius of what would decay")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("train_lm.py", "[options]", __doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--text",
        type=a_path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="files and directories of text, a tenth of the files for validation (default: the "
        "sources of Python's standard library)",
    )
    add(
        "--architecture",
        **choice(recipes.ARCHITECTURES),
        default="qwen3",
        help="where norms stand, and so what is radially invariant (default: %(default)s)",
    )
    add("--activation", **choice(recipes.ACTIVATIONS), help="default: the architecture's")
    add(
        "--qk_norm",
        action=argparse.BooleanOptionalAction,
        help="normalise queries and keys (default: as the architecture does)",
    )
    for name, default, what in (
        ("width", 128, "features between blocks"),
        ("depth", 4, "blocks"),
        ("heads", 4, "of attention"),
        ("context", 128, "bytes that a window predicts"),
        ("batch_size", 16, "windows in a step"),
        ("steps", 300, "of training"),
        ("eval_every", 50, "steps between evaluations; divides --steps"),
    ):
        add(
            f"--{name}",
            type=positive,
            default=default,
            metavar="N",
            help=f"{what} (default: %(default)s)",
        )
    add("--optimizer", **choice(recipes.OPTIMIZERS), default="adam_h", help="default: %(default)s")
    add(
        "--learning_rate",
        type=options.rate,
        metavar="X",
        help="the largest one, of the kernels in blocks that the optimizer takes "
        "(default: the recipe's)",
    )
    add(
        "--adam_learning_rate",
        type=options.rate,
        default=recipes.ADAM_LEARNING_RATE,
        metavar="X",
        help="of all other weights, which take AdamW (default: %(default)s)",
    )
    add(
        "--weight_decay",
        type=options.rate,
        metavar="X",
        help="decoupled, of the kernels in blocks that are on no sphere (default: the recipe's)",
    )
    add(
        "--warmup_steps",
        type=options.from_zero,
        metavar="N",
        help="while the learning rates rise (default: a tenth of --steps)",
    )
    add(
        "--schedule",
        **choice(recipes.SCHEDULES),
        default="cosine",
        help="how the learning rates fall to zero (default: %(default)s)",
    )
    add(
        "--clip",
        type=options.rate,
        default=1.0,
        metavar="X",
        help="largest norm of all gradients together (default: %(default)s)",
    )
    add(
        "--precision",
        **choice(("float32", "bfloat16")),
        default="float32",
        help="of activations; parameters, optimizer state and loss are float32 "
        "(default: %(default)s)",
    )
    add(
        "--unroll",
        action=argparse.BooleanOptionalAction,
        help="compile the blocks one by one and not as a loop (default: on a CPU)",
    )
    options.add_seeds(parser, "initial weights and windows", "at once (on a CPU one after another)")
    add(
        "--mesh",
        type=_mesh,
        metavar="data=N,fsdp=M",
        help="devices that share out each batch, times those that also share out the parameters "
        "(default: all for data)",
    )
    add(
        "--show_selection",
        action="store_true",
        help="print what the optimizer has on spheres and what is radially invariant, and end",
    )
    options.add_output(parser, "evaluation")
    options.add_processes(parser)
    return parser


def _mesh(text: str) -> dict[str, int]:
    shape = {}
    for part in text.split(","):
        name, equals, size = part.partition("=")
        if name not in ("data", "fsdp") or name in shape or not equals or not size.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is not data=N,fsdp=M")
        shape[name] = positive(size)
    return shape


if __name__ == "__main__":
    ending.leave(main())
