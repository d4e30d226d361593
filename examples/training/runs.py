"""A run's life: its directory, its checkpoints, and the way to its summary."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from images import programs
from images.data import DataSet
from training import checkpoints, loop, records
from training.display import epoch_line, progress_bar, say, seed_name
from training.processes import leads, make_stop
from training.signals import Stopped, StopSignals

ARGUMENTS, METRICS, SUMMARY = "arguments.json", "metrics.jsonl", "summary.json"
GEOMETRY = "geometry.jsonl"
CHECKPOINTS = "checkpoints"


class Job(NamedTuple):
    """What the runs of one command have in common."""

    arguments: dict[str, Any]  # that decide the outcome; `seed` is the first of `seeds`
    output: Path | None
    resume: bool
    tensorboard: bool
    images: DataSet
    make_model: Callable[[int], nnx.Module]  # with the initial weights of a seed
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    milestones: Sequence[int]
    steps_per_epoch: int
    mesh: Mesh
    git_revision: str | None  # of the code, when it was loaded
    signals: StopSignals


class OutputError(Exception):
    """The output directory cannot be used; the message says why."""


def check_output(output: Path, arguments: dict[str, Any], *, resume: bool) -> None:
    """Look whether a directory can be written, and is free or holds the same run to go on with.

    Touches nothing.

    Raises:
      OutputError: if not.
    """
    existing = next(p for p in (output, *output.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise OutputError(f"cannot write to {output}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {output}: no permission to write in {existing}")
    try:
        found = json.loads((output / ARGUMENTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = (METRICS, SUMMARY, CHECKPOINTS)
        if any(map(os.path.lexists, [*map(output.joinpath, names), *output.glob("seed-*")])):
            raise OutputError(f"{output} holds files of a run that did not begin there") from None
        return
    except ValueError as error:
        raise OutputError(f"{output / ARGUMENTS} is damaged: {error}") from error
    if not resume:
        raise OutputError(
            f"{output} already holds a run: go on with it (--resume), name another --output, "
            "or move it away"
        )
    _check_same(output, found, arguments)


def _check_same(place: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        differences = (f"{n} {found.get(n)} and not {wanted.get(n)}" for n in names)
        raise OutputError(f"{place} holds a run with {', '.join(differences)}")


def claim_output(output: Path, arguments: dict[str, Any]) -> IO[bytes]:
    """Make the directory and write the arguments; the file that is returned holds the lock on it.

    Raises:
      OutputError: another process is at work there, or the directory cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"another process is at work in {output}") from error
    except OSError as error:
        raise OutputError(f"cannot create {output}: {error.strerror}") from error
    records.write_json(output / ARGUMENTS, arguments)
    return lock


def run_directories(output: Path | None, arguments: dict[str, Any]) -> dict[int, Path | None]:
    """Where each seed's files are: in `output`, or one level below if there are several seeds."""
    first, count = arguments["seed"], arguments["seeds"]
    if output is None or count == 1:
        return dict.fromkeys(range(first, first + count), output)
    return {seed: output / f"seed-{seed}" for seed in range(first, first + count)}


def is_finished(directory: Path | None) -> bool:
    """Whether a run has come to its end here."""
    return directory is not None and (directory / SUMMARY).exists()


def train(job: Job, groups: Sequence[Sequence[int]]) -> bool:
    """Train all seeds, those of a group at once; groups of the same size share the compilation.

    Returns:
      Whether no seed failed. What failed has been said; the others have their summaries.

    Raises:
      Stopped: by a signal, after writing a checkpoint.
    """
    directories = run_directories(job.output, job.arguments)
    trainer, accuracies, failed = None, [], False
    for seeds in groups:
        finished = [d for seed in seeds if (d := directories[seed]) and is_finished(d)]
        if len(finished) == len(seeds):
            summaries = [json.loads((d / SUMMARY).read_text(encoding="utf-8")) for d in finished]
            accuracies += [summary["test_accuracy"] for summary in summaries]
            say(f"{seed_name(job.arguments, seeds)}finished before.")
            continue
        of_group = {seed: directories[seed] for seed in seeds}
        trainer, results = _train_group(job, of_group, trainer)
        accuracies += [result.test_accuracy for result in results if result]
        failed |= None in results
    if len(accuracies) > 1:
        say(
            f"Test accuracy {np.mean(accuracies):.2%} ± {100 * np.std(accuracies, ddof=1):.2f} "
            f"(standard deviation) of {len(accuracies)} seeds."
        )
    return not failed


