"""Folders and archives of images: the same data from each, and what is said about bad input."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_sets import assert_same, contents, load, message, png, tree, write

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
    assert [len(s.labels) for s in (found.train, found.test)] == [21, 6]
    for split_read, part in ((found.train, "train"), (found.test, "test")):
        expected = [
            (np.asarray(Image.open(io.BytesIO(content))).tobytes(), found.classes.index(label))
            for name, content in files.items()
            for split, label, _ in [name.split("/")]
            if split == part
        ]
        assert contents(split_read) == sorted(expected)
    pixels = found.train.images / 255
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(found.std, pixels.std(axis=(0, 1, 2)), rtol=1e-9)


@pytest.mark.parametrize(
    ("kind", "top"),
    [(kind, "") for kind in KINDS] + [("images.tar.xz", "./"), ("images.zip", "some set/")],
)
def test_every_kind_and_order_gives_the_same(tmp_path, kind, top):
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
    if kind == "images.tar":  # any length before the end mark, also where a header begins
        with tarfile.open(path) as archive:
            starts = [member.offset for member in archive]
            end = archive.offset
    else:
        starts, end = [0], len(content)
    lengths = {0, 1, 100, 512, *range(700, end, end // 12), *starts[1:4], starts[-1] + 100, end - 1}
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
        (lambda files: tree(labels=["cat"]), ["the class cat only", "at least 2"]),
    ],
    ids=["nothing", "no test", "no train", "other names", "class only in test", "empty class"]
    + ["two sets", "one class"],
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
    path = write(tmp_path / "folder", tree([("train", 1), ("test", 1)], ["cat", "dog"]))
    found = load(f"folder:{path}")
    assert [len(s.labels) for s in (found.train, found.test)] == [2, 2]


def test_what_is_not_used_is_told(tmp_path, capsys):
    files = tree()
    del files["test/owl/00.png"], files["test/owl/01.png"]
    files |= {"train/stray.png": b"x", "test/cat/more/0.png": b"x", "notes.txt": b"x"}
    expected = [
        "warning: 1 of the 3 classes of {0} have no test images, such as owl",
        "warning: what is in no class folder of {0}, or deeper in one, is not used, such as "
        "test/cat/more (2 in all)",
    ]
    for kind in ("folder", "images.zip", "images.tar.xz"):
        path = write(tmp_path / kind, files)
        assert len(load(f"folder:{path}").test.labels) == 4
        assert capsys.readouterr().err.splitlines() == [line.format(path) for line in expected]


LINKS = {  # in train/cat/
    "/etc/passwd": "out of the archive",
    "../../../dog.png": "out of the archive",
    "../dog.png": "to no file of the archive",
    "link.png": "to no file of the archive",  # to itself
}


@pytest.mark.parametrize("target", LINKS)
def test_a_link_that_leads_to_no_image_is_named(target, tmp_path):
    path = write(tmp_path / "images.tar", tree())
    member = tarfile.TarInfo("train/cat/link.png")
    member.type, member.linkname = tarfile.SYMTYPE, target
    with tarfile.open(path, "a") as archive:
        archive.addfile(member)
    link = f"{path}/train/cat/link.png is a link to {target}, which leads {LINKS[target]}; "
    assert message(f"folder:{path}").startswith(link)


@pytest.mark.slow  # it decodes 60,000 images
def test_cifar10_as_jpeg():
    path = Path(__file__).parents[2] / "shared/data/cifar10_jpeg.tar.xz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    found = load(f"folder:{path}")
    assert [len(s.labels) for s in (found.train, found.test)] == [50000, 10000]
    assert (np.bincount(found.test.labels) == 1000).all()
    # JPEG hardly moves the statistics of the originals.
    np.testing.assert_allclose(found.mean, (0.4914, 0.4822, 0.4465), atol=2e-3)
    np.testing.assert_allclose(found.std, (0.247, 0.2435, 0.2616), atol=2e-3)
