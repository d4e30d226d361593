"""What the commands that draw runs have in common: how they start, and end."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import compare_runs
from made_runs import add_geometry, make_run

EXAMPLES = Path(compare_runs.__file__).parent
PICTURES = {"compare_runs": "compare.png", "plot_geometry": "geometry.png"}
ENDS = {
    KeyboardInterrupt(): (130, "interrupted"),
    OSError(28, "No space left on device"): (1, "error: [Errno 28] No space left on device"),
    ModuleNotFoundError("No module named 'x'"): (
        2,
        "error: No module named 'x'; install it with: pip install -e '.[examples]'",
    ),
}


@pytest.mark.parametrize("error", ENDS, ids=repr)
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_written_whole_or_not_at_all(name, error, tmp_path, capsys, monkeypatch):
    run, output = add_geometry(make_run(tmp_path / "run")), tmp_path / PICTURES[name]
    output.write_bytes(b"the old picture")

    def fail(*_):
        raise error

    command = importlib.import_module(name)
    monkeypatch.setattr(command, "draw", lambda *_: Figure((1, 1)))  # what is drawn does not matter
    monkeypatch.setattr(os, "replace", fail)
    code, message = ENDS[error]
    assert command.main([str(run), "--output", str(output)]) == code
    assert capsys.readouterr() == ("", f"{name}.py: {message}\n")
    assert output.read_bytes() == b"the old picture"
    assert {path.name for path in tmp_path.iterdir()} == {"run", output.name}


@pytest.mark.parametrize("name", PICTURES)
def test_the_commands_do_not_start_jax(name, tmp_path):
    add_geometry(make_run(tmp_path / "run", optimizer="sgdmrt"))
    program = (
        f"import sys, {name} as command\n"
        "try: command.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'matplotlib' not in sys.modules\n"
        "assert command.main(sys.argv[1:]) == 0\n"
        "sys.exit('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    command += ["--output", str(tmp_path / "picture.png")]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "examples:" in said and f"(default: {PICTURES[name]})" in said