def _train_group(
    job: Job, directories: dict[int, Path | None], trainer: programs.Trainer | None
) -> tuple[programs.Trainer, list[loop.Result | None]]:
    """Train some seeds at once; gives the programs back, and None for a seed that failed."""
    seeds, epochs = list(directories), job.arguments["epochs"]
    images = len(job.images.train.labels)
    graphdef, of_seeds, run = loop.start_run(job.make_model, job.tx, seeds, images, job.mesh)
    origin = job.arguments | {"images": images}
    compiling = trainer is None
    with ExitStack() as stack:
        manager = None
        if job.output:
            alone = directories[seeds[0]] if len(seeds) == 1 else None
            manager = checkpoints.open_checkpoints((alone or job.output) / CHECKPOINTS)
            stack.callback(checkpoints.close, manager)
        if manager and job.resume:
            run = _restore(manager, run, origin, seed_name(job.arguments, seeds))
        recorders = [
            _begin_files(job, seed, directory, history, stack)
            for (seed, directory), history in zip(
                directories.items(), run.progress.history, strict=True
            )
        ]
        show = stack.enter_context(
            progress_bar(job.arguments, of_seeds, seed_name(job.arguments, seeds))
        )
        trainer = trainer or programs.compile_trainer(
            graphdef,
            job.tx,
            job.images,
            of_seeds,
            run.state,
            batch_size=job.arguments["batch_size"],
            mesh=job.mesh,
        )

        def save(run: loop.Run) -> None:
            if manager is None:
                return
            step = (run.progress.epoch - 1) * trainer.steps + run.progress.step
            arrays = {"state": run.state, "best": run.best}
            checkpoints.save(manager, step, arrays, {"of": origin, **run.progress._asdict()})

        def on_epoch(run: loop.Run) -> None:
            epoch, histories = run.progress.epoch - 1, run.progress.history
            latest = []
            figures = run.progress.epoch_geometry
            for history, measured, record in zip(histories, figures, recorders, strict=True):
                if history and history[-1].epoch == epoch:  # else this seed has failed
                    record(history[-1], measured)
                    latest.append(history[-1])
            if latest:
                say(seed_name(job.arguments, seeds) + epoch_line(latest, epochs))
            # Epochs may be shorter than a save; several processes must decide alike.
            busy = jax.process_count() == 1 and manager and manager.is_saving_in_progress()
            if not busy or epoch == epochs:
                save(run)

        with job.signals.defer():
            run = loop.fit(
                trainer,
                of_seeds,
                run,
                epochs=epochs,
                schedule=job.schedule,
                on_batch=show,
                on_epoch=on_epoch,
                stop=make_stop(job.signals),
            )
            finished = run.progress.epoch > epochs or all(run.progress.failed)
            if not finished:
                save(run)
        results = loop.results(trainer, run) if finished else [None] * len(seeds)
    compile_seconds = trainer.compile_seconds if compiling else 0.0
    for i, (seed, directory) in enumerate(directories.items()):
        _finish(job, seed, directory, i, run, results[i], compile_seconds)
    if not finished:
        raise Stopped(job.signals.requested or signal.SIGTERM, at_once=False)
    return trainer, results


