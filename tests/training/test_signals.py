"""Signals that come at awkward moments."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import atlas
from training import ending
from training.signals import stop_signals

BENCHMARKS = Path(atlas.__file__).parent
SENT = pytest.mark.parametrize(
    ("signum", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    ids=["Ctrl-C", "SIGTERM"],
)


class Unraisable:
    """Whose end ignores what is raised in it, as a callback of the garbage collection does."""

    def __init__(self, signum: int):
        self.signum = signum

    def __del__(self):
        signal.raise_signal(self.signum)


@SENT
def test_a_signal_that_python_ignores_comes_again(signum, code, word, capsys):
    def command(signals):
        dropped = Unraisable(signum)
        del dropped
        time.sleep(30)

    began = time.monotonic()
    assert ending.outcome("it", command) == code
    assert time.monotonic() - began < 20
    assert capsys.readouterr().err == f"it: {word}\n"


@SENT
def test_a_signal_of_which_something_makes_an_error(signum, code, word, capsys):
    def command(signals):
        try:
            signal.raise_signal(signum)
        except BaseException as error:
            raise ImportError("cannot import it") from error

    assert ending.outcome("it", command, stopped=lambda: "all is kept") == code
    assert capsys.readouterr().err == f"it: {word}; all is kept\n"


def test_an_error_after_a_signal_that_waits_stays_an_error(capsys):
    def command(signals):
        with signals.defer():
            signal.raise_signal(signal.SIGTERM)
        raise OSError("no space left on device")

    assert ending.outcome("it", command, failed="nothing is lost") == 1
    assert capsys.readouterr().err == "it: error: no space left on device; nothing is lost\n"


@SENT
def test_a_signal_is_held_back_from_imports(signum, code, word, capsys):
    imported = []

    def command(signals):
        with signals.held():
            signal.raise_signal(signum)
            imported.append("all")
        imported.append("more")

    assert ending.outcome("it", command) == code
    assert imported == ["all"]


def test_what_was_there_before_is_there_again():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers], sys.unraisablehook
    with stop_signals():
        pass
    assert ([signal.getsignal(number) for number in numbers], sys.unraisablehook) == before


@pytest.mark.parametrize(
    "moments", [pytest.param(1, marks=pytest.mark.slow), pytest.param(25, marks=pytest.mark.long)]
)
@SENT
@pytest.mark.parametrize(
    "command",
    ["optimizer_step.py --models resnet20", "training_throughput.py --batch_sizes 16", "atlas.py"],
)
def test_benchmarks_stop_at_any_moment(command, signum, code, word, moments, tmp_path):
    for moment in range(moments):
        process = subprocess.Popen(
            [sys.executable, *f"{BENCHMARKS}/{command} --output {tmp_path / 'out'}".split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        time.sleep(8 * (moment + 0.5) / moments)
        process.send_signal(signum)
        _, err = process.communicate(timeout=100)
        assert process.returncode in (code, -signum), err  # before `main` it ends without a word
        assert "Traceback" not in err
        assert process.returncode < 0 or f" {word}; what " in err.splitlines()[-1]


@pytest.mark.parametrize("command", ["atlas.py", "optimizer_step.py"])
def test_a_reader_that_goes_away_is_no_error(command, tmp_path):
    """As in `| head`: the results that are there are reported to nobody."""
    results = {"atlas.py": "atlas", "optimizer_step.py": "optimizer_step_cpu"}[command]
    shutil.copytree(BENCHMARKS / "results" / results, tmp_path / "results")
    read, write = os.pipe()
    os.close(read)
    arguments = [sys.executable, f"{BENCHMARKS}/{command}", "--report", "--output"]
    process = subprocess.run(
        [*arguments, str(tmp_path / "results")], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (1, b"")
