"""The README: its Python runs and prints what it says, and its commands are understood."""

import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"python examples/train_cifar\.py (.+)", README)


def test_the_python_blocks_run_and_print_what_the_text_says(capsys):
    namespace = {}
    pairs = zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True)
    count = 0
    for (language, source), (following, text) in pairs:
        if language == "python":
            exec(compile(source, "README.md", "exec"), namespace)
            count += 1
            printed = capsys.readouterr().out
            if following == "text":
                assert printed == text
    assert count >= 4


def test_there_are_two_shell_commands():
    shell = [source for language, source in BLOCKS if language == "bash"]
    assert len(shell) == 2  # one trains, one tests; .ci/run runs both
    assert "train_cifar.py" in shell[0] and "pytest" in shell[1]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_the_commands_are_understood(arguments, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train_cifar

    with pytest.raises(SystemExit) as end:  # arguments before --help are checked
        train_cifar.main([*shlex.split(arguments), "--help"])
    assert end.value.code == 0 and "--optimizer" in capsys.readouterr().out


def test_the_accuracies_on_digits_are_those_of_the_raw_results():
    table = re.search(r"^(\| `--optimizer`.*)\n.*\n(.*)$", README, re.MULTILINE)
    header, row = table.groups()
    names = re.findall(r"`(\w+)`", header)
    figures = re.findall(r"\d+\.\d+", row)
    assert len(names) == len(figures) == 7
    for name, figure in zip(names, figures, strict=True):
        summary = ROOT / "benchmarks" / "results" / "digits" / name / "summary.json"
        result = json.loads(summary.read_text())
        assert result["arguments"]["optimizer"] == name
        assert f"{100 * result['test_accuracy']:.2f}" == figure


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