def _finish(
    job: Job,
    seed: int,
    directory: Path | None,
    place: int,
    run: loop.Run,
    result: loop.Result | None,
    compile_seconds: float,
) -> None:
    """Write the picture and, if the run at this place among its seeds came to its end, the rest."""
    name, progress = seed_name(job.arguments, [seed]), run.progress
    history, failure = progress.history[place], progress.failed[place]
    if failure:
        rate = job.arguments["learning_rate"]
        say(f"{name}stopped: {failure}: lower --learning_rate ({rate:g})", file=sys.stderr)
    if directory and history and leads():
        a = job.arguments
        records.draw_curves(
            directory / "curves.png",
            history,
            result,
            title=f"{a['model']} on {a['dataset']} with {a['optimizer']}, seed {seed}",
            schedule=job.schedule,
            milestones=job.milestones,
            steps_per_epoch=job.steps_per_epoch,
        )
        if result:
            records.write_summary(
                directory / SUMMARY,
                _of_seed(job, seed),
                result,
                history,
                seconds=progress.seconds,
                compile_seconds=compile_seconds,
                seeds_at_once=len(progress.history),
                git_revision=job.git_revision,
            )
    if result:
        say(
            f"{name}Test accuracy {result.test_accuracy:.2%} (loss {result.test_loss:.4f}) with "
            f"epoch {result.best_epoch}, the best in validation; {progress.seconds:.0f} s, and "
            f"{compile_seconds:.0f} s of compilation."
        )


def _restore(
    manager: ocp.CheckpointManager, run: loop.Run, origin: dict[str, Any], name: str
) -> loop.Run:
    """The run as it stood at the last readable checkpoint; at the first step if there is none."""

    def warn(text: str) -> None:
        say(f"warning: {text}", file=sys.stderr)

    try:
        found = checkpoints.restore(manager, {"state": run.state, "best": run.best}, warn=warn)
    except ValueError as error:
        raise OutputError(str(error)) from error
    if found is None:
        return run
    arrays, saved = found
    _check_same(Path(manager.directory), saved.pop("of"), origin)
    history = [[loop.Metrics(*line) for line in lines] for lines in saved.pop("history")]
    progress = loop.Progress(**saved, history=history)
    after = f" after {progress.step} of its steps" if progress.step else ""
    say(f"{name}going on in epoch {progress.epoch}{after}.")
    return loop.Run(arrays["state"], arrays["best"], progress)


def _begin_files(
    job: Job,
    seed: int,
    directory: Path | None,
    history: Sequence[loop.Metrics],
    stack: ExitStack,
) -> Callable[[loop.Metrics, dict[str, float]], None]:
    """Write what there is of a run so far; gives the function that adds an epoch."""
    if directory is None or not leads():
        return lambda metrics, geometry: None
    directory.mkdir(exist_ok=True)
    if job.arguments["seeds"] > 1:
        records.write_json(directory / ARGUMENTS, _of_seed(job, seed))
    # Epochs after the checkpoint that the run goes on from will be run again.
    lines = {METRICS: [metrics._asdict() for metrics in history]}
    if job.arguments["geometry"]:
        lines[GEOMETRY] = records.read_lines(directory / GEOMETRY, len(history))
    for name, past in lines.items():
        records.write_lines(directory / name, past)
    events = None
    if job.tensorboard:
        events = records.open_events(directory / "tensorboard")
        stack.callback(events.close)
        for line in itertools.chain(*lines.values()):
            records.add_events(events, line)

    def record(metrics: loop.Metrics, geometry: dict[str, float]) -> None:
        new = {METRICS: metrics._asdict(), GEOMETRY: _geometry_line(metrics.epoch, geometry)}
        for name in lines:
            records.append_line(directory / name, new[name])
            if events:
                records.add_events(events, new[name])

    return record


def _geometry_line(epoch: int, geometry: dict[str, float]) -> dict[str, float | None]:
    """What float32 holds of an epoch's geometry; None for what is infinite or no number."""
    figures = {k: float(f"{v:.7g}") if math.isfinite(v) else None for k, v in geometry.items()}
    return {"epoch": epoch} | figures


def _of_seed(job: Job, seed: int) -> dict[str, Any]:
    """The arguments that give one seed's run when it is alone."""
    return {k: v for k, v in job.arguments.items() if "seeds" not in k} | {"seed": seed}
