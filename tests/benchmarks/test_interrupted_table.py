"""The table command killed, interrupted and started twice: nothing is lost or trained twice."""

import json
import os
import random
import signal
import time

import pytest

import table_command
import table_lines
from table_command import TWO, assert_same, calls, checkpoints, lines_of, main, start

# Fixtures.
trainer, whole, no_picture = table_command.trainer, table_command.whole, table_lines.no_picture


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_killed_at_every_step(whole, trainer, tmp_path):
    output = tmp_path / "table"
    kills = [
        "before subprocess Popen",
        "after subprocess Popen",
        "before common.run_lines append",
        "torn write",
        "after common.run_lines append",
        "part of the checkpoints",
        "before shutil rmtree",
        "before table.table_report write_report",
        "before os replace",
        "after os replace",
    ]
    for kill in kills:
        process = start(trainer, output, *TWO, KILL=kill)
        out, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, (kill, out, err)
    process = start(trainer, output, *TWO)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert_same(output, whole)
    # The torn write held the first of two runs; the warning stays with the rest of the second.
    assert err == (
        f"reproduce_table.py: warning: line 2 of {output}/runs.jsonl "
        "is no whole run and is ignored\n"
    )


def test_killed_at_random_moments(whole, trainer, tmp_path):
    output = tmp_path / "table"
    rng = random.Random(0)
    killed = 0
    for _ in range(10):  # an event is a call or return; the whole takes about 2,000
        process = start(trainer, output, *TWO, KILL=str(rng.randrange(20, 600)))
        process.communicate(timeout=60)
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 5
    process = start(trainer, output, *TWO)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert_same(output, whole)


@pytest.mark.parametrize(
    ("send", "patience", "code"),
    [
        (lambda p: os.killpg(p.pid, signal.SIGINT), 30, 130),  # as a terminal does
        (lambda p: p.send_signal(signal.SIGINT), 0.3, 130),  # then the trainer gets SIGTERM
        (lambda p: p.send_signal(signal.SIGTERM), 30, 143),
    ],
    ids=["Ctrl-C", "SIGINT", "SIGTERM"],
)
def test_interrupted(send, patience, code, whole, trainer, tmp_path):
    output = tmp_path / "table"
    begun = output / "cells/cifar10/resnet20/sgd/seeds-0-1/seed-1/metrics.jsonl"
    process = start(trainer, output, *TWO, patience=patience, SLOW="sgd:1:30")
    wait_for(begun.exists, process)
    send(process)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    how = "interrupted" if code == 130 else "terminated"
    kept = f"what {output / 'runs.jsonl'} holds is kept, and the same command goes on from there"
    assert err == f"reproduce_table.py: {how}; {kept}\n"
    # The interrupted cell is left as it is, to be resumed by the very same call.
    assert out.splitlines()[-1].startswith("2 of 8 runs are there; the table is in ")
    assert len(lines_of(output)) == 2 and checkpoints(output)
    made = calls(trainer)
    assert len(made) == 2
    again = start(trainer, output, *TWO)
    assert again.wait(timeout=60) == 0, again.communicate()
    assert calls(trainer)[2] == made[1] and len(calls(trainer)) == 5
    assert_same(output, whole)


def test_more_seeds_than_an_interrupted_command_had(trainer, tmp_path):
    """What had been finished counts, and is not trained again."""
    output = tmp_path / "table"
    begun = output / "cells/cifar10/resnet20/adam/seeds-0-1/seed-1/metrics.jsonl"
    process = start(trainer, output, *TWO, SLOW="adam:1:30")
    wait_for(begun.exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    more = [option if option != "2" else "3" for option in TWO]
    assert more != list(TWO)
    again = start(trainer, output, *more)
    assert again.wait(timeout=60) == 0, again.communicate()
    seeds = sorted(json.loads(line)["arguments"]["seed"] for line in lines_of(output))
    assert seeds == sorted([0, 1, 2] * (len(seeds) // 3))
    assert (output / "cells/cifar10/resnet20/adam/seeds-1-2").exists()


@pytest.mark.parametrize("own", [-signal.SIGINT, 130, -signal.SIGTERM, 143])
def test_an_interrupted_trainer_stops_the_table(own, trainer, no_picture, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", f"adam:1:{own}")
    want = 130 if own in (130, -signal.SIGINT) else 143
    assert main(tmp_path / "table", *TWO) == want
    assert len(calls(trainer)) == 1
    assert not (tmp_path / "table" / "runs.jsonl").exists()


def test_waits_for_a_trainer_that_outlived_its_killed_parent(whole, trainer, tmp_path):
    output = tmp_path / "table"
    begun = output / "cells/cifar10/resnet20/adam/seeds-0-1/seed-0/metrics.jsonl"
    process = start(trainer, output, *TWO, SLOW="adam:0:1")
    wait_for(begun.exists, process)
    process.kill()
    again = start(trainer, output, *TWO)
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert out.startswith("waiting for another process that works in ")
    assert_same(output, whole)  # two trainers at once would have written six epochs
    process.communicate()


def test_two_commands_share_an_output(whole, trainer, tmp_path):
    output = tmp_path / "table"
    both = [start(trainer, output, *TWO, SLOW="adam:0:0.1") for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert_same(output, whole)
    assert len(calls(trainer)) == 4
