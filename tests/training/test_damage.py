"""What befalls runs: odd paths, damaged files, poor environments, signals that get lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import compare_runs
import reproduce_table
import train_cifar
from ends import assert_same_end
from images import figures
from images.figures import draw_curves
from images.sources import DataError, read_folder
from table import table_cells, table_report, table_runs
from test_processes import FAST
from tiny import compile_once, draw_nothing, make_data, use_tiny, write_images
from training import checkpoints, command, files, records

RESULTS = Path(reproduce_table.__file__).parent / "results"


def message(path):
    with pytest.raises(DataError) as error:
        read_folder(path)
    return str(error.value)


@pytest.fixture(scope="module")
def tiny(compiled_quickly):
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch, make_data())
        draw_nothing(patch)
        compile_once(patch)
        yield


def train(output, *options):
    arguments = f"--epochs 2 --batch_size 5 --seed 3 --geometry --output {output}".split()
    return train_cifar.main([*arguments, *options])


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train(output) == 0
    return output


@pytest.mark.parametrize("title", ["images$", "bytes\udcff", "$\\frac$"])
def test_a_picture_takes_any_path_in_its_title(title, tmp_path):
    line = figures.Metrics(1, 0.1, 2.0, 0.1, 2.0, 0.1, 9.0)
    draw_curves(
        tmp_path / "curves.png", [line], None, title=title, schedule=lambda step: 0.1,
        milestones=[1], steps_per_epoch=3,
    )  # fmt: skip
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_fails_is_a_warning(tiny, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(figures, "draw_curves", fail)
    assert train(tmp_path / "run") == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["best_epoch"]
    assert "warning: curves.png could not be drawn (no fonts)" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_damaged_summary_is_made_again(damage, whole, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "summary.json").write_bytes(damage)
    assert train(output, "--resume") == 0
    assert_same_end(output, whole)


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"arrays": 1}', "{"])
def test_checksums_of_nothing_are_damaged(content, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    newest = max((tmp_path / "run/checkpoints").iterdir(), key=lambda path: int(path.name))
    (newest / checkpoints.CHECKSUMS).write_text(content)
    assert checkpoints._damaged_file(newest)


@pytest.mark.parametrize("line", [b'{"epoch": 1, "x": NaN}', b"\xff\xfe", b"[1]", b"", b'{"a": 1}'])
def test_a_damaged_line_of_figures_is_left_empty(line, tmp_path):
    path = tmp_path / "geometry.jsonl"
    path.write_bytes(line + b'\n{"epoch": 2, "x": 0.5}\n')
    assert records.read_lines(path, "epoch", [1, 2]) == [{"epoch": 1}, {"epoch": 2, "x": 0.5}]


def test_what_replaces_a_file_is_on_the_disk_before_it_does(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    files.replace_file(tmp_path / "file", lambda path: path.write_text("content"))
    assert order == ["fsync", "replace", "fsync"]


def test_an_unreadable_class_is_no_smaller_set(tmp_path, monkeypatch):
    """It was left out in silence; root may read all, so its listing fails here by itself."""
    root, iterdir = write_images(tmp_path / "images"), Path.iterdir

    def refuse(path):
        if path.name == "b" and path.parent.name == "test":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert message(root).endswith("test/b cannot be read: Permission denied.")


def test_runs_that_cannot_be_listed_are_no_fewer_runs(whole, tmp_path, monkeypatch, capsys):
    def walk(directory, onerror):
        yield str(directory), [], ["arguments.json", "metrics.jsonl"]
        onerror(PermissionError(13, "Permission denied", f"{directory}/seed-1"))

    monkeypatch.setattr(os, "walk", walk)
    assert compare_runs.main([str(whole), "--output", str(tmp_path / "x.png")]) == 2
    assert "seed-1: Permission denied" in capsys.readouterr().err


def run_command(arguments, **environment):
    path = os.environ.get("PATH", "")
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tiny_command.py")), *arguments.split()],
        capture_output=True,
        text=True,
        env={"PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)} | FAST | environment,
    )


def test_a_platform_that_is_not_there_is_refused():
    done = run_command("--epochs 1", JAX_PLATFORMS="cuda")
    assert done.returncode == 2, done.stderr
    assert "train_cifar.py: error: JAX has no device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_poor_environment_does_not_end_a_training(tmp_path):
    """No HOME, and a terminal that knows ASCII only, for the ± of two seeds."""
    output = tmp_path / "run"
    done = run_command(
        f"--epochs 1 --batch_size 8 --seeds 2 --output {output}",
        PYTHONIOENCODING="ascii",
        LC_ALL="C",
    )
    assert done.returncode == 0, done.stderr
    assert "\\xb1" in done.stdout
    assert (output / "seed-0/curves.png").exists()


def test_pictures_need_no_screen():
    code = """from training.command import prepare_process
