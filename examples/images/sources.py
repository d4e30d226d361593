"""Readers of image sets: TFDS, a folder or an archive of images, and scikit-learn's digits."""

import os
import re
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from training.command import Refused
from training.files import why_not_writable

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

_SIZE = 32
_MOST = 2**28  # bytes of an image file; more would be a mistake, or a trap for the memory
# [ROOT/]train/CLASS[/FILE]; without ROOT wherever a path can be read both ways.
_LAYOUT = re.compile(r"(?:([^/]+)/)??(train|test)/([^/]+)(?:/([^/]+))?")
_DEEPER = re.compile(r"((?:[^/]+/)?(?:train|test)/[^/]+/[^/]+)/.+")
_CLUTTER = re.compile(r"(^|/)(\.|__MACOSX(/|$)|Thumbs\.db$|desktop\.ini$)", re.IGNORECASE)


class Split(NamedTuple):
    """Images, uint8 [n, 32, 32, 3], and their class numbers, int32 [n]."""

    images: np.ndarray
    labels: np.ndarray


class DataError(Refused):
    """The data cannot be had; the message is one sentence for the user."""


def read_digits() -> tuple[tuple[str, ...], Split, Split]:
    """Reads the classes, training and test images of scikit-learn's 1,797 handwritten digits.

    The 8x8 grey values 0..16 become 0..255, enlarged to 32x32 by nearest neighbour and repeated
    for three channels; the stratified 80/20 split is always the same.

    Raises:
      ImportError: scikit-learn is missing.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    grey, labels = load_digits(return_X_y=True)
    pixels = np.rint(grey.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    images = pixels.repeat(_SIZE // 8, axis=1).repeat(_SIZE // 8, axis=2).repeat(3, axis=3)
    train, test, train_labels, test_labels = train_test_split(
        images, np.asarray(labels, np.int32), test_size=0.2, random_state=0, stratify=labels
    )
    classes = tuple(str(digit) for digit in range(10))
    return classes, Split(train, train_labels), Split(test, test_labels)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _decode(content: bytes) -> tuple[np.ndarray, bool]:
    """Decodes an image file to uint8 [32, 32, 3]; the flag says that it had another size."""
    try:
        image = Image.open(BytesIO(content))
    except UnidentifiedImageError as error:  # its message shows the BytesIO
        raise ValueError("it is no image that Pillow knows") from error
    with image:
        if image.mode.startswith(("I", "F")):  # Pillow would clip these to white
            raise ValueError("its pixels have more than 8 bits")
        rgb = image.convert("RGB")
    if rgb.size == (_SIZE, _SIZE):
        return np.asarray(rgb), False
    return np.asarray(rgb.resize((_SIZE, _SIZE))), True


def read_folder(path: Path) -> tuple[tuple[str, ...], Split, Split]:
    """Reads the classes, training and test images of train/CLASS/* and test/CLASS/*.

    Hidden files are passed over, and images of another size are resized to 32x32. The order is
    that of the names.

    Args:
      path: a directory, or a .zip or .tar[.gz|.bz2|.xz] archive, which is read in memory and may
        have everything below one top directory.

    Raises:
      DataError: the layout is another one, or something cannot be read.
    """
    if not os.path.exists(path):  # `Path.exists` raises for a name that is too long
        raise DataError(f"There is no file or directory {path}.")
    images: dict[tuple[str, str, str, str], np.ndarray] = {}
    folders: set[tuple[str, str, str]] = set()
    stray: set[str] = set()  # what is among the classes, or deeper than their images
    resized = 0
    try:
        for name, read in tqdm(_entries(path), "reading images", unit=" files", disable=None):
            name = str(PurePosixPath(name))
            match = _LAYOUT.fullmatch(name)
            if _CLUTTER.search(name):
                continue
            if not match:
                stray |= {found[1] for found in [_DEEPER.fullmatch(name)] if found}
                continue
            root, split, label, file = (part or "" for part in match.groups())
            if read is None and file:
                stray.add(name)
            elif read is None:
                folders.add((root, split, label))
            elif not file:
                stray.add(name)
            else:
                if (root, split, label, file) in images:
                    raise DataError(f"{path} holds {name} twice; keep one of them.")
                content = read()
                try:
                    images[root, split, label, file], other_size = _decode(content)
                except Exception as error:  # every image format raises kinds of its own
                    raise DataError(
                        f"The image {path}/{name} cannot be read ({_brief(error)}); "
                        "repair or remove it."
                    ) from error
                folders.add((root, split, label))
                resized += other_size
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # so does every compression
        raise DataError(
            f"{path} cannot be read to its end ({_brief(error)}); it is damaged or incomplete."
        ) from error

    roots = sorted({root for root, *_ in images})
    if len(roots) > 1:
        raise DataError(
            f"{path} has train/ and test/ in several places "
            f"({', '.join(root or 'the top' for root in roots)}); keep one."
        )
    keys = {split: sorted(key for key in images if key[1] == split) for split in ("train", "test")}
    for split, found in keys.items():
        if not found:
            raise DataError(
                f"{path} has no images in {split}/CLASS/; "
                "it needs one folder of images per class in train/ and in test/."
            )
    classes = sorted({label for _, _, label, _ in keys["train"]})
    numbers = {label: number for number, label in enumerate(classes)}
    for root, split, label in sorted(folders):
        if root == roots[0] and label not in numbers:
            problem = "is empty" if split == "train" else "has no counterpart in train/"
            raise DataError(
                f"The class folder {split}/{label} of {path} {problem}; fill or remove it."
            )
    tested = {label for _, _, label, _ in keys["test"]}
    if untested := [label for label in classes if label not in tested]:
        _warn(
            f"{len(untested)} of the {len(classes)} classes of {path} have no test images, "
            f"such as {untested[0]}"
        )
    if stray:
        _warn(
            f"what is in no class folder of {path}, or deeper in one, is not used, "
            f"such as {min(stray)} ({len(stray)} in all)"
        )
    if resized:
        print(f"{resized} of {len(images)} images were not 32x32 and have been resized to it.")
    train, test = (
        Split(
            np.stack([images[key] for key in keys[split]]),
            np.array([numbers[label] for _, _, label, _ in keys[split]], np.int32),
        )
        for split in ("train", "test")
    )
    return tuple(classes), train, test


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _entries(path: Path) -> Iterator[tuple[str, Callable[[], bytes] | None]]:
    """Yields the relative path and the reader of each file, and None for that of a directory."""
    if path.is_dir():
        # Not `glob`, which passes over a directory that cannot be read.
        for split in ("train", "test"):
            classes = _list(path / split)
            for entry in [*classes, *(file for folder in classes for file in _list(folder))]:
                name = entry.relative_to(path).as_posix()
                yield name, None if entry.is_dir() else partial(_read_file, entry)
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                read = partial(_read_member, archive, member)
                yield member.name, None if member.isdir() else read
            # tarfile takes a damaged header, or none, for the end, which is a block of zeros.
            stream = archive.fileobj
            if stream is not None:
                stream.seek(archive.offset)
                if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("there is no end mark")
                while stream.read(2**20):  # a compressed one has a checksum at its own end
                    pass
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                read = partial(_read_zipped, archive, info)
                yield info.filename, None if info.is_dir() else read
    else:
        raise DataError(
            f"{path} is neither a directory nor a .zip or .tar[.gz|.bz2|.xz] archive, "
            "or it is incomplete."
        )


def _list(directory: Path) -> list[Path]:
    """What a directory holds; nothing where there is none."""
    try:
        return sorted(directory.iterdir()) if directory.is_dir() else []
    except OSError as error:
        raise DataError(f"{directory} cannot be read: {error.strerror}.") from error


def _read_file(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would wait, a device has no end
        raise DataError(f"{path} is no file; remove it.")
    try:
        _check_size(str(path), path.stat().st_size)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    name = f"{archive.name}/{member.name}"
    try:
        file = archive.extractfile(member)
    except (KeyError, RecursionError) as error:
        target = os.path.normpath(os.path.join(os.path.dirname(member.name), member.linkname))
        where = "out" if target.startswith(("/", "..")) else "to no file"
        raise DataError(
            f"{name} is a link to {member.linkname}, which leads {where} of the archive; "
            "put the image in its place."
        ) from error
    if file is None:
        raise DataError(f"{name} is no file; remove it.")
    with file:
        _check_size(name, file.seek(0, os.SEEK_END))
        file.seek(0)
        return file.read()


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    name = f"{archive.filename}/{info.filename}"
    if stat.S_ISLNK(info.external_attr >> 16):
        raise DataError(f"{name} is a link; put the image in its place.")
    _check_size(name, info.file_size)
    return archive.read(info)


def _check_size(name: str, size: int) -> None:
    if size > _MOST:
        raise DataError(
            f"The image {name} has {size} bytes, more than {_MOST}; repair or remove it."
        )


def read_tfds(name: str, data_dir: Path) -> tuple[tuple[str, ...], Split, Split]:
    """Reads the classes, training and test images of a TFDS builder, preparing it once.

    Reading needs no TensorFlow; the first time, preparing does.

    Args:
      name: of a builder whose examples have a 32x32 RGB "image" and a "label".
      data_dir: where TFDS keeps its data sets.

    Raises:
      DataError: it could not be downloaded, or what lies in `data_dir` cannot be read.
      ImportError: a package is missing.
    """
    from tensorflow_datasets import builder as find_builder
    from tensorflow_datasets import decode

    def read(split: str) -> Split:
        source = builder.as_data_source(split, decoders={"image": decode.SkipDecoding()})
        images = np.empty((len(source), _SIZE, _SIZE, 3), np.uint8)
        labels = np.empty(len(source), np.int32)
        for i, record in enumerate(tqdm(source, f"reading {name} {split}", disable=None)):
            images[i], _ = _decode(record["image"])
            labels[i] = record["label"]
        return Split(images, labels)

    try:
        builder: Any = find_builder(name, data_dir=data_dir, file_format="array_record")
        if not builder.data_path.exists():
            if reason := why_not_writable(data_dir):
                raise DataError(
                    f"Data set {name} cannot be put into --data_dir {data_dir}: {reason}; "
                    "name another one."
                )
            _prepare(builder, data_dir)
        return tuple(builder.info.features["label"].names), read("train"), read("test")
    except (DataError, ImportError):
        raise
    except Exception as error:  # TFDS, ArrayRecord and Protobuf each raise kinds of their own
        raise DataError(
            f"The prepared data set in {data_dir / name} cannot be read ({_brief(error)}); "
            "choose another --data_dir, or delete that directory to have it prepared anew."
        ) from error


def _prepare(builder: "DatasetBuilder", data_dir: Path) -> None:
    """Downloads a set and writes it as ArrayRecord files, which needs TensorFlow."""
    import requests

    problem = f"Data set {builder.name} could not be downloaded"
    remedy = "two alternatives need no network: --dataset digits and --dataset folder:PATH."
    if not any((data_dir / "downloads" / builder.name).glob("*.INFO")):
        # TFDS repeats a failing download for minutes, so ask the server once before.
        for url in list(builder.url_infos or ())[:1]:
            try:
                with requests.get(url, stream=True, timeout=10) as answer:
                    answer.raise_for_status()
            except requests.RequestException as error:
                reason = type(error).__name__
                raise DataError(f"{problem} from {url} ({reason}); {remedy}") from error
    # TensorFlow only encodes the images here; keep its start-up notes from the user.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow  # noqa: F401  (fail before the download where it is absent)

    try:
        builder.download_and_prepare()
    except ImportError:
        raise
    except Exception as error:
        raise DataError(f"{problem} and prepared ({_brief(error)}); {remedy}") from error
