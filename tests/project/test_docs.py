"""The pages: their Python prints what they say, and what they name and link to is there."""

import ast
import importlib
import inspect
import json
import re
import shlex
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equations
import spherical_optax as so

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"python (?:examples|benchmarks)/(\w+)\.py\b *(.*)")
COMMANDS = sorted(
    {
        (name, arguments)
        for text in TEXTS.values()
        for name, arguments in COMMAND.findall(
            text.replace("\\\n", " ").replace("$optimizer", "adam")
        )
        if "`" not in arguments
    }
)
TESTS = {
    node.name
    for file in (ROOT / "tests").rglob("test_*.py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef)
}


def unwrapped(page):
    return " ".join(TEXTS[page].split())


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "```python" in text])
def test_the_python_runs_and_prints_what_the_page_says(page, compiled_quickly, capsys):
    blocks = FENCE.findall(TEXTS[page])
    namespace = {}
    for (language, source), (following, text) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language == "python":
            exec(compile(source, page, "exec"), namespace)
            assert capsys.readouterr().out == (text if following == "text" else "")


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_the_commands_are_understood(name, arguments, capsys):
    command = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:  # arguments before --help are checked
        command.main([*shlex.split(arguments), "--help"])
    assert end.value.code == 0 and "--output" in capsys.readouterr().out


def test_every_command_is_on_a_page():
    commands = {
        file.stem
        for folder in ("examples", "benchmarks")
        for file in (ROOT / folder).glob("*.py")
        if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")
    }
    assert commands == {name for name, _ in COMMANDS}


# Links.


def anchors(text):
    """The headings of a page, as code hosts and MyST name them."""
    text = FENCE.sub("", text)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_pictures_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[page]):
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.is_file() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target
    for target in re.findall(r"^```\{include\} (.+)$", TEXTS[page], re.MULTILINE):
        assert ((ROOT / page).parent / target).is_file(), target


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^(\w+)$", TEXTS["docs/index.md"].split("{toctree}")[1], re.MULTILINE)
    assert sorted(listed) == sorted(page.stem for page in PAGES[3:] if page.stem != "index")


@pytest.mark.parametrize("page", TEXTS)
def test_lines_are_short_and_tests_that_are_named_exist(page):
    for line in TEXTS[page].splitlines():
        assert len(line) <= 110 or line.startswith("|") or "](" in line, line
    named = set(re.findall(r"`(test_\w+)`", TEXTS[page]))
    assert named <= TESTS


def test_a_test_follows_every_formula():
    formulas = re.split(r"^\$\$.*?\$\$$", TEXTS["docs/theory.md"], flags=re.MULTILINE | re.DOTALL)
    assert len(formulas) > 12
    for behind in formulas[1:]:
        of_section = behind.split("\n## ")[0]
        # Two formulas in a row have their tests behind the second.
        assert "`test_" in of_section or behind is not formulas[-1] and len(of_section) < 200