prepare_process()
import training.curves"""
    environment = {"MPLBACKEND": "nonsense", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_signal_whose_exception_got_lost_still_stops(tiny, tmp_path, monkeypatch, capsys):
    """As in a callback of JAX while something is compiled, between start and the first step."""
    draw_nothing = train_cifar.recipes.milestones

    def lose(*arguments):
        with pytest.raises(BaseException):  # noqa: B017
            signal.raise_signal(signal.SIGTERM)
        return draw_nothing(*arguments)

    monkeypatch.setattr(train_cifar.recipes, "milestones", lose)
    assert train(tmp_path / "run") == 143
    assert "terminated" in capsys.readouterr().err


def lines_of_a_table():
    return (RESULTS / "cifar10_jpeg/runs.jsonl").read_text().splitlines()


@pytest.mark.parametrize("field, value", [
    ("test_accuracy", 7), ("test_accuracy", float("nan")), ("test_accuracy", "0.5"),
    ("seconds", 0), ("seconds", -1), ("seconds", float("nan")), ("versions", []), ("setting", 3),
    ("arguments", None), ("images_per_second", "many"),
])  # fmt: skip
def test_a_line_of_a_table_with_a_wrong_value_is_left_out(field, value, tmp_path):
    first, second, *_ = lines_of_a_table()
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(json.loads(first) | {field: value}) + "\n" + second + "\n")
    runs, broken = table_runs.load(path)
    assert len(runs) == 1 and broken == [1]
    assert table_report.table(runs)


def test_a_damaged_cell_does_not_stop_the_table(tmp_path, capsys):
    cell = table_cells.Cell("cifar10/resnet20", "adam", range(0, 1))
    home = table_cells.directory(tmp_path, cell)
    home.mkdir(parents=True)
    (home.parent / "seeds-0-0-old").mkdir()
    (home / "summary.json").write_text("{")
    table_cells.tidy_up(tmp_path, {("cifar10/resnet20", "adam", 0)}, [])
    table_cells.close(tmp_path, cell)
    (home / "summary.json").write_text(json.dumps({"test_accuracy": 0.5}))
    (home / "metrics.jsonl").write_text("{torn")
    table_cells.close(tmp_path, cell)
    assert f"{home / 'metrics.jsonl'} is damaged or missing: remove " in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


def test_streams_keep_what_they_cannot_show_as_an_escape(capfd):
    command.prepare_process()
    print("\udcff")
    assert "\\udcff" in capfd.readouterr().out


def test_nothing_that_is_read_can_be_executed():
    """As docs/security.md says."""
    ways = re.compile(r"\b(pickle|cPickle|dill|joblib|marshal|shelve|(?<!literal_)eval|exec)\b")
    root = Path(reproduce_table.__file__).parents[1]
    for directory in ("spherical_optax", "examples", "benchmarks"):
        for path in (root / directory).rglob("*.py"):
            assert not ways.search(path.read_text(encoding="utf-8")), path
