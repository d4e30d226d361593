"""Bad input and states: one clear sentence each, exit code 2, and nothing is half written."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bad_arguments
import bad_library
import bad_states


@pytest.mark.parametrize("call", bad_library.ROWS)
def test_the_library_refuses(call):
    error, _, words = bad_library.ROWS[call].partition(": ")
    with pytest.raises((TypeError, ValueError)) as raised:
        eval(call, dict(bad_library.NAMES))
    assert type(raised.value).__name__ == error
    assert words in str(raised.value)


def contents(directory: Path) -> dict[str, bytes | None]:
    """All that a directory holds."""
    return {
        str(path): path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
        for path in directory.rglob("*")
    }


def assert_refused(command: str, words: str, capsys: pytest.CaptureFixture) -> None:
    """The command, which writes to the current directory by default, writes a sentence only."""
    name, *arguments = command.format(long="x" * 300).split()
    before = contents(Path())
    try:
        code = importlib.import_module(name).main(arguments)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("usage:")]
    assert (code, out, len(lines)) == (2, "", 1), (out, err)
    assert lines[0].startswith(f"{name}.py: error: ") and words in lines[0]
    assert contents(Path()) == before


@pytest.mark.parametrize("command", bad_arguments.ROWS)
def test_commands_refuse_arguments(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    os.mkdir("empty")
    assert_refused(command, bad_arguments.ROWS[command], capsys)


@pytest.fixture
def root_as_user(monkeypatch):
    """Directories that their owner may not write are no directories to write for root either."""
    access = os.access

    def by_permissions(path, mode, **options):
        own = Path(path).stat().st_mode >> 6 if os.path.exists(path) else 7
        return access(path, mode, **options) and mode & own == mode

    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", by_permissions)


@pytest.mark.parametrize(
    "state", bad_states.ROWS, ids=lambda state: f"{state.command} ({', '.join(state.there)})"
)
def test_commands_refuse_states(state, tmp_path, monkeypatch, capsys, root_as_user):
    there, command, words, as_root = state
    if os.geteuid() == 0 and not as_root:
        pytest.skip("root may read all")
    monkeypatch.chdir(tmp_path)
    bad_states.make(there)
    assert_refused(command, words, capsys)


@pytest.mark.parametrize(
    "command",
    [
        "examples/train_cifar.py --output a/{long}",
        "examples/train_lm.py --optimiser muon_h",
        "examples/compare_runs.py nowhere",
        "benchmarks/lm_sweep.py --report",
    ],
)
def test_programs_refuse_as_their_functions_do(command, tmp_path):
    root = Path(__file__).parents[1]
    file, *arguments = command.format(long="x" * 300).split()
    done = subprocess.run(
        [sys.executable, root / file, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(f"{Path(file).name}: error: ")
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
