"""A run's life without images: its lines are of steps, and the lowest validation loss is best."""

import json
import math
import signal
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from training import loop, runs
from training.outputs import claimed, is_done
from training.signals import Stopped, StopSignals
from training.task import Task

EVERY, LENGTH = 3, 4  # steps between validations; bytes of an item


class Metrics(NamedTuple):
    step: int
    learning_rate: float
    train_loss: float
    valid_loss: float
    bytes_per_second: float


class Result(NamedTuple):
    test_loss: float
    best_step: int


TASK = Task(
    unit="step",
    item="item",
    rate="bytes_per_second",
    metrics=Metrics,
    line=lambda epoch: Metrics(
        epoch.number,
        0.5 ** (1 + epoch.first_step),
        epoch.loss_sum / epoch.items,
        epoch.scores["loss"],
        LENGTH * epoch.items_per_second,
    ),
    rank=lambda scores: -scores["loss"],
    result=lambda scores, step: Result(scores["loss"], step),
    so_far=lambda loss, counts: f"loss {loss:.3f}",
    epoch=lambda m: f"train loss {m.train_loss:.4f}, validation loss {m.valid_loss:.4f}",
    end=lambda result: f"Test loss {result.test_loss:.4f} with step {result.best_step}",
    seeds=lambda results: f"Mean test loss {np.mean([r['test_loss'] for r in results]):.4f}.",
)


def begin(seeds) -> runs.Begun:
    """A weight that counts the steps; its loss is lowest after 6 of them, and NaN from 20 on."""
    (seed,) = seeds

    def loss(network) -> float:
        steps, of_seed = map(float, network)
        return abs(steps - 6) + of_seed if steps < 20 else math.nan

    def train(state, order, step):
        steps, of_seed = map(int, state)
        assert order == (of_seed, steps // EVERY + 1) and step == steps % EVERY
        batch = loop.Batch(jnp.array([loss(state)]), {}, jnp.zeros((1, 0)))
        return state + jnp.array([1, 0]), batch

    trainer = loop.Trainer(
        items=EVERY * 2,
        steps=EVERY,
        batch_size=2,
        figures=(),
        compile_seconds=1.0,
        shuffle=lambda seed, epoch: (seed, epoch),
        train=train,
        network=lambda state: state,
        validate=lambda network, seed: {"loss": [loss(network)]},
        test=lambda network: {"loss": [10 * loss(network)]},
        choose=lambda better, new, old: new,
    )
    state = jnp.array([0, seed])
    run = loop.Run(state, state, loop.first_progress(1, (), ("loss",)))
    return runs.Begun(seed, run, lambda state: trainer)


def make_job(output: Path | None, **changed) -> runs.Job:
    arguments = {"steps": 12, "learning_rate": 0.5, "geometry": False, "seed": 1, "seeds": 1}
    job = runs.Job(
        arguments=arguments,
        output=output,
        resume=False,
        tensorboard=False,
        task=TASK,
        data={"bytes": 100},
        epochs=4,
        steps=EVERY,
        items=EVERY * 2,
        batch_size=2,
        begin=begin,
        draw=lambda path, seed, history, result: path.write_text(f"{seed} {len(history)} {result}"),
        git_revision=None,
        signals=StopSignals(),
    )
    return job._replace(**changed)


def read_lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_lines_and_messages_count_steps(tmp_path, capsys):
    job = make_job(tmp_path / "run")
    with claimed(job.output, job.arguments):
        assert runs.train(job, [[1]])
    assert capsys.readouterr().out.splitlines() == [
        "step 3/12: train loss 6.0000, validation loss 4.0000",
        "step 6/12: train loss 3.0000, validation loss 1.0000",
        "step 9/12: train loss 2.0000, validation loss 4.0000",
        "step 12/12: train loss 5.0000, validation loss 7.0000",
        "Test loss 10.0000 with step 6; 0 s, and 1 s of compilation.",
    ]
    lines = read_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert [line["learning_rate"] for line in lines] == [0.5, 0.5**4, 0.5**7, 0.5**10]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert list(summary)[:3] == ["test_loss", "best_step", "bytes_per_second"]
    assert (tmp_path / "run/curves.png").read_text().startswith("1 4 Result(")
    assert is_done(job.output, job.arguments, resume=True)


@pytest.mark.parametrize(("at", "where"), [(8, "step 6"), (9, "step 7")])
def test_a_run_that_is_stopped_goes_on(at, where, tmp_path, capsys, monkeypatch):
    job, asked = make_job(tmp_path / "run"), []
    with monkeypatch.context() as patch, claimed(job.output, job.arguments):
        stop = lambda signals: lambda: asked.append(0) or len(asked) >= at - 1  # noqa: E731
        patch.setattr(runs, "make_stop", stop)
        with pytest.raises(Stopped) as stopped:
            runs.train(job, [[1]])
    assert stopped.value.signum == signal.SIGTERM
    with claimed(job.output, job.arguments):
        assert runs.train(job._replace(resume=True), [[1]])
    assert f"going on after {where}.\n" in capsys.readouterr().out
    assert [line["step"] for line in read_lines(tmp_path / "run")] == [3, 6, 9, 12]
    whole = make_job(tmp_path / "whole")
    with claimed(whole.output, whole.arguments):
        assert runs.train(whole, [[1]])
    ends = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole")]
    assert [end["test_loss"] for end in ends] == [10.0, 10.0]


def test_seeds_in_turn_and_a_failure(capsys):
    job = make_job(None, epochs=8)
    arguments = job.arguments | {"seeds": 2}
    assert not runs.train(job._replace(arguments=arguments), [[1], [2]])
    out, err = capsys.readouterr()
    failures = [
        f"seed {seed}: stopped: the training loss is nan at step 21: lower --learning_rate (0.5)"
        for seed in (1, 2)
    ]
    assert err.splitlines() == failures
    assert "seed 2: step 18/24: " in out and "step 21/" not in out
    assert runs.train(job._replace(arguments=arguments, epochs=4), [[1], [2]])
    assert capsys.readouterr().out.endswith("\nMean test loss 15.0000.\n")
