"""A run's life: from its checkpoint, or its first step, to its summary."""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from training import checkpoints, geometry, loop, records
from training.display import epoch_line, progress_bar, say, seed_name
from training.files import (
    ARGUMENTS,
    CHECKPOINTS,
    FAILED,
    GEOMETRY,
    METRICS,
    SUMMARY,
    read_if_whole,
)
from training.outputs import OutputError, check_same, is_finished, run_directories
from training.processes import leads, make_stop
from training.signals import Stopped, StopSignals
from training.task import Metrics, Result, Task, number, where


class Begun(NamedTuple):
    """Some seeds at their first step."""

    seeds: loop.PyTree  # what the programs take of them
    run: loop.Run
    compile: Callable[[loop.PyTree], loop.Trainer]  # for a state with the shapes of that of `run`


class Job(NamedTuple):
    """What the runs of one command have in common."""

    arguments: dict[str, Any]  # that decide the outcome; `seed` is the first of `seeds`
    output: Path | None
    resume: bool
    tensorboard: bool
    task: Task
    data: dict[str, Any]  # what a checkpoint must agree in with the data, beside the arguments
    epochs: int
    steps: int  # of an epoch
    items: int  # of an epoch
    batch_size: int  # items of a step; the last of an epoch may have fewer
    begin: Callable[[Sequence[int]], Begun]
    # Draws a seed's curves.png; there is no result in a run that is not finished.
    draw: Callable[[Path, int, Sequence[Metrics], Result | None], object]
    git_revision: str | None  # of the code, when it was loaded
    signals: StopSignals


def seeds_at_once(first: int, count: int, *, convolutions: bool) -> list[list[int]]:
    """The seeds in the groups that share a program: all, or each alone where that is faster.

    On a CPU it is. With convolutions it was on an H200: four seeds of ResNet-20 at once took 5.5
    times as long as one.
    """
    seeds = list(range(first, first + count))
    alone = convolutions or jax.default_backend() == "cpu"
    return [[seed] for seed in seeds] if alone else [seeds]


def train(job: Job, groups: Sequence[Sequence[int]]) -> bool:
    """Train all seeds, those of a group at once; groups of the same size share the compilation.

    Returns:
      Whether no seed failed. What failed has been said; the others have their summaries.

    Raises:
      Stopped: by a signal, after writing a checkpoint.
    """
    directories = run_directories(job.output, job.arguments)
    trainer, ends, failed = None, [], False
    for seeds in groups:
        finished = [d for seed in seeds if (d := directories[seed]) and is_finished(d)]
        if len(finished) == len(seeds):
            ends += [summary for d in finished if (summary := read_if_whole(d / SUMMARY))]
            say(f"{seed_name(job.arguments, seeds)}finished before.")
            continue
        of_group = {seed: directories[seed] for seed in seeds}
        trainer, results = _train_group(job, of_group, trainer)
        ends += [result._asdict() for result in results if result]
        failed |= None in results
    if len(ends) > 1:
        say(job.task.seeds(ends))
    return not failed


