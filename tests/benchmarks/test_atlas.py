"""The atlas: what is on spheres in small networks, the command, and the report from its lines."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import atlas
import spherical_optax as so
from architectures import atlas_blocks, atlas_lines, atlas_report
from architectures.atlas_lines import MODELS, WITH_BIAS, Atlas, Leaf
from language import recipes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "atlas"
COMMITTED, BROKEN = atlas_lines.load(RESULTS / "atlas.jsonl")
BY_MODEL = {atlas.model: atlas for atlas in COMMITTED}


def run(output, *arguments):
    return atlas.main(["--output", str(output), *arguments])


def verdicts(leaves):
    return [(leaf.path, leaf.verdict, leaf.channel_axes, leaf.with_bias) for leaf in leaves]


def of_blocks(model):
    """The kinds of the arrays on spheres, or nearly, in the blocks of a network."""
    return {leaf.name: leaf.kind for leaf in BY_MODEL[model].leaves if leaf.in_blocks and leaf.kind}


@pytest.mark.slow
def test_the_command_measures_and_goes_on_from_what_is_there(
    compiled_quickly, tmp_path, capsys, monkeypatch
):
    assert run(tmp_path, "--models=qwen3") == 0
    (measured,), broken = atlas_lines.load(tmp_path / "atlas.jsonl")
    assert not broken and verdicts(measured.leaves) == verdicts(BY_MODEL["qwen3"].leaves)
    assert measured.versions["jax"] == jax.__version__ and measured.device.startswith("cpu (")
    query = next(leaf for leaf in measured.leaves if leaf.name == "attention/query")
    assert query[:6] == (query.path, (2, 64, 4, 16), 8192, "(0, -2)", 8, "invariant")
    assert query.rescaling < 1e-4 and query.kind == "per head"
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "table.md").read_text()
    assert "key, query: per head |" in text and "atlas.py --models qwen3`" in text
    assert "1 measured, 0 there" in capsys.readouterr().out

    monkeypatch.setattr(atlas, "measure", None)  # not called again
    assert run(tmp_path, "--models=qwen3") == 0
    assert "0 measured, 1 there" in capsys.readouterr().out


@pytest.mark.slow
def test_a_network_without_spheres(compiled_quickly):
    leaves = atlas.measure("mamba2")
    assert verdicts(leaves) == verdicts(BY_MODEL["mamba2"].leaves)
    assert not any(leaf.kind for leaf in leaves) and len(leaves) == 12


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("ngpt", marks=pytest.mark.slow),
        pytest.param("swin2", marks=pytest.mark.long),
        pytest.param("convnext", marks=pytest.mark.long),
    ],
)
def test_other_networks_are_as_committed(model):
    assert verdicts(atlas.measure(model)) == verdicts(BY_MODEL[model].leaves)


@pytest.mark.slow
def test_small_embeddings_let_an_epsilon_spoil_an_invariance():
    network = atlas_blocks.NETWORKS["olmo2"](nnx.Rngs(0))
    network.embedding.embedding[...] *= 0.02
    batch = atlas_blocks.batch(jax.random.key(0))
    found = {leaf.name: leaf for leaf in atlas.measure_network(network, batch)}
    value = found["attention/value"]
    assert value.verdict == "not invariant" and 1e-2 < value.rescaling < 1e-1


# The committed lines.


def test_the_committed_lines_are_of_all_networks_and_one_commit():
    assert not BROKEN and tuple(BY_MODEL) == MODELS and len(COMMITTED) == len(MODELS)
    revisions = {atlas.git_revision for atlas in COMMITTED}
    assert len(revisions) == 1 and "dirty" not in revisions.pop()


def test_nothing_is_near_the_tolerance():
    ratios = [
        (leaf.verdict, leaf.rescaling)
        for atlas in COMMITTED
        for leaf in atlas.leaves
        if leaf.rescaling is not None
    ]
    assert max(ratio for verdict, ratio in ratios if verdict == "invariant") < 1e-3
    assert min(ratio for verdict, ratio in ratios if verdict == "not invariant") > 5e-2


@pytest.mark.parametrize("name", recipes.ARCHITECTURES)
def test_decoders_have_the_kernels_on_spheres_that_the_recipes_select(name):
    selected = recipes.invariant_kernels(recipes.ARCHITECTURES[name])
    for leaf in BY_MODEL[name].leaves:
        if leaf.path.endswith("/kernel"):
            axes = selected(leaf.path, jnp.zeros(leaf.shape))
            measured = leaf.channel_axes and ast.literal_eval(leaf.channel_axes)
            assert groups(leaf.shape, axes) == groups(leaf.shape, measured), leaf.path


def groups(shape, axes):
    """The shape of an array with an element for each group; None without groups."""
    return None if axes is None else so.group_norm(jnp.ones(shape), channel_axes=axes).shape


def test_the_other_networks_have_what_their_papers_say():
    whole = dict.fromkeys(("value", "out", "up", "down", "up_scale"), "whole")
    assert of_blocks("ngpt") == {"query": "per head", "key": "per head"} | whole
    assert of_blocks("olmoe") == {"attention/query": "whole", "attention/key": "whole"}
    biased = dict.fromkeys(("query", "out", "down"), WITH_BIAS)
    assert of_blocks("swin2") == {"key": "per head"} | biased
    assert of_blocks("convnext") == {"conv": WITH_BIAS}
    for model in ("gpt2", "llama", "vit", "mamba2"):
        assert not of_blocks(model)
    convolutions = ("conv1", "conv2", "conv3", "shortcut")
    assert of_blocks("resnet_bn") == dict.fromkeys(convolutions, "per filter")
    assert of_blocks("resnet_gn") == dict.fromkeys(convolutions, "per block of filters")


def test_published_sizes_name_the_kernels_of_the_small_networks():
    for model, architecture in atlas_lines.ARCHITECTURES.items():
        leaves = [leaf for leaf in BY_MODEL[model].leaves if leaf.in_blocks]
        kernels = {leaf.name: leaf for leaf in leaves if leaf.path.endswith("/kernel")}
        if architecture.elements is None:  # all or none of them
            assert len({leaf.kind in (None, WITH_BIAS) for leaf in kernels.values()}) == 1
        else:
            experts = {leaf.name for leaf in leaves if leaf.name.startswith("experts/")}
            assert architecture.elements.keys() == kernels.keys() | experts
    # (4096 * 4096 + 4096 * 1024) of 192.9 million; 4 * 4096^2 + 2 * 4096 * 11008 of 202.4.
    assert round(BY_MODEL["qwen3"].of_size(), 4) == 0.1087
    assert round(BY_MODEL["olmo2"].of_size(), 4) == 0.7772


def test_the_committed_table_is_made_from_the_committed_lines():
    text = (RESULTS / "table.md").read_text(encoding="utf-8")
    assert text == atlas_report.report(atlas_lines.latest(COMMITTED))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(MODELS)


# The report.


def make_leaf(path, shape, elements, axes=None, bias=None):
    verdict = "not invariant" if axes is None else "invariant"
    return Leaf(path, shape, elements, axes, axes and 2, verdict, 0.1, None, bias)


LEAVES = (
    make_leaf("blocks/attention/key/kernel", (2, 4, 2, 2), 32, "(0, -2)"),
    make_leaf("blocks/norm/scale", (2, 8), 16, "-2"),
    make_leaf("blocks/1/conv/kernel", (1, 1, 2, 8), 16, "so.blocks(-1, 4)"),
    make_leaf("blocks/1/up/kernel", (4, 4), 16, "()"),
    make_leaf("blocks/1/out/kernel", (4, 4), 16, bias="blocks/1/out/bias"),
    make_leaf("blocks/1/out/bias", (4,), 4),
    make_leaf("stem/kernel", (3, 3, 1, 2), 100, "-1"),
)


def make_atlas(model="qwen3", leaves=LEAVES, revision="abc"):
    return Atlas(model, "cpu (2 cores)", {"jax": "0.10.2"}, revision, leaves)


def test_groups_in_words_and_shares():
    made = make_atlas()
    kinds = ["per head", "whole", "per block of filters", "whole", WITH_BIAS, None, "per filter"]
    assert [leaf.kind for leaf in made.leaves] == kinds
    assert made.share() == 80 / 100 and made.share("whole") == 32 / 100
    assert made.share(in_blocks=False) == 180 / 200
    (row,) = atlas_report.table([made])[2:]
    assert "| 80 % | 90 % |" in row
    assert "key: per head; conv: per block of filters; norm/scale, up: whole; out: only" in row


def test_lines_come_back_as_they_were(tmp_path):
    old, new, other = make_atlas(), make_atlas(revision=None, leaves=LEAVES[:2]), make_atlas("vit")
    text = b"".join(map(atlas_lines.to_lines, (old, other, new)))
    half = atlas_lines.to_lines(make_atlas("gpt2")).splitlines(keepends=True)[0]
    unknown = half.replace(b'"gpt2"', b'"gpt9"')
    (tmp_path / "atlas.jsonl").write_bytes(b"5\n" + text + half + unknown + half[:50])
    atlases, broken = atlas_lines.load(tmp_path / "atlas.jsonl")
    assert atlases == [old, other, new] and broken == [1, 19, 20]
    assert atlas_lines.latest(atlases) == [new, other]
    assert atlas_lines.load(tmp_path / "none.jsonl") == ([], [])


def test_report_makes_the_table_again(tmp_path, capsys):
    lines = b"".join(map(atlas_lines.to_lines, (make_atlas("vit"), make_atlas())))
    (tmp_path / "atlas.jsonl").write_bytes(lines + b"{")
    assert run(tmp_path, "--report") == 0
    out, err = capsys.readouterr()
    assert "warning: line 15 of" in err and "atlas.jsonl is no whole array" in err
    assert "2 there" in out
    text = (tmp_path / "table.md").read_text()
    assert text.index("[Qwen3]") < text.index("[ViT]") and "--models qwen3,vit`" in text
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failure_is_told_and_the_others_are_measured(tmp_path, capsys, monkeypatch):
    def fail(model):
        if model == "vit":
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nand much more")
        return LEAVES

    monkeypatch.setattr(atlas, "measure", fail)
    assert run(tmp_path, "--models=vit,qwen3") == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "atlas.py: failed: vit: RESOURCE_EXHAUSTED: no memory"
    assert "1 measured" in out
    entries = [json.loads(line) for line in (tmp_path / "atlas.jsonl").read_text().splitlines()]
    assert [entry["model"] for entry in entries] == ["qwen3"] * len(LEAVES)


def test_help_and_refusals_start_no_jax():
    program = (
        "import sys, atlas\n"
        "for arguments in (['--help'], ['--models', 'x'], ['--report', '--output', 'nowhere']):\n"
        "    try: atlas.main(arguments)\n"
        "    except SystemExit: pass\n"
        "sys.exit(bool({'jax', 'matplotlib'} & sys.modules.keys()))"
    )
    directory = Path(atlas.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=directory, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "runs/atlas)" in done.stdout and "examples:" in done.stdout
