"""Saving and restoring: bits and types, damage, and what is refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from images import programs
from made_checkpoints import (
    assert_same,
    make_checkpoints,
    no_warning,
    read_newest,
    small,
    step_names,
)
from tiny import Tiny
from training import checkpoints


def struct(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


@pytest.fixture
def training_arrays():
    """A training state, the best network, and arrays on several devices."""
    _, state = programs.split_model(Tiny(4, rngs=nnx.Rngs(0)), optax.adam(1e-3))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    numbers = np.random.default_rng(0).standard_normal((8, 1000), np.float32)
    numbers[0, :3] = -0.0, np.nan, np.inf
    return {
        "state": state,
        "best": (state.params, state.batch_stats),
        "bfloat16": jnp.asarray(numbers, jnp.bfloat16),
        "replicated": jax.device_put(numbers, NamedSharding(mesh, P())),
        "sharded": jax.device_put(numbers, NamedSharding(mesh, P("data"))),
    }


def test_round_trip_keeps_every_bit_type_and_sharding(training_arrays, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = Path("made", "with spaces, # and %20")
    progress = {"epoch": 3, "best": [0.1, None], "history": [{"loss": 1e-300, "name": "é"}]}
    expected = json.loads(json.dumps(progress))
    manager = checkpoints.open_checkpoints(directory)
    assert checkpoints.restore(manager, training_arrays, warn=no_warning) is None
    checkpoints.save(manager, 7, training_arrays, progress)
    progress["history"].append("changed while the save is under way")
    checkpoints.close(manager)

    manager = checkpoints.open_checkpoints(directory)
    for like in (training_arrays, jax.tree.map(struct, training_arrays)):
        restored, progress = checkpoints.restore(manager, like, warn=no_warning)
        assert_same(restored, training_arrays)
        assert progress == expected
    checkpoints.close(manager)


def test_orbax_alone_reads_the_arrays(training_arrays, tmp_path):
    manager = checkpoints.open_checkpoints(tmp_path)
    checkpoints.save(manager, 7, training_arrays, {})
    checkpoints.close(manager)
    loaded = ocp.StandardCheckpointer().restore(tmp_path / "7" / "arrays")
    kernel = training_arrays["best"][0]["conv"]["kernel"][...]
    np.testing.assert_array_equal(loaded["best"][0]["conv"]["kernel"]["value"], kernel)


def test_arrays_may_be_donated_after_save_and_after_restore(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: 1.5 * x + 1, tree), donate_argnums=0)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(200_000, np.float32)) for _ in range(4)]
    manager = checkpoints.open_checkpoints(tmp_path)
    for step in (1, 2):
        before = [np.array(x) for x in arrays]
        checkpoints.save(manager, step, arrays, {})
        for _ in range(5):
            arrays = advance(arrays)
    restored, _ = checkpoints.restore(manager, arrays, warn=no_warning)
    after = [1.5 * x + 1 for x in before]
    for x, y in zip(restored, before, strict=True):
        np.testing.assert_array_equal(x, y)
    # XLA contracts to a fused multiply-add, which rounds once; relative to numbers of about 1.
    for x, y in zip(advance(restored), after, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
    assert not any(x.is_deleted() for x in arrays)
    checkpoints.close(manager)


def test_the_newest_two_are_kept(tmp_path):
    make_checkpoints(tmp_path, [1, 2, 5])
    assert step_names(tmp_path) == ["2", "5"]
    make_checkpoints(tmp_path, [3, 5])  # neither is after the newest
    assert step_names(tmp_path) == ["2", "5"]
    assert read_newest(tmp_path) == 5
    (tmp_path / "9.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)  # from a killed process
    make_checkpoints(tmp_path, [6])
    assert step_names(tmp_path) == ["5", "6"]


def damages(path: Path):
    """Each kind of damage, as a function that does it."""
    content = path.read_bytes()
    yield "missing", path.unlink
    yield "cut off", lambda: path.write_bytes(content[: len(content) // 2])
    yield "changed", lambda: path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_damage_to_any_file_leads_to_the_checkpoint_before(tmp_path, capfd):
    make_checkpoints(tmp_path / "sound", [1, 2])
    checkpoint = tmp_path / "sound" / "2"
    names = [str(f.relative_to(checkpoint)) for f in checkpoint.rglob("*") if f.is_file()]
    assert "arrays/manifest.ocdbt" in names and "progress/metadata" in names
    unread = {"commit_success.txt", "_CHECKPOINT_METADATA"}  # which hold nothing of the run
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "sound", copy)
        sound = (copy / "2" / name).read_bytes()
        for kind, damage in damages(copy / "2" / name):
            damage()
            sentences: list[str] = []
            newest = read_newest(copy, sentences.append)
            if name in unread:
                assert (newest, sentences) == (2, []), (name, kind)
                (copy / "2" / name).write_bytes(sound)
            else:
                assert newest == 1, (name, kind)
                assert sentences == [
                    f"skipping the checkpoint {copy / '2'}, whose {name} is damaged or missing"
                ]
                assert step_names(copy) == ["1"]
                shutil.copytree(checkpoint, copy / "2")
        shutil.rmtree(copy)
    assert capfd.readouterr() == ("", "")


def test_where_all_are_damaged_the_run_can_start_again(tmp_path):
    make_checkpoints(tmp_path, [8, 9])
    for step in "89":
        shutil.rmtree(tmp_path / step / "arrays")
    sentences: list[str] = []
    assert read_newest(tmp_path, sentences.append) is None
    assert [sentence.split(",")[0][-1] for sentence in sentences] == ["9", "8"]
    make_checkpoints(tmp_path, [1])
    assert step_names(tmp_path) == ["1"]
    assert read_newest(tmp_path) == 1


@pytest.mark.parametrize(
    "like, difference",
    [
        ({"large": jnp.zeros(2000)}, "small is int32[3] there and missing here"),
        (small(0) | {"large": jnp.zeros(7)}, "large is float32[2000] there and float32[7] here"),
        (small(0) | {"more": jnp.zeros(())}, "more is missing there and float32[] here"),
    ],
)
def test_other_arrays_are_refused_and_nothing_is_removed(tmp_path, like, difference):
    make_checkpoints(tmp_path, [1, 2])
    manager = checkpoints.open_checkpoints(tmp_path)
    with pytest.raises(ValueError) as raised:
        checkpoints.restore(manager, like, warn=no_warning)
    assert str(raised.value) == (
        f"the checkpoint {tmp_path / '2'} does not fit this run: {difference}"
    )
    checkpoints.close(manager)
    assert read_newest(tmp_path) == 2


def test_progress_that_is_no_json_is_refused_at_once(tmp_path):
    manager = checkpoints.open_checkpoints(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(manager, 1, small(1), {"loss": np.float32(1)})
    checkpoints.close(manager)
    assert step_names(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=str(directory)):
            checkpoints.open_checkpoints(directory)


def test_a_directory_that_is_gone_fails_the_save_at_once(tmp_path):
    manager = checkpoints.open_checkpoints(tmp_path / "run")
    checkpoints.save(manager, 1, small(1), {})
    manager.wait_until_finished()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").touch()
    with pytest.raises(OSError) as raised:
        checkpoints.save(manager, 2, small(2), {})
    assert str(raised.value) == f"cannot save a checkpoint in {tmp_path / 'run'}: Not a directory"
    checkpoints.close(manager)