def _train_group(
    job: Job, directories: dict[int, Path | None], trainer: loop.Trainer | None
) -> tuple[loop.Trainer, list[Result | None]]:
    """Train some seeds at once; gives the programs back, and None for a seed that failed."""
    job.signals.check()
    seeds, epochs, name = list(directories), job.epochs, seed_name(job.arguments, [*directories])
    of_seeds, run, compile_trainer = job.begin(seeds)
    origin = job.arguments | job.data
    compiling = trainer is None
    with ExitStack() as stack:
        manager = None
        if job.output:
            alone = directories[seeds[0]] if len(seeds) == 1 else None
            manager = checkpoints.open_checkpoints((alone or job.output) / CHECKPOINTS)
            stack.callback(checkpoints.close, manager)
        if manager and job.resume:
            run = _restore(job, manager, run, origin, name)
        recorders = [
            _begin_files(job, seed, directory, history, stack)
            for (seed, directory), history in zip(
                directories.items(), run.progress.history, strict=True
            )
        ]
        show = stack.enter_context(
            progress_bar(
                name,
                job.task,
                epochs=epochs,
                steps=job.steps,
                items=job.items,
                batch_size=job.batch_size,
                seeds=len(seeds),
            )
        )
        trainer = trainer or compile_trainer(run.state)
        job.signals.check()

        def save(run: loop.Run) -> None:
            if manager is None:
                return
            step = (run.progress.epoch - 1) * job.steps + run.progress.step
            arrays = {"state": run.state, "best": run.best}
            checkpoints.save(manager, step, arrays, {"of": origin, **loop.to_json(run.progress)})

        def on_epoch(run: loop.Run) -> None:
            epoch, histories = run.progress.epoch - 1, run.progress.history
            latest = []
            figures = run.progress.epoch_geometry
            for history, measured, record in zip(histories, figures, recorders, strict=True):
                if len(history) == epoch:  # else this seed has failed
                    record(history[-1], measured)
                    latest.append(history[-1])
            if latest:
                say(name + epoch_line(latest, job.task, number(job.task.unit, epochs, job.steps)))
            # Epochs may be shorter than a save; several processes must decide alike.
            busy = jax.process_count() == 1 and manager and manager.is_saving_in_progress()
            if not busy or epoch == epochs:
                save(run)

        with job.signals.defer():
            run = loop.fit(
                trainer,
                of_seeds,
                run,
                job.task,
                epochs=epochs,
                on_batch=show,
                on_epoch=on_epoch,
                stop=make_stop(job.signals),
            )
            finished = run.progress.epoch > epochs or all(run.progress.failed)
            if not finished:
                save(run)
        results = loop.results(trainer, run, job.task) if finished else [None] * len(seeds)
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
    result: Result | None,
    compile_seconds: float,
) -> None:
    """Write the summary, if the run at this place among its seeds has come to its end; draw it."""
    name, progress = seed_name(job.arguments, [seed]), run.progress
    history, failure = progress.history[place], progress.failed[place]
    if failure:
        rate = job.arguments["learning_rate"]
        say(f"{name}stopped: {failure}: lower --learning_rate ({rate:g})", file=sys.stderr)
        if directory and leads():
            records.write_json(directory / FAILED, {"reason": failure})
    if directory and history and leads():
        if result:
            records.write_summary(
                directory / SUMMARY,
                _of_seed(job, seed),
                result._asdict(),
                job.task.rate,
                [getattr(metrics, job.task.rate) for metrics in history],
                seconds=progress.seconds,
                compile_seconds=compile_seconds,
                seeds_at_once=len(progress.history),
                git_revision=job.git_revision,
            )
        try:
            job.draw(directory / "curves.png", seed, history, result)
        except Exception as error:  # the figures are there, and a picture can be drawn again
            reason = str(error).partition("\n")[0] or type(error).__name__
            say(f"warning: {name}curves.png could not be drawn ({reason})", file=sys.stderr)
    if result:
        say(
            f"{name}{job.task.end(result)}; {progress.seconds:.0f} s, and "
            f"{compile_seconds:.0f} s of compilation."
        )


def _restore(
    job: Job, manager: ocp.CheckpointManager, run: loop.Run, origin: dict[str, Any], name: str
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
    check_same(Path(manager.directory), saved["of"], origin)
    progress = loop.from_json(saved, run.progress, job.task.metrics)
    say(f"{name}going on {where(job.task.unit, progress.epoch, progress.step, job.steps)}.")
    return loop.Run(arrays["state"], arrays["best"], progress)


def _begin_files(
    job: Job,
    seed: int,
    directory: Path | None,
    history: Sequence[Metrics],
    stack: ExitStack,
) -> Callable[[Metrics, dict[str, float]], None]:
    """Write what there is of a run so far; gives the function that adds an epoch."""
    if directory is None or not leads():
        return lambda metrics, measured: None
    directory.mkdir(exist_ok=True)
    if job.arguments["seeds"] > 1:
        records.write_json(directory / ARGUMENTS, _of_seed(job, seed))
    # Epochs after the checkpoint that the run goes on from will be run again.
    lines = {METRICS: [metrics._asdict() for metrics in history]}
    if job.arguments["geometry"]:
        lines[GEOMETRY] = records.read_lines(
            directory / GEOMETRY, job.task.unit, [metrics[0] for metrics in history]
        )
    for name, past in lines.items():
        records.write_lines(directory / name, past)
    events = None
    if job.tensorboard:
        events = records.open_events(directory / "tensorboard")
        stack.callback(events.close)
        for line in itertools.chain(*lines.values()):
            records.add_events(events, line)

    def record(metrics: Metrics, measured: dict[str, float]) -> None:
        of_spheres = geometry.line(job.task.unit, metrics[0], measured)
        new = {METRICS: metrics._asdict(), GEOMETRY: of_spheres}
        for name in lines:
            records.append_line(directory / name, new[name])
            if events:
                records.add_events(events, new[name])

    return record


def _of_seed(job: Job, seed: int) -> dict[str, Any]:
    """The arguments that give one seed's run when it is alone."""
    return {k: v for k, v in job.arguments.items() if "seeds" not in k} | {"seed": seed}
