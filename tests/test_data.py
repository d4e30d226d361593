"""The data sets: what is read, how it is split and augmented, and what is said about bad input.

No test needs a network: TFDS prepares its data sets from small archives made here.
"""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import requests
import scipy.io
from cifar import data
from PIL import Image
from sklearn.datasets import load_digits
from tensorflow_datasets.core.download import DownloadManager

ROOT = Path(__file__).parents[1]
TRAINING = json.loads((ROOT / "tests/goldens/recipes.json").read_text())["training"]


def load(name, data_dir="unused", seed=0):
    return data.load(str(name), data_dir=str(data_dir), seed=seed)


def message(name, data_dir="unused"):
    """The message of the DataError that loading must raise, which is one line."""
    with pytest.raises(data.DataError) as error:
        load(name, data_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(*splits):
    """The images as bytes with their labels, in an order that does not depend on the splits."""
    return sorted((i.tobytes(), int(n)) for s in splits for i, n in zip(*s, strict=True))


def assert_same(a, b):
    assert a._replace(name="", train=0, valid=0, test=0) == b._replace(
        name="", train=0, valid=0, test=0
    )
    for split in ("train", "valid", "test"):
        for x, y in zip(getattr(a, split), getattr(b, split), strict=True):
            np.testing.assert_array_equal(x, y)


# --- TFDS ---------------------------------------------------------------------------------------


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
    assert contents(found.train, found.valid) == contents(*train)
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
from cifar import data
prepared, empty, output = sys.argv[1:]
found = data.load("cifar10", data_dir=prepared, seed=0)
np.savez(output, **{f"{s}_{k}": v for s in ("train", "valid", "test")
                    for k, v in getattr(found, s)._asdict().items()})
try:
    data.load("cifar10", data_dir=empty, seed=0)
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


def test_an_unknown_name_lists_the_known_ones():
    text = message("cifar11")
    for name in ("cifar11", "digits", "cifar10", "cifar100", "svhn", "folder:PATH"):
        assert name in text


# --- digits -------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    found = load("digits")
    assert found.classes == tuple("0123456789")
    assert [len(s.labels) for s in (found.train, found.valid, found.test)] == [1366, 71, 360]
    assert (found.pad, found.flip) == (4, False)
    for images, labels in (found.train, found.valid, found.test):
        assert images.shape == (len(labels), 32, 32, 3)
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        small = images[:, ::4, ::4, :1]
        blocks = np.kron(small, np.ones((1, 4, 4, 3), np.uint8))
        np.testing.assert_array_equal(images, blocks)

    grey, labels = load_digits(return_X_y=True)
    original = [(row.tobytes(), int(n)) for row, n in zip(grey, labels, strict=True)]
    back = [
        (np.round(image[::4, ::4, 0].ravel() * (16 / 255)).tobytes(), n)
        for split in (found.train, found.valid, found.test)
        for image, n in zip(split.images, split.labels.tolist(), strict=True)
    ]
    assert sorted(back) == sorted(original)
    assert found.train.images.min() == 0 and found.train.images.max() == 255
    # Stratified: a fifth of each class, to the nearest image.
    np.testing.assert_allclose(np.bincount(found.test.labels), np.bincount(labels) / 5, atol=1)


def test_statistics_are_those_of_all_training_images():
    found = load("digits")
    pixels = np.concatenate([found.train.images, found.valid.images]) / 255
    # float64 sums of 1.5 million values in another order
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-11)
    np.testing.assert_allclose(found.std, pixels.std(axis=(0, 1, 2)), rtol=1e-11)


def test_the_validation_split_depends_on_the_seed_alone():
    first, again, other = load("digits"), load("digits"), load("digits", seed=1)
    assert_same(first, again)
    np.testing.assert_array_equal(first.test.images, other.test.images)
    np.testing.assert_array_equal(first.test.labels, other.test.labels)
    assert contents(first.train, first.valid) == contents(other.train, other.valid)
    assert contents(first.valid) != contents(other.valid)
    assert (first.mean, first.std) == (other.mean, other.std)


