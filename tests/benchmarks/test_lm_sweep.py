"""The sweep of learning rates, with a trainer that trains nothing."""

import math
from pathlib import Path

import pytest

import lm_sweep
from sweep import lm_report, lm_runs
from sweep.lm_runs import Key, Run

FAKE = """\
import json, math, sys
from pathlib import Path

options = dict(a.removeprefix("--").split("=") for a in sys.argv[1:] if "=" in a)
kinds = {"learning_rate": float, "output": str, "optimizer": str, "architecture": str}
options = {name: kinds.get(name, int)(value) for name, value in options.items()}
output = Path(options.pop("output"))
output.mkdir(parents=True, exist_ok=True)
arguments = options | {"heads": 4, "text_sha256": "abc"}
(output / "arguments.json").write_text(json.dumps(arguments))
if options["learning_rate"] > 0.15:
    (output / "failed.json").write_text("{}")  # as after a loss that is no number
    sys.exit(1)
# The lowest loss is at twice the recipe's learning rate, and falls with the width.
best = {"adamw": 0.02, "muon_h": 0.08}[options["optimizer"]]
loss = 1 + math.log2(options["learning_rate"] / best) ** 2 + 8 / options["width"]
loss += 0.01 * options["seed"]
lines = [{"step": 10 * i, "valid_loss": loss / i} for i in (1, 2)]
(output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
summary = {"seconds": 1.0, "tokens_per_second": 9.0, "versions": {"python": "3"}}
summary |= {"device": "cpu", "git_revision": "0" * 40}
(output / "summary.json").write_text(json.dumps(summary))
(output / "checkpoints").mkdir()
"""
OPTIONS = (
    "--architectures qwen3 --optimizers adamw,muon_h --widths 32,64 --steps 20 --eval_every 10"
)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    trainer = tmp_path / "trainer.py"
    trainer.write_text(FAKE)
    monkeypatch.setattr(lm_sweep, "TRAINER", trainer)
    monkeypatch.setattr(lm_report, "_draw", lambda path, runs: path.write_bytes(b"picture"))
    return lambda options: lm_sweep.main([*options.split(), "--output", str(tmp_path / "sweep")])


def test_each_optimizer_has_as_many_rates_around_its_recipes():
    assert lm_sweep.rates("adamw", 5) == [0.0025, 0.005, 0.01, 0.02, 0.04]
    assert lm_sweep.rates("adamw", 2) == [0.01, 0.02]


def test_all_rates_are_trained_and_then_the_best_with_more_seeds(sweep, tmp_path, capfd):
    assert sweep(f"{OPTIONS} --points 5 --seeds 3") == 0
    runs, broken = lm_runs.load(tmp_path / "sweep/runs.jsonl")
    assert not broken and len(runs) == 2 * 2 * (5 + 2)
    more = {key for key in runs if key.seed}
    assert more == {
        Key("qwen3", width, name, rate, seed)
        for width in (32, 64)
        for name, rate in (("adamw", 0.02), ("muon_h", 0.08))
        for seed in (1, 2)
    }
    assert not list((tmp_path / "sweep").glob("cells/*/run/checkpoints"))
    table = (tmp_path / "sweep/table.md").read_text()
    assert "| adamw | 0.02 | 0.6300 ± 0.0050 | 3 | – | 0.0025: 5.125, " in table
    capfd.readouterr()
    assert sweep(f"{OPTIONS} --points 5 --seeds 3") == 0  # nothing is trained again
    assert "run 1/" not in capfd.readouterr().out


def test_a_best_rate_at_the_edge_is_marked(sweep, tmp_path):
    assert sweep(f"{OPTIONS} --points 3 --seeds 1") == 0
    assert "| adamw | 0.02 (edge) |" in (tmp_path / "sweep/table.md").read_text()


def test_a_rate_that_is_too_large_is_a_result(sweep, tmp_path):
    assert sweep(f"{OPTIONS} --points 9 --seeds 1") == 0
    runs = lm_runs.load(tmp_path / "sweep/runs.jsonl")[0]
    assert runs[Key("qwen3", 32, "adamw", 0.16, 0)].loss == math.inf
    assert "0.16: –" in (tmp_path / "sweep/table.md").read_text()


def test_runs_of_another_protocol_are_refused(sweep, capfd):
    assert sweep(f"{OPTIONS} --points 1 --seeds 1") == 0
    assert sweep(f"{OPTIONS} --points 1 --seeds 1 --depth 3") == 2
    assert "holds a run with another protocol: depth 2 and not 3" in capfd.readouterr().err
    assert sweep("--report --depth 3") == 0


@pytest.mark.parametrize("code", [1, 2])  # a full disk; a refusal
def test_a_trainer_that_cannot_train_fails_the_sweep(code, sweep, tmp_path, monkeypatch, capfd):
    broken = tmp_path / "broken.py"
    broken.write_text(f"import sys; sys.exit({code})")
    monkeypatch.setattr(lm_sweep, "TRAINER", broken)
    assert sweep(f"{OPTIONS} --points 1 --seeds 1") == 1
    assert f"failed: qwen3-32-adamw-0.01-0: exit code {code}" in capfd.readouterr().err


def test_the_picture_is_drawn(tmp_path):
    runs = [
        Run(Key("qwen3", width, name, rate, seed), {"steps": 10}, [2.0, loss], 1.0, {})
        for width in (32, 64)
        for name in ("adamw", "muon_h")
        for rate, seed, loss in ((0.1, 0, 1.5), (0.2, 0, 1.2), (0.4, 0, 1.3), (0.2, 1, 1.25))
    ]
    lm_report._draw(tmp_path / "picture.png", runs)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_table_is_of_the_committed_lines():
    results = Path(lm_sweep.__file__).parent / "results/lm_sweep_cpu"
    if not (results / "runs.jsonl").exists():
        pytest.skip("no results are committed yet")
    runs, broken = lm_runs.load(results / "runs.jsonl")
    assert not broken
    assert "\n".join(lm_report._lines(list(runs.values()))) == (results / "table.md").read_text()
