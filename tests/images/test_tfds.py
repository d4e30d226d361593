"""The sets that TFDS provides: prepared from small archives made here, so without a network."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
import scipy.io
from tensorflow_datasets.core.download import DownloadManager

from image_sets import contents, load, message

ROOT = Path(__file__).parents[2]
TRAINING = json.loads((ROOT / "tests/goldens/recipes.json").read_text())["training"]


def write_cifar(folder, files, names, seed):
    """Write CIFAR's binary files: per record one byte for each label, then the planes of colour."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for file in files:
        labels = [rng.integers(0, len(lines), 30) for lines in names.values()]
        planes = rng.integers(0, 256, (30, 3, 32, 32))
        records = np.hstack([np.stack(labels, axis=1), planes.reshape(30, -1)])
        (folder / file).write_bytes(records.astype(np.uint8).tobytes())
        yield planes.transpose(0, 2, 3, 1).astype(np.uint8), labels[-1]
    for file, lines in names.items():
        (folder / file).write_text("\n".join(lines) + "\n")


def write_svhn(folder, names):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(2)
    for name in names:
        images = rng.integers(0, 256, (30, 32, 32, 3)).astype(np.uint8)
        labels = rng.integers(0, 10, 30)
        original = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels, labels, 10)[:, None]}
        scipy.io.savemat(folder / f"{name}.mat", original)
        yield images, labels


def serve(url):
    """Stand in for a server that answers."""
    answer = requests.Response()
    answer.status_code, answer.raw = 200, io.BytesIO()
    return answer


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A data directory that TFDS prepared, and the (images, labels) that went into it."""
    root = tmp_path_factory.mktemp("published")
    animals = [f"animal{i}" for i in range(10)]
    fine, coarse = [f"fine{i}" for i in range(100)], [f"coarse{i}" for i in range(20)]
    *train10, test10 = write_cifar(
        root / "cifar10/cifar-10-batches-bin",
        [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"],
        {"batches.meta.txt": animals},
        seed=0,
    )
    train100, test100 = write_cifar(
        root / "cifar100/cifar-100-binary",
        ["train.bin", "test.bin"],
        {"coarse_label_names.txt": coarse, "fine_label_names.txt": fine},
        seed=1,
    )
    train, test, _ = write_svhn(root / "svhn", ["train", "test", "extra"])

    def download(manager, urls):
        if isinstance(urls, str):
            return root / ("cifar100" if "100" in urls else "cifar10")
        return {key: root / "svhn" / f"{key.removesuffix('_32x32')}.mat" for key in urls}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "get", lambda url, **_: serve(url))
        patch.setattr(DownloadManager, "download", download)
        patch.setattr(DownloadManager, "download_and_extract", download)
        for name in ("cifar10", "cifar100", "svhn"):
            load(name, root / "tfds")
    return root / "tfds", {
        "cifar10": (tuple(animals), train10, test10),
        "cifar100": (tuple(fine), [train100], test100),
        "svhn": (tuple("0123456789"), [train], test),
    }


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_a_published_set_is_read_as_it_was_prepared(published, name):
    data_dir, originals = published
    classes, train, test = originals[name]
    found = load(name, data_dir)
    assert found.classes == classes
    assert contents(found.train) == contents(*train)
    assert contents(found.test) == contents(test)
    normalisation = TRAINING["normalisation"][name]
    if name == "svhn":  # "pixels divided by 255, no mean or std" and no augmentation
        assert (found.mean, found.std, found.pad, found.flip) == ((0,) * 3, (1,) * 3, 0, False)
    else:
        assert found.mean == tuple(normalisation["mean"])
        assert found.std == tuple(normalisation["std"])
        assert (found.pad, found.flip) == (4, True)


def test_only_preparing_needs_tensorflow(published, tmp_path):
    """In a process where TensorFlow cannot be found, as if it were not installed."""
    script = """
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] == "tensorflow"
        return None if hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
import numpy as np
from images import data
prepared, empty, output = sys.argv[1:]
found = data.load("cifar10", data_dir=prepared)
np.savez(output, **{f"{s}_{k}": v for s in ("train", "test")
                    for k, v in getattr(found, s)._asdict().items()})
try:
    data.load("cifar10", data_dir=empty)
except data.DataError as error:
    print(error)
assert "tensorflow" not in sys.modules
"""
    data_dir, _ = published
    # An archive that was fetched before, so that no server is asked.
    downloads = tmp_path / "empty/downloads/cifar10"
    downloads.mkdir(parents=True)
    (downloads / "archive.tar.gz.INFO").write_text("{}")
    output = tmp_path / "read.npz"
    arguments = [sys.executable, "-c", script, data_dir, tmp_path / "empty", output]
    process = subprocess.run(
        arguments, cwd=ROOT / "examples", capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert "tensorflow" in process.stdout
    assert "pip install 'spherical-optax[examples]'" in process.stdout
    found = load("cifar10", data_dir)
    with np.load(output) as read:
        for key in read:
            split, field = key.split("_")
            np.testing.assert_array_equal(read[key], getattr(getattr(found, split), field))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_without_a_network_nothing_is_written(tmp_path, monkeypatch, name):
    def refuse(url, **_):
        raise requests.ConnectionError(f"no route to {url}")

    monkeypatch.setattr(requests, "get", refuse)
    text = message(name, tmp_path / "data")
    assert name in text and "could not be downloaded" in text
    assert "--dataset digits" in text and "--dataset folder:PATH" in text
    assert not (tmp_path / "data").exists()


def test_a_download_that_breaks_off(tmp_path, monkeypatch):
    def break_off(*_):
        raise requests.ConnectionError("connection reset")

    monkeypatch.setattr(requests, "get", lambda url, **_: serve(url))
    monkeypatch.setattr(DownloadManager, "download_and_extract", break_off)
    text = message("cifar10", tmp_path)
    assert "cifar10" in text and "connection reset" in text and "--dataset digits" in text
    assert not list(tmp_path.rglob("*3.0.2"))  # what TFDS had begun is gone, so a retry can work


def remove(pattern):
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


def overwrite(folder):
    for file in folder.glob("*train.array_record*"):
        content = bytearray(file.read_bytes())
        content[40_000:60_000] = bytes(20_000)
        file.write_bytes(content)


def shorten(folder):
    for file in folder.glob("*train.array_record*"):
        file.write_bytes(file.read_bytes()[:70_000])


def other_format(folder):
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


@pytest.mark.parametrize(
    "damage",
    [remove("dataset_info.json"), remove("*test*"), remove("*"), overwrite, shorten, other_format],
    ids=["no info", "no test file", "empty", "overwritten", "shortened", "other format"],
)
def test_a_damaged_prepared_set_is_named(published, tmp_path, damage):
    shutil.copytree(published[0] / "cifar10", tmp_path / "cifar10")
    (folder,) = tmp_path.glob("cifar10/*")
    damage(folder)
    text = message("cifar10", tmp_path)
    assert str(tmp_path / "cifar10") in text and "--data_dir" in text and "delete" in text
