"""Bad states: what lies in a directory, a command that meets it, and words of the one sentence."""

import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import train_cifar
from image_sets import png, tree, write
from images import recipes
from made_runs import add_geometry, make_run
from training import records

# What a file holds, or a function that makes it.
There = dict[str, str | bytes | Callable[[Path], Any]]


class State(NamedTuple):
    """In the current directory."""

    there: There
    command: str
    words: str
    as_root: bool = True  # whether it is one for root too, who may read all


def make(there: There) -> None:
    """Makes the files in their order; a name that ends in / is a directory."""
    for name, content in there.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            if path.is_file():
                path.unlink()
            content(path)
        elif name.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def locked(mode: int) -> Callable[[Path], None]:
    """A directory with these permissions."""
    return lambda path: path.mkdir(mode)


def unreadable(path: Path) -> None:
    path.write_text("hello")
    path.chmod(0)


def begun(path: Path) -> None:
    """The arguments of a run of train_cifar.py with its defaults."""
    args = train_cifar._parser().parse_args([])
    recipe, _ = recipes.recipe(args.dataset, args.model, args.optimizer)
    records.write_json(path, train_cifar._arguments(args, recipe) | {"seeds_at_once": 1})


def run(*, geometry: bool = False, changes: There | None = None, **more: Any) -> Callable:
    """A run as train_cifar.py leaves it, of which some files are others."""

    def make_one(path: Path) -> None:
        make_run(path, **more)
        if geometry:
            add_geometry(path)
        make({f"{path}/{name}": content for name, content in (changes or {}).items()})

    return make_one


def images(change: Callable[[dict[str, bytes]], Any] = lambda files: None) -> Callable:
    """A set of images; the name says whether in a folder or an archive of some kind."""

    def make_set(path: Path) -> None:
        files = tree()
        change(files)
        write(path, files)

    return make_set


def cut(length: int) -> Callable[[Path], None]:
    def make_part(path: Path) -> None:
        write(path, tree())
        path.write_bytes(path.read_bytes()[:length])

    return make_part


def member(name: str, kind: bytes, target: str = "") -> Callable[[Path], None]:
    """A tar archive of images and of something that is no file."""

    def make_archive(path: Path) -> None:
        write(path, tree())
        odd = tarfile.TarInfo(name)
        odd.type, odd.linkname = kind, target
        with tarfile.open(path, "a") as archive:
            archive.addfile(odd)

    return make_archive


def zip_link(path: Path) -> None:
    write(path, tree())
    odd = zipfile.ZipInfo("train/cat/link.png")
    odd.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(odd, "/etc/passwd")


def zip_bomb(path: Path) -> None:
    """Of 300 MiB in 300 kB."""
    write(path, tree())
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("train/cat/large.png", "w", force_zip64=True) as file,
    ):
        for _ in range(300):
            file.write(bytes(2**20))


def tar_bomb(path: Path) -> None:
    """A header that promises 8 TiB, and nothing behind it."""
    write(path, tree())
    odd = tarfile.TarInfo("train/cat/large.png")
    odd.size = 2**43
    content = path.read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % tarfile.BLOCKSIZE)
    path.write_bytes(content + odd.tobuf() + bytes(10 * tarfile.BLOCKSIZE))


def of_pixels(side: int) -> bytes:
    file = BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


DOT = png(np.zeros((1, 1, 3), np.uint8))
DEEP, HUGE = "[" * 100_000, '{"epoch": ' + "1" * 5000 + "}"
WITHOUT = "no run (with arguments.json and metrics.jsonl) at or below"
TRAIN, RESUME = "train_cifar --output run", "train_cifar --output run --resume"
COMPARE, PLOT = "compare_runs runs --output x.png", "plot_geometry runs --output x.png"
FOLDER = "train_cifar --dataset folder:images"
FOREIGN = "run holds files of a run that did not begin there"
TEXT = "hello world, " * 30