def test_the_validation_split_is_the_same_everywhere():
    """Fixed figures: another NumPy or another platform must choose the same images."""
    assert load("digits").valid.labels[:16].tolist() == [9, 9, 9]


# --- folders and archives -----------------------------------------------------------------------


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tree(sizes=(("train", 7), ("test", 2)), labels=("cat", "dog", "owl")):
    """A path and the content of each image, as PNG, which keeps every pixel."""
    rng = np.random.default_rng(3)
    return {
        f"{split}/{label}/{i:02}.png": png(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8))
        for split, count in sizes
        for label in labels
        for i in range(count)
    }


def write(path, files):
    """Write {name: content} as the folder or archive that the name of the path asks for."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    elif ".tar" in path.suffixes:
        mode = "w" if path.suffix == ".tar" else f"w:{path.suffix[1:]}"
        with tarfile.open(path, mode) as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


KINDS = ["folder", "images.zip", "images.tar", "images.tar.gz", "images.tar.bz2", "images.tar.xz"]
CLUTTER = {
    "__MACOSX/train/cat/._00.png": b"x",
    ".git/train/cat/a.png": b"x",
    "train/.DS_Store": b"x",
    "train/cat/.DS_Store": b"x",
    "test/dog/Thumbs.db": b"x",
    "train/README.txt": b"x",
    "LICENCE": b"x",
}


def test_a_folder_is_read_as_it_is(tmp_path):
    files = tree()
    found = load(f"folder:{write(tmp_path / 'folder', files)}")
    assert found.classes == ("cat", "dog", "owl")
    assert (found.pad, found.flip) == (4, True)
    assert [len(s.labels) for s in (found.train, found.valid, found.test)] == [20, 1, 6]
    for splits, part in (((found.train, found.valid), "train"), ((found.test,), "test")):
        expected = [
            (np.asarray(Image.open(io.BytesIO(content))).tobytes(), found.classes.index(label))
            for name, content in files.items()
            for split, label, _ in [name.split("/")]
            if split == part
        ]
        assert contents(*splits) == sorted(expected)
    pixels = np.concatenate([found.train.images, found.valid.images]) / 255
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-11)
    np.testing.assert_allclose(found.std, pixels.std(axis=(0, 1, 2)), rtol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", ["", "./", "some set/", "train/"])
def test_every_kind_and_order_gives_the_same(tmp_path, kind, top):
    if kind == "folder" and top:
        pytest.skip("a folder is named itself")
    files = tree()
    expected = load(f"folder:{write(tmp_path / 'plain', files)}")
    backwards = dict(reversed(list(files.items()))) | CLUTTER
    path = write(tmp_path / kind, {top + name: content for name, content in backwards.items()})
    before = sorted(tmp_path.rglob("*"))
    assert_same(load(f"folder:{path}"), expected)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked


def test_images_of_other_kinds_and_sizes(tmp_path, capsys):
    files = tree()
    grey = Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32))
    others = {
        "g.png": grey,
        "p.gif": grey.convert("P"),
        "a.png": grey.convert("RGBA"),
        "b.bmp": grey.convert("RGB"),
        "w.jpg": Image.new("RGB", (50, 20), (0, 128, 255)),
        "s.png": Image.new("L", (8, 8), 77),
    }
    folder = write(tmp_path / "folder", files)
    for name, image in others.items():
        image.save(folder / "test/cat" / name)
    found = load(f"folder:{folder}")
    assert "2 of 33 images were not 32x32" in capsys.readouterr().out
    names = sorted(file.name for file in (folder / "test/cat").iterdir())
    by_name = dict(zip(names, found.test.images, strict=False))  # cat is the first class
    for name in ("g.png", "p.gif", "a.png", "b.bmp"):
        np.testing.assert_array_equal(by_name[name], np.asarray(grey.convert("RGB")))
    assert (by_name["s.png"] == 77).all()
    # JPEG rounds a uniform colour by a few steps at most.
    np.testing.assert_allclose(
        by_name["w.jpg"], np.broadcast_to([0, 128, 255], (32, 32, 3)), atol=3
    )


def test_equal_images_do_not_divide_by_zero(tmp_path):
    files = dict.fromkeys(tree(), png(np.full((32, 32, 3), 51, np.uint8)))
    found = load(f"folder:{write(tmp_path / 'folder', files)}")
    assert found.std == (1.0, 1.0, 1.0)
    np.testing.assert_allclose(found.mean, 0.2, rtol=1e-15)


@pytest.mark.parametrize("kind", ["folder", "images.zip", "images.tar.xz"])
@pytest.mark.parametrize("content", [b"", b"not an image", "half", "16 bit"])
def test_a_corrupt_image_is_named(tmp_path, kind, content):
    files = tree()
    if content == "half":
        content = files["train/dog/03.png"][:1500]
    elif content == "16 bit":
        content = png(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64)
    files["train/dog/03.png"] = content
    path = write(tmp_path / kind, files)
    assert f"{path}/train/dog/03.png" in message(f"folder:{path}")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_truncated_archive_is_never_read_in_part(tmp_path, kind):
    path = write(tmp_path / kind, tree())
    content = path.read_bytes()
    lengths = {0, 1, 100, 512, *range(700, len(content), len(content) // 12)}
    if kind == "images.tar":  # also where one image ends and the next begins, and inside a header
        with tarfile.open(path) as archive:
            starts = [member.offset for member in archive]
        lengths = {*lengths, *starts[:3], starts[-1], starts[-1] + 100}
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        text = message(f"folder:{path}")
        assert str(path) in text and "incomplete" in text, length


def test_a_damaged_header_inside_a_tar_is_not_its_end(tmp_path):
    path = write(tmp_path / "images.tar", tree())
    with tarfile.open(path) as archive:
        start = archive.getmember("test/owl/01.png").offset
    content = bytearray(path.read_bytes())
    content[start : start + 20] = b"?" * 20
    path.write_bytes(content)
    assert "damaged" in message(f"folder:{path}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: {}, ["train/CLASS"]),
        (lambda files: tree([("train", 3)]), ["no images in test/CLASS/"]),
        (lambda files: tree([("test", 3)]), ["no images in train/CLASS/"]),
        (lambda files: {n.replace("train", "Training"): c for n, c in files.items()}, ["train/"]),
        (lambda files: files | {"test/emu/0.png": png(np.zeros((32, 32), np.uint8))}, ["test/emu"]),
        (lambda files: files | {"train/emu/": b""}, ["train/emu", "empty"]),
        (lambda files: files | {f"old/{n}": c for n, c in files.items()}, ["several", "old"]),
        (lambda files: tree([("train", 1), ("test", 1)], ["cat"]), ["1 training image"]),
    ],
    ids=["nothing", "no test", "no train", "other names", "class only in test", "empty class"]
    + ["two sets", "one image"],
)
def test_another_layout_is_explained(tmp_path, change, words):
    path = write(tmp_path / "images.zip", change(tree()))
    text = message(f"folder:{path}")
    assert all(word in text for word in [*words, str(path)]), text


def test_an_empty_class_folder_is_named(tmp_path):
    path = write(tmp_path / "folder", tree())
    (path / "train/emu").mkdir()
    assert "train/emu" in message(f"folder:{path}")


def test_a_path_that_is_no_data_set(tmp_path):
    assert str(tmp_path / "none") in message(f"folder:{tmp_path / 'none'}")
    text = tmp_path / "a.txt"
    text.write_text("hello")
    assert "neither a directory nor" in message(f"folder:{text}")
    assert "folder:PATH" in message("folder:")


def test_two_training_images_are_enough(tmp_path):
    path = write(tmp_path / "folder", tree([("train", 2), ("test", 1)], ["cat"]))
    found = load(f"folder:{path}")
    assert [len(s.labels) for s in (found.train, found.valid, found.test)] == [1, 1, 1]


@pytest.mark.slow  # it decodes 60,000 images
def test_cifar10_as_jpeg():
    path = ROOT.parent / "shared/data/cifar10_jpeg.tar.xz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    found = load(f"folder:{path}")
    assert [len(s.labels) for s in (found.train, found.valid, found.test)] == [47500, 2500, 10000]
    assert (np.bincount(found.test.labels) == 1000).all()
    # JPEG hardly moves the statistics of the originals.
    np.testing.assert_allclose(found.mean, TRAINING["normalisation"]["cifar10"]["mean"], atol=2e-3)
    np.testing.assert_allclose(found.std, TRAINING["normalisation"]["cifar10"]["std"], atol=2e-3)


# --- the jitted step's part ---------------------------------------------------------------------


class Augment(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_each_image_is_one_of_the_crops_and_all_occur(self):
        images = np.random.default_rng(0).integers(0, 256, (2000, 6, 6, 3)).astype(np.uint8)
        images[0] = 255  # black padding shows on it
        augment = self.variant(lambda key, x: data.augment(key, x, pad=2, flip=True))
        found = np.asarray(augment(jax.random.key(0), images))
        assert found.dtype == np.uint8 and found.shape == images.shape
        padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
        counts = []
        for flip in (1, -1):
            for y in range(5):
                for x in range(5):
                    crops = padded[:, y : y + 6, x : x + 6][:, :, ::flip]
                    counts.append((found[1:] == crops[1:]).all(axis=(1, 2, 3)).sum())
        assert sum(counts) == 1999  # each image matches exactly one of the 50
        # 40 expected; 5 standard deviations of the binomial are 31
        assert min(counts) > 9 and max(counts) < 71
        assert set(np.unique(found[0])) <= {0, 255}

    @chex.variants(with_jit=True, without_jit=True)
    def test_crop_or_flip_alone(self):
        images = np.random.default_rng(1).integers(0, 256, (64, 32, 32, 3)).astype(np.uint8)
        key = jax.random.key(1)
        flipped = self.variant(lambda x: data.augment(key, x, pad=0, flip=True))(images)
        same = (np.asarray(flipped) == images).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(flipped[~same], images[~same][:, :, ::-1])
        assert 10 < same.sum() < 54
        cropped = self.variant(lambda x: data.augment(key, x, pad=4, flip=False))(images)
        padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
        for one, image in zip(np.asarray(cropped), padded, strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(image, (32, 32, 3))[:, :, 0]
            assert (windows == one).all(axis=(2, 3, 4)).sum() == 1
        unchanged = self.variant(lambda x: data.augment(key, x, pad=0, flip=False))(images)
        np.testing.assert_array_equal(unchanged, images)

    @chex.variants(with_jit=True, without_jit=True)
    def test_normalise(self):
        images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
        mean, std = (0.1, 0.5, 0.9), (0.2, 1.0, 3.0)
        found = self.variant(lambda x: data.normalise(x, mean, std))(images)
        assert found.dtype == jnp.float32
        expected = (images / 255 - np.array(mean)) / np.array(std)
        # values up to 5, a few float32 roundings
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_augment_depends_on_the_key_alone_and_maps_over_keys():
    images = np.random.default_rng(2).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
    keys = jax.random.split(jax.random.key(2), 3)

    def augment(key):
        return data.augment(key, jnp.asarray(images), pad=4, flip=True)

    mapped = np.asarray(jax.jit(jax.vmap(augment))(keys))
    for key, one in zip(keys, mapped, strict=True):
        np.testing.assert_array_equal(augment(key), one)
    assert not (mapped[0] == mapped[1]).all()