def test_the_version_is_the_newest_in_the_changelog():
    version, date = re.findall(r"^## \[(.+)\] - (.+)$", TEXTS["CHANGELOG.md"], re.MULTILINE)[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert project["version"] == version
    assert f"version: {version}" in citation and f"date-released: {date}" in citation


# The reference and its equations.


def test_the_reference_has_every_public_name_once():
    named = re.findall(r"^\.\. auto\w+:: (\w+)$", TEXTS["docs/reference.md"], re.MULTILINE)
    assert sorted(named) == sorted(["spherical_optax", *so.__all__])


@pytest.mark.parametrize(
    ("text", "parameters", "expected"),
    [
        (
            "mu <- (<x, y> mu - <mu, y> x) / |y|²",
            (),
            r"\mu \leftarrow (\langle x,y\rangle \,\mu -\langle \mu ,y\rangle \,x)"
            r"/\lVert y\rVert ^{2}",
        ),
        ("sqrt(nu/(1 - b2^t)) + eps", (), r"\sqrt{\nu /(1-b_{2}^{t})}+\varepsilon"),
        ("x - learning_rate u", ("learning_rate",), r"x-\mathrm{learning\_rate}\,u"),
        ("|<g, x>| <= |g|", (), r"\lvert \langle g,x\rangle \rvert \le \lVert g\rVert"),
        (
            "r if |y| > |x| else 1",
            (),
            r"r\text{ if }\lVert y\rVert > \lVert x\rVert \text{ else }1",
        ),
        ("one number per group", (), r"\text{one number per group}"),
        ("angle R", ("angle",), r"\mathrm{angle}\,R"),
        ("η_e c < d", (), r"\eta_{e}\,c< d"),
    ],
)
def test_an_equation_is_translated(text, parameters, expected):
    assert equations.latex(text, parameters) == expected


@pytest.mark.parametrize(
    "text", ["x <- frobnicate u", "x @ y", "|x", "(x]", "weight_decay x", "x)"]
)
def test_what_cannot_be_translated_is_an_error(text):
    with pytest.raises(equations.UnknownToken):
        equations.latex(text)


@pytest.mark.parametrize(
    "name", [name for name in so.__all__ if inspect.isfunction(vars(so)[name])]
)
def test_every_equation_of_a_docstring_is_translated(name):
    function = getattr(so, name)
    doc = (inspect.getdoc(function) or "").splitlines()
    lines = equations.typeset(doc, inspect.signature(function).parameters)
    kept = lines.index("Args:")
    written = [line for line in doc[: doc.index("Args:")] if line.startswith("    ")]
    made = [line for line in lines[:kept] if line.startswith("    ")]
    assert len(made) == len(written) + 2 * lines.count(".. math::")  # begin and end
    assert bool(written) == (".. math::" in lines)
    assert lines[kept:] == doc[doc.index("Args:") :]
    # Sphinx takes what is before a colon in the first line for a type.
    assert ": " not in doc[doc.index("Returns:") + 1]


# Paths of libraries that the tests do not need.


def test_paths_of_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Sequential([eqx.nn.Conv2d(3, 16, 3, use_bias=False, key=jax.random.key(0))])
    params = eqx.filter(model, eqx.is_array)
    assert "layers/0/weight  16×3×3×3  16 × 27" in so.describe(params, so.by_path({"layers/0": 0}))
    tx = so.adam_srt(0.1, channel_axes=so.by_path({"layers/0/weight": 0}))
    updates, _ = tx.update(params, tx.init(params), params)
    assert isinstance(eqx.apply_updates(model, updates), eqx.nn.Sequential)


def test_paths_of_haiku():
    hk = pytest.importorskip("haiku")
    net = hk.transform(lambda x: hk.nets.MLP([4, 2])(x))
    params = net.init(jax.random.key(0), jnp.ones((1, 3)))
    table = so.describe(params, so.by_path({"linear_0/w": -1}))
    assert "mlp/~/linear_0/w  3×4    4 × 3" in table and "mlp/~/linear_1/w  4×2    classic" in table


# Figures.


def measures(run, measure, epoch):
    """A measure's mean over the groups of each layer, in an epoch of a committed run."""
    lines = (RESULTS / run / "geometry.jsonl").read_text(encoding="utf-8").splitlines()
    of_epoch = json.loads(lines[epoch - 1] if epoch > 0 else lines[epoch])
    return np.array([v for name, v in of_epoch.items() if name.endswith(f"/{measure}/mean")])


def grown(run):
    """Radii of the last epoch to those of the first, the least and the most of a layer."""
    ratios = measures(run, "radius", -1) / measures(run, "radius", 1)
    return ratios.min(), ratios.max()


def test_what_the_pictures_are_said_to_show_is_in_the_raw_results():
    page = unwrapped("docs/see.md")

    def spread(run, measure, epoch):
        values = measures(run, measure, epoch)
        return values.max() / values.min()

    adam, sgd = (spread(f"sphere/{name}", "turn_per_gradient", 1) for name in ("adam", "sgd"))
    assert f"by a factor of {adam:.0f} with Adam, and of {sgd:.0f} with SGD" in page
    growth = {name: grown(f"sphere/{name}") for name in ("adam", "adams", "sgd", "adamsrt")}
    percent = {name: [100 * (x - 1) for x in pair] for name, pair in growth.items()}
    assert (
        f"the radii of Adam and AdamS grow by up to {percent['adam'][1]:.0f} % and "
        f"{percent['adams'][1]:.0f} %, those of SGD by {percent['sgd'][0]:.0f} to "
        f"{percent['sgd'][1]:.0f} %, and those of AdamSRT by at most {percent['adamsrt'][1]:.1f} %"
    ) in page
    radial = {
        name: measures(f"sphere/{name}", "momentum_radial_fraction", 1).mean() for name in growth
    }
    shares = [f"{100 * radial[name]:.0f}" for name in ("adam", "adams", "sgd")]
    assert "{}, {} and {} % of it point along the radius".format(*shares) in page
    assert f"what is left is rounding, {radial['adamsrt']:.0e}" in page
    for run, words in {
        "sgd": "radii fall to between {:.2f} and {:.2f} of what they were",
        "sgdmrt": "its radii fall less, to between {:.2f} and {:.2f}",
    }.items():
        assert words.format(*grown(f"balance/{run}")) in page
    assert f"drift apart, to a factor of {spread('balance/sgd', 'angle', -1):.0f}" in page
    in_epoch_10 = {
        name: measures(f"balance/{name}", "momentum_radial_fraction", 10).mean()
        for name in ("sgd", "adamw", "sgdmrt")
    }
    assert (
        f"radial fraction is {in_epoch_10['sgd']:.2f}, on the mean over layers, against "
        f"{in_epoch_10['adamw']:.2f} with AdamW"
    ) in page
    assert f"on the way there, with {in_epoch_10['sgdmrt']:.2f}" in page
    accuracies = {
        summary.parent.name: 100 * json.loads(summary.read_text())["test_accuracy"]
        for runs in ("sphere", "balance")
        for summary in RESULTS.glob(f"{runs}/*/summary.json")
        if runs == "sphere" or summary.parent.name == "sgd"
    }
    assert f"of {min(accuracies.values()):.1f} to {max(accuracies.values()):.1f} %" in page
    assert f"SGD still reaches {accuracies['sgd']:.1f} %" in page
    assert f"by up to {percent['adam'][1]:.0f} % in 30 epochs" in unwrapped("README.md")
    assert f"AdamSRT by at most {percent['adamsrt'][1]:.1f} %" in unwrapped("README.md")


def test_the_equilibrium_is_where_the_page_says():
    page = TEXTS["docs/optimizers.md"]
    assert "so.rotational(optax.scale_by_adam(), 0.0032," in page
    assert float(so.equilibrium_angle(1e-3, 0.1)) == pytest.approx(0.0032, abs=5e-5)
