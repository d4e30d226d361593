"""The table beside the paper's figures: table.md and table.png, made from runs.jsonl alone."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

import table_lines
from table import paper_figures, table_report
from table_lines import line, names, report, write_lines

GOLDENS = Path(__file__).parents[1] / "goldens"
no_picture = table_lines.no_picture  # a fixture


def rows(output: Path, setting: str) -> dict[str, list[str]]:
    """The rows of a setting's table by optimizer, without the name."""
    section = (output / "table.md").read_text().split(f"\n## {setting}\n")[1].split("\n## ")[0]
    cells = [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| ")]
    return {name: rest for name, *rest in cells[1:]}


def test_paper_figures_are_the_published_ones():
    published = json.loads((GOLDENS / "recipes.json").read_text())["paper_test_accuracy_percent"]
    ours = {
        setting: {name: figure._asdict() for name, figure in row.items()}
        for setting, row in paper_figures.PAPER.items()
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
        figure = paper_figures.PAPER[key[0]][key[1]]
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
    assert "not to be compared" not in text
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
        "instead of 405, and the batches have 32 images instead of 128: accuracies are not to be "
        "compared with the paper's, differences between optimizers may be.**"
    ) in text
    assert "* versions: python 3.11.7 and 3.13.1, jax 0.10.2\n" in text
    assert "adamg" not in text
    # Without the paper's accuracy, and a rate of one run only.
    deviation = f"{np.std([50, 60], ddof=1):.2f}"
    assert rows(output, "cifar10/resnet20 on digits")["sgd"] == [
        *(f"55.00 ± {deviation}", "2", "100", "10.5", "1000", "2")
    ]
    assert "▲" not in text

    output = write_lines(tmp_path / "one", line("svhn/vgg16", "adam", 0, 9, images_per_second=None))
    assert report(output) == 0
    assert rows(output, "svhn/vgg16")["adam"][:4] == ["9.00", "1", "95.57 ± 0.20", "−86.57"]
    assert rows(output, "svhn/vgg16")["adam"][6] == "–"


def test_differences_are_of_the_seeds_that_both_have(no_picture, tmp_path):
    percents = {"adam": {0: 80, 1: 81, 2: 85}, "adamsrt": {1: 82.5, 2: 86, 3: 9}, "sgdmrt": {0: 90}}
    output = write_lines(
        tmp_path / "table",
        *(
            line("cifar10/vgg16", name, seed, value, epochs=20)
            for name, values in percents.items()
            for seed, value in values.items()
        ),
    )
    assert report(output) == 0
    found = rows(output, "cifar10/vgg16")
    paper = f"+0.92 ± {np.hypot(0.06, 0.17):.2f}"  # 93.75 and 92.83
    ours = f"+1.25 ± {np.std([1.5, 1.0], ddof=1):.2f}"
    assert found["adamsrt − adam"] == [ours, "2", paper]
    assert "adams − adam" not in found and "sgdmrt − sgd" not in found


def test_a_report_that_fails_leaves_the_one_before(no_picture, tmp_path, monkeypatch, capsys):
    assert report(write_lines(tmp_path, line("svhn/vgg16", "sgd", 0, 90))) == 0

    def fill_the_disk(path, runs):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(table_report, "draw", fill_the_disk)
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


def test_the_picture_of_another_protocol_shows_differences_and_no_marks(tmp_path):
    lines = [
        line("cifar10/resnet20", name, seed, 10 * seed, epochs=20)
        for name in ("sgd", "sgdmrt", "adam", "adamsrt")
        for seed in range(2)
    ]
    assert report(write_lines(tmp_path, *lines)) == 0
    assert red(tmp_path / "table.png") == 0


def test_picture_of_the_whole_table(tmp_path):
    lines = [
        line(setting, optimizer, seed, figure.mean + seed)
        for setting, row in paper_figures.PAPER.items()
        for optimizer, figure in row.items()
        for seed in range(2)
    ]
    assert report(write_lines(tmp_path, *lines)) == 0
    with Image.open(tmp_path / "table.png") as picture:
        assert min(picture.size) > 1000


def test_a_run_counts_once(no_picture, tmp_path):
    lines = [line("svhn/vgg16", "sgd", 0, percent) for percent in (90, 50)]
    output = write_lines(tmp_path / "table", *lines)
    assert report(output) == 0
    assert rows(output, "svhn/vgg16")["sgd"][:2] == ["90.00", "1"]


def test_report_refuses_mixed_and_missing_runs(tmp_path, capsys):
    assert report(tmp_path / "nothing") == 2
    assert f"there are no runs in {tmp_path}/nothing/runs.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
    lines = [line("svhn/vgg16", "sgd", n, 90, epochs=epochs) for n, epochs in enumerate((4, 9))]
    output = write_lines(tmp_path / "table", *lines)
    assert report(output) == 2
    assert "holds a run of another protocol: --epochs 9, not 4\n" in capsys.readouterr().err
    assert names(output) == {"runs.jsonl"}
