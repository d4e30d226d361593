"""Lines of figures with a value of another type, in each of the reports: left out, or harmless."""

import copy
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from architectures import atlas_report
from compiled import compiled_report
from steps import step_report
from sweep import lm_report
from table import table_report
from throughput import throughput_report
from training import files

RESULTS = Path(table_report.__file__).parents[1] / "results"
OF_SWEEP = {
    "arguments": {
        **{"architecture": "qwen3", "width": 32, "optimizer": "adamw", "learning_rate": 0.02},
        **{"seed": 0, "depth": 2, "heads": 4, "context": 8, "batch_size": 8, "steps": 20},
        **{"eval_every": 10, "text_sha256": "abc"},
    },
    "losses": [3.0, 2.0],
    **{"seconds": 1.0, "versions": {"python": "3"}, "device": "cpu", "git_revision": "abc"},
}
REPORTS = {
    "reproduce_table": (table_report, "draw", "cifar10_jpeg/runs.jsonl"),
    "lm_sweep": (lm_report, "_draw", None),
    "atlas": (atlas_report, "draw", "atlas/atlas.jsonl"),
    "optimizer_step": (step_report, "draw", "optimizer_step_cpu/runs.jsonl"),
    "training_throughput": (throughput_report, "draw", "training_throughput_cpu/runs.jsonl"),
    "compiled_for_gpu": (compiled_report, "draw", "compiled_for_gpu/runs.jsonl"),
}
VALUES = [None, "", -1, 0, float("nan"), 10**400, [1], {}]


def places(value: Any, depth: int = 0) -> Iterator[tuple]:
    """Keys that lead to all values, and to those in them."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, inner in items:
        yield (key,)
        if isinstance(inner, dict | list) and depth < 2:
            yield from ((key, *rest) for rest in places(inner, depth + 1))


def changed(line: Any, place: tuple, value: Any) -> str:
    line = copy.deepcopy(line)
    inner = line
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(line)


@pytest.mark.parametrize("command", REPORTS)
def test_a_report_passes_over_a_line_with_another_value(command, tmp_path, monkeypatch, capsys):
    report, draw, file = REPORTS[command]
    monkeypatch.setattr(report, draw, lambda path, *_: path.write_bytes(b"picture"))
    first, *rest = (RESULTS / file).read_text().splitlines() if file else [json.dumps(OF_SWEEP)]
    monkeypatch.setattr(files, "_flush", lambda path: None)  # to the disk, which takes time
    lines = tmp_path / Path(file or "runs.jsonl").name
    main = importlib.import_module(command).main
    for place in places(json.loads(first)):
        for value in VALUES:
            line = changed(json.loads(first), place, value)
            lines.write_text("\n".join([line, *rest[:8]]) + "\n")
            (tmp_path / "table.md").unlink(missing_ok=True)
            code = main(["--report", "--output", str(tmp_path)])
            err = capsys.readouterr().err
            assert code in (0, 2), (place, value, err)
            assert err.count("\n") == ("is no whole" in err) + ("error: " in err), err
            if code == 0:
                assert "nan" not in (tmp_path / "table.md").read_text().lower().split(), place


DEEP = "[" * 100_000


@pytest.mark.parametrize("damage", ["{", DEEP, '{"a": ' + "1" * 5000 + "}", "\0", "[]", "3"])
@pytest.mark.parametrize("command", REPORTS)
def test_a_report_passes_over_a_line_that_is_no_object(command, damage, tmp_path, capsys):
    file = REPORTS[command][2] or "runs.jsonl"
    (tmp_path / Path(file).name).write_text(f"{damage}\n")
    assert importlib.import_module(command).main(["--report", "--output", str(tmp_path)]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert f"{command}.py: warning: line 1 of " in warning and "and is ignored" in warning
    assert f"{command}.py: error: there are no " in error