OUTPUTS = [
    State({"run/arguments.json": "{}"}, TRAIN, "run already holds a run: go on with it (--resume)"),
    State({"run/arguments.json": "{}"}, RESUME, "run holds a run with dataset None and not digits"),
    State({"run/arguments.json": "{"}, TRAIN, "run/arguments.json, line 1: damaged, not JSON"),
    State({"run/arguments.json": ""}, TRAIN, "run/arguments.json, line 1: damaged, not JSON"),
    State({"run/arguments.json": b"\xff\xfe"}, TRAIN, "arguments.json, line 1: damaged, not JSON"),
    State({"run/arguments.json": "[]"}, RESUME, "line 1: damaged, not a JSON object"),
    State({"run/arguments.json": "7"}, RESUME, "line 1: damaged, not a JSON object"),
    State({"run/arguments.json": "null"}, RESUME, "line 1: damaged, not a JSON object"),
    State({"run/arguments.json": DEEP}, RESUME, "line 1: damaged, too large to be read"),
    State({"run/arguments.json": HUGE}, RESUME, "line 1: damaged, too large to be read"),
    State({"run/arguments.json/": ""}, RESUME, "cannot read run/arguments.json: Is a directory"),
    State(
        {"run/arguments.json": os.mkfifo}, RESUME, "cannot read run/arguments.json: it is no fil"
    ),
    State(
        {"run/arguments.json": link("no")}, RESUME, "cannot read run/arguments.json: No such file"
    ),
    State({"run/arguments.json": begun, "run/checkpoints": ""}, RESUME, "checkpoints is no direct"),
    State(
        {"run/arguments.json": begun, "run/metrics.jsonl/": ""}, RESUME, "metrics.jsonl is no fi"
    ),
    State(
        {"run/arguments.json": begun, "run/summary.json": os.mkfifo}, RESUME, "on is no file: mov"
    ),
    State({"run/metrics.jsonl": "mine"}, TRAIN, FOREIGN),
    State({"run/summary.json": "{}"}, RESUME, FOREIGN),
    State({"run/checkpoints/": ""}, RESUME, FOREIGN),
    State({"run/seed-7/": ""}, TRAIN, FOREIGN),
    State({"run": link("run")}, TRAIN, "run is not a directory"),
    State({"run": link("nowhere")}, TRAIN, "run is not a directory"),
    State(
        {"locked": locked(0o500)}, "train_cifar --output locked/new/run", "no permission to write"
    ),
    State({"locked": locked(0o500)}, "train_lm --output locked/run", "no permission to write in /"),
    State(
        {"locked": locked(0o500)}, "optimizer_step --output locked", "no permission to write in l"
    ),
    State({"locked": locked(0o500)}, "lm_sweep --output locked/run", "no permission to write in /"),
    State(
        {"locked": locked(0o500)},
        "train_cifar --dataset cifar10 --data_dir locked/sets",
        "/locked; name another one.",
    ),
    State(
        {"run/runs.jsonl/": ""}, "reproduce_table --output run", "cannot read run/runs.jsonl: Is"
    ),
    State({"run/runs.jsonl": os.mkfifo}, "reproduce_table --report --output run", "it is no file"),
    State({"run/runs.jsonl": os.mkfifo}, "lm_sweep --report --output run", "it is no file"),
    State(
        {"run/atlas.jsonl/": ""}, "atlas --report --output run", "cannot read run/atlas.jsonl: I"
    ),
    State(
        {"run/runs.jsonl/": ""}, "optimizer_step --report --output run", "cannot read run/runs.js"
    ),
    State(
        {"run/runs.jsonl/": ""}, "training_throughput --report --output run", "cannot read run/r"
    ),
    State({"run/runs.jsonl/": ""}, "compiled_for_gpu --report --output run", "cannot read run/r"),
]
DATA = [
    State({"images/": ""}, FOLDER, "images has no images in train/CLASS/"),
    State({"images/train/cat/0.png": DOT}, FOLDER, "no images in test/CLASS/"),
    State(
        {"images/train/cat/0.png": b""}, FOLDER, "images/train/cat/0.png cannot be read (it is no"
    ),
    State({"images": images(), "images/train/emu/": ""}, FOLDER, "train/emu of images is empty"),
    State(
        {"images": images(), "images/test/emu/": ""}, FOLDER, "test/emu of images has no counter"
    ),
    State(
        {"images": images(), "images/train/cat/a.png": os.mkfifo}, FOLDER, "a.png is no file; rem"
    ),
    State(
        {"images": images(), "images/train/cat/zeros.png": link("/dev/zero")},
        FOLDER,
        "zeros.png is no file; remove it.",
    ),
    State(
        {"images": images(), "images/train/cat/link.png": link("nowhere")},
        FOLDER,
        "images/train/cat/link.png cannot be read: No such file or directory.",
    ),
    State(
        {"images": images(), "images/train/cat/large.png": of_pixels(15_000)},
        FOLDER,
        "large.png cannot be read (Image size (225000000 pixels) exceeds limit",
    ),
    State({"images.tar": cut(700)}, FOLDER + ".tar", "images.tar cannot be read to its end"),
    State({"images.tar.gz": cut(700)}, FOLDER + ".tar.gz", "damaged or incomplete."),
    State({"images.tar.xz": cut(700)}, FOLDER + ".tar.xz", "incomplete."),
    State({"images.zip": cut(700)}, FOLDER + ".zip", "or it is incomplete."),
    State({"images.zip": "PK"}, FOLDER + ".zip", "images.zip is neither a directory nor a .zip or"),
    State(
        {"images.zip": zip_bomb}, FOLDER + ".zip", "train/cat/large.png has 314572800 bytes, more"
    ),
    State({"images.tar": tar_bomb}, FOLDER + ".tar", "train/cat/large.png has 8796093022208 bytes"),
    State(
        {"images.zip": zip_link}, FOLDER + ".zip", "images.zip/train/cat/link.png is a link; put"
    ),
    State(
        {"images.tar": member("train/cat/link.png", tarfile.SYMTYPE, "/etc/passwd")},
        FOLDER + ".tar",
        "images.tar/train/cat/link.png is a link to /etc/passwd, which leads out of the archive;",
    ),
    State(
        {"images.tar": member("train/cat/link.png", tarfile.LNKTYPE, "gone.png")},
        FOLDER + ".tar",
        "is a link to gone.png, which leads to no file of the archive;",
    ),
    State(
        {"images.tar": member("train/cat/pipe.png", tarfile.FIFOTYPE)},
        FOLDER + ".tar",
        "train/cat/pipe.png is no file; remove it.",
    ),
    State(
        {"images.tar": member("train/cat/00.png", tarfile.REGTYPE)},
        FOLDER + ".tar",
        "images.tar holds train/cat/00.png twice; keep one of them.",
    ),
    State(
        {"images.zip": images(lambda files: files.update({"other/train/cat/0.png": DOT}))},
        FOLDER + ".zip",
        "has train/ and test/ in several places (the top, other); keep one.",
    ),
    State({"a": b"\xff", "b": TEXT}, "train_lm --text a b", "a is not text in UTF-8"),
    State({"a": b"x\0y", "b": TEXT}, "train_lm --text a b", "a is not text in UTF-8"),
    State({"a": os.mkfifo, "b": TEXT}, "train_lm --text a b", "a is not text in UTF-8"),
    State({"a": "", "b": ""}, "train_lm --text a b", "the 1 bytes for training hold no window"),
    State({"d/.hidden": TEXT}, "train_lm --text d", "there is no file of text, and two are needed"),
    State({"a": link("a"), "b": TEXT}, "train_lm --text a b", "Too many levels of symbolic links"),
    State({"a": unreadable, "b": TEXT}, "train_lm --text a b", "cannot read a: Permission", False),
    State({"images": unreadable}, FOLDER, "Permission denied", False),
]
RUNS = [
    State({"runs/a": run(), "b/": ""}, "compare_runs runs b", f"{WITHOUT} b"),
    State(
        {"runs/a": run()}, "compare_runs runs/a/metrics.jsonl", "no such directory: runs/a/metri"
    ),
    State(
        {"runs/a": run(test_accuracy=0.5), "runs/b": run(test_accuracy=0.5)},
        COMPARE,
        "runs/a and runs/b are the same run twice, with the same arguments and seed 0: leave one o",
    ),
    State({"runs/a": run(), "x.png/": ""}, COMPARE, "cannot write x.png: it is a directory"),
    State(
        {"runs/a": run(), "locked": locked(0o500)},
        "compare_runs runs --output locked/x.png",
        "cannot write locked/x.png: no permission to write in locked",
    ),
    State(
        {"runs/arguments.json": "{}", "runs/metrics.jsonl": ""}, COMPARE, "dataset is missing or"
    ),
    State(
        {"runs/a": run(changes={"metrics.jsonl": os.mkfifo})}, COMPARE, "metrics.jsonl: it is no"
    ),
    State({"runs/a": run(changes={"metrics.jsonl": os.mkdir})}, COMPARE, "metrics.jsonl: Is a dir"),
    State({"runs/a": run(changes={"arguments.json": DEEP})}, COMPARE, "line 1: damaged, too large"),
    State({"runs/a": run(changes={"metrics.jsonl": f"{DEEP}\n"})}, COMPARE, "damaged, too large"),
    State({"runs/a": run(changes={"metrics.jsonl": f"{HUGE}\n"})}, COMPARE, "damaged, too large"),
    State({"runs/a": run(changes={"summary.json": "[]"})}, COMPARE, "not a JSON object"),
    State(
        {"runs/a": run(changes={"summary.json": DEEP})}, COMPARE, "damaged, too large to be read"
    ),
    State(
        {"runs/a": run(changes={"summary.json": "{}"})}, COMPARE, "test_accuracy is not a finite"
    ),
    State({"runs/a": run()}, PLOT, "runs/a was made without --geometry: it has no geometry.jsonl"),
    State(
        {"runs/a": run(geometry=True, changes={"geometry.jsonl": f"{DEEP}\n"})},
        PLOT,
        "runs/a/geometry.jsonl, line 1: damaged, too large to be read",
    ),
    State(
        {"runs/a": run(geometry=True, changes={"geometry.jsonl": f"{HUGE}\n"})},
        PLOT,
        "runs/a/geometry.jsonl, line 1: damaged, too large to be read",
    ),
    State(
        {"runs/a": run(geometry=True, changes={"geometry.jsonl": '{"epoch": 1}\n'})},
        PLOT,
        "runs/a/geometry.jsonl: damaged, it measures no layer",
    ),
    State(
        {f"runs/{seed}": run(geometry=True, seed=seed) for seed in range(11)},
        PLOT,
        "11 runs are too many to be read side by side: name up to 10",
    ),
]
ROWS = [*OUTPUTS, *DATA, *RUNS]
