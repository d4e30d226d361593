"""What the tests of the data sets share."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from images import data


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


COMPRESS = {".tar": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write(path, files):
    """Write {name: content} as the folder or archive that the name of the path asks for."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    elif ".tar" in path.suffixes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        path.write_bytes(COMPRESS[path.suffix](buffer.getvalue()))
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


def load(name, data_dir="unused"):
    """Load with defaults for what a test does not care about."""
    return data.load(str(name), data_dir=str(data_dir))


def message(name, data_dir="unused"):
    """The message of the DataError that loading must raise, which is one line."""
    with pytest.raises(data.DataError) as error:
        load(name, data_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(*splits):
    """The images as bytes with their labels, sorted."""
    return sorted((i.tobytes(), int(n)) for s in splits for i, n in zip(*s, strict=True))


def assert_same(a, b):
    """Everything but the name is equal."""
    for field in a._fields:
        x, y = getattr(a, field), getattr(b, field)
        if field in ("train", "test"):
            np.testing.assert_array_equal(x.images, y.images)
            np.testing.assert_array_equal(x.labels, y.labels)
        elif field != "name":
            assert x == y, field
