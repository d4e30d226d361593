"""The table command: cells, kills and restarts, runs.jsonl, and the report made from it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paper_table
import reproduce_table
import table_runs

GOLDENS = Path(__file__).parent / "goldens"
BENCHMARKS = Path(reproduce_table.__file__).parent
# Trains in a moment: writes what the trainer writes. FAIL is "OPTIMIZER:SEED:EXIT_CODE", where a
# negative code is a signal; SECONDS is the time of an epoch; the calls are noted in calls.txt.
FAKE_TRAINER = """\
import argparse, json, os, pathlib, signal, sys, time, zlib
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in "dataset model optimizer precision data_dir".split():
    parser.add_argument("--" + name)
for name in "epochs batch_size seed seeds".split():
    parser.add_argument("--" + name, type=int)
parser.add_argument("--output", type=pathlib.Path)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
with open(pathlib.Path(__file__).with_name("calls.txt"), "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + chr(10))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
fail, fail_seed, fail_code = (os.environ.get("FAIL") or "none:0:0").split(":")
failed = False
try:
    for seed in range(args.seed, args.seed + args.seeds):
        run = args.output / f"seed-{seed}" if args.seeds > 1 else args.output
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / "1").write_text("large")
        if args.optimizer == fail and seed == int(fail_seed):
            if int(fail_code) < 0:
                os.kill(os.getpid(), -int(fail_code))
            if int(fail_code) not in (0, 1):
                sys.exit(int(fail_code))
            failed = int(fail_code) == 1
            continue
        done = 0
        if (run / "metrics.jsonl").exists():
            assert args.resume
            done = len((run / "metrics.jsonl").read_text().splitlines())
        for epoch in range(done + 1, args.epochs + 1):
            time.sleep(float(os.environ.get("SECONDS", 0)))
            with open(run / "metrics.jsonl", "a") as metrics:
                metrics.write(json.dumps({"epoch": epoch, "valid_accuracy": 0.5}) + chr(10))
        arguments = {name: getattr(args, name) for name in
                     "dataset model optimizer epochs batch_size precision".split()}
        digest = zlib.crc32(repr((arguments, seed)).encode())
        summary = {"test_accuracy": 0.9 + digest % 1000 / 1e4, "test_loss": 0.1, "best_epoch": 1,
                   "images_per_second": 100.0, "compile_seconds": 2.0, "seconds": 9.0,
                   "seeds_at_once": 1, "arguments": {**arguments, "seed": seed},
                   "versions": {"python": "3.11"}, "device": "none", "git_revision": "abc"}
        (run / "summary.tmp").write_text(json.dumps(summary))
        os.replace(run / "summary.tmp", run / "summary.json")
except KeyboardInterrupt:
    sys.exit(130)
sys.exit(failed)
"""
# The command with the fake trainer and without the slow picture, killed where KILL says: before or
# after the first call of a function, in the middle of a write, or at the nth event of the profiler.
HARNESS = """\
import os, shutil, signal, subprocess, sys
sys.path.insert(0, {benchmarks!r})
import reproduce_table, paper_table, table_runs
from pathlib import Path
reproduce_table.TRAINER, reproduce_table.PATIENCE = Path({trainer!r}), {patience}
paper_table.draw = lambda path, runs: path.write_bytes(b"picture")
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def wrap(module, name, when):
    function = getattr(module, name)
    def wrapped(*args, **kwargs):
        if when == "before":
            die()
        function(*args, **kwargs)
        die()
    setattr(module, name, wrapped)
kill = os.environ.get("KILL", "")
if kill.isdigit():
    events = 0
    def count(frame, event, argument):
        global events
        if frame.f_code.co_filename.startswith({benchmarks!r}):
            events += 1
            if events == int(kill):
                die()
    sys.setprofile(count)
