"""What befalls a run from outside, and that nothing is lost: signals, damaged files, a full disk.

A few of each with `-m slow`; all of them, which takes an hour, with `-m long`.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_cifar
from ends import assert_same_end, figures
from test_processes import COMMAND, FAST, start_command, start_processes, wait_for
from tiny import compile_once, draw_nothing, make_data, use_tiny
from training import runs

FEW, MANY = pytest.mark.slow, pytest.mark.long
OPTIONS = "--epochs 150 --batch_size 11 --geometry --resume --output"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, float]:
    """An undisturbed run, and the seconds that its process took."""
    output = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    ended(f"{OPTIONS} {output}")
    return output, time.monotonic() - began


def ended(arguments: str) -> str:
    """Runs the command to its end; gives what it printed."""
    ((code, out, err),) = wait_for([start_command(arguments)])
    assert code == 0, err
    return out


# A signal before `main` has its handlers ends the process as it always does.
@pytest.mark.parametrize(
    "codes",
    [(-signal.SIGKILL,), (130, -signal.SIGINT), (143, -signal.SIGTERM)],
    ids=["kill", "interrupt", "terminate"],
)
@pytest.mark.parametrize("moments", [pytest.param(1, marks=FEW), pytest.param(50, marks=MANY)])
def test_a_run_stopped_at_random_moments_ends_as_an_undisturbed_one(
    codes, moments, whole, tmp_path
):
    """Anywhere: while starting, loading, compiling, training, writing, ending."""
    signum = -codes[-1]
    output, rng = tmp_path / "run", random.Random(signum)
    went_on = 0
    for moment in range(moments):
        process = start_command(f"{OPTIONS} {output}")
        if moment % 3:  # after a line that it prints: the first is before compilation
            assert process.stdout is not None
            printed = "".join(process.stdout.readline() for _ in range(rng.choice([2, 3, 10, 20])))
            went_on += "going on in epoch" in printed
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, whole[1]))
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, *codes), err
        assert "Traceback" not in err or process.returncode == -signal.SIGINT
        if process.returncode == 0:  # it had ended before; again from the start
            assert_same_end(output, whole[0])
            shutil.rmtree(output)
    ended(f"{OPTIONS} {output}")
    assert_same_end(output, whole[0])
    assert went_on or moments == 1


@pytest.mark.parametrize("moments", [pytest.param(1, marks=FEW), pytest.param(20, marks=MANY)])
def test_a_pause_changes_nothing(moments, whole, tmp_path):
    process = start_command(f"{OPTIONS} {tmp_path / 'run'}")
    rng = random.Random(0)
    for _ in range(moments):
        time.sleep(rng.uniform(0, whole[1] / moments))
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        process.send_signal(signal.SIGCONT)
    ((code, _, err),) = wait_for([process])
    assert code == 0, err
    assert_same_end(tmp_path / "run", whole[0])


@pytest.mark.parametrize(
    "sizes",
    [pytest.param([4], marks=FEW), pytest.param([0, 1, 2, 3, 4, 6, 8, 16, 32, 64], marks=MANY)],
    ids=["few", "many"],
)
def test_a_run_goes_on_after_files_could_not_grow(sizes, whole, tmp_path):
    """As on a full disk; `ulimit -f` counts in units of 1,024 bytes."""
    for size in sizes:
        output = tmp_path / f"run{size}"
        command = f"ulimit -f {size}; exec {sys.executable} {COMMAND} {OPTIONS} {output}"
        process = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, env=os.environ | FAST
        )
        assert process.returncode in (0, 1, 2), process.stderr
        assert "Traceback" not in process.stderr
        if process.returncode:
            assert process.stderr.splitlines()[-1].startswith("train_cifar.py: error: ")
        ended(f"{OPTIONS} {output}")
        assert_same_end(output, whole[0])


@FEW
def test_two_commands_on_one_output_do_not_mix(whole, tmp_path):
    arguments = f"{OPTIONS} {tmp_path / 'run'}"
    both = wait_for([start_command(arguments) for _ in range(2)])
    codes = sorted(code for code, *_ in both)
    assert codes[0] == 0 and codes[1] in (0, 2), both
    assert all("Traceback" not in err for *_, err in both)
    assert_same_end(tmp_path / "run", whole[0])


@pytest.mark.parametrize(
    "killed",
    [pytest.param(0, marks=MANY, id="the first"), pytest.param(1, marks=FEW, id="the second")],
)
def test_a_killed_process_of_two_leaves_what_a_run_goes_on_from(killed, tmp_path):
    options = f"--epochs 2000 --batch_size 8 --resume --output {tmp_path / 'run'}"
    both = start_processes(options, HEARTBEAT="5")
    assert both[0].stdout is not None
    for line in both[0].stdout:
        if line.startswith("epoch 5/"):
            break
    both[killed].kill()
    began = time.monotonic()
    results = wait_for(both)
    assert results[killed][0] == -signal.SIGKILL
    code, _, err = results[1 - killed]
    assert code not in (0, None), err
    assert time.monotonic() - began < 60  # JAX's heartbeats end the other one
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    process = start_command(options)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("going on"):
            break
    else:
        pytest.fail("it did not go on")
    process.terminate()
    assert wait_for([process])[0][0] == 143


# The rest in this process, where a run takes half a second.


@pytest.fixture(scope="module")
def tiny(compiled_quickly):
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch, make_data())
        draw_nothing(patch)
        compile_once(patch)
        yield


def train(output: Path) -> int:
    options = "--epochs 4 --batch_size 5 --geometry --tensorboard --resume --output"
    return train_cifar.main([*options.split(), str(output)])


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    assert train(output) == 0
    return output


@pytest.fixture(scope="module")
def unfinished(tiny, tmp_path_factory) -> Path:
    """A run that was stopped inside its third epoch."""
    output = tmp_path_factory.mktemp("unfinished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        count = itertools.count()
        patch.setattr(runs, "make_stop", lambda signals: lambda: next(count) == 11)
        assert train(output) == 143
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2
    return output


def files(run: Path) -> list[Path]:
    found = (path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file())
    return [path for path in found if (run / path).stat().st_size]


def summary(run: Path) -> dict:
    found = json.loads((run / "summary.json").read_text())
    return {name: found[name] for name in ("arguments", "test_accuracy", "best_epoch")}


def damages(content: bytes, number: int, rng: random.Random) -> list[bytes]:
    """As many as `number`: half of them cut at a tenth of its length, half with a bit flipped."""
    cut = [content[: len(content) * tenth // 10] for tenth in range(10)]
    flipped = []
    for _ in range(10):
        place = rng.randrange(len(content))
        bit = bytes([content[place] ^ 1 << rng.randrange(8)])
        flipped.append(content[:place] + bit + content[place + 1 :])
    chosen = rng.sample(cut, (number + 1) // 2) + rng.sample(flipped, (number + 1) // 2)
    return rng.sample(chosen, number)


@pytest.mark.parametrize(
    ("run", "number"),
    [
        pytest.param("unfinished", 1, marks=FEW),
        pytest.param("unfinished", 20, marks=MANY),
        pytest.param("finished", 20, marks=MANY),
    ],
)
def test_a_damaged_file_is_told_or_does_no_harm(run, number, request, finished, tmp_path, capsys):
    """A run goes on to the same end, or is refused, and goes on once the file is whole again."""
    original, rng = request.getfixturevalue(run), random.Random(0)
    refused = 0
    for path in files(original):
        content = (original / path).read_bytes()
        for damaged in damages(content, number, rng):
            if damaged == content:
                continue
            output = tmp_path / "run"
            shutil.copytree(original, output)
            (output / path).write_bytes(damaged)
            code = train(output)
            err = capsys.readouterr().err
            assert code in (0, 1, 2), (path, err)
            if code:
                refused += 1
                assert err.splitlines()[-1].startswith("train_cifar.py: error: "), (path, err)
                (output / path).write_bytes(content)
                assert train(output) == 0, (path, capsys.readouterr().err)
            if path.name == "geometry.jsonl":  # no checkpoint holds its lines: one may be lost
                assert figures(output) == figures(finished)
            elif run == "unfinished":
                assert_same_end(output, finished)
            else:  # whose lines nobody reads again
                assert summary(output) == summary(finished)
            shutil.rmtree(output)
    assert refused


@FEW
def test_a_clock_that_goes_backwards_changes_nothing(tiny, finished, tmp_path, monkeypatch):
    clock = itertools.count(time.time(), -60)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    assert train(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", finished)
