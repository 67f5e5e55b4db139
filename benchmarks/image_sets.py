"""Image sets for benchmarks that train: where they are, and what is cut from their training images for a search."""

import gzip
import io
import random
import struct
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

IDX = "{}-images-idx3-ubyte.gz", "{}-labels-idx1-ubyte.gz"  # of Fashion-MNIST, which Debian packages
SPLITS = {"train": "train", "t10k": "val"}


def find(name: str, folders: Sequence[Path], kept: Path) -> Path:
    """The folder of a set's train.tar and val.tar; Fashion-MNIST's are made in `kept` from its own files.

    Raises:
        FileNotFoundError: no folder has them.
    """
    for folder in folders:
        if (folder / name / "train.tar").exists():
            return folder / name
    if name != "fashion":
        raise FileNotFoundError(f"no {name}/train.tar in {', '.join(map(str, folders))}")
    pattern = IDX[0].format("train")
    found = next((path.parent for folder in folders for path in folder.rglob(pattern)), None)
    if found is None:
        raise FileNotFoundError(f"no {pattern} in {', '.join(map(str, folders))} (Debian: dataset-fashion-mnist)")
    place = kept / name
    for split, ours in SPLITS.items():
        if not (place / f"{ours}.tar").exists():
            write_tar(place / f"{ours}.tar", images(found, split))
    return place


def images(folder: Path, split: str) -> Iterable[tuple[str, bytes]]:
    """Names and PNG files of a pair of idx files, see http://yann.lecun.com/exdb/mnist."""
    pixels, labels = (gzip.decompress((folder / name.format(split)).read_bytes()) for name in IDX)
    _, count, height, width = struct.unpack(">4I", pixels[:16])
    for i in range(count):
        start, file = 16 + i * height * width, io.BytesIO()
        Image.frombytes("L", (width, height), pixels[start : start + height * width]).save(file, "PNG")
        yield f"{labels[8 + i]}/{i:05}.png", file.getvalue()


def cut(source: Path, place: Path, train: int, val: int) -> Path:
    """A set of some of the images of another's train.tar, to train and to validate, in `place`."""
    with tarfile.open(source / "train.tar") as tar:
        names = sorted(member.name for member in tar if member.isfile())
        chosen = random.Random(0).sample(names, train + val)
        for split, part in (("train", chosen[:train]), ("val", chosen[train:])):
            if not (place / f"{split}.tar").exists():
                write_tar(place / f"{split}.tar", ((name, tar.extractfile(name).read()) for name in sorted(part)))
    return place


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with tarfile.open(unfinished, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    unfinished.rename(path)