elif kill == "torn write":
    write = os.write
    os.write = lambda file, content: (write(file, content[: len(content) * 2 // 3]), die())
elif kill == "part of the checkpoints":
    shutil.rmtree = lambda path, **_: (os.unlink(path / "1"), die())
elif kill:
    when, module, name = kill.split()
    wrap(sys.modules[module], name, when)
sys.exit(reproduce_table.main(sys.argv[1:]))
"""
TWO = ["--settings", "cifar10/resnet20,svhn/vgg16", "--optimizers", "adam,sgd", "--seeds", "2"]


def use_fake_trainer(directory: Path, patch: pytest.MonkeyPatch) -> Path:
    path = directory / "fake" / "trainer.py"
    path.parent.mkdir()
    path.write_text(FAKE_TRAINER)
    patch.setattr(reproduce_table, "TRAINER", path)
    return path


@pytest.fixture
def trainer(tmp_path, monkeypatch) -> Path:
    """The fake trainer, in place of the real one."""
    return use_fake_trainer(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The output of TWO without interruption."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        use_fake_trainer(directory, patch)
        patch.setattr(paper_table, "draw", lambda path, runs: path.write_bytes(b"picture"))
        assert main(directory / "table", *TWO) == 0
    return directory / "table"


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(paper_table, "draw", lambda path, runs: path.write_bytes(b"picture"))


def calls(trainer: Path) -> list[str]:
    path = trainer.with_name("calls.txt")
    return path.read_text().splitlines() if path.exists() else []


def main(output: Path, *arguments: str) -> int:
    return reproduce_table.main([*arguments, "--epochs", "3", "--output", str(output)])


def start(trainer: Path, output: Path, *arguments: str, patience: float = 30, **environment: str):
    """Starts the command in a process group of its own, as a terminal does."""
    harness = HARNESS.format(benchmarks=str(BENCHMARKS), trainer=str(trainer), patience=patience)
    command = [sys.executable, "-c", harness, *arguments, "--epochs", "3", "--output", str(output)]
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def lines_of(output: Path) -> list[str]:
    """The whole lines, sorted."""
    lines = (output / "runs.jsonl").read_bytes().split(b"\n")
    return sorted(line.decode() for line in lines if line.endswith(b"}"))


def checkpoints(output: Path) -> list[Path]:
    return list(output.rglob("checkpoints"))


def assert_same(output: Path, whole: Path) -> None:
    assert lines_of(output) == lines_of(whole)
    assert (output / "table.md").read_text() == (whole / "table.md").read_text()
    assert not checkpoints(output)


def test_runs_what_is_missing(trainer, no_picture, tmp_path, capfd):
    output = tmp_path / "new" / "table"
    arguments = ["--settings", "svhn/vgg16,cifar10/resnet20", "--optimizers", "sgd,adam"]
    assert main(output, *arguments, "--seeds", "2", "--data_dir", "data") == 0
    first = output / "cells" / "svhn" / "vgg16" / "sgd" / "seeds-0-1"
    assert calls(trainer)[0] == (
        "--dataset=svhn --model=vgg16 --optimizer=sgd --epochs=3 --batch_size=128 "
        f"--precision=float32 --seed=0 --seeds=2 --output={first} --data_dir=data --resume"
    )
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        "cell 1/4: svhn/vgg16 with sgd, seeds 0 to 1",
        "cell 2/4: svhn/vgg16 with adam, seeds 0 to 1",
        "cell 3/4: cifar10/resnet20 with sgd, seeds 0 to 1",
        "cell 4/4: cifar10/resnet20 with adam, seeds 0 to 1",
        f"8 of 8 runs are there; the table is in {output}/table.md and table.png",
    ]
    assert err == ""
    assert not checkpoints(output)
    lines = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert [
        (line["setting"], line["arguments"]["optimizer"], line["arguments"]["seed"])
        for line in lines
    ] == [
        (s, o, n)
        for s in ("svhn/vgg16", "cifar10/resnet20")
        for o in ("sgd", "adam")
        for n in (0, 1)
    ]
    summary = json.loads((first / "seed-1" / "summary.json").read_text())
    curve = [{"epoch": epoch, "valid_accuracy": 0.5} for epoch in (1, 2, 3)]
    assert lines[1] == {"setting": "svhn/vgg16", **summary, "curve": curve}

    before = (output / "table.md").read_text()
    assert main(output, *arguments, "--seeds", "2") == 0  # nothing is missing
    assert len(calls(trainer)) == 4 and (output / "table.md").read_text() == before

    # Without svhn's adam with seed 0 and cifar10's with seed 1, and what could give them back:
    kept = lines[:2] + lines[3:7]
    (output / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    shutil.rmtree(output / "cells")
    capfd.readouterr()
    assert main(output, *arguments, "--seeds", "4") == 0
    assert capfd.readouterr().out.splitlines()[:-1] == [
        "cell 1/5: svhn/vgg16 with sgd, seeds 2 to 3",
        "cell 2/5: svhn/vgg16 with adam, seed 0",
        "cell 3/5: svhn/vgg16 with adam, seeds 2 to 3",
        "cell 4/5: cifar10/resnet20 with sgd, seeds 2 to 3",
        "cell 5/5: cifar10/resnet20 with adam, seeds 1 to 3",
    ]
    assert len(lines_of(output)) == 16 == len(set(lines_of(output)))


def test_defaults_are_the_papers(trainer, no_picture, tmp_path):
    output = tmp_path / "table"
    assert (
        reproduce_table.main(["--seeds", "1", "--optimizers", "adamg", "--output", str(output)])
        == 0
    )
    protocol = table_runs.Protocol(405, 128, "float32", None)
    runs, _ = table_runs.load(output / "runs.jsonl")
    assert {key[0] for key in runs} == set(paper_table.PAPER)
    assert {run.protocol for run in runs.values()} == {protocol}
    assert "not to be read as errors" not in (output / "table.md").read_text()


@pytest.mark.parametrize(
    ("fail", "ending", "recorded"),
    [
        ("adam:1:1", "exit code 1", 1),
        ("adam:0:2", "exit code 2", 0),
        ("adam:1:-9", "killed by signal 9 (Killed)", 0),
        ("adam:1:0", "exit code 0 without the results of all seeds", 1),
    ],
)
def test_a_cell_that_fails_does_not_stop_the_others(
    fail, ending, recorded, whole, trainer, tmp_path, monkeypatch, capfd
):
    output = tmp_path / "table"
    monkeypatch.setenv("FAIL", fail)
    assert main(output, *TWO) == 1
    out, err = capfd.readouterr()
    assert err.splitlines() == [
        f"reproduce_table.py: failed: {setting} with adam, seeds 0 to 1: {ending}"
        for setting in ("cifar10/resnet20", "svhn/vgg16")
    ]
    count = 4 + 2 * recorded
    assert f"{count} of 8 runs are there; the table is in" in out
    assert len(lines_of(output)) == count
    # What may be resumed keeps its checkpoints.
    assert bool(checkpoints(output)) == (not recorded)
    monkeypatch.delenv("FAIL")
    assert main(output, *TWO) == 0
    assert_same(output, whole)


def test_killed_at_every_step(whole, trainer, tmp_path):
    output = tmp_path / "table"
    kills = [
        "before subprocess Popen",
        "after subprocess Popen",
        "before table_runs append",
        "torn write",
        "after table_runs append",
        "part of the checkpoints",
        "before shutil rmtree",
        "before paper_table write_report",
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
    for _ in range(10):  # an event is a call or return; the whole takes about 1,800
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
    process = start(trainer, output, *TWO, patience=patience, SECONDS="1")
    wait_for(begun.exists, process)
    send(process)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err == "reproduce_table.py: interrupted; the same command goes on from here\n"
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
    process = start(trainer, output, *TWO, SECONDS="1")
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
    process = start(trainer, output, *TWO, SECONDS="0.5")
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
    both = [start(trainer, output, *TWO, SECONDS="0.02") for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert_same(output, whole)
    assert len(calls(trainer)) == 4


def line(
    setting: str, optimizer: str, seed: int, percent: float, *, dataset: str = "", **other
) -> dict:
    own, model = setting.split("/")
    arguments = {
        "dataset": dataset or own,
        "model": model,
        "optimizer": optimizer,
        "epochs": other.pop("epochs", 405),
        "batch_size": other.pop("batch_size", 128),
        "precision": other.pop("precision", "float32"),
        "seed": seed,
    }
    return {
        "setting": setting,
        "test_accuracy": percent / 100,
        "images_per_second": 1000.0 + seed,
        "compile_seconds": 10.0 + seed,
        "seconds": 100.0 + seed,
        "seeds_at_once": 2,
        "arguments": arguments,
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "device": "cpu (2 cores)",
        "git_revision": "abc",
        "curve": [],
    } | other


def write_lines(output: Path, *lines: dict) -> Path:
    output.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (output / "runs.jsonl").write_text(text)
    return output


def rows(output: Path, setting: str) -> dict[str, list[str]]:
    """The rows of a setting's table by optimizer, without the name."""
    section = (output / "table.md").read_text().split(f"\n## {setting}\n")[1].split("\n## ")[0]
    cells = [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| ")]
    return {name: rest for name, *rest in cells[1:]}


def report(output: Path) -> int:
    return reproduce_table.main(["--report", "--output", str(output)])


def test_paper_figures_are_the_published_ones():
    published = json.loads((GOLDENS / "recipes.json").read_text())["paper_test_accuracy_percent"]
    ours = {
        setting: {name: figure._asdict() for name, figure in row.items()}
        for setting, row in paper_table.PAPER.items()
    }
    assert ours == {
        setting: {o: {"mean": f["mean"], "deviation": f["std"]} for o, f in row.items()}
        for setting, row in published.items()
    }
    assert list(ours) == list(published)  # in the paper's order
    assert all(list(row) == list(ours[setting]) for setting, row in published.items())


def test_table_of_made_up_runs(no_picture, tmp_path):
    # The deviation of the difference of sgd, 92.39 ± 0.12 in the paper, to these three runs:
    spread = np.array([-0.1, 0.0, 0.1])
    limit = 2 * np.hypot(np.std(spread, ddof=1), 0.12)
    values = {
        ("cifar10/resnet20", "sgd"): 92.39 + 1.01 * limit + spread,
        ("cifar10/resnet18", "sgd"): 95.1 - 1.01 * 2 * np.hypot(0.1, 0.04) + spread,
        ("cifar10/vgg16", "sgd"): 93.56 + 0.99 * 2 * np.hypot(0.1, 0.05) + spread,
        ("cifar10/resnet20", "adam"): np.array([80.0]),
        ("cifar10/resnet20", "adamg"): np.array([10.0, 10.2]),
    }
    output = write_lines(
        tmp_path / "table",
        *(
            line(*key, seed, value, git_revision="def" if seed else "abc")
            for key, percent in values.items()
            for seed, value in enumerate(percent)
        ),
    )
    assert report(output) == 0

    def want(key: tuple[str, str], difference: str) -> list[str]:
        mean, n = np.mean(values[key]), len(values[key])
        figure = paper_table.PAPER[key[0]][key[1]]
        return [
            f"{mean:.2f} ± {np.std(values[key], ddof=1):.2f}" if n > 1 else f"{mean:.2f}",
            str(n),
            f"{figure.mean:.2f} ± {figure.deviation:.2f}",
            difference.format(abs(mean - figure.mean)),
            f"{np.mean(100 + np.arange(n)):.0f}",
            f"{np.mean(10 + np.arange(n)):.1f}",
            f"{np.mean(1000 + np.arange(n)):.0f}",
            "2",
        ]

    missing = ["–"] * 5
    assert rows(output, "cifar10/resnet20") == {
        "sgd": want(("cifar10/resnet20", "sgd"), "+{:.2f} ▲"),
        "adam": want(("cifar10/resnet20", "adam"), "−{:.2f}"),
        "adamg": want(("cifar10/resnet20", "adamg"), "not comparable"),
    }
    assert rows(output, "cifar10/resnet18") == {
        "sgd": want(("cifar10/resnet18", "sgd"), "−{:.2f} ▼"),
        "adam": ["–", "0", "93.77 ± 0.20", *missing],
        "adamg": ["–", "0", "94.67 ± 0.12", *missing],
    }
    assert rows(output, "cifar10/vgg16")["sgd"] == want(("cifar10/vgg16", "sgd"), "+{:.2f}")
    text = (output / "table.md").read_text()
    for sentence in (
        "* epochs: 405\n",
        "* batch size: 128\n",
        "* precision: float32\n",
        "* data: that of each setting\n",
        "* device: cpu (2 cores)\n",
        "* versions: python 3.11.7, jax 0.10.2\n",
        "* git revision: abc, def\n",
        "the published code inverts its `channel_wise` switch",
    ):
        assert sentence in text
    assert "not to be read as errors" not in text
    assert "cifar100" not in text and "adamw" not in text


def test_table_of_another_protocol_says_so(no_picture, tmp_path):
    one = line("cifar10/resnet20", "sgd", 0, 50, dataset="digits", epochs=4, batch_size=32)
    two = line("cifar10/resnet20", "sgd", 1, 60, dataset="digits", epochs=4, batch_size=32)
    two |= {"versions": {"python": "3.13.1", "jax": "0.10.2"}, "images_per_second": None}
    output = write_lines(tmp_path / "table", one, two)
    assert report(output) == 0
    text = (output / "table.md").read_text()
    assert (
        "**The images are not CIFAR-10's (digits stands in for them), and the runs have 4 epochs "
        "instead of 405, and the batches have 32 images instead of 128: differences to the paper "
        "are not to be read as errors of either.**"
    ) in text
    assert "* versions: python 3.11.7 and 3.13.1, jax 0.10.2\n" in text
    assert "adamg" not in text
    assert rows(output, "cifar10/resnet20 on digits")["sgd"][6] == "1000"

    output = write_lines(tmp_path / "one", line("svhn/vgg16", "adam", 0, 9, images_per_second=None))
    assert report(output) == 0
    assert rows(output, "svhn/vgg16")["adam"][:4] == ["9.00", "1", "95.57 ± 0.20", "−86.57"]
    assert rows(output, "svhn/vgg16")["adam"][6] == "–"


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_report_that_fails_leaves_the_one_before(no_picture, tmp_path, monkeypatch, capsys):
    assert report(write_lines(tmp_path, line("svhn/vgg16", "sgd", 0, 90))) == 0

    def fill_the_disk(path, runs):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(paper_table, "draw", fill_the_disk)
    assert report(tmp_path) == 1
    assert "error: No space left on device; what " in capsys.readouterr().err
    assert names(tmp_path) == {"runs.jsonl", "table.md", "table.png"}
    assert (tmp_path / "table.png").read_bytes() == b"picture"


def red(path: Path) -> int:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) >= 300
    return int((np.abs(pixels - (0xC0, 0x39, 0x2B)).sum(-1) < 30).sum())


def test_picture(tmp_path):
    def colour(optimizer: str, *percents: float) -> int:
        lines = [line("cifar10/resnet20", optimizer, n, p) for n, p in enumerate(percents)]
        assert report(write_lines(tmp_path, *lines)) == 0
        assert names(tmp_path) == {"runs.jsonl", "table.md", "table.png"}
        return red(tmp_path / "table.png")

    legend = colour("sgd", 92.3, 92.4)
    assert legend > 0
    assert colour("sgd", 90.0, 90.1) > 2 * legend  # the square and the words beside it
    assert colour("adamg", 20.0, 20.1) < 1.2 * legend  # not comparable
    assert colour("sgd", 20.0) < 1.2 * legend  # a single run


def test_picture_of_the_whole_table(tmp_path):
    lines = [
        line(setting, optimizer, seed, figure.mean + seed)
        for setting, row in paper_table.PAPER.items()
        for optimizer, figure in row.items()
        for seed in range(2)
    ]
    assert report(write_lines(tmp_path, *lines)) == 0
    with Image.open(tmp_path / "table.png") as picture:
        assert min(picture.size) > 1000


def test_lines_that_are_no_runs(whole, trainer, no_picture, tmp_path, capfd):
    whole = shutil.copytree(whole, tmp_path / "table")
    good = (whole / "runs.jsonl").read_text()
    first, *rest = good.splitlines()
    capfd.readouterr()
    for torn in (
        first[:-20],
        "[]",
        "3",
        json.dumps({**json.loads(first), "setting": "cifar10/alexnet"}),
        json.dumps({**json.loads(first), "test_accuracy": float("nan")}),
        json.dumps({name: value for name, value in json.loads(first).items() if name != "device"}),
    ):
        trainer.with_name("calls.txt").unlink(missing_ok=True)
        (whole / "runs.jsonl").write_text("\n".join([*rest, torn]))
        assert main(whole, *TWO) == 0
        lines = (whole / "runs.jsonl").read_text().split("\n")
        assert lines[:8] == [*rest, torn] and lines[9:] == [""]
        assert json.loads(lines[8]) == json.loads(first)
        warning = f"warning: line 8 of {whole}/runs.jsonl is no whole run and is ignored\n"
        assert warning in capfd.readouterr().err
        # The run is in the cell's directory still: nothing is trained again.
        assert calls(trainer) == []

    (whole / "runs.jsonl").write_text("\n".join([*rest, first]))  # only the newline is missing
    assert main(whole, *TWO) == 0
    assert report(whole) == 0
    assert capfd.readouterr().err == ""


def test_a_run_counts_once(no_picture, tmp_path):
    lines = [line("svhn/vgg16", "sgd", 0, percent) for percent in (90, 50)]
    output = write_lines(tmp_path / "table", *lines)
    assert report(output) == 0
    assert rows(output, "svhn/vgg16")["sgd"][:2] == ["90.00", "1"]


PROTOCOLS = {
    "--epochs 4": "--epochs 3, not 4",
    "--batch_size 64": "--batch_size 128, not 64",
    "--precision bfloat16": "--precision float32, not bfloat16",
    "--dataset digits": "--dataset (none), not digits",
}


@pytest.mark.parametrize("arguments", PROTOCOLS)
def test_an_output_has_one_protocol(arguments, trainer, no_picture, tmp_path, capfd):
    output = write_lines(tmp_path / "table", line("cifar10/resnet20", "sgd", 0, 90, epochs=3))
    command = ["--epochs", "3", "--seeds", "1", "--output", str(output)]
    assert reproduce_table.main([*command, *arguments.split()]) == 2
    assert capfd.readouterr().err == (
        f"reproduce_table.py: error: {output}/runs.jsonl holds a run of another protocol: "
        f"{PROTOCOLS[arguments]}\n"
    )
    assert calls(trainer) == [] and names(output) == {"runs.jsonl"}


def test_report_refuses_mixed_and_missing_runs(tmp_path, capsys):
    assert report(tmp_path / "nothing") == 2
    assert f"there are no runs in {tmp_path}/nothing/runs.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
    lines = [line("svhn/vgg16", "sgd", n, 90, epochs=epochs) for n, epochs in enumerate((4, 9))]
    output = write_lines(tmp_path / "table", *lines)
    assert report(output) == 2
    assert "holds a run of another protocol: --epochs 9, not 4\n" in capsys.readouterr().err
    assert names(output) == {"runs.jsonl"}


def test_a_stand_in_serves_cifar10_only(trainer, no_picture, tmp_path, capsys):
    output = tmp_path / "table"
    arguments = ["--dataset", "folder:a b", "--optimizers", "sgd", "--seeds", "1"]
    assert main(output, *arguments) == 0
    runs, _ = table_runs.load(output / "runs.jsonl")
    assert {key[0] for key in runs} == {f"cifar10/{m}" for m in ("resnet20", "resnet18", "vgg16")}
    assert {run.protocol.stand_in for run in runs.values()} == {"folder:a b"}
    assert "## cifar10/vgg16 on folder:a b\n" in (output / "table.md").read_text()
    assert "--dataset=folder:a b --model=resnet20 " in calls(trainer)[0]


REFUSALS = {
    "--settings cifar10/alexnet": "unknown 'cifar10/alexnet' (choose from cifar10/resnet20, ",
    "--settings svhn/vgg16,svhn/vgg16": "svhn/vgg16 is named twice",
    "--settings=": "unknown ''",
    "--optimizers sgd,adamax": "unknown 'adamax' (choose from sgd, adam, adamw, ",
    "--optimizers sgd,sgd": "sgd is named twice",
    "--seeds 0": "'0' is not an integer from 1",
    "--epochs x": "'x' is not an integer from 1",
    "--batch_size -1": "'-1' is not an integer from 1",
    "--precision float16": "invalid choice: 'float16'",
    "--dataset cifar10": "'cifar10' is neither digits nor folder:PATH",
    "--dataset folder:": "'folder:' is neither digits nor folder:PATH",
    "--dataset digits --settings svhn/vgg16": "digits stands in for cifar10, not for svhn/vgg16",
    "--seed 1": "unrecognized arguments: --seed 1",
}


@pytest.mark.parametrize("arguments", REFUSALS)
def test_refusals(arguments, tmp_path, capsys):
    output = tmp_path / "table"
    try:
        code = reproduce_table.main([*arguments.split(), "--output", str(output)])
    except SystemExit as error:
        code = error.code
    assert code == 2
    err = capsys.readouterr().err.splitlines()
    assert len([text for text in err if not text.startswith("usage:")]) == 1
    assert err[-1].startswith("reproduce_table.py: error: ")
    assert REFUSALS[arguments] in err[-1]
    assert not output.exists()


def test_an_output_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(tmp_path / "file") == 2
    assert main(tmp_path / "file" / "table") == 2
    assert capsys.readouterr().err.count("error: cannot create ") == 2


def test_help_and_refusals_start_neither_jax_nor_matplotlib():
    program = (
        "import sys, reproduce_table\n"
        "for arguments in (['--help'], ['--epochs', '0']):\n"
        "    try: reproduce_table.main(arguments)\n"
        "    except SystemExit: pass\n"
        "sys.exit(bool({'jax', 'matplotlib', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "(default: 5)" in done.stdout
